"""The operators ``mbm::conv2d`` and ``mbm::multiply``: schema, shapes, gradients. The backends implement them.

``multiplier`` is a handle: a short form (``mbm-t8``), ``table``, or the source of a function in C. Only ``table`` comes
with a tensor, int16 (2^m + 1, 2^m) as ``Table.tensor`` makes it. Together they say everything about the product.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from mbm_cli.backends.shapes import conv2d_output_shape
from mbm_cli.multipliers.content import operands, resolve
from mbm_cli.multipliers.names import Multiplier

torch.library.define(
    "mbm::conv2d",
    "(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "str multiplier, Tensor? table=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "mbm::multiply",
    "(Tensor a, Tensor b, str multiplier, Tensor? table=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)

from mbm_cli.backends import cpu, cuda, reference  # noqa: E402, F401  (they register kernels for the schemas above)


def multiply(a: Tensor, b: Tensor, multiplier: Multiplier | str = "mbm") -> Tensor:
    """Multiply ``a`` and ``b``, element by element, as the multiplier does.

    Gradients are those of the exact product (straight-through). Under autocast the operands are cast to float32.

    Args:
        a: float32, any shape, on any device.
        b: float32, a shape that broadcasts with ``a``'s, on the same device.
        multiplier: a ``Multiplier`` or its name, for example ``"mbm-t8"``; a file that is named is read at each call.

    Returns:
        float32, the broadcast shape, on the same device.

    Raises:
        RuntimeError: operands that are not float32, not dense, do not broadcast, or lie on two devices.
        TypeError: an operand that is not a tensor.
        ValueError: not a multiplier.
    """
    _check_tensors(a=a, b=b)
    a, b, _ = _float32_in_autocast(a, b)
    _check_operands(a, b, "a", "b")
    operator = _Multiply.apply if _is_transformed() else torch.ops.mbm.multiply
    product: Tensor = operator(a, b, *operands(resolve(multiplier), a.device))
    return product


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    multiplier: Multiplier | str = "mbm",
) -> Tensor:
    """Compute ``torch.nn.functional.conv2d`` with the multiplier's products; sums are float32, the bias is exact.

    Gradients are those of the exact convolution, from the saved operands (straight-through). Under autocast operands
    are cast to float32.

    Args:
        input: float32, (N, C, H, W) or (C, H, W), any memory format.
        weight: float32, (O, C / groups, kH, kW).
        bias: float32, (O,), or ``None``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, ``"same"`` and ``"valid"`` included;
            up to 2^31 - 1.
        multiplier: a ``Multiplier`` or its name, for example ``"mbm-t16-r7"``; a file that is named is read at each
            call.

    Returns:
        float32, (N, O, H', W') or (O, H', W').

    Raises:
        RuntimeError: operands that are not float32, not dense or on two devices, or arguments that do not fit together;
            or a dimension other than the batch is empty.
        TypeError: arguments of a type that ``torch.nn.functional.conv2d`` does not take either.
        ValueError: not a multiplier, or a number of more than 64 bits.
    """
    multiplier = resolve(multiplier)
    if multiplier.is_exact:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    _check_tensors(input=input)
    arguments = operands(multiplier, input.device)
    return conv2d_of_operands(input, weight, bias, stride, padding, dilation, groups, *arguments)


def conv2d_of_operands(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    handle: str,
    table: Tensor | None,
) -> Tensor:
    """Compute `conv2d` for a multiplier given as a handle and a table on the input's device, as layers keep them."""
    # All types first, as PyTorch does.
    _check_tensors(input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    input, weight, bias = _float32_in_autocast(input, weight, bias)
    strides, dilations, groups = _numbers(stride, "stride"), _numbers(dilation, "dilation"), _number(groups, "groups")
    paddings = padding if isinstance(padding, str) else _numbers(padding, "padding")
    _check_operands(input, weight, "input", "weight")
    if bias is not None:
        _check_operands(weight, bias, "weight", "bias")
    stride, dilation = _pair(strides, "stride"), _pair(dilations, "dilation")
    if weight.dim() != 4 or input.dim() not in (3, 4):
        raise RuntimeError(f"the input has 3 or 4 dimensions and the weight 4, not {input.dim()} and {weight.dim()}")
    if isinstance(paddings, str):
        input, paddings = _resolve_padding(input, weight, stride, paddings, dilation)
    padding = _pair(paddings, "padding")
    batch = input.unsqueeze(0) if input.dim() == 3 else input
    operator = _Conv2d.apply if _is_transformed() else torch.ops.mbm.conv2d
    output: Tensor = operator(batch, weight, bias, stride, padding, dilation, groups, handle, table)
    return output.squeeze(0) if input.dim() == 3 else output


def _float32_in_autocast(a: Tensor, b: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to float32 where autocast is on, as PyTorch's own float32-only operators do."""
    kind = a.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return a, b, c
    return a.float(), b.float(), None if c is None else c.float()


def _is_transformed() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation is active, for which an operator has no rules."""
    if torch.compiler.is_compiling():
        return False
    is_forward: bool = forward_ad._current_level >= 0
    return is_forward or torch._C._functorch.peek_interpreter_stack() is not None


def _check_tensors(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")


def _check_operands(a: Tensor, b: Tensor, name_a: str, name_b: str) -> None:
    for name, tensor in ((name_a, a), (name_b, b)):
        if tensor.layout != torch.strided:
            raise RuntimeError(f"{name} is {tensor.layout}, but the kernels take dense tensors: use {name}.to_dense()")
        if tensor.dtype != torch.float32:
            raise RuntimeError(
                f"{name} is {tensor.dtype}, but the multiplier takes float32: cast it with {name}.float()"
            )
    if a.device != b.device:
        raise RuntimeError(f"{name_a} is on {a.device} and {name_b} on {b.device}: move them to one device")


def _numbers(value: Any, name: str) -> list[int]:
    return [_number(one, name) for one in value] if isinstance(value, list | tuple) else [_number(value, name)]


def _number(value: Any, name: str) -> int:
    """Convert what PyTorch takes as a whole number, which excludes booleans."""
    if isinstance(value, bool):
        raise TypeError(f"{name} takes whole numbers, not {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} takes whole numbers, not {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} takes numbers of 64 bits, not {value}")
    return number


def _pair(values: list[int], name: str) -> list[int]:
    if len(values) not in (1, 2):
        raise RuntimeError(f"{name} takes one number or two, not {len(values)}")
    return values * 2 if len(values) == 1 else values


def _resolve_padding(
    input: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int]
) -> tuple[Tensor, list[int]]:
    """Return ``"valid"`` or ``"same"`` padding as numbers, and the input padded by the odd rest of ``"same"``."""
    if padding == "valid":
        return input, [0, 0]
    if padding != "same":
        raise RuntimeError(f"padding is {padding!r}, but as a word it is 'same' or 'valid'")
    if stride != [1, 1]:
        raise RuntimeError("padding='same' is not defined for strided convolutions")
    total = [dilation[i] * (weight.shape[2 + i] - 1) for i in range(2)]
    if total[0] % 2 or total[1] % 2:
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, [total[0] // 2, total[1] // 2]


@torch.library.register_fake("mbm::multiply")
def _multiply_shape(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None = None) -> Tensor:
    return a.new_empty(torch.broadcast_shapes(a.shape, b.shape))


@torch.library.register_fake("mbm::conv2d")
def _conv2d_shape(
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
    return input.new_empty(conv2d_output_shape(input, weight, bias, stride, padding, dilation, groups))


def _save_multiply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, *_ = inputs
    ctx.save_for_backward(a, b)


def _multiply_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    grad_a = (grad * b).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
    grad_b = (grad * a).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None, None


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.arguments, _, _ = inputs
    ctx.bias_shape = None if bias is None else list(bias.shape)
    ctx.output_shape = output.shape
    ctx.save_for_backward(input, weight)


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.arguments
    wanted = list(ctx.needs_input_grad[:3])
    # cuDNN sums the gradient of a bias over three dimensions at once, in one block for each of a few channels. Summing
    # over one dimension, then two, takes a quarter of the time for LeNet.
    bias_apart = wanted[2] and grad.is_cuda
    # One call reaches cuDNN on the GPU and oneDNN on the CPU, and computes only what is asked for.
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        input,
        weight,
        ctx.bias_shape,
        stride,
        padding,
        dilation,
        False,  # not transposed,
        [0, 0],  # hence no output padding
        groups,
        [*wanted[:2], wanted[2] and not bias_apart],
    )
    if bias_apart:
        grad_bias = grad.sum(0).sum((1, 2))
    return grad_input, grad_weight, grad_bias, *[None] * 6


torch.library.register_autograd("mbm::multiply", _multiply_backward, setup_context=_save_multiply)
torch.library.register_autograd("mbm::conv2d", _conv2d_backward, setup_context=_save_conv2d)


@register_flop_formula(torch.ops.mbm.conv2d)
def _conv2d_flops(input: Any, weight: Any, *arguments: Any, out_shape: Any = None, **more: Any) -> int:
    count: int = conv_flop_count(input, weight, out_shape)
    return count


# ---- torch.func: the operators once more, with rules for forward-mode differentiation and for vmap


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None) -> Tensor:
        product: Tensor = torch.ops.mbm.multiply(a, b, multiplier, table)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_multiply(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _multiply_backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, *_: Any) -> Tensor:
        a, b = ctx.saved_tensors
        return _sum([da * b if da is not None else None, a * db if db is not None else None])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, int]:
        ranks = [x.dim() - (d is not None) for x, d in zip((a, b), in_dims, strict=False)]
        a, b = (
            x if d is None else x.movedim(d, 0)[(slice(None), *[None] * (max(ranks) - rank))]
            for x, d, rank in zip((a, b), in_dims, ranks, strict=False)
        )
        return _Multiply.apply(a, b, *rest), 0


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        output: Tensor = torch.ops.mbm.conv2d(input, weight, bias, *arguments)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_conv2d(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _conv2d_backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, d_input: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, *_: Any) -> Tensor:
        input, weight = ctx.saved_tensors
        by_input = None if d_input is None else F.conv2d(d_input, weight, None, *ctx.arguments)
        by_weight = None if d_weight is None else F.conv2d(input, d_weight, None, *ctx.arguments)
        by_bias = None if d_bias is None else d_bias.reshape(-1, 1, 1)
        return _sum([by_input, by_weight, by_bias]).expand(ctx.output_shape)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, int]:
        """Take the mapped dimension as one of images, or, if weights are mapped, as one of groups."""
        size, (of_input, of_weight, of_bias, *_) = info.batch_size, in_dims
        if of_weight is None and of_bias is None:
            output = _Conv2d.apply(input.movedim(of_input, 0).flatten(0, 1), weight, bias, *arguments)
            return output.unflatten(0, (size, -1)), 0
        stride, padding, dilation, groups, *rest = arguments

        def mapped(x: Tensor, dim: int | None) -> Tensor:
            return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

        images, weights = mapped(input, of_input).movedim(0, 1).flatten(1, 2), mapped(weight, of_weight).flatten(0, 1)
        biases = None if bias is None else mapped(bias, of_bias).flatten()
        output = _Conv2d.apply(images, weights, biases, stride, padding, dilation, size * groups, *rest)
        return output.unflatten(1, (size, -1)), 1


def _sum(parts: list[Tensor | None]) -> Tensor:
    first, *others = [part for part in parts if part is not None]
    for part in others:
        first = first + part
    return first
