"""The convolutions that the kernels compute: forward passes, gradients and dense layers are one sum on other strides.

A kernel computes, for each image n, group g, output channel o and output position (y, x), the sum over channels c and
kernel elements (i, j) of the products

    input[n, g, c, y * stride - padding + i * dilation, ...] x weight[g, o, c, i, j]

whose input element exists; elements are found through the strides of a `Geometry`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Sizes, and strides in elements. Channels are counted per group; a kernel and an output's plane are contiguous.

    Attributes:
        padding, dilation: can be negative.
        input_strides: of image, group, channel, row, column.
        weight_strides: of group, output channel, channel.
        output_strides: of image, group, output channel.
        divisible: whether a sum may be added up in parts; otherwise its order is that of 0.1.0, bit for bit.
        exchanged: whether the input is the second operand of a product.
    """

    batch: int
    groups: int
    channels: int
    out_channels: int
    size: Pair
    kernel: Pair
    out_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    input_strides: tuple[int, int, int, int, int]
    weight_strides: tuple[int, int, int]
    output_strides: tuple[int, int, int]
    divisible: bool = True
    exchanged: bool = False

    @property
    def steps(self) -> int:
        """Products of a sum."""
        return self.channels * math.prod(self.kernel)

    @property
    def products(self) -> int:
        return self.outputs * self.steps

    @property
    def is_dense(self) -> bool:
        """Whether this is a dense layer: images of one element, without a kernel or groups."""
        return self.size == self.kernel == self.out_size == (1, 1) and self.groups == 1 and self.padding == (0, 0)

    @property
    def outputs(self) -> int:
        return self.batch * self.groups * self.out_channels * math.prod(self.out_size)


Shape = tuple[int, ...]


def forward(
    shape: Shape,
    strides: Shape,
    weight: Shape,
    out_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Geometry:
    """Return a convolution's geometry; ``weight`` is the shape of a contiguous weight, and the output is contiguous."""
    out_channels, channels, *kernel = weight
    of_row, plane = channels * math.prod(kernel), math.prod(out_size)
    rows = out_channels // groups
    return Geometry(
        shape[0],
        groups,
        channels,
        rows,
        (shape[2], shape[3]),
        (kernel[0], kernel[1]),
        out_size,
        stride,
        padding,
        dilation,
        (strides[0], channels * strides[1], *strides[1:]),  # type: ignore[arg-type]
        (rows * of_row, of_row, math.prod(kernel)),
        (out_channels * plane, rows * plane, plane),
        divisible=False,
    )


def input_grad(
    grad: Shape, strides: Shape, weight: Shape, size: Pair, padding: Pair, dilation: Pair, groups: int
) -> Geometry:
    """Return the geometry of a gradient of a convolution's input, with stride 1.

    The gradient of the output is the input, and the weight's two kinds of channels change places.

    Args:
        grad, strides: of the gradient of the output.
        weight: shape of a contiguous weight.
        size: of the result.
    """
    out_channels, channels, *kernel = weight
    rows, elements, plane = out_channels // groups, math.prod(kernel), math.prod(size)
    return Geometry(
        grad[0],
        groups,
        rows,
        channels,
        (grad[2], grad[3]),
        (kernel[0], kernel[1]),
        size,
        (1, 1),
        (-padding[0], -padding[1]),
        (-dilation[0], -dilation[1]),
        (strides[0], rows * strides[1], *strides[1:]),  # type: ignore[arg-type]
        (rows * channels * elements, elements, channels * elements),
        (groups * channels * plane, channels * plane, plane),
    )


def weight_grad(
    shape: Shape, strides: Shape, grad: Shape, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Geometry:
    """Return the geometry of a gradient of a convolution's weight.

    The gradient of the output, contiguous, is the kernel. Channels are images, and the sum runs over the images.

    Args:
        shape, strides: of the input.
        grad: shape of the gradient of the output.
        kernel: size of the result's kernel.
    """
    channels, rows = shape[1] // groups, grad[1] // groups
    plane, elements = math.prod(grad[2:]), math.prod(kernel)
    return Geometry(
        channels,
        groups,
        shape[0],
        rows,
        (shape[2], shape[3]),
        (grad[2], grad[3]),
        kernel,
        dilation,
        padding,
        stride,
        (strides[1], channels * strides[1], strides[0], strides[2], strides[3]),
        (rows * plane, plane, groups * rows * plane),
        (elements, rows * channels * elements, channels * elements),
        exchanged=True,
    )


def linear(shape: Shape, strides: Shape, rows: int, weight_strides: Shape) -> Geometry:
    """Return the geometry of a dense layer, (N, K) by (O, K): a 1x1 convolution of N images of one element."""
    return Geometry(
        shape[0],
        1,
        shape[1],
        rows,
        size=(1, 1),
        kernel=(1, 1),
        out_size=(1, 1),
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        input_strides=(strides[0], 0, strides[1], 0, 0),
        weight_strides=(0, weight_strides[0], weight_strides[1]),
        output_strides=(rows, 0, 1),
    )


class Phase(NamedTuple):
    """Along one axis, the elements of an input that one residue modulo the stride has, and what contributes to them.

    Attributes:
        first, size: the first element, and how many there are, ``stride`` apart.
        kernel: the kernel elements that contribute; none of them for an empty slice.
        padding, dilation: of the convolution with stride 1 that computes these elements, as `input_grad` takes them.
    """

    first: int
    size: int
    kernel: slice
    padding: int
    dilation: int


def phases(size: int, kernel: int, stride: int, padding: int, dilation: int) -> Iterator[Phase]:
    """Yield the phases of the gradient of a strided convolution's input, along one axis.

    Element y gets products with the kernel elements k for which y + padding - k * dilation is a multiple of the stride:
    every ``stride / gcd(stride, dilation)``-th, from the first one that is.
    """
    common = math.gcd(stride, dilation)
    for first in range(min(stride, size)):
        count = -(-(size - first) // stride)
        candidates = range(min(kernel, stride // common))
        of_first = next((k for k in candidates if (first + padding - k * dilation) % stride == 0), None)
        if of_first is None:
            yield Phase(first, count, slice(0, 0), 0, 1)
        else:
            origin = (first + padding - of_first * dilation) // stride
            yield Phase(first, count, slice(of_first, None, stride // common), origin, dilation // common)
