"""Every path of integer sums, for many tables: ``python tests/gpu/integers.py [FOLDER]``, on a GPU where there is one.

Tables are those of the files in FOLDER (mul8s_*: int8, mul8u_*: uint8), random ones of full rank, asymmetric ones, ones
whose products with zero are not zero, and built-in ones of 2 to 8 bits. Random convolutions and dense layers are summed
by each path of each device and compared with a plain gather, and the longest sums that 32 bits hold.

``compute-sanitizer --tool memcheck python tests/gpu/integers.py sanitize`` (racecheck, initcheck) checks less, faster.
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbm_cli import integer_linear, resolve
from mbm_cli.backends import reference_integers
from mbm_cli.backends.cpu_integers import terms_of
from mbm_cli.experiments.doctor import PATHS

SHAPES = 12  # random convolutions of each table
ops = torch.ops.mbm


def tables(folder: Path | None) -> dict[str, Tensor]:
    """Return tables as the operators take them."""
    rng, found = np.random.default_rng(0), {}
    for path in sorted(folder.iterdir()) if folder else []:
        found[path.stem] = resolve(f"{'int8' if path.stem.startswith('mul8s') else 'uint8'}:{path}").content.tensor()
    for i in range(20):
        entries = rng.integers(-(1 << 15), 1 << 15, (256, 256)) if i % 2 else rng.integers(0, 1 << 16, (256, 256))
        found[f"random {i}"] = torch.from_numpy(entries.astype(np.int32))
    found["32 bits"] = torch.from_numpy(rng.integers(-(1 << 31), 1 << 31, (256, 256)).astype(np.int32))
    names = ("exact-int8", "exact-uint8", "mbm-int8", "mitchell-uint8-t3", "drum-int8-k3", "exact-int4", "exact-uint2")
    found |= {name: resolve(name).content.tensor() for name in names}
    return found


def random_convolution(choose: random.Random) -> tuple[Tensor, Tensor, tuple]:
    """Return codes of input and weight, some of them extreme throughout, and a convolution's arguments."""
    groups, channels, rows = choose.choice((1, 1, 1, 2, 5)), choose.randint(1, 70), choose.randint(1, 90)
    kernel = choose.choice(((1, 1), (3, 3), (5, 5), (2, 3)))
    stride, padding, dilation = ([choose.randint(low, 3) for _ in range(2)] for low in (1, 0, 1))
    size = [dilation[i] * (kernel[i] - 1) + 1 + choose.randint(0, 14) for i in range(2)]
    shapes = (choose.randint(1, 9), groups * channels, *size), (groups * rows, channels, *kernel)
    codes = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
    if choose.random() < 0.1:
        codes = [torch.full(shape, choose.choice((0, 128, 255)), dtype=torch.uint8) for shape in shapes]
    if choose.random() < 0.3:
        codes[0] = codes[0].contiguous(memory_format=torch.channels_last)
    return *codes, (stride, padding, dilation, groups, choose.randint(0, 255))


def dense(choose: random.Random) -> tuple[Tensor, Tensor, tuple]:
    batch, channels, rows = choose.randint(1, 300), choose.randint(1, 500), choose.randint(1, 130)
    codes = (torch.randint(0, 256, (n, channels, 1, 1), dtype=torch.uint8) for n in (batch, rows))
    return *codes, ([1, 1], [0, 0], [1, 1], 1, 0)


def check(table: Tensor, choose: random.Random, shapes: int) -> None:
    on_device = {device: table.to(device) for device in PATHS if device == "cpu" or torch.cuda.is_available()}
    for i in range(shapes):
        input, weight, arguments = dense(choose) if i % 4 == 3 else random_convolution(choose)
        expected = reference_integers.OPERATORS.integer_conv2d(input, weight, *arguments, table)
        for device, entries in on_device.items():
            for path in ("auto", *PATHS[device]):
                if path == "terms" and terms_of(table) is None:
                    continue
                sums = ops.integer_conv2d(input.to(device), weight.to(device), *arguments, entries, path)
                assert torch.equal(sums.cpu(), expected), (device, path, input.shape, weight.shape, arguments)


def check_longest_sums() -> None:
    codes = torch.full((2, 131_071), -128, dtype=torch.int8)
    for device in PATHS if torch.cuda.is_available() else ("cpu",):
        for path in PATHS[device]:
            sums = integer_linear(codes.to(device), codes.to(device), "exact-int8", path)
            assert sums.tolist() == [[131_071 * 16_384] * 2] * 2, (device, path)


def main(folder: Path | None, shapes: int = SHAPES) -> None:
    started, choose, found = time.perf_counter(), random.Random(0), tables(folder)
    torch.manual_seed(0)
    for name, table in found.items():
        check(table, choose, shapes)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    check_longest_sums()
    print(f"{len(found)} tables, {shapes} layers each, every path: all sums are the tables'")


if __name__ == "__main__":
    if sys.argv[1:] == ["sanitize"]:
        main(None, 2)
    else:
        main(Path(sys.argv[1]) if sys.argv[1:] else None)
