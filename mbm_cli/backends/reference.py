"""The reference backend, for devices without kernels: the bit-level model, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli.backends.shapes import conv2d_output_shape
from mbm_cli.multipliers.content import of_handle
from mbm_cli.multipliers.float32 import reference_product

# Products held in memory at once: the model spends about ten int32 tensors of this size.
_CHUNK = 1 << 22


def multiply(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None = None) -> Tensor:
    return reference_product(a, b, of_handle(multiplier), table).clone()


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: str,
    table: Tensor | None = None,
) -> Tensor:
    """Add up one kernel element at a time: its products with the input elements under it, without the padding."""
    parsed = of_handle(multiplier)
    if parsed.is_exact:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    _, out_channels, *out_size = conv2d_output_shape(input, weight, bias, stride, padding, dilation, groups)
    batch, _, *size = input.shape
    _, group_channels, *kernel = weight.shape
    grouped_input = input.reshape(batch, groups, 1, group_channels, *size)
    grouped_weight = weight.reshape(1, groups, out_channels // groups, group_channels, *kernel, 1, 1)
    output = input.new_zeros(batch, groups, out_channels // groups, *out_size)

    step = max(1, _CHUNK // max(1, output[:1].numel()))
    for channel in range(group_channels):
        for i in range(kernel[0]):
            rows, image_rows = _overlap(i * dilation[0] - padding[0], stride[0], size[0], out_size[0])
            for j in range(kernel[1]):
                columns, image_columns = _overlap(j * dilation[1] - padding[1], stride[1], size[1], out_size[1])
                w = grouped_weight[:, :, :, channel, i, j]
                for first in range(0, batch, step):
                    images = slice(first, first + step)
                    x = grouped_input[images, :, :, channel, image_rows, image_columns]
                    output[images, :, :, rows, columns] += reference_product(x, w, parsed, table)
    output = output.reshape(batch, out_channels, *out_size)
    return output if bias is None else output + bias.reshape(-1, 1, 1)


def _overlap(shift: int, stride: int, size: int, out_size: int) -> tuple[slice, slice]:
    """Return the outputs of one axis whose element ``output * stride + shift`` is in the image, and the elements."""
    first = max(0, -(shift // stride))
    last = min(out_size, (size - 1 - shift) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last), slice(first * stride + shift, (last - 1) * stride + shift + 1, stride)


torch.library.impl("mbm::multiply", "default", multiply)
torch.library.impl("mbm::conv2d", "default", conv2d)
