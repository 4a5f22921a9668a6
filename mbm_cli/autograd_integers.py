"""The operators of quantised layers: their schemas, shapes and gradients.

``table`` is int32 (256, 256), as ``IntegerTable.tensor`` makes it. Codes are int8 or uint8. Scales are float32, zero
points whole numbers in float32, both of one element or of one for each row: each output channel of a weight.

``quantized_conv2d`` takes floats: it quantises both operands, sums the table's entries, and scales the sums. Its
gradients are straight-through: those of the convolution of the dequantised operands, zero where an operand was clipped.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from mbm_cli.autograd import CONVOLUTION, GRADIENTS, Gradients, conv2d_gradients, linear_gradients, operator, padded
from mbm_cli.backends.integers import is_dense
from mbm_cli.backends.shapes import conv2d_output_shape

_FORMAT = "int bits, bool signed"
_SCALE = "Tensor scale, Tensor zero"
_SCALES = "Tensor input_scale, Tensor input_zero, Tensor weight_scale, Tensor weight_zero"
for _name, _arguments in {
    "integer_conv2d": f"Tensor input, Tensor weight, {CONVOLUTION}, int padding_code, Tensor table, str path='auto'",
    "quantized_conv2d": f"Tensor input, Tensor weight, Tensor? bias, {_SCALES}, {CONVOLUTION}, {_FORMAT}, "
    f"Tensor table, {GRADIENTS}",
    "quantize": f"Tensor x, {_SCALE}, {_FORMAT}, Tensor(a!)? poison=None",
    "fake_quantize": f"Tensor x, {_SCALE}, {_FORMAT}",
    "quantize_grad": f"Tensor grad, Tensor x, {_SCALE}, {_FORMAT}",
    "update_range": f"Tensor x, Tensor(a!) running, float momentum, {_FORMAT}",
    "row_scales": f"Tensor x, {_FORMAT}",
    "quantize_and_sum": f"Tensor x, {_SCALE}, int bits, int groups, int[2] padding, Tensor(a!)? poison=None",
    "scale_sums": "Tensor sums, Tensor of_positions, Tensor of_rows, SymInt[] weight_shape, int[2] stride, "
    "int[2] dilation, Tensor input_zero, Tensor weight_zero, Tensor scale, Tensor? bias",
}.items():
    _returned = "(Tensor, Tensor)" if _name == "quantize_and_sum" else "Tensor"
    torch.library.define(f"mbm::{_name}", f"({_arguments}) -> {_returned}", tags=torch.Tag.pt2_compliant_tag)

from mbm_cli.backends import cpu_integers, cuda_integers, cuda_quantize, reference_integers  # noqa: E402, F401

_ops = torch.ops.mbm


@torch.library.register_fake("mbm::integer_conv2d")
def _integer_shape(
    input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, *_: object
) -> Tensor:
    shape = conv2d_output_shape(input, weight, None, stride, padding, dilation, groups)
    return input.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("mbm::quantized_conv2d")
def _quantized_shape(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    input_zero: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    *_: object,
    **__: object,
) -> Tensor:
    return input.new_empty(conv2d_output_shape(input, weight, bias, stride, padding, dilation, groups))


@torch.library.register_fake("mbm::quantize")
def _codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool, poison: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)


@torch.library.register_fake("mbm::quantize_and_sum")
def _codes_and_sums(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, groups: int, padding: list[int], poison: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    count, channels, *size = x.shape
    size = [n + 2 * p for n, p in zip(size, padding, strict=True)]
    codes = x.new_empty(count, channels, *size, dtype=torch.uint8)
    return codes, x.new_empty(count, groups, *size, dtype=torch.int32)


@torch.library.register_fake("mbm::fake_quantize")
@torch.library.register_fake("mbm::quantize_grad")
def _like(first: Tensor, *_: object) -> Tensor:
    return torch.empty_like(first)


@torch.library.register_fake("mbm::update_range")
def _one_scale(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(2)


@torch.library.register_fake("mbm::row_scales")
def _scales_of_rows(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(2, len(x))


@torch.library.register_fake("mbm::scale_sums")
def _floats(sums: Tensor, *_: object) -> Tensor:
    return sums.new_empty(sums.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *scales = inputs[:7]
    *ctx.arguments, bits, signed, _, of_input, input_table, of_weight, weight_table = inputs[7:]
    ctx.format, ctx.multipliers = (bits, signed), (of_input, of_weight)
    ctx.bias_shape = None if bias is None else list(bias.shape)
    ctx.save_for_backward(input, weight, *scales, input_table, weight_table)


def _backward(ctx: Any, grad: Tensor) -> Gradients:
    input, weight, *scales, input_table, weight_table = ctx.saved_tensors
    of_input, of_weight = scales[:2], scales[2:]
    wants_input, wants_weight, wants_bias, wants_input_scale, _, wants_weight_scale, *_ = ctx.needs_input_grad
    wanted = [wants_input or wants_input_scale, wants_weight or wants_weight_scale, wants_bias]
    x = fake_quantize(input, *of_input, *ctx.format) if wanted[1] or wants_input_scale else input
    w = fake_quantize(weight, *of_weight, *ctx.format) if wanted[0] or wants_weight_scale else weight
    tables = (ctx.multipliers[0], input_table), (ctx.multipliers[1], weight_table)
    if is_dense(input, weight, ctx.arguments[1], ctx.arguments[3]):
        grad_x, grad_w, grad_bias = linear_gradients(wanted, grad.flatten(1), x.flatten(1), w.flatten(1), *tables)
        grad_x, grad_w = (None if g is None else g[:, :, None, None] for g in (grad_x, grad_w))
    else:
        grad_x, grad_w, grad_bias = conv2d_gradients(wanted, grad, x, w, ctx.bias_shape, ctx.arguments, *tables)
    of_input_scale = _scale_grad(grad_x, input, x, *of_input, *ctx.format) if wants_input_scale else None
    of_weight_scale = _scale_grad(grad_w, weight, w, *of_weight, *ctx.format) if wants_weight_scale else None
    if wants_input:
        grad_x = quantize_grad(grad_x, input, *of_input, *ctx.format)
    if wants_weight:
        grad_w = quantize_grad(grad_w, weight, *of_weight, *ctx.format)
    gradients = grad_x if wants_input else None, grad_w if wants_weight else None, grad_bias
    return padded(ctx, *gradients, of_input_scale, None, of_weight_scale)


def _scale_grad(
    grad: Tensor | None, x: Tensor, dequantized: Tensor, scale: Tensor, zero: Tensor, bits: int, signed: bool
) -> Tensor:
    """Return the gradient of a scale (Esser et al., "Learned Step Size Quantization", ICLR 2020, equation 3)."""
    assert grad is not None
    rows = scale.reshape(-1, *[1] * (x.dim() - 1))
    # Codes less what they were rounded from, or clipped: then only the code.
    codes = dequantized / rows - quantize_grad(x / rows, x, scale, zero, bits, signed)
    product = grad * codes
    return product.sum().reshape(scale.shape) if scale.numel() == 1 else product.flatten(1).sum(1)


def _save_rounding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bits, signed = inputs
    ctx.format = bits, signed
    ctx.save_for_backward(*tensors[-3:])


def _rounding_backward(ctx: Any, grad: Tensor) -> Gradients:
    """Pass a gradient through where nothing was clipped."""
    return padded(ctx, quantize_grad(grad, *ctx.saved_tensors, *ctx.format))


# Their derivatives are those of gradients.
fake_quantize = operator("fake_quantize", _save_rounding, _rounding_backward)
quantize_grad = operator("quantize_grad", _save_rounding, _rounding_backward)
quantized_conv2d = operator("quantized_conv2d", _save, _backward)


def integer_conv2d(*inputs: Any) -> Tensor:
    """Call the operator ``mbm::integer_conv2d``."""
    output: Tensor = _ops.integer_conv2d(*inputs)
    return output


@register_flop_formula([torch.ops.mbm.integer_conv2d, torch.ops.mbm.quantized_conv2d])
def _flops(input: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count: int = conv_flop_count(input, weight, out_shape)
    return count
