"""Integer multipliers: the minimally biased one and Mitchell's, on unsigned numbers of 8 and 16 bits.

Source: H. Saadat, H. Bokhari, S. Parameswaran, "Minimally Biased Multipliers for Approximate Integer and Floating-Point
Multiplication", IEEE TCAD 37(11), 2018, sections III and IV. They are for characterisation; networks use the
floating-point form.
"""

import re
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

FAMILIES = ("mitchell", "mbm")
WIDTHS = (8, 16)
MOST_TRUNCATED = 8
# In products this small, chopping outweighs the error reduction of a carry: without the one that is added to them, the
# 8-bit peak error is Mitchell's, 11.11 %.
_SMALL_CHARACTERISTIC = 6
_SHORT_FORM = re.compile(r"(?P<family>[a-z]+)-int(?P<bits>[0-9]{1,3})(?:-t(?P<t>[0-9]{1,3}))?")
_FLOAT32_FRACTION_BITS, _FLOAT32_BIAS = 23, 127


@dataclass(frozen=True)
class IntegerMultiplier:
    """A family of integer products and its two numbers.

    Attributes:
        family: ``mitchell`` or ``mbm``.
        bits: N, the operands' width, 8 or 16; their fractions have N - 1 bits.
        truncate: t, low fraction bits dropped from each operand, 0 to 8 and at most N - 2.

    Raises:
        ValueError: a family or a number outside of these.
    """

    family: str
    bits: int
    truncate: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown integer family {self.family!r}: the families are {', '.join(FAMILIES)}")
        if type(self.bits) is not int or self.bits not in WIDTHS:
            raise ValueError(f"operands of {self.bits} bits: integer multipliers have {' or '.join(map(str, WIDTHS))}")
        most = min(MOST_TRUNCATED, self.bits - 2)
        if type(self.truncate) is not int or not 0 <= self.truncate <= most:
            raise ValueError(f"truncate is {self.truncate}, but 0 to {most} bits can go from {self.bits}-bit integers")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a short form, ``family-intN[-tT]``, for example ``mbm-int8`` or ``mbm-int16-t3``.

        Raises:
            ValueError: the text is no such name, or a part of it is out of range.
        """
        match = _SHORT_FORM.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not an integer multiplier: write family-intN[-tT] with a family of "
                f"{', '.join(FAMILIES)}, for example mbm-int8 or mbm-int16-t3"
            )
        return cls(match["family"], int(match["bits"]), int(match["t"] or 0))

    def __str__(self) -> str:
        truncated = f"-t{self.truncate}" if self.truncate else ""
        return f"{self.family}-int{self.bits}{truncated}"

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of ``a`` and ``b``, element by element.

        A number is 2^k (1 + x), k the position of its leading one. The product is 2^(k1 + k2) (1 + x1 + x2), or
        2^(k1 + k2 + 1) (x1 + x2) where the fractions' sum carries, chopped to an integer. ``mbm`` adds an error
        reduction of 2^-4 + 2^-6 to the fraction, half of it on a carry and none where the fraction would then overflow;
        and one to the product of a carry whose characteristic k1 + k2 + 1 is at most 6.

        Without a carry, the error reduction may lift 1 + x1 + x2 beyond 2. Unlike in the floating-point form no bit is
        dropped then: dropping one makes the 8-bit figures 0.04 / 2.69 / 7.85 % (bias, mean, peak), and the paper's
        Table I has 0.05 / 2.69 / 7.81 %.

        Truncation clears t low bits of both fractions; ``mbm`` then sets bit t, and its error reduction loses those
        bits too, as in the floating-point form. (Table I's figures for 16 bits come out either way.) Zero times
        anything is zero.

        Args:
            a, b: int64, from 0 to 2^N - 1, of shapes that broadcast, on one device.

        Returns:
            int64, the broadcast shape.

        Raises:
            TypeError: operands that are not int64.
            ValueError: an operand that is no unsigned N-bit number.
        """
        for operand in (a, b):
            if operand.dtype != torch.int64:
                raise TypeError(f"operands must be int64, not {operand.dtype}: cast them with .long()")
            if operand.numel() and bool(((operand < 0) | (operand >> self.bits > 0)).any()):
                raise ValueError(f"operands must be from 0 to {(1 << self.bits) - 1}: {self} takes no others")
        (k1, x1), (k2, x2) = decompose(a, self.bits), decompose(b, self.bits)
        width, kept = self.bits - 1, -1 << self.truncate
        one = 1 << width
        x1, x2 = x1 & kept, x2 & kept
        if self.family == "mbm" and self.truncate:
            x1, x2 = x1 | (1 << self.truncate), x2 | (1 << self.truncate)
        total = x1 + x2
        carry = total >> width
        fraction = total & (one - 1)
        if self.family == "mbm":
            whole = (one >> 4) + (one >> 6)
            corrected = fraction + torch.where(carry == 1, (whole >> 1) & kept, whole & kept)
            fraction = torch.where((carry == 1) & (corrected >= one), fraction, corrected)
        characteristic = k1 + k2 + carry
        product = ((one + fraction) << characteristic) >> width
        if self.family == "mbm":
            product = product + ((carry == 1) & (characteristic <= _SMALL_CHARACTERISTIC))
        return torch.where((a == 0) | (b == 0), 0, product)


def decompose(numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The position of the leading one, and the fraction below it, left-aligned to ``bits - 1`` bits.

    Args:
        numbers: int64, below 2^bits with ``bits`` at most 24. What zero gives means nothing.

    Returns:
        Two int64 tensors of the same shape.
    """
    # A float32 holds such an integer exactly, and its fields are the two.
    fields = numbers.to(torch.float32).view(torch.int32).to(torch.int64)
    position = (fields >> _FLOAT32_FRACTION_BITS) - _FLOAT32_BIAS
    fraction = (fields & ((1 << _FLOAT32_FRACTION_BITS) - 1)) >> (_FLOAT32_FRACTION_BITS - (bits - 1))
    return position.clamp(min=0), fraction
