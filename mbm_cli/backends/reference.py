"""The reference backend, for devices without kernels: the bit-level model, in plain PyTorch."""

import torch
from torch import Tensor

from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.operators import Operators
from mbm_cli.multipliers.content import of_handle
from mbm_cli.multipliers.float32 import reference_product

# Products held in memory at once: the model spends about ten int32 tensors of this size.
_CHUNK = 1 << 22


def multiply(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None = None) -> Tensor:
    return reference_product(a, b, of_handle(multiplier), table).clone()


def run(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    multiplier: str,
    table: Tensor | None,
) -> None:
    """Add up one kernel element of one channel at a time: its products with the input elements under it.

    Padding takes no part.
    """
    g, parsed = geometry, of_handle(multiplier)
    of_groups = g.batch, g.groups, g.out_channels, g.channels
    images = input.as_strided((g.batch, g.groups, 1, g.channels, *g.size), _with_zero(g.input_strides, 2))
    weights = weight.as_strided((1, *of_groups[1:], *g.kernel, 1, 1), (0, *g.weight_strides, g.kernel[1], 1, 1, 1))
    sums = output.as_strided((*of_groups[:3], *g.out_size), (*g.output_strides, g.out_size[1], 1)).zero_()

    step = max(1, _CHUNK // max(1, sums[:1].numel()))
    for channel in range(g.channels):
        for i in range(g.kernel[0]):
            rows, image_rows = _overlap(g, 0, i)
            for j in range(g.kernel[1]):
                columns, image_columns = _overlap(g, 1, j)
                w = weights[:, :, :, channel, i, j]
                for first in range(0, g.batch, step):
                    some = slice(first, first + step)
                    x = images[some, :, :, channel, image_rows, image_columns]
                    operands = (w, x) if g.exchanged else (x, w)
                    sums[some, :, :, rows, columns] += reference_product(*operands, parsed, table)
    if bias is not None:
        sums += bias.reshape(g.groups, g.out_channels, 1, 1)


def _with_zero(strides: tuple[int, ...], dimension: int) -> tuple[int, ...]:
    return (*strides[:dimension], 0, *strides[dimension:])


def _overlap(g: Geometry, axis: int, element: int) -> tuple[slice, slice]:
    """Return the outputs along an axis whose element under a kernel element is in the image, and these elements."""
    shift, stride, size = element * g.dilation[axis] - g.padding[axis], g.stride[axis], g.size[axis]
    first = max(0, -(shift // stride))
    last = min(g.out_size[axis], (size - 1 - shift) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    return slice(first, last), slice(first * stride + shift, (last - 1) * stride + shift + 1, stride)


torch.library.impl("mbm::multiply", "default", multiply)
OPERATORS = Operators("default", run)
