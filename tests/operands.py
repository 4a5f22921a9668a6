"""Random operands, and operators' arguments in the form that they take."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(*shapes: tuple[int, ...], device: str = "cpu") -> list[Tensor]:
    """Return normally distributed tensors, the same at each call."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def wild(count: int, generator: torch.Generator) -> Tensor:
    """Return random bit patterns; an eighth are zeros, subnormals, extremes, infinities and NaN."""
    anything = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    exponent = torch.tensor([0, 1, 127, 254, 255])[torch.randint(5, (count,), generator=generator)]
    fraction = torch.tensor([0, 1, 2**22, 2**23 - 1])[torch.randint(4, (count,), generator=generator)]
    edge = (anything & -(2**31)) | exponent << 23 | fraction
    is_edge = torch.randint(8, (count,), generator=generator) == 0
    return from_bits(torch.where(is_edge, edge, anything))


def in_range(count: int, generator: torch.Generator) -> Tensor:
    """Return random signs and fractions; every product is normal, so that convolutions take their fast path."""
    exponent = torch.randint(64, 190, (count,), generator=generator)
    sign_and_fraction = torch.randint(-(2**31), 2**31, (count,), generator=generator) & ~(255 << 23)
    return from_bits(sign_and_fraction | exponent << 23)


def from_bits(bits: Tensor) -> Tensor:
    """Return the float32 numbers with these bit patterns, given as integers of any type."""
    return bits.to(torch.int32).view(torch.float32)


def in_pairs(*arguments: int | Sequence[int]) -> list[list[int]]:
    """Return each of a convolution's stride, padding and dilation as two numbers."""
    return [[x, x] if isinstance(x, int) else list(x) for x in arguments]
