"""The float32 families and the bit-level model of their products, in plain PyTorch.

Source of the arithmetic: H. Saadat, H. Bokhari, S. Parameswaran, "Minimally Biased Multipliers for Approximate Integer
and Floating-Point Multiplication", IEEE TCAD 37(11), 2018 (the floating-point form, AFMB-t).

PyTorch is imported by the functions that compute, so that naming a multiplier does not load it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device

    from mbm_cli.multipliers.names import Multiplier

FRACTION_BITS = 23
BIAS = 127
# Step 4's error reduction, (2^-4 + 2^-6) of the unit fraction.
CORRECTION = (1 << (FRACTION_BITS - 4)) + (1 << (FRACTION_BITS - 6))

_SIGN = -(1 << 31)  # as a signed 32-bit integer
_INFINITY = 0x7F800000
_NAN = 0x7FC00000
_FRACTION = (1 << FRACTION_BITS) - 1

# Fractions of both operands and the truncated bits, to the carry into the exponent and the fraction; int32 tensors.
Significand = Callable[["Tensor", "Tensor", int], "tuple[Tensor, Tensor]"]


def _mitchell(x: "Tensor", y: "Tensor", t: int) -> "tuple[Tensor, Tensor]":
    total = _clear_low(x, t) + _clear_low(y, t)
    return total >> FRACTION_BITS, total & _FRACTION


def _mbm(x: "Tensor", y: "Tensor", t: int) -> "tuple[Tensor, Tensor]":
    """Add step 4's error reduction to Mitchell's product (steps as in the paper)."""
    x, y = _clear_low(x, t), _clear_low(y, t)
    if t > 0:
        x, y = x | (1 << t), y | (1 << t)
    total = x + y
    carry = total >> FRACTION_BITS
    f = total & _FRACTION
    corrected = f + _clear_low(CORRECTION >> carry, t)
    f = f.where((carry == 1) & (corrected > _FRACTION), corrected)
    overflows = f > _FRACTION  # only without a carry: the fraction is renormalised, truncating
    return (carry + 1).where(overflows, carry), ((f - _FRACTION - 1) >> 1).where(overflows, f)


def _drum(x: "Tensor", y: "Tensor", t: int) -> "tuple[Tensor, Tensor]":
    """Multiply the leading bits of both significands exactly, the lowest of them set; truncate the product.

    Source: AFDR in the paper; S. Hashemi, R. I. Bahar, S. Reda, "DRUM: A Dynamic Range Unbiased Multiplier for
    Approximate Applications", ICCAD 2015.
    """
    x, y = (((_clear_low(f, t) | (1 << t)) + (1 << FRACTION_BITS)).long() for f in (x, y))
    product = x * y
    carry = product >> (2 * FRACTION_BITS + 1)
    return carry.int(), ((product >> (FRACTION_BITS + carry)) & _FRACTION).int()


@dataclass(frozen=True)
class Family:
    """Products that differ in how many low fraction bits the operands lose.

    Attributes:
        what: what it is, in a few words.
        example: a multiplier of the family.
        significand: the model of its fractions; ``None`` for the IEEE product.
        parameter: what the short form counts: ``t`` the dropped bits, ``k`` the leading bits that are kept.
        truncations: how many bits can be dropped.
    """

    what: str
    example: str
    significand: Significand | None
    parameter: str = "t"
    truncations: range = range(FRACTION_BITS)


# A new family gets a line here, and one in kernels/multiplier.h.
FAMILIES = {
    "exact": Family("the IEEE 754 product", "exact-t16", None),
    "mitchell": Family("Mitchell's logarithmic product", "mitchell-t16-r7", _mitchell),
    "mbm": Family("the minimally biased multiplier", "mbm-t16-r7", _mbm),
    "drum": Family("DRUM: the N leading bits multiplied exactly", "drum-k6", _drum, "k", range(1, FRACTION_BITS)),
}


def reference_product(a: "Tensor", b: "Tensor", multiplier: "Multiplier", table: "Tensor | None" = None) -> "Tensor":
    """Multiply ``a`` and ``b``, element by element, from the definition in integer operations.

    Every backend is held to this model, bit for bit. It is written to be read, not to be fast.

    Args:
        a: float32, any shape.
        b: float32, a shape that broadcasts with ``a``'s.
        multiplier: any but a function in C, which is a definition of its own.
        table: of ``lut`` and ``python``: the operators' table; without it the one of the multiplier's content.

    Returns:
        float32, the broadcast shape. Every NaN is 0x7FC00000.

    Raises:
        TypeError: operands that are not float32.
        ValueError: a multiplier in C.
    """
    import torch

    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"operands must be float32, not {a.dtype} and {b.dtype}: cast them with .float()")
    if multiplier.family == "c" and multiplier.bits is None:
        raise ValueError(f"{multiplier} is compiled for the CPU or a CUDA device; it has no other model")
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()  # a bit view needs a real last dimension
    if multiplier.is_file:
        return _product_of_fields(a, b, multiplier, _table_significand(multiplier, table, a.device))
    significand = FAMILIES[multiplier.family].significand
    if significand is None:
        return _exact_product(a, b, multiplier)
    return _product_of_fields(a, b, multiplier, significand)


def _table_significand(multiplier: "Multiplier", table: "Tensor | None", device: "device") -> Significand:
    from mbm_cli.multipliers.tables import Table

    if table is None:
        assert isinstance(multiplier.content, Table)
        table = multiplier.content.tensor()
    entries, m = table.to(device).int(), table.shape[1].bit_length() - 1

    def significand(x: "Tensor", y: "Tensor", t: int) -> "tuple[Tensor, Tensor]":
        entry = entries[y >> (FRACTION_BITS - m), x >> (FRACTION_BITS - m)]
        return entry >> m, (entry & ((1 << m) - 1)) << (FRACTION_BITS - m)

    return significand


def _exact_product(a: "Tensor", b: "Tensor", multiplier: "Multiplier") -> "Tensor":
    product = _truncate_finite(a, multiplier.truncate) * _truncate_finite(b, multiplier.truncate)
    product = _truncate_finite(product, FRACTION_BITS - (multiplier.result_bits or FRACTION_BITS))
    return product.where(~product.isnan(), float("nan"))


def _truncate_finite(x: "Tensor", bits: int) -> "Tensor":
    """Clear the low fraction bits of finite numbers; leave infinities and NaN as they are."""
    return _from_bits(_clear_low(_bits(x), bits)).where(x.isfinite(), x)


def _product_of_fields(a: "Tensor", b: "Tensor", multiplier: "Multiplier", significand: Significand) -> "Tensor":
    """Combine signs, exponents and special values as in the paper, and fractions as the family does."""
    import torch

    a, b = _bits(a), _bits(b)
    sign = (a ^ b) & _SIGN
    exponent_a, exponent_b = (a >> FRACTION_BITS) & 0xFF, (b >> FRACTION_BITS) & 0xFF
    carry, f = significand(a & _FRACTION, b & _FRACTION, multiplier.truncate)
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


def _bits(x: "Tensor") -> "Tensor":
    import torch

    return x.view(torch.int32)


def _from_bits(x: "Tensor") -> "Tensor":
    import torch

    return x.int().view(torch.float32)


def _clear_low(x: "Tensor", bits: int) -> "Tensor":
    return x & ~((1 << bits) - 1)
