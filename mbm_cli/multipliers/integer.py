"""Integer multipliers: the formats of their operands, the built-in products, and tables of all products.

Sources: H. Saadat, H. Bokhari, S. Parameswaran, "Minimally Biased Multipliers for Approximate Integer and
Floating-Point Multiplication", IEEE TCAD 37(11), 2018, sections III and IV (``mbm`` and ``mitchell``); S. Hashemi,
R. I. Bahar, S. Reda, "DRUM: A Dynamic Range Unbiased Multiplier for Approximate Applications", ICCAD 2015 (``drum``).

NumPy and PyTorch are imported by the functions that compute, so that naming a multiplier does not load them.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

WIDTHS = range(2, 9)  # of operands in networks
CHARACTERIZED = 16  # a width for characterisation alone
MOST_TRUNCATED = 8
# In products this small, chopping outweighs the error reduction of a carry: without the one that is added to them, the
# 8-bit peak error is Mitchell's, 11.11 %.
_SMALL_CHARACTERISTIC = 6


class Operands(NamedTuple):
    """The format of both operands: two's complement (``int8``) or unsigned (``uint8``) numbers of so many bits."""

    bits: int
    signed: bool

    def __str__(self) -> str:
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def least(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def most(self) -> int:
        return (1 << (self.bits - self.signed)) - 1

    def numbers(self) -> "np.ndarray":
        """Return the numbers of all codes, int64 (2^bits,), in the order of their bit patterns."""
        import numpy as np

        codes = np.arange(1 << self.bits)
        return np.where(codes > self.most, codes - (1 << self.bits), codes)


@dataclass(frozen=True)
class IntegerTable:
    """An integer multiplier as the table of all its products.

    Attributes:
        operands: the format of both operands.
        entries: int32 (2^n, 2^n), ``entries[a, b]`` by the operands' bit patterns; a is the activation, b the weight.
        costs: figures of the circuit found in its file, by their names.
    """

    operands: Operands
    entries: "np.ndarray" = field(compare=False, repr=False)
    costs: dict[str, str] = field(default_factory=dict, compare=False)
    digest: str = field(init=False)  # of format and entries

    def __post_init__(self) -> None:
        import numpy as np

        wanted = (1 << self.operands.bits,) * 2
        if self.entries.dtype != np.int32 or self.entries.shape != wanted:
            raise ValueError(f"the entries are {self.entries.dtype} {self.entries.shape}, not int32 {wanted}")
        text = str(self.operands).encode() + np.ascontiguousarray(self.entries).tobytes()
        object.__setattr__(self, "digest", hashlib.sha256(text).hexdigest())

    @cached_property
    def largest(self) -> int:
        """The largest magnitude of a product."""
        return int(abs(self.entries.astype("int64")).max())

    @cached_property
    def largest_error(self) -> int:
        """The largest magnitude of a product's error."""
        import numpy as np

        numbers = self.operands.numbers()
        return int(abs(self.entries - np.outer(numbers, numbers)).max())

    @property
    def bounds(self) -> tuple[int, bool, int, int]:
        """The operands' bits and whether they are signed, the largest product, and the largest error."""
        return *self.operands, self.largest, self.largest_error

    def bytes(self) -> "np.ndarray":
        """Return the table for operands in bytes, int32 (256, 256): the bits above the operands' are ignored."""
        import numpy as np

        codes = np.arange(256) & ((1 << self.operands.bits) - 1)
        return np.ascontiguousarray(self.entries[np.ix_(codes, codes)])

    def tensor(self) -> "Tensor":
        """Return the table as the operators take it: int32 (256, 256), on the CPU."""
        import torch

        return torch.from_numpy(self.bytes())


def tabulate(family: str, operands: Operands, truncate: int = 0, leading_bits: int = 0) -> IntegerTable:
    """Tabulate a built-in multiplier."""
    import numpy as np

    numbers = operands.numbers()
    products = product(family, operands, numbers[:, None], numbers[None], truncate, leading_bits)
    return IntegerTable(operands, products.astype(np.int32))


def product(
    family: str, operands: Operands, a: "np.ndarray", b: "np.ndarray", truncate: int = 0, leading_bits: int = 0
) -> "np.ndarray":
    """Multiply numbers as a built-in family does, element by element; signed ones as magnitudes, with a sign.

    ``drum`` multiplies the ``leading_bits`` leading bits of each operand, the lowest of them set where bits are
    dropped; magnitudes below 2^leading_bits are unchanged.

    Args:
        a, b: int64, numbers of the format, of shapes that broadcast.

    Returns:
        int64, the broadcast shape.

    Raises:
        ValueError: a number outside of the format.
    """
    import numpy as np

    for one in (a, b):
        if one.size and not operands.least <= one.min() <= one.max() <= operands.most:
            raise ValueError(f"operands must be from {operands.least} to {operands.most}: {operands} has no others")
    x, y = np.abs(a), np.abs(b)
    if family == "drum":
        magnitudes = _leading(x, leading_bits) * _leading(y, leading_bits)
    elif family == "exact":
        magnitudes = x * y
    else:
        magnitudes = _logarithmic(family, operands.bits, x, y, truncate)
    signed: np.ndarray = np.where((a < 0) ^ (b < 0), -magnitudes, magnitudes)
    return signed


def _leading(magnitudes: "np.ndarray", kept: int) -> "np.ndarray":
    import numpy as np

    shift = np.maximum(decompose(magnitudes, 1)[0] + 1 - kept, 0)
    reduced: np.ndarray = ((magnitudes >> shift) | (shift > 0)) << shift
    return reduced


def _logarithmic(family: str, bits: int, a: "np.ndarray", b: "np.ndarray", truncate: int) -> "np.ndarray":
    """Multiply unsigned numbers as ``mitchell`` or ``mbm``.

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
    """
    import numpy as np

    (k1, x1), (k2, x2) = decompose(a, bits), decompose(b, bits)
    width, kept = bits - 1, -1 << truncate
    one = 1 << width
    x1, x2 = x1 & kept, x2 & kept
    if family == "mbm" and truncate:
        x1, x2 = x1 | (1 << truncate), x2 | (1 << truncate)
    total = x1 + x2
    carry = total >> width
    fraction = total & (one - 1)
    if family == "mbm":
        whole = (one >> 4) + (one >> 6)
        corrected = fraction + np.where(carry == 1, (whole >> 1) & kept, whole & kept)
        fraction = np.where((carry == 1) & (corrected >= one), fraction, corrected)
    characteristic = k1 + k2 + carry
    magnitudes = ((one + fraction) << characteristic) >> width
    if family == "mbm":
        magnitudes = magnitudes + ((carry == 1) & (characteristic <= _SMALL_CHARACTERISTIC))
    result: np.ndarray = np.where((a == 0) | (b == 0), 0, magnitudes)
    return result


def decompose(numbers: "np.ndarray", bits: int) -> "tuple[np.ndarray, np.ndarray]":
    """Return the position of the leading one, and the fraction below it, left-aligned to ``bits - 1`` bits.

    Args:
        numbers: int64, not negative, below 2^53. The results for zero have no meaning.

    Returns:
        Two int64 arrays of the same shape.
    """
    import numpy as np

    significand, exponent = np.frexp(numbers)  # in [0.5, 1)
    position = np.maximum(exponent.astype(np.int64) - 1, 0)
    fraction = np.floor(np.ldexp(np.maximum(2 * significand - 1, 0), bits - 1)).astype(np.int64)
    return position, fraction
