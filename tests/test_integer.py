"""Integer multipliers against a scalar model in Python integers, and against the paper's Table I."""

import re

import pytest
import torch

from mbm_cli.multipliers.integer import MOST_TRUNCATED, IntegerMultiplier

NAMES = [
    f"{family}-int{bits}{f'-t{t}' if t else ''}"
    for family in ("mbm", "mitchell")
    for bits in (8, 16)
    for t in range(min(MOST_TRUNCATED, bits - 2) + 1)
]
# Bias, mean and peak in percent, as printed.
TABLE_1 = {"mbm-int8": ("0.05", "2.69", "7.81"), "mitchell-int8": ("-3.76", "3.76", "11.11")}


def scalar_product(a: int, b: int, family: str, bits: int, t: int) -> int:
    """Multiply as on paper, with strings of bits; fractions are whole numbers of 2^-(bits - 1)."""
    if not a * b:
        return 0
    one = 2 ** (bits - 1)
    sum_, k = 0, 0
    for number in (a, b):
        leading, *rest = f"{number:b}"
        assert leading == "1"
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


@pytest.mark.parametrize("name", NAMES)
def test_products_equal_the_scalar_model(name):
    multiplier = IntegerMultiplier.parse(name)
    assert str(multiplier) == name
    most = 2**multiplier.bits - 1
    edges = torch.tensor([*range(9), 127, 128, 129, 191, 254, 255, most // 2, most // 2 + 1, most - 1, most])
    generator = torch.Generator().manual_seed(0)
    # Many small operands, too, where mbm adds one to products with a carry.
    drawn = [torch.randint(below, (2000, 2), generator=generator) for below in (most + 1, 32)]
    pairs = torch.cat([torch.cartesian_prod(edges, edges), *drawn])
    fields = multiplier.family, multiplier.bits, multiplier.truncate
    assert multiplier.multiply(*pairs.T).tolist() == [scalar_product(a, b, *fields) for a, b in pairs.tolist()]


@pytest.mark.parametrize("name", ["mbm-int8", "mitchell-int8"])
def test_errors_are_those_of_table_1(name):
    """Average over all 65,536 pairs; the error of a pair with a zero is zero."""
    numbers = torch.arange(256)
    a, b = numbers[:, None], numbers[None, :]
    exact = (a * b).double()
    errors = torch.where(exact == 0, 0.0, 100 * (IntegerMultiplier.parse(name).multiply(a, b) - exact) / exact)
    measured = (errors.mean().item(), errors.abs().mean().item(), errors.abs().max().item())
    assert tuple(f"{value:.2f}" for value in measured) == TABLE_1[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mbm-int9", "9 bits: integer multipliers have 8 or 16"),
        ("mbm-int8-t7", "0 to 6 bits can go from 8-bit"),
        ("mbm-int16-t9", "0 to 8 bits can go from 16-bit"),
        ("exact-int8", "the families are mitchell, mbm"),
        *[(name, "write family-intN[-tT]") for name in ("mbm-int", "mbm-int8-r3", "mbm")],
    ],
)
def test_other_names_are_rejected(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        IntegerMultiplier.parse(name)


def test_operands_broadcast():
    multiplier = IntegerMultiplier("mbm", 8)
    assert multiplier.multiply(torch.arange(3)[:, None], torch.arange(5)).shape == (3, 5)
    assert multiplier.multiply(torch.empty(0, dtype=torch.int64), torch.tensor(1)).shape == (0,)


@pytest.mark.parametrize(
    ("operand", "kind", "message"),
    [(-1, ValueError, "0 to 255"), (256, ValueError, "0 to 255"), (1.0, TypeError, r"\.long\(\)")],
)
def test_operands_out_of_range_are_rejected(operand, kind, message):
    for a, b in ((operand, 1), (1, operand)):
        with pytest.raises(kind, match=message):
            IntegerMultiplier("mbm", 8).multiply(torch.tensor([a]), torch.tensor([b]))
