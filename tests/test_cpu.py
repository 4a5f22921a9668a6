"""The CPU kernels, with each instruction set that this machine runs, against the reference."""

import ctypes
import ctypes.util
import platform
from contextlib import contextmanager

import pytest
import torch
from exhaustive_cpu import MULTIPLIERS, cases, differences, instruction_set
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_formats import MEMORY_FORMATS
from operands import from_bits, normal, wild
from sums import assert_sums_of_products, same_bits
from tables import random_table
from torch import Tensor

from mbm_cli import Multiplier, _cpu, conv2d, multiply
from mbm_cli.backends import cpu
from mbm_cli.multipliers.float32 import FAMILIES, reference_product

# Every form of the fast arithmetic: none, one constant (halved by the carry, or gone: t >= 19), two (t = 17); t = 0,
# where the correction has to be rounded; with and without result bits; drum exact and rounded.
FORMS = ["exact-t8", "exact-r7", "mitchell", "mitchell-t16-r7", "mbm", "mbm-r7", "mbm-t1", "mbm-t16-r7", "mbm-t17"]
FORMS += ["mbm-t17-r3", "mbm-t19", "mbm-t22-r1", "drum-k6", "drum-k20", "drum-k6-r3"]
EACH_FORM = pytest.mark.parametrize("multiplier", [Multiplier.parse(name) for name in FORMS], ids=str)


@pytest.fixture(scope="module", params=_cpu.instruction_sets())
def each_instruction_set(request):
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread: small operations on two take long where the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grid(exponent: Tensor) -> Tensor:
    """Return every 7-bit fraction, with these exponents (127 that of 1) and alternating signs."""
    fraction = torch.arange(128)
    return from_bits(-(fraction % 2 << 31) | exponent << 23 | fraction << 16)


def test_instruction_sets_are_chosen_by_name():
    assert _cpu.instruction_sets()[-1] == "portable"
    assert cpu.instruction_set() == _cpu.instruction_sets()[0]
    with pytest.raises(ValueError, match="does not run the instruction set sse9"):
        _cpu.use_instruction_set("sse9")


# Single products


@pytest.mark.parametrize("case", list(cases(100_000, seed=0)), ids=lambda case: case.name)
def test_random_products(case):
    assert [found for multiplier in MULTIPLIERS for found in differences(multiplier, case)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_of_7_bit_fractions(family):
    """Multiply elementwise, and as a 1x1 convolution on the fast path and on the exact one.

    Use every r where t is 0 or leaves at most 7 bits. Between, where only mbm differs from t = 0, three suffice.
    """
    a, b = grid(127 + torch.arange(128) % 11 - 5), grid(127 + torch.arange(128) % 13 - 6)
    row, column = a.reshape(1, 1, 1, 128), b.reshape(128, 1, 1, 1)
    row_with_infinity = torch.cat([row, torch.full((1, 1, 1, 1), torch.inf)], 3)  # rules the fast path out
    every_r, some_r = [None, *range(1, 24)], [None, 1, 8]
    truncations = FAMILIES[family].truncations
    for multiplier in (Multiplier(family, t, r) for t in truncations for r in (some_r if 1 <= t < 16 else every_r)):
        expected = reference_product(row, b.reshape(1, 128, 1, 1), multiplier)
        for name in _cpu.instruction_sets():
            with instruction_set(name):
                where = f"{multiplier} on {name}"
                assert same_bits(multiply(row, b.reshape(1, 128, 1, 1), multiplier), expected), where
                assert same_bits(conv2d(row, column, multiplier=multiplier), expected), where
                if not multiplier.is_exact:
                    exact_path = conv2d(row_with_infinity, column, multiplier=multiplier)[..., :128]
                    assert same_bits(exact_path, expected), where


@EACH_FORM
@pytest.mark.parametrize("exponent", [1, 2, 64, 126, 190, 253, 254])
def test_convolutions_leave_the_fast_path_in_time(multiplier, exponent):
    """Use exponents whose sum is around the smallest and the largest that keep every product normal."""
    row = grid(torch.tensor(exponent)).reshape(1, 1, 1, 128)
    others = [sum_ + 127 - exponent for sum_ in (-2, -1, 0, 1, 2, 3, 252, 253, 254, 255, 256)]
    for other in (e for e in others if 0 < e < 255):
        weight = grid(torch.tensor(other))
        expected = 0.0 + reference_product(row, weight.reshape(1, 128, 1, 1), multiplier)
        for name in _cpu.instruction_sets():
            with instruction_set(name):
                sums = conv2d(row, weight.reshape(128, 1, 1, 1), multiplier=multiplier)
                assert same_bits(sums, expected), f"{other} on {name}"


def test_operands_of_any_layout_and_size(each_instruction_set):
    strided = torch.randn(7, 5, 3).permute(2, 0, 1)[:, ::2], torch.randn(5, 1).expand(5, 4).t()[:1]
    scalars, empty = (torch.tensor(1.5), torch.tensor(1.5)), (torch.ones(0, 3), torch.ones(3))
    generator = torch.Generator().manual_seed(0)
    # Counts that fill no vector.
    wilds = [wild(2 * count, generator).chunk(2) for count in (1, 3, 4, 5, 15, 16, 17, 31, 33)]
    for a, b in (strided, scalars, empty, *wilds):
        assert same_bits(multiply(a, b, "mbm-t3"), reference_product(a, b, Multiplier("mbm", 3)))


# Sums

SPECIAL = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0**-140, 2.0**-126, 2.0**100, -0.0])
VALUES = {  # of tensors, from normally distributed ones and a generator
    "ordinary": lambda x, _: x,
    "sparse": lambda x, _: x.relu(),
    "far apart": lambda x, g: x * torch.exp2(torch.randint(-90, 21, x.shape, generator=g)),
    "special": lambda x, g: torch.where(
        torch.rand(x.shape, generator=g) < 0.02, SPECIAL[torch.randint(len(SPECIAL), x.shape, generator=g)], x
    ),
}
PARAMETERS = [(family, t) for family in FAMILIES for t in FAMILIES[family].truncations]
TABLES = [random_table(bits) for bits in (1, 3, 7, 8)]


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw):
    """Draw operands and arguments of a convolution that has an output."""
    groups, group_channels, group_outputs = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)))
    kernel, stride, dilation, padding = (draw(pairs(*bounds)) for bounds in ((1, 4), (1, 5), (1, 3), (0, 5)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    batch, size = draw(st.integers(1, 3)), [draw(st.integers(n, n + 20)) for n in least]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = (batch, groups * group_channels, *size), (groups * group_outputs, group_channels, *kernel)
    input, weight = (
        VALUES[draw(st.sampled_from(list(VALUES)))](torch.randn(shape, generator=generator), generator)
        for shape in shapes
    )
    bias = torch.randn(groups * group_outputs, generator=generator) if draw(st.booleans()) else None
    input = MEMORY_FORMATS[draw(st.sampled_from(list(MEMORY_FORMATS)))](input)
    parameters, result_bits = draw(st.sampled_from(PARAMETERS)), draw(st.none() | st.integers(1, 23))
    built_in = st.just(Multiplier(*parameters, result_bits)).filter(lambda multiplier: not multiplier.is_exact)
    return input, weight, bias, stride, padding, dilation, groups, draw(built_in | st.sampled_from(TABLES))


@settings(max_examples=150, deadline=None)
@given(convolution=convolutions())
def test_random_convolutions(each_instruction_set, convolution):
    assert_sums_of_products(conv2d(*convolution), *convolution)


@EACH_FORM
@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "arguments"),
    [
        ((2, 1, 28, 28), (6, 1, 5, 5), (1, 2, 1, 1)),
        ((2, 6, 14, 14), (16, 6, 5, 5), (1, 0, 1, 1)),
        ((1, 16, 9, 7), (16, 1, 3, 3), (1, 1, 1, 16)),  # depthwise
        ((1, 3, 40, 40), (5, 3, 7, 7), (4, 3, 1, 1)),  # several phases an axis
        ((1, 2, 9, 9), (3, 2, 2, 2), (5, 0, 1, 1)),  # pixels that no kernel element meets
        ((1, 2, 3, 3), (3, 2, 7, 7), (1, 3, 1, 1)),  # kernel larger than the image
        ((1, 2, 20, 20), (3, 2, 3, 3), (2, 4, 4, 1)),  # stride and dilation share a factor
        ((1, 2, 1, 70), (3, 2, 1, 9), (1, 4, 1, 1)),  # one-dimensional
        ((1, 1, 64, 3), (9, 1, 3, 3), (1, 1, 1, 1)),  # narrow
        ((2, 64, 12, 12), (8, 64, 3, 3), (1, 1, 1, 1)),  # planes too large for one job
    ],
)
def test_kinds_of_convolution(each_instruction_set, input_shape, weight_shape, arguments, multiplier):
    """Check the sums, and that the bias is added last, rounded to nearest, whatever its stride."""
    input, weight, bias = normal(input_shape, weight_shape, (weight_shape[0], 2))
    sums = conv2d(input, weight, None, *arguments, multiplier)
    assert_sums_of_products(sums, input, weight, None, *arguments, multiplier)
    expected = sums + bias[:, 0].reshape(-1, 1, 1)
    for same in (bias[:, 0], bias[:, 0].contiguous()):
        assert same_bits(conv2d(input, weight, same, *arguments, multiplier), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_kernel_elements_may_be_far_apart(each_instruction_set, axis):
    """All but one of them meet padding, which takes no memory."""
    input, weight = normal((1, 1, 5, 5), (1, 1, 3, 3))
    padding, dilation = [1, 1], [1, 1]
    padding[axis] = dilation[axis] = 2**31 - 1
    middle = weight.select(2 + axis, 1).unsqueeze(2 + axis)
    expected = conv2d(input, middle, padding=[axis, 1 - axis])
    assert same_bits(conv2d(input, weight, padding=padding, dilation=dilation), expected)


@EACH_FORM
def test_extreme_operands_among_ordinary_ones(each_instruction_set, multiplier):
    """Put underflow, overflow and infinities into one tile; some images and channels have none."""
    input, weight = normal((3, 2, 6, 30), (9, 2, 3, 3))
    input[1, 0, 2, 3:9] = torch.tensor([2.0**-140, 2.0**-126, 2.0**120, torch.inf, -0.0, -(2.0**-100)])
    weight[5, 1, 0] = torch.tensor([2.0**-126, 2.0**-60, 2.0**10])
    output = conv2d(input, weight, None, 1, 1, multiplier=multiplier)
    assert output[1].isinf().any()
    assert_sums_of_products(output, input, weight, None, 1, 1, 1, 1, multiplier)


@EACH_FORM
@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_special_operands_reach_the_outputs_that_see_them(each_instruction_set, multiplier, special):
    input, weight = torch.ones(2, 2, 9, 20), torch.ones(5, 2, 3, 3)
    input[1, 1, 4, 7] = weight[3, 0, 0, 0] = special  # this weight meets padding in the first row and column
    expected = torch.zeros(2, 5, 9, 20, dtype=torch.bool)
    expected[1, :, 3:6, 6:9] = expected[:, 3, 1:, 1:] = True
    assert torch.equal(~conv2d(input, weight, None, 1, 1, multiplier=multiplier).isfinite(), expected)


@pytest.mark.parametrize("multiplier", ["mbm", "mitchell", "exact-t8"])
def test_zero_sums_are_positive(each_instruction_set, multiplier):
    output = conv2d(torch.zeros(1, 1, 1, 20), -torch.ones(1, 1, 1, 1), multiplier=multiplier)
    assert same_bits(output, torch.zeros(1, 1, 1, 20))


# Threads and the floating-point environment


@pytest.mark.parametrize("multiplier", ["mbm", "mbm-t16-r7", random_table(7)], ids=str)
def test_bits_do_not_depend_on_threads_or_run(each_instruction_set, multiplier):
    input, weight, a, b = normal((5, 6, 30, 30), (16, 6, 5, 5), (300_000,), (300_000,))
    results = []
    for threads in (1, 1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append((conv2d(input, weight, None, 2, 1, multiplier=multiplier), multiply(a, b, multiplier)))
    assert all(same_bits(x, y) for again in results for x, y in zip(results[0], again, strict=True))


def awkward_operands() -> list[Tensor]:
    """Return operands with subnormal products, and products and sums that are rounded, on both paths."""
    input, weight, bias = normal((64, 4, 16, 16), (8, 4, 3, 3), (8,))
    input[::2] *= 2.0**-125
    return [input, weight, bias]


ROUNDING = {"to nearest": 0x000, "down": 0x400, "up": 0x800, "toward zero": 0xC00}  # of x86


@contextmanager
def floating_point_mode(mode: str):
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    try:
        if mode in ROUNDING:
            is_set = platform.machine() in ("x86_64", "AMD64") and library.fesetround(ROUNDING[mode]) == 0
        else:
            is_set = torch.set_flush_denormal(True)
        if not is_set:
            pytest.skip("this CPU has no such mode, or another number for it")
        yield
    finally:
        torch.set_flush_denormal(False)
        library.fesetround(ROUNDING["to nearest"])


def probe() -> Tensor:
    """Compute numbers that differ from mode to mode."""
    ones = torch.tensor([1.0, -1.0])
    return torch.cat([ones * 2.0**-120 * 2.0**-20, ones + ones * 1e-9, ones + ones * 9e-8])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["flush subnormals", "down", "up", "toward zero"])
@pytest.mark.parametrize("multiplier", ["exact-t8", "exact-t1-r22", "mbm", "mbm-t1", "mitchell", "drum-k20"])
def test_modes_of_the_caller_change_no_bits(each_instruction_set, multiplier, mode, threads):
    """Check that the mode is kept, too."""
    torch.set_num_threads(threads)
    input, weight, bias = awkward_operands()

    def outputs() -> list[Tensor]:
        return [conv2d(input, weight, bias, multiplier=multiplier), multiply(input, weight[0, 0, 0, 0], multiplier)]

    expected, usual = outputs(), probe()
    with floating_point_mode(mode):
        before, actual, after = probe(), outputs(), probe()
    assert all(same_bits(*pair) for pair in zip(actual, expected, strict=True))
    assert same_bits(before, after)
    assert not same_bits(before, usual)
    assert same_bits(probe(), usual)


def test_no_thread_keeps_rounding_toward_zero(each_instruction_set):
    """drum with many bits sums toward zero, on all threads; PyTorch's later sums on them must be to nearest."""
    torch.set_num_threads(2)
    a, b = normal((1 << 20,), (1 << 20,))
    expected = (a.double() + b.double()).float()
    conv2d(*awkward_operands(), multiplier="drum-k20")
    assert same_bits(a + b, expected)
