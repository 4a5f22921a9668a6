"""The exhaustive checks of the CUDA kernels, a few minutes on a GPU: ``python tests/gpu/exhaustive.py``.

Products, bit for bit against the reference model evaluated on the GPU, elementwise and as one-product convolutions in
both kinds of kernels: all pairs of 16-bit (1, 8, 7) operands, and random bit patterns for every family and many
truncations. Then random convolutions against float64 sums of bit-exact products, and against the CPU backend.

``compute-sanitizer --tool memcheck python tests/gpu/exhaustive.py sanitize`` (racecheck, initcheck) runs nothing on the
GPU but these convolutions.
"""

import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))
from tables import random_table

import mbm_cli.ops  # noqa: F401  (registers the operators)
from mbm_cli.backends import cuda
from mbm_cli.multipliers import FAMILIES, Multiplier, reference_product

TRUNCATIONS = (0, 1, 7, 15, 16, 17, 18, 20, 22)
BFLOAT16 = ("mbm-t16-r7", "mitchell-t16-r7")
TABLE_BITS = (1, 5, 7, 8, 11)
SHAPE_MULTIPLIERS = ("mbm", "mbm-t16-r7", "mbm-t17-r3", "mbm-t8-r10", "mitchell", "mitchell-r5", "exact-t8-r7")
SHAPE_MULTIPLIERS += ("drum-k6", "drum-k18", "drum-k6-r3", *(random_table(bits).key for bits in TABLE_BITS))
PAIRS = 1 << 28
CHUNK = 1 << 24


def conv2d(input: Tensor, weight: Tensor, multiplier: str, groups: int = 1) -> Tensor:
    return torch.ops.mbm.conv2d(input, weight, None, [1, 1], [0, 0], [1, 1], groups, multiplier)


def from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def same_sums(sums: Tensor, products: Tensor) -> bool:
    """Whether sums of one product are ``0.0 + product``; a NaN is any NaN."""
    return same_bits(
        torch.where(sums.isnan(), torch.nan, sums), torch.where(products.isnan(), torch.nan, 0.0 + products)
    )


def bfloat16_operands() -> Tensor:
    """All 2^16 values with 7 fraction bits, those of an exponent together, so that tiles take the fast path."""
    return from_bits(
        (torch.arange(1 << 16, device="cuda").reshape(2, 256, 128).transpose(0, 1).reshape(-1) << 16).to(torch.int32)
    )


def one_product_convolutions(pixels: Tensor, weights: Tensor, multiplier: str) -> Iterator[Tensor]:
    """All products of pixels and weights, (weights, pixels), from the tiled and from the direct kernels."""
    yield conv2d(pixels.reshape(1, 1, 1, -1), weights.reshape(-1, 1, 1, 1), multiplier).reshape(len(weights), -1)
    for channels in (1, 8):
        groups = len(weights) // channels
        grouped = pixels.reshape(1, 1, 1, -1).expand(1, groups, 1, -1)
        yield conv2d(grouped, weights.reshape(-1, 1, 1, 1), multiplier, groups).reshape(len(weights), -1)


def check_bfloat16_pairs(multiplier: str) -> None:
    operands, parsed = bfloat16_operands(), Multiplier.of_key(multiplier)
    for some in operands.split(256):
        expected = reference_product(some.unsqueeze(1), operands, parsed)
        assert same_bits(torch.ops.mbm.multiply(some.unsqueeze(1), operands, multiplier), expected)
        for sums in one_product_convolutions(operands, some, multiplier):
            assert same_sums(sums, expected)


def random_bits(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, device="cuda", generator=generator).to(torch.int32)


def check_random_pairs(multiplier: str, pairs: int, generator: torch.Generator) -> None:
    """Elementwise over all patterns; as convolutions over all, and over exponents that allow the fast path."""
    parsed = Multiplier.of_key(multiplier)
    for _ in range(0, pairs, CHUNK):
        a, b = (from_bits(random_bits(CHUNK, generator=generator)) for _ in range(2))
        expected = reference_product(a, b, parsed)
        assert same_bits(torch.ops.mbm.multiply(a, b, multiplier), expected)
        if not parsed.is_exact:  # whose convolution is PyTorch's
            # A group for each weight, and so a different pair in every output.
            sums = conv2d(a.reshape(1, -1, 1, 1), b.reshape(-1, 1, 1, 1), multiplier, groups=CHUNK)
            assert same_sums(sums.reshape(-1), expected)
    if parsed.is_exact:
        return
    for lowest, highest in ((0, 255), (80, 190)):
        for _ in range(0, pairs, CHUNK):
            exponents = torch.randint(lowest, highest + 1, (CHUNK // 64 + 64,), device="cuda", generator=generator)
            bits = random_bits(CHUNK // 64 + 64, generator=generator) & ~0x7F800000
            pixels, weights = from_bits(bits | (exponents << 23)).split((CHUNK // 64, 64))
            expected = reference_product(pixels, weights.unsqueeze(1), parsed)
            for sums in one_product_convolutions(pixels, weights, multiplier):
                assert same_sums(sums, expected)


def random_convolution(choose: random.Random) -> tuple[tuple[int, ...], tuple[int, ...], dict]:
    """The input's and the weight's shape, and the arguments between bias and multiplier."""
    while True:
        groups = choose.choice((1, 1, 1, 2, 3, 8))
        channels = choose.choice((1, 2, 3, 5, 6, 8, 12, 16, 20, 33))
        out_channels = choose.choice((1, 2, 3, 5, 6, 8, 9, 16, 17, 33, 64, 70))
        kernel = [choose.choice((1, 1, 2, 3, 3, 5, 7)) for _ in range(2)]
        arguments = {
            "stride": [choose.choice((1, 1, 1, 2, 3)) for _ in range(2)],
            "padding": [choose.choice((0, 1, 2, 4)) for _ in range(2)],
            "dilation": [choose.choice((1, 1, 1, 2, 3)) for _ in range(2)],
            "groups": groups,
        }
        size = [choose.randint(1, 20) for _ in range(2)]
        padded = [size[i] + 2 * arguments["padding"][i] for i in range(2)]
        if all(arguments["dilation"][i] * (kernel[i] - 1) + 1 <= padded[i] for i in range(2)):
            batch = choose.choice((1, 2, 3, 7))
            return (batch, channels * groups, *size), (out_channels * groups, channels, *kernel), arguments


def float64_sums(
    input: Tensor, weight: Tensor, bias: Tensor | None, arguments: dict, multiplier: str
) -> tuple[Tensor, Tensor]:
    """The convolution with bit-exact products summed in float64, and the float32 accumulation's bound on the error."""
    groups = arguments["groups"]
    rest = {name: tuple(arguments[name]) for name in ("stride", "padding", "dilation")}
    patches = F.unfold(input, tuple(weight.shape[2:]), **rest)
    batch, length = len(input), patches.shape[1] // groups
    patches = patches.reshape(batch, groups, 1, length, -1)
    rows = weight.reshape(1, groups, -1, length, 1)
    products = reference_product(patches, rows, Multiplier.of_key(multiplier)).double()
    sums, magnitude = products.sum(3), products.abs().sum(3)
    size = [
        (input.shape[2 + i] + 2 * rest["padding"][i] - rest["dilation"][i] * (weight.shape[2 + i] - 1) - 1)
        // rest["stride"][i]
        + 1
        for i in range(2)
    ]
    sums, magnitude = (x.reshape(batch, -1, *size) for x in (sums, magnitude))
    if bias is not None:
        sums, magnitude = sums + bias.reshape(-1, 1, 1), magnitude + bias.abs().reshape(-1, 1, 1)
    additions = (length + 1) * 2.0**-24
    return sums, additions / (1 - additions) * magnitude


def random_operands(choose: random.Random) -> tuple[list, dict, str]:
    """Input, weight and bias on the CPU, the arguments behind them, and the multiplier."""
    shape, weight_shape, arguments = random_convolution(choose)
    generator = torch.Generator().manual_seed(choose.randrange(1 << 31))
    input = torch.randn(shape, generator=generator)
    input[input < choose.choice((-9.0, 0.0))] = 0.0
    weight = torch.randn(weight_shape, generator=generator)
    bias = torch.randn(weight_shape[0], generator=generator) if choose.random() < 0.5 else None
    if choose.random() < 0.2:  # products below the fast path's range
        input, weight = input * 2.0**-70, weight * 2.0**-50
    if choose.random() < 0.3:
        input = input.contiguous(memory_format=torch.channels_last)
    return [input, weight, bias], arguments, choose.choice(SHAPE_MULTIPLIERS)


def to_gpu(operands: list) -> list:
    return [None if x is None else x.cuda() for x in operands]


def check_random_convolution(choose: random.Random) -> None:
    operands, arguments, multiplier = random_operands(choose)
    on_gpu = to_gpu(operands)
    output = torch.ops.mbm.conv2d(*on_gpu, *arguments.values(), multiplier)
    where = f"{[None if x is None else tuple(x.shape) for x in operands]} {arguments} {multiplier}"
    assert same_bits(output, torch.ops.mbm.conv2d(*on_gpu, *arguments.values(), multiplier)), where
    sums, bound = float64_sums(*on_gpu, arguments, multiplier)
    assert ((output.double() - sums).abs() <= bound).all(), where
    on_cpu = torch.ops.mbm.conv2d(*operands, *arguments.values(), multiplier)
    # The CPU may round its additions toward zero, with twice the error.
    assert ((output.cpu().double() - on_cpu.double()).abs() <= 3 * bound.cpu()).all(), where


def run_random_convolutions(shapes: int) -> None:
    choose = random.Random(0)
    for _ in range(shapes):
        operands, arguments, multiplier = random_operands(choose)
        torch.ops.mbm.conv2d(*to_gpu(operands), *arguments.values(), multiplier).cpu()


def compile_for(multiplier: str) -> None:
    torch.cuda.init()
    cuda.kernels(multiplier, torch.cuda.current_device())


def main(shapes: int = 300, pairs: int = PAIRS) -> None:
    families = [str(Multiplier(f, t)) for f in FAMILIES for t in TRUNCATIONS if t in FAMILIES[f].truncations]
    families += [random_table(bits).key for bits in TABLE_BITS]
    started = time.perf_counter()
    with ProcessPoolExecutor(8, get_context("spawn")) as pool:  # CuPy's cache hands the results on
        list(pool.map(compile_for, sorted({*families, *BFLOAT16, *SHAPE_MULTIPLIERS})))
    print(f"compiled: {time.perf_counter() - started:.0f} s", flush=True)

    generator = torch.Generator("cuda").manual_seed(0)
    for multiplier in BFLOAT16:
        check_bfloat16_pairs(multiplier)
        print(f"{multiplier}: 2^32 pairs: {time.perf_counter() - started:.0f} s", flush=True)
    for multiplier in families:
        check_random_pairs(multiplier, pairs, generator)
        print(f"{multiplier}: {pairs} random pairs: {time.perf_counter() - started:.0f} s", flush=True)
    choose = random.Random(0)
    for _ in range(shapes):
        check_random_convolution(choose)
    print(f"{shapes} random convolutions: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["sanitize"]:
        run_random_convolutions(300)
    else:
        main(*map(int, sys.argv[1:]))
