"""What a multiplier is: its name, its parameters, and the bit-level model of its product in plain PyTorch.

Source of the arithmetic: H. Saadat, H. Bokhari, S. Parameswaran, "Minimally Biased Multipliers for Approximate Integer
and Floating-Point Multiplication", IEEE TCAD 37(11), 2018 (the floating-point form, AFMB-t).
"""

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

FRACTION_BITS = 23
BIAS = 127
# Step 4's error reduction, (2^-4 + 2^-6) of the unit fraction.
CORRECTION = (1 << (FRACTION_BITS - 4)) + (1 << (FRACTION_BITS - 6))
FAMILIES = ("exact", "mitchell", "mbm")

_SIGN = -(1 << 31)  # as a signed 32-bit integer
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
_FRACTION = (1 << FRACTION_BITS) - 1
_SHORT_FORM = re.compile(r"(?P<family>[a-z]+)(?:-t(?P<t>[0-9]{1,3}))?(?:-r(?P<r>[0-9]{1,3}))?")


@dataclass(frozen=True)
class Multiplier:
    """A family of products and its two numbers.

    Attributes:
        family: ``exact``, ``mitchell`` or ``mbm``.
        truncate: low fraction bits dropped from each operand, 0..22.
        result_bits: fraction bits kept in the product, 1..23; ``None`` keeps all 23.

    Raises:
        ValueError: a family or a number outside of these.
    """

    family: str
    truncate: int = 0
    result_bits: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown multiplier family {self.family!r}: the families are {', '.join(FAMILIES)}")
        if type(self.truncate) is not int or not 0 <= self.truncate < FRACTION_BITS:
            raise ValueError(f"truncate is {self.truncate}, but 0 to {FRACTION_BITS - 1} fraction bits can be dropped")
        if self.result_bits is None:
            return
        if type(self.result_bits) is not int or not 1 <= self.result_bits <= FRACTION_BITS:
            raise ValueError(f"result_bits is {self.result_bits}, but 1 to {FRACTION_BITS} fraction bits can be kept")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the short form ``family[-tT][-rR]``, for example ``mbm-t16-r7``.

        Raises:
            ValueError: the text is not a short form, or a part of it is out of range.
        """
        match = _SHORT_FORM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a multiplier: write family[-tT][-rR] with a family of "
                f"{', '.join(FAMILIES)}, for example mbm, mbm-t8 or mbm-t16-r7"
            )
        result_bits = None if match["r"] is None else int(match["r"])
        return cls(match["family"], int(match["t"] or 0), result_bits)

    def __str__(self) -> str:
        truncate = f"-t{self.truncate}" if self.truncate else ""
        result_bits = "" if self.result_bits is None else f"-r{self.result_bits}"
        return f"{self.family}{truncate}{result_bits}"

    @property
    def is_exact(self) -> bool:
        """Whether the product is IEEE 754's own, with nothing dropped from operands or result."""
        return self.family == "exact" and self.truncate == 0 and self.result_bits in (None, FRACTION_BITS)


def reference_product(a: Tensor, b: Tensor, multiplier: Multiplier) -> Tensor:
    """The product of ``a`` and ``b``, element by element, from the definition in integer operations.

    This is the model that every backend is held to, bit for bit; it is written to be read, not to be fast.

    Args:
        a: float32, any shape.
        b: float32, a shape that broadcasts with ``a``'s.

    Returns:
        float32, the broadcast shape. Every NaN is 0x7FC00000.
    """
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"operands must be float32, not {a.dtype} and {b.dtype}: cast them with .float()")
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()  # a bit view needs a real last dimension
    product = _exact_product if multiplier.family == "exact" else _logarithmic_product
    return product(a, b, multiplier)


def _exact_product(a: Tensor, b: Tensor, multiplier: Multiplier) -> Tensor:
    product = _truncate_finite(a, multiplier.truncate) * _truncate_finite(b, multiplier.truncate)
    dropped = FRACTION_BITS - (multiplier.result_bits or FRACTION_BITS)
    product = _truncate_finite(product, dropped)
    return torch.where(product.isnan(), _from_bits(torch.full_like(_bits(product), _NAN)), product)


def _truncate_finite(x: Tensor, bits: int) -> Tensor:
    """Clear the low fraction bits of finite numbers; infinities and NaN stay what they are."""
    return torch.where(x.isfinite(), _from_bits(_clear_low(_bits(x), bits)), x)


def _logarithmic_product(a: Tensor, b: Tensor, multiplier: Multiplier) -> Tensor:
    """Mitchell's product, and with the error reduction of step 4 the minimally biased one (steps as in the paper)."""
    t, minimally_biased = multiplier.truncate, multiplier.family == "mbm"
    a, b = _bits(a), _bits(b)
    sign = (a ^ b) & _SIGN
    exponent_a, exponent_b = (a >> FRACTION_BITS) & 0xFF, (b >> FRACTION_BITS) & 0xFF
    x, y = _clear_low(a & _FRACTION, t), _clear_low(b & _FRACTION, t)
    if minimally_biased and t > 0:
        x, y = x | (1 << t), y | (1 << t)

    total = x + y
    carry = total >> FRACTION_BITS
    f = total & _FRACTION
    if minimally_biased:
        c = _clear_low(torch.where(carry == 1, CORRECTION >> 1, CORRECTION), t)
        corrected = f + c
        f = torch.where((carry == 1) & (corrected > _FRACTION), f, corrected)
    exponent = exponent_a + exponent_b - BIAS + carry
    overflows = f > _FRACTION  # only ever without a carry: the fraction is renormalised, truncating
    exponent = torch.where(overflows, exponent + 1, exponent)
    f = torch.where(overflows, (f - _FRACTION - 1) >> 1, f)
    f = _clear_low(f, FRACTION_BITS - (multiplier.result_bits or FRACTION_BITS))

    product = sign | (exponent << FRACTION_BITS) | f
    product = torch.where(exponent <= 0, sign, product)
    product = torch.where(exponent >= 255, sign | _INFINITY, product)

    zero_a, zero_b = exponent_a == 0, exponent_b == 0  # subnormals count as zero
    special_a, special_b = exponent_a == 255, exponent_b == 255
    nan = (special_a & ((a & _FRACTION) != 0)) | (special_b & ((b & _FRACTION) != 0))
    nan = nan | (special_a & zero_b) | (zero_a & special_b)
    product = torch.where(zero_a | zero_b, sign, product)
    product = torch.where(special_a | special_b, sign | _INFINITY, product)
    product = torch.where(nan, _NAN, product)
    return _from_bits(product)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _from_bits(x: Tensor) -> Tensor:
    return x.to(torch.int32).view(torch.float32)


def _clear_low(x: Tensor, bits: int) -> Tensor:
    return x & ~((1 << bits) - 1)
