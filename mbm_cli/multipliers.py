"""What a multiplier is: its name, its parameters, and the bit-level model of its product in plain PyTorch.

Source of the arithmetic: H. Saadat, H. Bokhari, S. Parameswaran, "Minimally Biased Multipliers for Approximate Integer
and Floating-Point Multiplication", IEEE TCAD 37(11), 2018 (the floating-point form, AFMB-t).
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mbm_cli import custom, lut

FRACTION_BITS = 23
BIAS = 127
# Step 4's error reduction, (2^-4 + 2^-6) of the unit fraction.
CORRECTION = (1 << (FRACTION_BITS - 4)) + (1 << (FRACTION_BITS - 6))
USERS = {  # multipliers from files, and how they are named
    "lut": "lut:FILE",
    "python": "python:FILE.py:function",
    "c": "c:FILE.h:function",
}
CODE = ("python:", "c:")  # with which names begin that run what is in the file

_SIGN = -(1 << 31)  # as a signed 32-bit integer
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
_FRACTION = (1 << FRACTION_BITS) - 1
_SHORT_FORM = re.compile(r"(?P<family>[a-z]+)(?:-(?P<parameter>[tk])(?P<n>[0-9]{1,3}))?(?:-r(?P<r>[0-9]{1,3}))?")
_BITS = re.compile(r"(?P<reference>.*)@(?P<bits>[0-9]{1,3})", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where a user's multiplier comes from, and what was found there: a table, or code.

    Attributes:
        text: how the user names it, for example ``lut:my.bin``.
    """

    text: str
    content: lut.Table | custom.Code
    located: str = ""  # the same with the file's whole path


@dataclass(frozen=True)
class Multiplier:
    """A family of products and its two numbers, or a multiplier that a user brings.

    Attributes:
        family: ``exact``, ``mitchell``, ``mbm`` or ``drum``; ``lut``, ``python`` or ``c`` with a source.
        truncate: low fraction bits dropped from each operand, 0..22. ``drum`` with k leading bits drops 24 - k.
        result_bits: fraction bits kept in the product, 1..23; ``None`` keeps all 23.
        source: of a multiplier from a file.

    Raises:
        ValueError: a family or a number outside of these.
    """

    family: str
    truncate: int = 0
    result_bits: int | None = None
    source: Source | None = None

    def __post_init__(self) -> None:
        if self.source is not None:
            _SOURCES[self.key] = self
            return
        if self.family not in FAMILIES:
            raise ValueError(f"unknown multiplier family {self.family!r}: the families are {', '.join(FAMILIES)}")
        allowed = FAMILIES[self.family].truncations
        if type(self.truncate) is not int or self.truncate not in allowed:
            if FAMILIES[self.family].parameter == "k":
                raise ValueError(
                    f"{self.family} keeps {FRACTION_BITS + 1 - allowed[-1]} to {FRACTION_BITS + 1 - allowed[0]} "
                    f"leading bits, for example {self.family}-k6"
                )
            raise ValueError(f"truncate is {self.truncate}, but {allowed[0]} to {allowed[-1]} fraction bits can go")
        if self.result_bits is None:
            return
        if type(self.result_bits) is not int or not 1 <= self.result_bits <= FRACTION_BITS:
            raise ValueError(f"result_bits is {self.result_bits}, but 1 to {FRACTION_BITS} fraction bits can be kept")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # another process may not know the source

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a multiplier's name.

        ``family[-tT][-rR]`` and ``drum-kK[-rR]`` are short forms, for example ``mbm-t16-r7``. ``lut:FILE`` is a table,
        ``python:FILE.py:function`` a function that is tabulated (for 7-bit fractions, or m with ``@m`` behind it),
        ``c:FILE.h:function`` one that is compiled. Files are read now: the multiplier is what they say now.

        Raises:
            ValueError: the text is no such name, a part of it is out of range, or a file is at fault.
        """
        kind, colon, reference = text.partition(":")
        if colon and kind in USERS:
            name, _, rest = (reference, "", "") if kind == "lut" else reference.rpartition(":")
            located = f"{kind}:{Path(os.path.expanduser(name)).absolute()}{rest and ':' + rest}"
            return cls(kind, source=Source(text, _read(kind, reference), located))
        match = _SHORT_FORM.fullmatch(text)
        if match is None and re.fullmatch(r"\w+-int\d+(-t\d+)?", text):
            raise ValueError(f"{text!r} multiplies integers, which mbm characterize measures; convolutions take floats")
        if match is None:
            raise ValueError(
                f"{text!r} is not a multiplier: write family[-tT][-rR] with a family of "
                f"{', '.join(FAMILIES)}, for example mbm, mbm-t8 or mbm-t16-r7, or {', '.join(USERS.values())}"
            )
        family, number = match["family"], int(match["n"] or 0)
        if match["parameter"] and family in FAMILIES and FAMILIES[family].parameter != match["parameter"]:
            raise ValueError(
                f"{text!r} is not a multiplier: {family} takes -{FAMILIES[family].parameter}, not -"
                + match["parameter"]
            )
        truncate = FRACTION_BITS + 1 - number if match["parameter"] == "k" else number
        return cls(family, truncate, None if match["r"] is None else int(match["r"]))

    @classmethod
    def of_key(cls, key: str) -> "Multiplier":
        """The multiplier that has this ``key``; those from files must have been read in this process."""
        return _SOURCES[key] if key in _SOURCES else cls.parse(key)

    @property
    def key(self) -> str:
        """What names it to operators and caches: equal keys are equal products, whatever happens to files."""
        return str(self) if self.source is None else f"{self.family}:{self.source.content.digest}"

    def __str__(self) -> str:
        if self.source is not None:
            return self.source.text
        parameter = FAMILIES[self.family].parameter
        number = FRACTION_BITS + 1 - self.truncate if parameter == "k" else self.truncate
        operands = f"-{parameter}{number}" if number else ""
        result_bits = "" if self.result_bits is None else f"-r{self.result_bits}"
        return f"{self.family}{operands}{result_bits}"

    def distinct(self) -> "list[Multiplier]":
        """This one: what several multipliers by layer have, a single one has, too."""
        return [self]

    @property
    def is_exact(self) -> bool:
        """Whether the product is IEEE 754's own, with nothing dropped from operands or result."""
        return self.family == "exact" and self.truncate == 0 and self.result_bits in (None, FRACTION_BITS)

    @property
    def table(self) -> lut.Table | None:
        return self.source.content if self.source and isinstance(self.source.content, lut.Table) else None

    @property
    def code(self) -> custom.Code | None:
        return self.source.content if self.source and isinstance(self.source.content, custom.Code) else None


_SOURCES: dict[str, Multiplier] = {}


def _read(kind: str, reference: str) -> lut.Table | custom.Code:
    if kind == "lut":
        return lut.read(Path(os.path.expanduser(reference)))
    if kind == "c":
        return custom.read_c(reference)
    match = _BITS.fullmatch(reference)
    return (
        custom.read_python(match["reference"], int(match["bits"]))
        if match
        else custom.read_python(reference, custom.DEFAULT_BITS)
    )


def reference_product(a: Tensor, b: Tensor, multiplier: Multiplier) -> Tensor:
    """The product of ``a`` and ``b``, element by element, from the definition in integer operations.

    This is the model that every backend is held to, bit for bit; it is written to be read, not to be fast.

    Args:
        a: float32, any shape.
        b: float32, a shape that broadcasts with ``a``'s.

    Returns:
        float32, the broadcast shape. Every NaN is 0x7FC00000.

    Raises:
        TypeError: operands that are not float32.
        ValueError: a multiplier in C, which is a definition of its own.
    """
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"operands must be float32, not {a.dtype} and {b.dtype}: cast them with .float()")
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()  # a bit view needs a real last dimension
    if multiplier.code is not None:
        raise ValueError(f"{multiplier} is compiled for the CPU or a CUDA device; there is no other model of it")
    significand = _table if multiplier.table else FAMILIES[multiplier.family].significand
    if significand is None:
        return _exact_product(a, b, multiplier)
    return _product_of_fields(a, b, multiplier, significand)


def _exact_product(a: Tensor, b: Tensor, multiplier: Multiplier) -> Tensor:
    product = _truncate_finite(a, multiplier.truncate) * _truncate_finite(b, multiplier.truncate)
    dropped = FRACTION_BITS - (multiplier.result_bits or FRACTION_BITS)
    product = _truncate_finite(product, dropped)
    return torch.where(product.isnan(), _from_bits(torch.full_like(_bits(product), _NAN)), product)


def _truncate_finite(x: Tensor, bits: int) -> Tensor:
    """Clear the low fraction bits of finite numbers; infinities and NaN stay what they are."""
    return torch.where(x.isfinite(), _from_bits(_clear_low(_bits(x), bits)), x)


# What a family does with fractions: those of both operands in, the carry into the exponent and the fraction out.
Significand = Callable[[Tensor, Tensor, Multiplier], tuple[Tensor, Tensor]]


def _product_of_fields(a: Tensor, b: Tensor, multiplier: Multiplier, significand: Significand) -> Tensor:
    """Signs, exponents and special values as in the paper, fractions as the family has them."""
    a, b = _bits(a), _bits(b)
    sign = (a ^ b) & _SIGN
    exponent_a, exponent_b = (a >> FRACTION_BITS) & 0xFF, (b >> FRACTION_BITS) & 0xFF
    carry, f = significand(a & _FRACTION, b & _FRACTION, multiplier)
    exponent = exponent_a + exponent_b - BIAS + carry
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


def _mitchell(x: Tensor, y: Tensor, multiplier: Multiplier) -> tuple[Tensor, Tensor]:
    total = _clear_low(x, multiplier.truncate) + _clear_low(y, multiplier.truncate)
    return total >> FRACTION_BITS, total & _FRACTION


def _mbm(x: Tensor, y: Tensor, multiplier: Multiplier) -> tuple[Tensor, Tensor]:
    """Mitchell's, with the error reduction of step 4 (steps as in the paper)."""
    t = multiplier.truncate
    x, y = _clear_low(x, t), _clear_low(y, t)
    if t > 0:
        x, y = x | (1 << t), y | (1 << t)
    total = x + y
    carry = total >> FRACTION_BITS
    f = total & _FRACTION
    c = _clear_low(torch.where(carry == 1, CORRECTION >> 1, CORRECTION), t)
    corrected = f + c
    f = torch.where((carry == 1) & (corrected > _FRACTION), f, corrected)
    overflows = f > _FRACTION  # only ever without a carry: the fraction is renormalised, truncating
    return torch.where(overflows, carry + 1, carry), torch.where(overflows, (f - _FRACTION - 1) >> 1, f)


def _drum(x: Tensor, y: Tensor, multiplier: Multiplier) -> tuple[Tensor, Tensor]:
    """The leading bits of both significands, the lowest of them set, multiplied exactly; the product truncated.

    Source: AFDR in the paper; S. Hashemi, R. I. Bahar, S. Reda, "DRUM: A Dynamic Range Unbiased Multiplier for
    Approximate Applications", ICCAD 2015.
    """
    t = multiplier.truncate
    x, y = (((_clear_low(f, t) | (1 << t)) + (1 << FRACTION_BITS)).to(torch.int64) for f in (x, y))
    product = x * y
    carry = product >> (2 * FRACTION_BITS + 1)
    return carry.int(), ((product >> (FRACTION_BITS + carry)) & _FRACTION).int()


def _table(x: Tensor, y: Tensor, multiplier: Multiplier) -> tuple[Tensor, Tensor]:
    assert multiplier.table is not None
    m = multiplier.table.bits
    entries = torch.from_numpy(multiplier.table.entries.astype("int32")).to(x.device)
    entry = entries[x >> (FRACTION_BITS - m), y >> (FRACTION_BITS - m)]
    return entry >> m, (entry & ((1 << m) - 1)) << (FRACTION_BITS - m)


@dataclass(frozen=True)
class Family:
    """Products that differ in how many low fraction bits the operands lose.

    Attributes:
        what: what it is, in a few words.
        significand: the model of its fractions; family ``exact`` needs none.
        parameter: how the short form tells the dropped bits: ``t`` counts those, ``k`` the leading bits that are left.
        truncations: how many bits can be dropped.
    """

    what: str
    example: str
    significand: Significand | None
    parameter: str = "t"
    truncations: range = range(FRACTION_BITS)


# A new family gets a line here, and one in kernels/multiplier.h.
FAMILIES = {
    "exact": Family("the IEEE 754 product; N low fraction bits of the operands dropped", "exact-t16", None),
    "mitchell": Family("Mitchell's logarithmic product, likewise", "mitchell-t16-r7", _mitchell),
    "mbm": Family("the minimally biased multiplier, likewise; R fraction bits kept", "mbm-t16-r7", _mbm),
    "drum": Family("DRUM: the N leading bits multiplied exactly", "drum-k6", _drum, "k", range(1, FRACTION_BITS)),
}


class Name(NamedTuple):
    """A kind of multiplier as users name it."""

    name: str
    what: str
    example: str


NAMES = (
    *(
        Name(
            f"{name}-{family.parameter}N[-rR]" if family.parameter == "k" else f"{name}[-{family.parameter}N][-rR]",
            family.what,
            family.example,
        )
        for name, family in FAMILIES.items()
    ),
    Name("lut:FILE", "a table: .bin (up to 7 fraction bits) or .npy (up to 11)", "lut:mbm.bin"),
    Name(
        "python:FILE.py:function[@M]", "a function in Python, tabulated for M fraction bits", "python:my.py:product@7"
    ),
    Name("c:FILE.h:function", "a function in C on the bit patterns, compiled", "c:my.h:product"),
)


def export(multiplier: Multiplier, bits: int) -> lut.Table:
    """The table of a multiplier for operands of so many fraction bits, its products cut to as many.

    Raises:
        ValueError: more bits than a table may have; or a multiplier in C, of which there is no model.
    """
    return custom.tabulate(lambda a, b: reference_product(a, b, multiplier), bits, str(multiplier))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _from_bits(x: Tensor) -> Tensor:
    return x.to(torch.int32).view(torch.float32)


def _clear_low(x: Tensor, bits: int) -> Tensor:
    return x & ~((1 << bits) - 1)
