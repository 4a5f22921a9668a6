"""The exhaustive checks of the CUDA kernels, a few minutes on a GPU: ``python tests/gpu/exhaustive.py``.

Products, bit for bit against the reference model evaluated on the GPU, elementwise and as one-product convolutions in
both kinds of kernels: all pairs of 16-bit (1, 8, 7) operands, and random bit patterns for every family and many
truncations. Then random convolutions against float64 sums of bit-exact products, and against the CPU backend.

``python tests/gpu/exhaustive.py gradients`` checks nothing but gradients of random convolutions, and dense layers.
``compute-sanitizer --tool memcheck python tests/gpu/exhaustive.py sanitize`` (racecheck, initcheck) runs nothing on the
GPU but convolutions, dense layers and their gradients.
"""

import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))
import test_gradients
from operands import from_bits
from sums import assert_within_bound, float64_sums, same_bits, same_sums
from tables import random_table

from mbm_cli import Multiplier, conv2d, linear, multiply
from mbm_cli.multipliers.float32 import FAMILIES, reference_product

TABLES = [random_table(bits) for bits in (1, 5, 7, 8, 11)]
EVERY_FAMILY = [
    *(Multiplier(f, t) for f in FAMILIES for t in (0, 1, 7, 15, 16, 17, 18, 20, 22) if t in FAMILIES[f].truncations),
    *TABLES,
]
OF_16_BITS = [Multiplier.parse(name) for name in ("mbm-t16-r7", "mitchell-t16-r7")]
NAMES = ("mbm", "mbm-t16-r7", "mbm-t17-r3", "mbm-t8-r10", "mitchell", "mitchell-r5", "exact-t8-r7")
OF_CONVOLUTIONS = [*map(Multiplier.parse, (*NAMES, "drum-k6", "drum-k18", "drum-k6-r3")), *TABLES]
PAIRS = 1 << 28
CHUNK = 1 << 24


def bfloat16_operands() -> Tensor:
    """Return all 2^16 values with 7 fraction bits, grouped by exponent, so that tiles take the fast path."""
    patterns = torch.arange(1 << 16, device="cuda").reshape(2, 256, 128)  # sign, exponent, fraction
    return from_bits(patterns.transpose(0, 1).flatten() << 16)


def check_all_products(pixels: Tensor, weights: Tensor, multiplier: Multiplier) -> None:
    """Check the products of pixels and weights, (weights, pixels), in the tiled and the direct kernels.

    A pixel is the first operand, which matters to a table.
    """
    expected = 0.0 + reference_product(pixels, weights.unsqueeze(1), multiplier)
    for groups in (1, len(weights), len(weights) // 8):
        row, column = pixels.reshape(1, 1, 1, -1).expand(1, groups, 1, -1), weights.reshape(-1, 1, 1, 1)
        sums = conv2d(row, column, groups=groups, multiplier=multiplier)
        assert same_sums(sums.reshape(len(weights), -1), expected), multiplier


def check_bfloat16_pairs(multiplier: Multiplier, weights: Tensor) -> None:
    """Check products of all values of 7 fraction bits with some of them."""
    operands, column = bfloat16_operands(), weights.unsqueeze(1)
    assert same_bits(multiply(column, operands, multiplier), reference_product(column, operands, multiplier))
    check_all_products(operands, weights, multiplier)


def check_random_pairs(multiplier: Multiplier, pairs: int, generator: torch.Generator) -> None:
    """Check elementwise products of all patterns, and convolutions of all and of those that allow the fast path."""

    def random_bits(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, device="cuda", generator=generator)

    for _ in range(0, pairs, CHUNK):
        a, b = from_bits(random_bits(2, CHUNK))
        expected = reference_product(a, b, multiplier)
        assert same_bits(multiply(a, b, multiplier), expected), multiplier
        if not multiplier.is_exact:  # whose convolution is PyTorch's
            # A group for each weight, and so a different pair in every output.
            sums = conv2d(a.reshape(1, -1, 1, 1), b.reshape(-1, 1, 1, 1), groups=CHUNK, multiplier=multiplier)
            assert same_sums(sums.flatten(), 0.0 + expected), multiplier
    if multiplier.is_exact:
        return
    for lowest, highest in ((0, 255), (80, 190)):
        for _ in range(0, pairs, CHUNK):
            exponents = torch.randint(lowest, highest + 1, (CHUNK // 64 + 64,), device="cuda", generator=generator)
            bits = random_bits(CHUNK // 64 + 64) & ~0x7F800000
            check_all_products(*from_bits(bits | (exponents << 23)).split((CHUNK // 64, 64)), multiplier)


def random_shapes(choose: random.Random) -> tuple[tuple[int, ...], tuple[int, ...], tuple]:
    """Return the input's and the weight's shape, and the arguments between bias and multiplier."""
    while True:
        groups = choose.choice((1, 1, 1, 2, 3, 8))
        channels = choose.choice((1, 2, 3, 5, 6, 8, 12, 16, 20, 33))
        out_channels = choose.choice((1, 2, 3, 5, 6, 8, 9, 16, 17, 33, 64, 70))
        kernel = [choose.choice((1, 1, 2, 3, 3, 5, 7)) for _ in range(2)]
        stride = [choose.choice((1, 1, 1, 2, 3)) for _ in range(2)]
        padding = [choose.choice((0, 1, 2, 4)) for _ in range(2)]
        dilation = [choose.choice((1, 1, 1, 2, 3)) for _ in range(2)]
        size = [choose.randint(1, 20) for _ in range(2)]
        if all(dilation[i] * (kernel[i] - 1) + 1 <= size[i] + 2 * padding[i] for i in range(2)):
            input_shape = (choose.choice((1, 2, 3, 7)), channels * groups, *size)
            return input_shape, (out_channels * groups, channels, *kernel), (stride, padding, dilation, groups)


def random_convolution(choose: random.Random) -> tuple[list, list, tuple]:
    """Return input, weight and bias on the CPU and on the GPU, and the arguments behind them."""
    shape, weight_shape, arguments = random_shapes(choose)
    generator = torch.Generator().manual_seed(choose.randrange(1 << 31))
    input = torch.randn(shape, generator=generator)
    input[input < choose.choice((-9.0, 0.0))] = 0.0
    weight = torch.randn(weight_shape, generator=generator)
    bias = torch.randn(weight_shape[0], generator=generator) if choose.random() < 0.5 else None
    if choose.random() < 0.2:  # products below the fast path's range
        input, weight = input * 2.0**-70, weight * 2.0**-50
    if choose.random() < 0.3:
        input = input.contiguous(memory_format=torch.channels_last)
    operands = [input, weight, bias]
    on_gpu = [None if x is None else x.cuda() for x in operands]
    return operands, on_gpu, (*arguments, choose.choice(OF_CONVOLUTIONS))


def check_random_convolution(choose: random.Random) -> None:
    operands, on_gpu, arguments = random_convolution(choose)
    output, again = (conv2d(*on_gpu, *arguments) for _ in range(2))
    where = f"{[None if x is None else tuple(x.shape) for x in operands]} {arguments}"
    assert same_bits(output, again), where
    total, bound = float64_sums(*on_gpu, *arguments, rounding=2.0**-24)
    assert_within_bound(output, total, bound, where)
    # The CPU may round its additions toward zero, with twice the error.
    assert_within_bound(conv2d(*operands, *arguments).cuda(), total, 2 * bound, where)


def check_random_gradients(shapes: int) -> None:
    for seed in range(shapes):
        test_gradients.check_random_convolution(seed, "cuda")
        shape = random.Random(seed).choices(range(1, 300), k=3)
        test_gradients.check_dense((shape[0], shape[1], shape[2]), OF_CONVOLUTIONS[seed % len(OF_CONVOLUTIONS)], "cuda")


def compute_anything(choose: random.Random) -> None:
    """Compute a random convolution and a random dense layer with their gradients, and check nothing."""
    _, (x, *rest), (*sizes, multiplier) = random_convolution(choose)
    conv2d(
        x.requires_grad_(), *(None if one is None else one.requires_grad_() for one in rest), *sizes, multiplier, "same"
    ).sum().backward()
    shape = choose.choices(range(1, 200), k=3)
    dense = torch.randn(shape[0], shape[1], device="cuda", requires_grad=True)
    weight = torch.randn(shape[2], shape[1], device="cuda", requires_grad=True)
    linear(dense, weight, None, multiplier, "same").sum().backward()


def compile_kernels(multiplier: Multiplier) -> None:
    one = torch.ones(1, device="cuda")
    multiply(one, one, multiplier)


def main(shapes: int = 300, pairs: int = PAIRS) -> None:
    started = time.perf_counter()

    def report(what: object) -> None:
        print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)

    with ProcessPoolExecutor(8, get_context("spawn")) as pool:  # CuPy's cache hands the results on
        list(pool.map(compile_kernels, {*EVERY_FAMILY, *OF_16_BITS, *OF_CONVOLUTIONS}))
    report("compiled")
    generator = torch.Generator("cuda").manual_seed(0)
    for multiplier in OF_16_BITS:
        for some in bfloat16_operands().split(256):
            check_bfloat16_pairs(multiplier, some)
        report(f"{multiplier}: 2^32 pairs")
    for multiplier in EVERY_FAMILY:
        check_random_pairs(multiplier, pairs, generator)
        report(f"{multiplier}: {pairs} random pairs")
    choose = random.Random(0)
    for _ in range(shapes):
        check_random_convolution(choose)
    report(f"{shapes} random convolutions")
    check_random_gradients(shapes)
    report(f"gradients of {shapes} random convolutions, {shapes} random dense layers")


if __name__ == "__main__":
    if sys.argv[1:] == ["sanitize"]:
        chosen = random.Random(0)
        for _ in range(300):
            compute_anything(chosen)
    elif sys.argv[1:] == ["gradients"]:
        check_random_gradients(300)
    else:
        main(*map(int, sys.argv[1:]))
