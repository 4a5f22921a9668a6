"""Compare random convolutions with sums of bit-exact products, and run some under AddressSanitizer and UBSan.

``python tests/stress/convolutions.py [CALLS [SANITIZED]]`` makes 20,000 calls of `mbm_cli.conv2d` and 2,000 sanitized
ones. Shapes, strides, memory layouts, instruction sets and multipliers are random, with tables and a function in C.
Each output must be within the bound of float32 additions around the float64 sum (tests/sums.py).

For the sanitized calls the package is built once more into a temporary folder, and imported from there by a Python
that loads the sanitizers' libraries first. PyTorch then allocates from the sanitizer, which so detects accesses beside
a tensor. The first fault ends that Python with a report.
"""

import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from memory_formats import MEMORY_FORMATS  # noqa: E402
from sums import assert_sums_of_products  # noqa: E402
from torch import Tensor  # noqa: E402

from mbm_cli import Multiplier, _cpu, conv2d, resolve  # noqa: E402
from mbm_cli.multipliers.float32 import FAMILIES  # noqa: E402

COMPILER = "g++ -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def multipliers_from_files(folder: Path) -> list[tuple[Multiplier, Multiplier]]:
    """Return random tables and a function in C, each with the multiplier that models its products."""
    tables = []
    for bits in (1, 3, 7, 8):
        entries = np.random.default_rng(bits).integers(0, 2 << bits, (1 << bits, 1 << bits))
        np.save(folder / f"{bits}.npy", entries.astype(np.uint16))
        tables.append(resolve(f"lut:{folder / f'{bits}.npy'}"))
    in_c = resolve(f"c:{TESTS.parent / 'examples' / 'mbm.h'}:mbm")
    return [*((table, table) for table in tables), (in_c, Multiplier("mbm"))]


def random_multiplier(choose: random.Random) -> Multiplier:
    while True:
        family = choose.choice(list(FAMILIES))
        truncate = choose.choice(FAMILIES[family].truncations)
        multiplier = Multiplier(family, truncate, choose.choice([None, None, choose.randint(1, 23)]))
        if not multiplier.is_exact:  # PyTorch computes that, and crashes for some strides
            return multiplier


def random_call(choose: random.Random) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Return operands and arguments of a convolution that has an output, which may be of no images."""
    groups, channels, outputs = choose.randint(1, 3), choose.randint(1, 4), choose.choice([1, 2, 3, 4, 5, 9])
    kernel, stride, dilation, padding = (
        [choose.randint(*bounds) for _ in range(2)] for bounds in ((1, 4), (1, 4), (1, 3), (0, 4))
    )
    if choose.random() < 0.03:
        # Rows far apart and far outside: positions that exceed 32 bits. The stride keeps the output small.
        axis, far = choose.randrange(2), choose.choice([50, 2**20, 2**31 - 1])
        dilation[axis], padding[axis], stride[axis] = far, far, choose.choice([far, max(1, far // 100)])
        kernel[axis] = min(kernel[axis], 3)
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    size = [n + choose.choice([0, choose.randint(0, 12)]) for n in least]
    input = random_operand(choose, [choose.choice([0, 1, 1, 2, 3]), groups * channels, *size])
    weight = random_operand(choose, [groups * outputs, channels, *kernel])
    bias = choose.choice([None, random_operand(choose, [groups * outputs])])
    return [input, weight, bias], {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def random_operand(choose: random.Random, shape: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(choose.randrange(1 << 31))
    x = torch.randn(shape, generator=generator)
    kind = choose.random()
    if kind < 0.2:
        x = x.relu()
    elif kind < 0.4:
        x = x * torch.exp2(torch.randint(-90, 21, x.shape, generator=generator))
    elif kind < 0.5:
        special = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0**-140, 2.0**-126, 2.0**100, -0.0])
        chosen = special[torch.randint(len(special), x.shape, generator=generator)]
        x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, chosen, x)
    if x.dim() == 1:
        return choose.choice([x, torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]])
    return MEMORY_FORMATS[choose.choice(list(MEMORY_FORMATS))](x) if x.numel() else x


def check(calls: int, seed: int) -> None:
    choose, began = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        from_files = multipliers_from_files(Path(folder))
        for number in range(1, calls + 1):
            own = random_multiplier(choose)
            multiplier, model = choose.choice([(own, own), (own, own), choose.choice(from_files)])
            operands, arguments = random_call(choose)
            _cpu.use_instruction_set(choose.choice(_cpu.instruction_sets()))
            torch.set_num_threads(choose.choice([1, 2]))
            output = conv2d(*operands, **arguments, multiplier=multiplier)
            try:
                if output.numel():
                    assert_sums_of_products(output, *operands, *arguments.values(), model)
            except AssertionError as error:
                layouts = [x if x is None else (tuple(x.shape), x.stride()) for x in operands]
                raise AssertionError(f"call {number}: {multiplier} {layouts} {arguments}: {error}") from None
    print(f"{calls:,} calls from {_cpu.__file__}: all right, {time.monotonic() - began:.0f} s", flush=True)


def check_sanitized(calls: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Functions in C are compiled with CXX, too, into a cache of their own.
        environment = {**os.environ, "CXX": COMPILER, "XDG_CACHE_HOME": folder}
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/package"]
        install += ["-C", f"build-dir={folder}/build", "-C", "cmake.build-type=RelWithDebInfo", str(TESTS.parent)]
        subprocess.run(install, env=environment, check=True)
        # libstdc++ because AddressSanitizer looks for its __cxa_throw.
        finds = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
        environment |= {
            "LD_PRELOAD": " ".join(subprocess.check_output(find, text=True).strip() for find in finds),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks; PyTorch tries large sizes
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # -S leaves out the editable installation, which would come first.
            "PYTHONPATH": os.pathsep.join([f"{folder}/package", sysconfig.get_path("purelib")]),
        }
        subprocess.run([sys.executable, "-S", __file__, str(calls), "0"], env=environment, check=True)


def main(calls: int = 20_000, sanitized: int = 2_000) -> None:
    check(calls, seed=sanitized)
    if sanitized:
        check_sanitized(sanitized)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
