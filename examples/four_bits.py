"""A multiplier in Python, python:examples/four_bits.py:product: operands of 4 fraction bits, exact products."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the elementwise products of two float32 tensors.

    mbm tabulates their fractions. Signs and exponents must be those of a multiplication.
    """
    return truncate(a) * truncate(b)


def truncate(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # the mantissa is in [0.5, 1): its leading bit is not part of the fraction
    return torch.ldexp(torch.trunc(mantissa * 32) / 32, exponent)
