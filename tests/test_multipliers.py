"""The reference model against one written differently, in scalar Python integers."""

import itertools
import math
import struct

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operands import from_bits

from mbm_cli.multipliers.float32 import FAMILIES, reference_product
from mbm_cli.multipliers.names import Multiplier

INFINITY, NAN, SIGN = 0x7F800000, 0x7FC00000, 0x80000000
FRACTIONS, EXPONENTS = (0, 1, 2**22, 2**23 - 1), (0, 1, 63, 64, 127, 190, 191, 254, 255)
EDGES = [sign | e << 23 | f for sign in (0, SIGN) for e in EXPONENTS for f in FRACTIONS]
# Products with exponents on both sides of 0 and of 255, with and without a carry, and in the middle of the range.
EXPONENT_PAIRS = [
    *[(127, 127), (1, 1), (1, 125), (1, 126), (1, 127), (63, 63), (64, 64), (100, 27)],
    *[(254, 254), (254, 126), (254, 127), (254, 128), (200, 180), (200, 181), (200, 182)],
]


def scalar_product(a: int, b: int, multiplier: Multiplier) -> int:
    """Return the bits of the product of two float32 numbers given as bits."""
    product = _scalar_exact if multiplier.family == "exact" else _scalar_approximate
    return product(a, b, multiplier.family, multiplier.truncate, multiplier.result_bits or 23)


def _scalar_exact(a: int, b: int, family: str, t: int, r: int) -> int:
    # Exact in float64, hence rounded once.
    product = math.prod(_value(_cleared(x, t)) for x in (a, b))
    if math.isnan(product):
        return NAN
    try:
        rounded = struct.pack("<f", product)
    except OverflowError:
        rounded = struct.pack("<f", math.copysign(math.inf, product))
    return _cleared(struct.unpack("<I", rounded)[0], 23 - r)


def _scalar_approximate(a: int, b: int, family: str, t: int, r: int) -> int:
    (sign_a, exponent_a, fraction_a), (sign_b, exponent_b, fraction_b) = _fields(a), _fields(b)
    sign = SIGN if sign_a != sign_b else 0
    if (exponent_a == 255 and fraction_a) or (exponent_b == 255 and fraction_b):
        return NAN
    if 255 in (exponent_a, exponent_b):
        return NAN if 0 in (exponent_a, exponent_b) else sign | INFINITY
    if 0 in (exponent_a, exponent_b):
        return sign

    unit = 2**t
    x, y = fraction_a // unit * unit, fraction_b // unit * unit
    if family in ("mbm", "drum") and t > 0:
        x, y = x | unit, y | unit
    if family == "drum":
        significand = (2**23 + x) * (2**23 + y)
        carry = significand >= 2**47
        f = significand // 2 ** (24 if carry else 23) - 2**23
    else:
        carry, f = divmod(x + y, 2**23)
    exponent = exponent_a + exponent_b - 127 + carry
    if family == "mbm":
        c = (327680 if carry else 655360) // unit * unit
        if not carry or f + c < 2**23:
            f += c
    if f >= 2**23:
        exponent, f = exponent + 1, (f - 2**23) // 2
    if exponent <= 0:
        return sign
    if exponent >= 255:
        return sign | INFINITY
    return sign + exponent * 2**23 + f // 2 ** (23 - r) * 2 ** (23 - r)


def _fields(bits: int) -> tuple[int, int, int]:
    return bits >> 31, bits >> 23 & 255, bits % 2**23


def _value(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _cleared(bits: int, low: int) -> int:
    """Clear the low fraction bits of a finite number."""
    return bits if bits >> 23 & 255 == 255 else bits >> low << low


def assert_reference_is_scalar_model(pairs: list[tuple[int, int]], multiplier: Multiplier) -> None:
    a, b = from_bits(torch.tensor(pairs)).T
    products = reference_product(a, b, multiplier).view(torch.int32).tolist()
    for (x, y), found in zip(pairs, products, strict=True):
        product, expected = found & 0xFFFFFFFF, scalar_product(x, y, multiplier)
        assert product == expected, f"{multiplier}: {x:08x} * {y:08x} is {expected:08x}, not {product:08x}"


def boundary_fractions(t: int) -> list[tuple[int, int]]:
    """Return pairs of fractions whose sum lies around each threshold of the definition."""
    unit = 2**t
    thresholds = [2**23]  # carry
    for c in (655360, 655360 // unit * unit):
        thresholds += [2**23 - c, 2**24 - c // 2, 2**24 - c // 2 // unit * unit]  # renormalisation; correction skipped
    sums = {threshold + step * unit for threshold in thresholds for step in range(-4, 5)}
    sums |= {threshold + step for threshold in thresholds for step in (-1, 0, 1)}
    firsts = [0, unit, 2**22, 2**22 + unit, 7 << 20, 2**23 - unit, 2**23 - 1]
    return [(x, s - x) for x in firsts for s in sums if 0 <= x < 2**23 and 0 <= s - x < 2**23]


@pytest.mark.parametrize(
    ("a", "b", "multiplier", "product"),
    [
        (1.0, 1.0, "mitchell", 1.0),
        (1.5, 1.5, "mitchell", 2.0),  # 1 + 0.5 + 0.5
        (-1.75, 1.5, "mitchell", -2.5),  # 2 * (0.75 + 0.5)
        (1.0, 1.0, "mbm", 1.078125),  # c = 2^-4 + 2^-6
        (1.5, 1.5, "mbm", 2.078125),  # half of c, doubled by the carry
        (1.984375, 1.984375, "mbm", 3.9375),  # the correction would overflow: skipped
        (1.0, 1.96875, "mbm", 2.046875),  # renormalised: 31/32 + 5/64 is 1 + 3/64, of which half is the fraction
        (1.0, 1.0, "mbm-t22", 2.0),  # both fractions become 1/2, and nothing is left of c
        (1.0, 1.96875, "mbm-r5", 2.0),
        (1.75, 1.75, "mitchell-r1", 3.0),
        (1.75, 1.75, "exact-t22-r1", 2.0),
        (1.0, 1.0, "drum-k2", 2.25),  # 1.5 * 1.5
        (1.75, -1.5, "drum-k3", -3.0625),  # 1.75 * -(1.5 + 0.25)
    ],
)
def test_products_by_hand(a, b, multiplier, product):
    multiplier = Multiplier.parse(multiplier)
    assert reference_product(torch.tensor(a), torch.tensor(b), multiplier).item() == product


RESULT_BITS = (None, 1, 2, 7, 22, 23)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_edge_values(family):
    pairs = list(itertools.product(EDGES, EDGES))
    for t in FAMILIES[family].truncations:
        for r in RESULT_BITS if t in (0, 1, 16) else (RESULT_BITS[t % len(RESULT_BITS)],):
            assert_reference_is_scalar_model(pairs, Multiplier(family, t, r))


@pytest.mark.parametrize("family", FAMILIES)
def test_products_around_thresholds_of_fraction_and_exponent(family):
    for t in FAMILIES[family].truncations:
        combinations = itertools.product(boundary_fractions(t), EXPONENT_PAIRS)
        pairs = [(e << 23 | x, SIGN | f << 23 | y) for (x, y), (e, f) in combinations]
        for r in (None, RESULT_BITS[1 + t % 5]):
            assert_reference_is_scalar_model(pairs, Multiplier(family, t, r))


BITS = st.integers(0, 2**32 - 1) | st.sampled_from(EDGES)
PARAMETERS = st.sampled_from([(family, t) for family in FAMILIES for t in FAMILIES[family].truncations])


@settings(max_examples=300, deadline=None)
@given(PARAMETERS, st.none() | st.integers(1, 23), st.lists(st.tuples(BITS, BITS), min_size=1, max_size=50))
@example(("mbm", 17), None, [(0x3FC00000, 0x3FDC0000)])
def test_products_of_random_bit_patterns(parameters, result_bits, pairs):
    assert_reference_is_scalar_model(pairs, Multiplier(*parameters, result_bits))


@pytest.mark.parametrize(
    ("name", "bias", "mean", "peak"),
    [("mbm", -0.10, 2.58, 7.81), ("mitchell", -3.85, 3.85, 11.11), ("mbm-t20", -3.85, 6.91, 24.95)],
)
def test_errors_are_the_published_ones(name, bias, mean, peak):
    """Compare relative errors in percent over uniform random operands in [1, 2)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1 << 22, generator=generator) + 1 for _ in range(2))
    exact = a.double() * b.double()
    error = 100 * (reference_product(a, b, Multiplier.parse(name)).double() / exact - 1)
    assert error.mean().item() == pytest.approx(bias, abs=0.01)
    assert error.abs().mean().item() == pytest.approx(mean, abs=0.01)
    assert error.abs().max().item() == pytest.approx(peak, abs=0.1 if name == "mbm-t20" else 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_operands_of_any_layout_broadcast(family):
    multiplier = Multiplier(family, 3)
    a = torch.randn(4, 6).t()[::2]  # (3, 4), neither contiguous nor dense
    b = torch.randn(5, 1, 1).expand(5, 3, 1)
    product = reference_product(a, b, multiplier)
    assert product.shape == (5, 3, 4)
    for k, i, j in itertools.product(range(5), range(3), range(4)):
        assert product[k, i, j] == reference_product(a[i, j], b[k, i, 0], multiplier)
    assert reference_product(torch.ones(0, 3), torch.ones(3), multiplier).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_operands_must_be_float32(dtype):
    with pytest.raises(TypeError, match=r"float32.*\.float\(\)"):
        reference_product(torch.ones(2), torch.ones(2, dtype=dtype), Multiplier("mbm"))
