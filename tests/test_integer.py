"""Integer multipliers against scalar models in Python integers, and against the paper's Table I."""

import re

import numpy as np
import pytest

from mbm_cli import resolve
from mbm_cli.multipliers.integer import MOST_TRUNCATED, IntegerTable, Operands, product, tabulate
from mbm_cli.multipliers.names import IntegerMultiplier, Multiplier

FORMATS = ("int8", "uint8", "uint16")
LOGARITHMIC = [
    f"{family}-{operands}{f'-t{t}' if t else ''}"
    for family in ("mbm", "mitchell")
    for operands in FORMATS
    for t in range(min(MOST_TRUNCATED, int(operands.lstrip("uint")) - 2) + 1)
]
OTHERS = [
    *[f"exact-{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)],
    *[f"drum-{sign}int{bits}-k{k}" for sign in ("", "u") for bits in (3, 4, 8) for k in range(2, bits)],
]
# Bias, mean and peak in percent, as printed.
TABLE_1 = {"mbm-uint8": ("0.05", "2.69", "7.81"), "mitchell-uint8": ("-3.76", "3.76", "11.11")}


def scalar_product(a: int, b: int, m: IntegerMultiplier) -> int:
    """Multiply magnitudes, and restore the sign."""
    x, y = abs(a), abs(b)
    if m.family == "exact":
        magnitude = x * y
    elif m.family == "drum":
        magnitude = leading(x, m.leading_bits) * leading(y, m.leading_bits)
    else:
        magnitude = logarithmic(x, y, m.family, m.operands.bits, m.truncate)
    return -magnitude if (a < 0) != (b < 0) else magnitude


def leading(number: int, k: int) -> int:
    """Keep k leading bits as a string, set the last of them, and fill with zeros."""
    text = f"{number:b}"
    return number if len(text) <= k else int(text[: k - 1] + "1" + "0" * (len(text) - k), 2)


def logarithmic(a: int, b: int, family: str, bits: int, t: int) -> int:
    """Multiply as on paper, with strings of bits; fractions are whole numbers of 2^-(bits - 1)."""
    if not a * b:
        return 0
    one = 2 ** (bits - 1)
    sum_, k = 0, 0
    for number in (a, b):
        first, *rest = f"{number:b}"
        assert first == "1"
        fraction = "".join(rest).ljust(bits - 1, "0")
        if t:
            fraction = fraction[:-t] + "0" * t
            if family == "mbm":
                fraction = fraction[: -t - 1] + "1" + "0" * t
        sum_, k = sum_ + int(fraction, 2), k + len(rest)
    carries = sum_ >= one
    if family == "mbm":
        # 5/64 of the unit fraction without a carry, and 5/128 with one.
        reduction = 5 * one // (128 if carries else 64) // 2**t * 2**t
        if not carries or sum_ + reduction < 2 * one:
            sum_ += reduction
    if not carries:
        return 2**k * (one + sum_) // one
    k += 1
    return 2**k * sum_ // one + (family == "mbm" and k <= 6)


def parsed(name: str) -> IntegerMultiplier:
    multiplier = Multiplier.parse(name)
    assert isinstance(multiplier, IntegerMultiplier)
    assert str(multiplier) == name
    return multiplier


def products(m: IntegerMultiplier, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return product(m.family, m.operands, a, b, m.truncate, m.leading_bits)


@pytest.mark.parametrize("name", [*LOGARITHMIC, *OTHERS])
def test_products_equal_the_scalar_model(name):
    multiplier = parsed(name)
    least, most = multiplier.operands.least, multiplier.operands.most
    edges = {0, 1, 2, 3, 4, 5, 6, 7, 8, 127, 128, 129, 191, 254, 255, most // 2, most // 2 + 1, most - 1, most, least}
    edges = np.array([one for one in sorted(edges | {-edge for edge in edges}) if least <= one <= most])
    generator = np.random.default_rng(0)
    # Many small operands, too, where mbm adds one to products with a carry.
    drawn = [generator.integers(max(least, -end), min(most, end) + 1, (2, 1000)) for end in (most + 1, 31)]
    a, b = np.concatenate([np.stack([edges.repeat(len(edges)), np.tile(edges, len(edges))]), *drawn], axis=1)
    expected = [scalar_product(x, y, multiplier) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert products(multiplier, a, b).tolist() == expected


@pytest.mark.parametrize("name", ["exact-int4", "drum-int5-k3", "mbm-int8-t2", "mitchell-uint8", "drum-uint3-k2"])
def test_tables_hold_products_by_bit_patterns(name):
    multiplier = parsed(name)
    table = resolve(multiplier).content
    bits, signed = multiplier.operands
    assert (table.operands, table.entries.dtype, table.entries.shape) == (
        multiplier.operands,
        np.int32,
        (1 << bits,) * 2,
    )

    def number(code: int) -> int:
        return code - (1 << bits) if signed and code >> (bits - 1) else code

    for a in (0, 1, 2, (1 << bits) - 1, 1 << (bits - 1)):
        expected = [scalar_product(number(a), number(b), multiplier) for b in range(1 << bits)]
        assert table.entries[a].tolist() == expected


@pytest.mark.parametrize("name", TABLE_1)
def test_errors_are_those_of_table_1(name):
    """Average over all 65,536 pairs; the error of a pair with a zero is zero."""
    numbers = np.arange(256)
    exact = np.outer(numbers, numbers)
    errors = 100 * (resolve(name).content.entries - exact) / np.maximum(exact, 1)
    measured = errors.mean(), np.abs(errors).mean(), np.abs(errors).max()
    assert tuple(f"{value:.2f}" for value in measured) == TABLE_1[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact-int9", "operands have 2 to 8 bits, not 9"),
        ("exact-uint1", "operands have 2 to 8 bits, not 1"),
        ("exact-uint16", "exact multiplies operands of up to 8 bits"),
        ("mbm-int16", "operands have 2 to 8 bits, not 16"),
        ("mbm-int4", "mbm multiplies operands of 8 bits"),
        ("mbm-uint8-t7", "0 to 6 fraction bits can go from uint8"),
        ("mbm-uint16-t9", "0 to 8 fraction bits can go from uint16"),
        ("mbm-int8-k3", "mbm takes -t, not -k"),
        ("exact-int8-t3", "exact has no parameter, not -t"),
        ("drum-int8", "fewer than the 8 of int8, for example drum-int8-k4"),
        ("drum-int8-k8", "fewer than the 8 of int8"),
        ("drum-int2-k2", "fewer than the 2 of int2"),
        ("bam-int8", "the families of integer multipliers are exact, drum, mbm, mitchell"),
        ("mbm-int8-r3", "'mbm-int8-r3' is not a multiplier"),
        ("mbm-int", "'mbm-int' is not a multiplier"),
    ],
)
def test_other_names_are_rejected(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Multiplier.parse(name)


def test_sixteen_bits_have_no_table():
    with pytest.raises(ValueError, match="mbm-uint16 is for mbm characterize"):
        resolve("mbm-uint16")


def test_operands_broadcast():
    multiplier = parsed("mbm-uint8")
    assert products(multiplier, np.arange(3)[:, None], np.arange(5)).shape == (3, 5)
    assert products(multiplier, np.empty(0, np.int64), np.array(1)).shape == (0,)


@pytest.mark.parametrize(("name", "operand"), [("mbm-uint8", -1), ("mbm-uint8", 256), ("exact-int4", 8)])
def test_operands_out_of_range_are_rejected(name, operand):
    for a, b in ((operand, 1), (1, operand)):
        with pytest.raises(ValueError, match="operands must be from"):
            products(parsed(name), np.array([a]), np.array([b]))


def test_tables_are_equal_by_content():
    """The format counts: the same entries mean other operands."""
    table = tabulate("exact", Operands(4, True))
    assert table.digest == IntegerTable(table.operands, table.entries.copy(), {"power": "1 mW"}).digest
    assert table.digest != tabulate("drum", table.operands, leading_bits=2).digest
    assert table.digest != IntegerTable(Operands(4, False), table.entries).digest


@pytest.mark.parametrize("entries", [np.zeros((16, 16)), np.zeros((16, 8), np.int32), np.zeros(256, np.int32)])
def test_tables_have_one_type_and_shape(entries):
    with pytest.raises(ValueError, match=r"not int32 \(16, 16\)"):
        IntegerTable(Operands(4, True), entries)


def test_table_in_bytes_ignores_higher_bits():
    table = tabulate("exact", Operands(3, True))
    assert table.bytes()[0b10101111, 0b101] == -1 * -3
    assert (table.largest, table.largest_error) == (16, 0)
    assert tabulate("mbm", Operands(8, False)).largest_error > 0
