"""The integer operators of a backend: sums of table entries, and quantisation to the codes that index the table."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli.backends import geometry
from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.shapes import conv2d_output_shape
from mbm_cli.errors import RunError
from mbm_cli.multipliers.integer import Operands


class NotFiniteError(RunError, ValueError):
    """A quantised layer's input has numbers that no code stands for."""

    def __init__(self) -> None:
        super().__init__("a quantised layer's input is not finite: if training diverged, lower optimizer.lr")


# Takes a geometry, codes of input and weight, the contiguous output, the table, the code of padding, and the path.
Run = Callable[..., None]
_ops = torch.ops.mbm


class IntegerOperators:
    """``mbm::integer_conv2d`` and ``mbm::quantized_conv2d`` for a kind of device; ``run`` computes their sums.

    Args:
        scales: whether ``run`` also takes ``scale`` and ``bias``, to write scaled sums to a float32 output.
    """

    def __init__(self, device: str, run: Run, scales: bool = False) -> None:
        self._run, self._scales = run, scales
        for operator in (self.integer_conv2d, self.quantized_conv2d):
            torch.library.impl(f"mbm::{operator.__name__}", device, operator)

    def integer_conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        padding_code: int,
        table: Tensor,
        path: str = "auto",
    ) -> Tensor:
        shape = conv2d_output_shape(input, weight, None, stride, padding, dilation, groups)
        if input.dtype != weight.dtype or input.dtype not in (torch.int8, torch.uint8):
            raise RuntimeError(f"codes are int8 or uint8, both the same, not {input.dtype} and {weight.dtype}")
        output = input.new_empty(shape, dtype=torch.int32)
        self._compute(input, weight, output, (stride, padding, dilation, groups), table, padding_code, path)
        return output

    def _compute(
        self, input: Tensor, weight: Tensor, output: Tensor, arguments: tuple[Any, ...], *rest: Any, **scales: Any
    ) -> None:
        if output.numel() == 0:
            return
        stride, padding, dilation, groups = arguments
        g = forward_geometry(input, weight, list(output.shape), stride, padding, dilation, groups)
        if g.is_dense:
            input = input.flatten(1)
        self._run(g, input, weight.contiguous(), output, *rest, **scales)

    def quantized_conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_scale: Tensor,
        input_zero: Tensor,
        weight_scale: Tensor,
        weight_zero: Tensor,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        bits: int,
        signed: bool,
        table: Tensor,
        *_: object,  # the multipliers of the gradients
    ) -> Tensor:
        shape = conv2d_output_shape(input, weight, bias, stride, padding, dilation, groups)
        scale = input_scale * weight_scale  # NaN if the input is not finite
        if signed:
            codes = _ops.quantize(input, input_scale, input_zero, bits, signed, scale)
            weights = _ops.quantize(weight, weight_scale, weight_zero, bits, signed)
        else:
            codes, of_positions = _ops.quantize_and_sum(input, input_scale, input_zero, bits, groups, padding, scale)
            rows, padding = weight.flatten(1)[:, :, None, None], [0, 0]  # the codes have their border
            weights, of_rows = _ops.quantize_and_sum(rows, weight_scale, weight_zero, bits, 1, padding)
            weights = weights.reshape(weight.shape)
        if scale.device.type == "cpu" and scale[0].isnan():
            raise NotFiniteError
        arguments = stride, padding, dilation, groups
        if self._scales and signed:
            output = input.new_empty(shape)
            self._compute(codes, weights, output, arguments, table, 0, "auto", scale=scale, bias=bias)
            return output
        sums = self.integer_conv2d(codes, weights, *arguments, 0, table)
        if signed:
            return scaled(sums, scale, bias)
        code_sums = of_positions, of_rows.flatten()
        output = _ops.scale_sums(sums, *code_sums, weight.shape, stride, dilation, input_zero, weight_zero, scale, bias)
        return output


def scaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    output = sums.float() * scale.reshape(-1, 1, 1)
    return output if bias is None else output + bias.reshape(-1, 1, 1)


def scale_sums(
    sums: Tensor,
    of_positions: Tensor,
    of_rows: Tensor,
    weight_shape: list[int],
    stride: list[int],
    dilation: list[int],
    input_zero: Tensor,
    weight_zero: Tensor,
    scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Turn sums of T[a, b] into sums of T[a, b] - a b + (a - z_a)(b - z_b), in integers; scale them.

    Args:
        sums: int32 (N, O, H, W), of a convolution without padding.
        of_positions: int32, sums of a over the channels of a group, as `quantize_and_sum` returns them.
        of_rows: int32 (O,), sums of b.
    """
    out_channels, channels, *kernel = weight_shape
    *outer, down, across = of_positions.stride()
    strides = *outer, down * stride[0], across * stride[1], down * dilation[0], across * dilation[1]
    windows = of_positions.as_strided((*of_positions.shape[:2], *sums.shape[2:], *kernel), strides)
    windows = windows.sum((-2, -1), dtype=torch.int32).repeat_interleave(out_channels // windows.shape[1], 1)
    z_a, z_b = input_zero.int(), weight_zero.int()
    constant = z_a * (channels * kernel[0] * kernel[1] * z_b - of_rows)
    return scaled(sums - z_b.reshape(-1, 1, 1) * windows + constant.reshape(-1, 1, 1), scale, bias)


def forward_geometry(
    input: Tensor, weight: Tensor, shape: list[int], stride: Any, padding: Any, dilation: Any, groups: int
) -> Geometry:
    """Return the geometry of a convolution with output of this shape; of one element an image, a dense layer's."""
    if is_dense(input, weight, padding, groups):
        rows = input.shape[1], 1
        return geometry.linear(tuple(input.shape[:2]), input.stride()[:2], len(weight), rows)
    sizes = (shape[2], shape[3]), tuple(stride), tuple(padding), tuple(dilation)
    return geometry.forward(tuple(input.shape), input.stride(), tuple(weight.shape), *sizes, groups)


def is_dense(input: Tensor, weight: Tensor, padding: Any, groups: int) -> bool:
    """Return whether a convolution is a dense layer: images and kernels of one element."""
    return tuple(input.shape[2:]) == tuple(weight.shape[2:]) == (1, 1) and tuple(padding) == (0, 0) and groups == 1


# Quantisation, on any device. A scale and a zero point are of one element, or of one for each row of x.


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool, poison: Tensor | None = None) -> Tensor:
    """Return codes; turn ``poison``, by which results are multiplied, into NaN if x is not finite."""
    if poison is not None:
        poison.mul_(torch.where(x.isfinite().all(), 1.0, torch.nan))
    codes = _rounded(x, scale, zero).clamp_(*code_range(bits, signed))
    return codes.to(torch.int8 if signed else torch.uint8)


def quantize_and_sum(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, groups: int, padding: list[int], poison: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return unsigned codes of images with a border of the code of zero; add them up over the channels of each group.

    The sums are int32 (N, groups, H, W). Otherwise as `quantize`.
    """
    if any(padding):  # the code of zero is on the device: zeros that are quantised become it
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    codes = quantize(x, scale, zero, bits, False, poison)
    return codes, codes.unflatten(1, (groups, -1)).sum(2, dtype=torch.int32)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool) -> Tensor:
    codes = _rounded(x, scale, zero).clamp_(*code_range(bits, signed))
    return codes.sub_(_of_rows(zero, x)).mul_(_of_rows(scale, x))


def quantize_grad(grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool) -> Tensor:
    codes = _rounded(x, scale, zero)
    least, most = code_range(bits, signed)
    return torch.where((codes >= least) & (codes <= most), grad, 0.0)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Return the least and the greatest code of a quantised number: symmetric if they are signed."""
    operands = Operands(bits, signed)
    return (-operands.most if signed else 0), operands.most


def _rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (x / _of_rows(scale, x)).round_().add_(_of_rows(zero, x))


def _of_rows(values: Tensor, x: Tensor) -> Tensor:
    """Shape values so that they broadcast along the rows of x."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def update_range(x: Tensor, running: Tensor, momentum: float, bits: int, signed: bool) -> Tensor:
    """Move a running range, float32 (2,), towards that of x; return its scale and zero point, float32 (2,)."""
    if x.numel() > 0:
        running.add_((torch.stack(x.aminmax()) - running).mul_(momentum))
    return torch.cat(scale_of(running[:1], running[1:], Operands(bits, signed)))


def row_scales(x: Tensor, bits: int, signed: bool) -> Tensor:
    """Return the scales and the zero points of the ranges of rows, float32 (2, rows)."""
    return torch.stack(scale_of(*x.flatten(1).aminmax(dim=1), Operands(bits, signed)))


def scale_of(low: Tensor, high: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of ranges; a range without extent has the scale 1.

    Args:
        low, high: float32 (n,), the ends of the ranges.
    """
    most = torch.full_like(low, operands.most)  # CUDA would multiply by the reciprocal of a number
    if operands.signed:
        scale = torch.maximum(low.abs(), high.abs()) / most
        return torch.where(scale == 0, 1.0, scale), torch.zeros_like(scale)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / most
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / scale).round().clamp(0, operands.most)


for _function in (quantize, quantize_and_sum, fake_quantize, quantize_grad, update_range, row_scales, scale_sums):
    torch.library.impl(f"mbm::{_function.__name__}", "default", _function)
