"""A multiplier in Python, python:examples/four_bits.py:product: operands cut to 4 fraction bits, multiplied exactly."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """The products of two float32 tensors, element by element.

    Only the fractions of what it gives are used, as a table; signs and exponents must be those of a multiplication.
    """
    return cut(a) * cut(b)


def cut(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # the mantissa is in [0.5, 1): its first bit is not of the fraction
    return torch.ldexp(torch.trunc(mantissa * 32) / 32, exponent)
