"""Sums of products, as a convolution's outputs, against the bit-exact products added up in float64."""

import torch
import torch.nn.functional as F
from operands import in_pairs
from torch import Tensor

from mbm_cli.backends.shapes import conv2d_output_shape
from mbm_cli.multipliers.float32 import reference_product


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def same_sums(a: Tensor, b: Tensor) -> bool:
    """Return whether the bits are equal; any NaN equals any other."""
    return same_bits(torch.where(a.isnan(), torch.nan, a), torch.where(b.isnan(), torch.nan, b))


def assert_sums_of_products(output: Tensor, *convolution) -> None:
    """Check a convolution's output; its operands and arguments are those of `float64_sums`."""
    assert_within_bound(output, *float64_sums(*convolution))


def assert_within_bound(output: Tensor, total: Tensor, bound: Tensor, where: str = "") -> None:
    finite = total.isfinite()
    assert same_sums(output[~finite], total[~finite].float()), where
    excess = ((output.double() - total).abs() - bound)[finite]
    assert (excess <= 0).all(), f"{excess.max()} more than the bound {where}"


def float64_sums(
    input, weight, bias, stride, padding, dilation, groups, multiplier, rounding=2.0**-23
) -> tuple[Tensor, Tensor]:
    """Return the sums in float64, and how far float32 additions may be from them.

    N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, SIAM 2002, section 4.2.

    Args:
        rounding: the largest relative error of an addition, 2^-23 in any direction or 2^-24 to nearest.
    """
    batch, _, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    # Which pixel (from 1 on; 0 is padding) meets each element of the kernel, for each output.
    numbers = torch.arange(1, size[0] * size[1] + 1, dtype=torch.float64, device=input.device).reshape(1, 1, *size)
    pixel = F.unfold(numbers, kernel, dilation, padding, stride)[0].long()
    pixels = F.pad(input.reshape(batch, groups, 1, group_channels, -1), (1, 0))[..., pixel]
    weights = weight.reshape(1, groups, out_channels // groups, group_channels, -1, 1)
    products = torch.where(pixel > 0, reference_product(pixels, weights, multiplier), 0.0).double()
    out_size = conv2d_output_shape(input, weight, bias, *in_pairs(stride, padding, dilation), groups)
    total, magnitude = (x.sum((3, 4)).reshape(out_size) for x in (products, products.abs()))
    terms = group_channels * kernel[0] * kernel[1]
    if bias is not None:
        terms += 1
        total, magnitude = total + bias.reshape(-1, 1, 1), magnitude + bias.abs().reshape(-1, 1, 1)
    return total, terms * rounding / (1 - terms * rounding) * magnitude
