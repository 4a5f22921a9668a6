"""The CPU kernels, with each instruction set that this machine runs, against the reference."""

import ctypes
import ctypes.util
import platform

import pytest
import torch
from exhaustive_cpu import MULTIPLIERS, cases, differences, instruction_set, wild
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_formats import MEMORY_FORMATS
from sums import assert_sums_of_products, same_bits
from tables import random_table
from torch import Tensor

from mbm_cli import _cpu
from mbm_cli.backends import cpu
from mbm_cli.multipliers import FAMILIES, Multiplier, reference_product
from mbm_cli.ops import conv2d, multiply

# Every form of the fast arithmetic: none, one constant (halved by the carry, or gone: t >= 19), two (t = 17); t = 0,
# where the correction has to be rounded; with and without result bits; drum exact and rounded.
FORMS = ["exact-t8", "exact-r7", "mitchell", "mitchell-t16-r7", "mbm", "mbm-r7", "mbm-t1", "mbm-t16-r7", "mbm-t17"]
FORMS += ["mbm-t17-r3", "mbm-t19", "mbm-t22-r1", "drum-k6", "drum-k20", "drum-k6-r3"]
TABLES = [random_table(bits) for bits in (1, 3, 7, 8)]


@pytest.fixture(scope="module", params=_cpu.instruction_sets())
def each_instruction_set(request):
    with instruction_set(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Small operations on two threads take long where the other core is busy; some tests below ask for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grid(exponent: Tensor) -> Tensor:
    """Every 7-bit fraction, with these exponents (127 that of 1) and alternating signs."""
    fraction = torch.arange(128)
    bits = -(fraction % 2 << 31) | exponent << 23 | fraction << 16
    return bits.to(torch.int32).view(torch.float32)


# Single products


def test_an_instruction_set_is_chosen_by_name():
    assert _cpu.instruction_sets()[-1] == "portable"
    assert cpu.instruction_set() == _cpu.instruction_sets()[0]
    with pytest.raises(ValueError, match="does not run the instruction set sse9"):
        _cpu.use_instruction_set("sse9")


@pytest.mark.parametrize("case", cases(100_000, seed=0), ids=lambda case: case.name.replace(" ", "-"))
def test_random_products(case):
    """A hundredth of what exhaustive_cpu.py compares: elementwise, and as sums of one product."""
    assert [found for multiplier in MULTIPLIERS for found in differences(multiplier, case)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_of_7_bit_fractions(family):
    """Elementwise, and as a 1x1 convolution on the fast path and on the exact one.

    Every r where t is 0 or reaches what a 7-bit fraction holds; between, where mbm alone differs from t = 0, three.
    """
    a, b = grid(127 + torch.arange(128) % 11 - 5), grid(127 + torch.arange(128) % 13 - 6)
    row, column = a.reshape(1, 1, 1, 128), b.reshape(128, 1, 1, 1)
    row_with_infinity = torch.cat([row, torch.full((1, 1, 1, 1), torch.inf)], 3)  # rules the fast path out
    every_r, some_r = [None, *range(1, 24)], [None, 1, 8]
    truncations = FAMILIES[family].truncations
    multipliers = [Multiplier(family, t, r) for t in truncations for r in (some_r if 1 <= t < 16 else every_r)]
    for multiplier in multipliers:
        expected = reference_product(row, b.reshape(1, 128, 1, 1), multiplier)
        for name in _cpu.instruction_sets():
            with instruction_set(name):
                where = f"{multiplier} on {name}"
                assert same_bits(multiply(row, b.reshape(1, 128, 1, 1), multiplier), expected), where
                assert same_bits(conv2d(row, column, multiplier=multiplier), expected), where
                if not multiplier.is_exact:
                    exact_path = conv2d(row_with_infinity, column, multiplier=multiplier)[..., :128]
                    assert same_bits(exact_path, expected), where


@pytest.mark.parametrize("multiplier", FORMS)
@pytest.mark.parametrize("exponent", [1, 2, 64, 126, 190, 253, 254])
def test_convolutions_leave_the_fast_path_in_time(multiplier, exponent):
    """Exponents whose sum is around the smallest and the largest that keep every product normal."""
    row, multiplier = grid(torch.tensor(exponent)).reshape(1, 1, 1, 128), Multiplier.parse(multiplier)
    others = [sum_ + 127 - exponent for sum_ in (-2, -1, 0, 1, 2, 3, 252, 253, 254, 255, 256)]
    for other in (e for e in others if 0 < e < 255):
        weight = grid(torch.tensor(other))
        expected = 0.0 + reference_product(row, weight.reshape(1, 128, 1, 1), multiplier)
        for name in _cpu.instruction_sets():
            with instruction_set(name):
                sums = conv2d(row, weight.reshape(128, 1, 1, 1), multiplier=multiplier)
                assert same_bits(sums, expected), f"{other} on {name}"


def test_products_of_tensors_that_are_not_contiguous(each_instruction_set):
    a = torch.randn(7, 5, 3).permute(2, 0, 1)[:, ::2]
    b = torch.randn(5, 1).expand(5, 4).t()[:1]
    multiplier = Multiplier.parse("mbm-t3")
    assert same_bits(multiply(a, b, multiplier), reference_product(a, b, multiplier))
    assert multiply(torch.ones(0, 3), torch.ones(3), multiplier).shape == (0, 3)
    assert multiply(torch.tensor(1.5), torch.tensor(1.5), "mitchell").item() == 2.0


@pytest.mark.parametrize("count", [1, 3, 4, 5, 15, 16, 17, 31, 33])
def test_products_that_fill_no_vector(each_instruction_set, count):
    a, b = (wild(count, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    multiplier = Multiplier.parse("mbm")
    assert same_bits(multiply(a, b, multiplier), reference_product(a, b, multiplier))


# Sums


def _ordinary(x: Tensor, generator) -> None:
    pass


def _sparse(x: Tensor, generator) -> None:
    x.relu_()


def _far_apart(x: Tensor, generator) -> None:
    x.mul_(torch.exp2(torch.randint(-90, 21, x.shape, generator=generator)))


def _with_specials(x: Tensor, generator) -> None:
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0**-140, 2.0**-126, 2.0**100, -0.0])
    chosen = special[torch.randint(len(special), x.shape, generator=generator)]
    x.copy_(torch.where(torch.rand(x.shape, generator=generator) < 0.02, chosen, x))


VALUES = [_ordinary, _sparse, _far_apart, _with_specials]


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw):
    """Operands and arguments of a convolution that has an output."""
    groups, group_channels, group_outputs = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)))
    kernel, stride, dilation, padding = (draw(pairs(*bounds)) for bounds in ((1, 4), (1, 5), (1, 3), (0, 5)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    batch, size = draw(st.integers(1, 3)), [draw(st.integers(n, n + 20)) for n in least]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    input = torch.randn(batch, groups * group_channels, *size, generator=generator)
    weight = torch.randn(groups * group_outputs, group_channels, *kernel, generator=generator)
    bias = torch.randn(groups * group_outputs, generator=generator) if draw(st.booleans()) else None
    for tensor in (input, weight):
        draw(st.sampled_from(VALUES))(tensor, generator)
    input = MEMORY_FORMATS[draw(st.sampled_from(list(MEMORY_FORMATS)))](input)
    family = draw(st.sampled_from(list(FAMILIES)))
    fields = st.just(family), st.sampled_from(FAMILIES[family].truncations), st.none() | st.integers(1, 23)
    multiplier = draw(st.builds(Multiplier, *fields).filter(lambda m: not m.is_exact) | st.sampled_from(TABLES))
    return input, weight, bias, stride, padding, dilation, groups, multiplier


@settings(max_examples=150, deadline=None)
@given(convolution=convolutions())
def test_any_convolution(each_instruction_set, convolution):
    assert_sums_of_products(conv2d(*convolution), *convolution)


@pytest.mark.parametrize("multiplier", FORMS)
@pytest.mark.parametrize(
    ("input_shape", "weight_shape", "stride", "padding", "dilation", "groups"),
    [
        ((2, 1, 28, 28), (6, 1, 5, 5), 1, 2, 1, 1),
        ((2, 6, 14, 14), (16, 6, 5, 5), 1, 0, 1, 1),
        ((1, 16, 9, 7), (16, 1, 3, 3), 1, 1, 1, 16),  # depthwise
        ((1, 3, 40, 40), (5, 3, 7, 7), 4, 3, 1, 1),  # several phases an axis
        ((1, 2, 9, 9), (3, 2, 2, 2), 5, 0, 1, 1),  # pixels that no kernel element meets
        ((1, 2, 3, 3), (3, 2, 7, 7), 1, 3, 1, 1),  # kernel larger than the image
        ((1, 2, 20, 20), (3, 2, 3, 3), 2, 4, 4, 1),  # stride and dilation share a factor
        ((1, 2, 1, 70), (3, 2, 1, 9), 1, 4, 1, 1),  # one-dimensional
        ((1, 1, 64, 3), (9, 1, 3, 3), 1, 1, 1, 1),  # narrow
        ((2, 64, 12, 12), (8, 64, 3, 3), 1, 1, 1, 1),  # planes too large for one job
    ],
)
def test_kinds_of_convolution(
    each_instruction_set, input_shape, weight_shape, stride, padding, dilation, groups, multiplier
):
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(input_shape, generator=generator), torch.randn(weight_shape, generator=generator)
    bias = torch.randn(weight_shape[0], generator=generator)
    arguments = (stride, padding, dilation, groups, Multiplier.parse(multiplier))
    assert_sums_of_products(conv2d(input, weight, bias, *arguments), input, weight, bias, *arguments)


@pytest.mark.parametrize("axis", [0, 1])
def test_kernel_elements_that_are_far_apart(each_instruction_set, axis):
    """All but one of them meet padding, which takes no memory."""
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(1, 1, 5, 5, generator=generator), torch.randn(1, 1, 3, 3, generator=generator)
    padding, dilation = [1, 1], [1, 1]
    padding[axis] = dilation[axis] = 2**31 - 1
    middle = weight.select(2 + axis, 1).unsqueeze(2 + axis)
    expected = conv2d(input, middle, padding=[axis, 1 - axis])
    assert same_bits(conv2d(input, weight, padding=padding, dilation=dilation), expected)


@pytest.mark.parametrize("multiplier", FORMS)
def test_ordinary_and_extreme_operands_side_by_side(each_instruction_set, multiplier):
    """Underflow, overflow and infinities among ordinary operands, in one tile; some images and channels have none."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(3, 2, 6, 30, generator=generator)
    weight = torch.randn(9, 2, 3, 3, generator=generator)
    input[1, 0, 2, 3:9] = torch.tensor([2.0**-140, 2.0**-126, 2.0**120, torch.inf, -0.0, -(2.0**-100)])
    weight[5, 1, 0] = torch.tensor([2.0**-126, 2.0**-60, 2.0**10])
    arguments = (1, 1, 1, 1, Multiplier.parse(multiplier))
    output = conv2d(input, weight, None, *arguments)
    assert output[1].isinf().any()
    assert_sums_of_products(output, input, weight, None, *arguments)


@pytest.mark.parametrize("multiplier", FORMS)
def test_a_nan_reaches_the_outputs_that_see_it(each_instruction_set, multiplier):
    input, weight = torch.ones(2, 2, 9, 20), torch.ones(5, 2, 3, 3)
    input[1, 1, 4, 7] = torch.nan
    expected = torch.zeros(2, 5, 9, 20, dtype=torch.bool)
    expected[1, :, 3:6, 6:9] = True
    assert torch.equal(conv2d(input, weight, None, 1, 1, multiplier=multiplier).isnan(), expected)


@pytest.mark.parametrize("multiplier", FORMS)
@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_padding_contributes_nothing_not_zero_times_a_weight(each_instruction_set, multiplier, special):
    input, weight = torch.ones(1, 1, 4, 20), torch.ones(2, 1, 3, 3)
    weight[1, 0, 0, 0] = special  # meets padding at the outputs of the first row and column
    output = conv2d(input, weight, None, 1, 1, multiplier=multiplier)
    expected = torch.zeros(2, 4, 20, dtype=torch.bool)
    expected[1, 1:, 1:] = True
    assert torch.equal(~output[0].isfinite(), expected)


@pytest.mark.parametrize("multiplier", FORMS)
def test_the_bias_is_added_to_the_nearest(each_instruction_set, multiplier):
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(7, 3, 3, 3, generator=generator)
    bias = torch.randn(7, generator=generator)
    sums = conv2d(input, weight, multiplier=multiplier)
    assert same_bits(conv2d(input, weight, bias, multiplier=multiplier), sums + bias.reshape(-1, 1, 1))
    strided = torch.stack([bias, torch.zeros(7)], 1)[:, 0]
    assert same_bits(conv2d(input, weight, strided, multiplier=multiplier), sums + bias.reshape(-1, 1, 1))


@pytest.mark.parametrize("multiplier", ["mbm", "mitchell", "exact-t8"])
def test_a_zero_sum_is_positive(each_instruction_set, multiplier):
    """A sum begins with 0.0."""
    output = conv2d(torch.zeros(1, 1, 1, 20), -torch.ones(1, 1, 1, 1), multiplier=multiplier)
    assert same_bits(output, torch.zeros(1, 1, 1, 20))


# Threads and the floating-point environment


@pytest.mark.parametrize("multiplier", ["mbm", "mbm-t16-r7"])
def test_the_bits_do_not_depend_on_threads_or_run(each_instruction_set, multiplier):
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(5, 6, 30, 30, generator=generator), torch.randn(16, 6, 5, 5, generator=generator)
    a, b = torch.randn(2, 300_000, generator=generator)
    first = conv2d(input, weight, None, 2, 1, multiplier=multiplier), multiply(a, b, multiplier)
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        again = conv2d(input, weight, None, 2, 1, multiplier=multiplier), multiply(a, b, multiplier)
        assert all(same_bits(x, y) for x, y in zip(first, again, strict=True))


def operands_for_the_environment() -> tuple[Tensor, Tensor]:
    """Products that are subnormal, and products and sums that are rounded, on the fast path and on the exact one."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(64, 4, 16, 16, generator=generator)
    input[::2] *= 2.0**-125
    return input, torch.randn(8, 4, 3, 3, generator=generator)


@pytest.fixture
def flush_denormal():
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals to zero")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("multiplier", ["exact-t8", "exact-t1-r22", "mbm", "mbm-t1", "mitchell", "drum-k20"])
def test_flushed_subnormals_change_nothing_here(each_instruction_set, flush_denormal, multiplier, threads):
    """Nor does the caller find the mode changed."""
    torch.set_num_threads(threads)
    input, weight = operands_for_the_environment()
    expected = conv2d(input, weight, multiplier=multiplier), multiply(input, weight[0, 0, 0, 0], multiplier)
    torch.set_flush_denormal(True)
    actual = conv2d(input, weight, multiplier=multiplier), multiply(input, weight[0, 0, 0, 0], multiplier)
    subnormal = torch.tensor([2.0**-120]) * 2.0**-20
    torch.set_flush_denormal(False)
    assert all(same_bits(x, y) for x, y in zip(actual, expected, strict=True))
    assert subnormal == 0, "the mode was lost"
    assert torch.tensor([2.0**-120]) * 2.0**-20 != 0


ROUNDING = {"to nearest": 0x000, "down": 0x400, "up": 0x800, "toward zero": 0xC00}  # of x86


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the modes' numbers are those of x86")
@pytest.mark.parametrize("mode", ROUNDING)
@pytest.mark.parametrize("multiplier", ["exact-t8", "mbm", "mbm-t1", "mitchell", "drum-k20"])
def test_the_rounding_mode_of_the_caller_changes_nothing_here(each_instruction_set, multiplier, mode):
    """Nor does the caller find it changed."""
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    input, weight = operands_for_the_environment()
    bias = torch.full((8,), 1 / 3)
    expected = conv2d(input, weight, bias, multiplier=multiplier), multiply(input, weight[0, 0, 0, 0], multiplier)
    try:
        library.fesetround(ROUNDING[mode])
        actual = conv2d(input, weight, bias, multiplier=multiplier), multiply(input, weight[0, 0, 0, 0], multiplier)
        mode_after = library.fegetround()
    finally:
        library.fesetround(ROUNDING["to nearest"])
    assert mode_after == ROUNDING[mode]
    assert all(same_bits(x, y) for x, y in zip(actual, expected, strict=True))


def test_no_thread_is_left_rounding_toward_zero(each_instruction_set):
    """drum with many bits sums toward zero, on all threads; what PyTorch computes on them afterwards must not."""
    torch.set_num_threads(2)
    a, b = torch.randn(2, 1 << 20, generator=torch.Generator().manual_seed(0))
    expected = (a.double() + b.double()).float()
    conv2d(*operands_for_the_environment(), multiplier="drum-k20")
    assert same_bits(a + b, expected)
