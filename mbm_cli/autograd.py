"""The operators that the backends implement: their schemas, shapes and gradients, and their rules for ``torch.func``.

``multiplier`` is a handle: a short form (``mbm-t8``), ``table``, or the source of a function in C. Only ``table`` comes
with a tensor, int16 (2^m + 1, 2^m) as ``Table.tensor`` makes it. Together they say everything about the product. The
first operand of a product is the activation, or the gradient where an operator takes one.

``conv2d`` and ``linear`` also take the multipliers of their gradients. The derivatives of gradients are exact.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from mbm_cli.backends.operators import exact_gradients
from mbm_cli.backends.shapes import conv2d_output_shape, linear_output_shape
from mbm_cli.multipliers.content import of_handle

_PRODUCT = "str multiplier, Tensor? table=None"
GRADIENTS = "str of_input='exact', Tensor? input_table=None, str of_weight='exact', Tensor? weight_table=None"
CONVOLUTION = "int[2] stride, int[2] padding, int[2] dilation, int groups"
for _name, _arguments in {
    "multiply": f"Tensor a, Tensor b, {_PRODUCT}",
    "conv2d": f"Tensor input, Tensor weight, Tensor? bias, {CONVOLUTION}, {_PRODUCT}, {GRADIENTS}",
    "conv2d_input_grad": f"Tensor grad, Tensor weight, SymInt[] input_size, {CONVOLUTION}, {_PRODUCT}",
    "conv2d_weight_grad": f"Tensor grad, Tensor input, SymInt[] weight_size, {CONVOLUTION}, {_PRODUCT}",
    "linear": f"Tensor input, Tensor weight, Tensor? bias, {_PRODUCT}, {GRADIENTS}",
}.items():
    torch.library.define(f"mbm::{_name}", f"({_arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)

from mbm_cli.backends import cpu, cuda_matrix, reference  # noqa: E402, F401  (they register kernels for the schemas above)

Gradients = tuple[Tensor | None, ...]
Product = tuple[str, Tensor | None]  # a handle, and its table
_EXACT = "exact", None, "exact", None  # the gradients of a gradient


@torch.library.register_fake("mbm::multiply")
def _multiply_shape(a: Tensor, b: Tensor, *_: object, **__: object) -> Tensor:
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
    *_: object,
    **__: object,
) -> Tensor:
    return input.new_empty(conv2d_output_shape(input, weight, bias, stride, padding, dilation, groups))


@torch.library.register_fake("mbm::conv2d_input_grad")
@torch.library.register_fake("mbm::conv2d_weight_grad")
def _gradient_shape(grad: Tensor, operand: Tensor, size: list[int], *_: object, **__: object) -> Tensor:
    return grad.new_empty(size)


@torch.library.register_fake("mbm::linear")
def _linear_shape(input: Tensor, weight: Tensor, bias: Tensor | None, *_: object, **__: object) -> Tensor:
    return input.new_empty(linear_output_shape(input, weight, bias))


# Gradients. Each pair saves what a backward pass needs of an operator's inputs, and computes their gradients.


def padded(ctx: Any, *gradients: Tensor | None) -> Gradients:
    """Return the gradients of all inputs; those after the tensors have none."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def _save_multiply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _multiply_backward(ctx: Any, grad: Tensor) -> Gradients:
    a, b = ctx.saved_tensors
    grad_a = (grad * b).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
    grad_b = (grad * a).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
    return padded(ctx, grad_a, grad_b)


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.arguments, _, _, of_input, input_table, of_weight, weight_table = inputs
    ctx.bias_shape = None if bias is None else list(bias.shape)
    ctx.output_shape = output.shape
    ctx.multipliers = of_input, of_weight
    ctx.save_for_backward(input, weight, input_table, weight_table)


def _conv2d_backward(ctx: Any, grad: Tensor) -> Gradients:
    input, weight, input_table, weight_table = ctx.saved_tensors
    of_input, of_weight = (ctx.multipliers[0], input_table), (ctx.multipliers[1], weight_table)
    wanted = list(ctx.needs_input_grad[:3])
    operands = grad, input, weight, ctx.bias_shape, ctx.arguments
    return padded(ctx, *conv2d_gradients(wanted, *operands, of_input, of_weight))


def conv2d_gradients(
    wanted: list[bool],
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_shape: list[int] | None,
    arguments: Any,
    of_input: Product,
    of_weight: Product,
) -> list[Tensor | None]:
    """Compute the wanted gradients of a convolution, of input, weight and bias, with the products of two multipliers.

    Args:
        arguments: stride, padding, dilation, groups.
    """
    approximate = [wanted[0] and not _is_exact(of_input[0]), wanted[1] and not _is_exact(of_weight[0])]
    exact = [wanted[i] and not approximate[i] for i in range(2)]
    # cuDNN sums the gradient of a bias over three dimensions at once, in one block for each of a few channels. Summing
    # over one dimension, then two, takes a quarter of the time for LeNet.
    bias_apart = wanted[2] and (grad.is_cuda or any(approximate))
    gradients: list[Tensor | None] = [None] * 3
    if any(exact) or (wanted[2] and not bias_apart):
        of_exact = [*exact, wanted[2] and not bias_apart]
        gradients = list(exact_gradients(of_exact, grad, input, weight, bias_shape, *arguments))
    if approximate[0]:
        gradients[0] = conv2d_input_grad(grad, weight, list(input.shape), *arguments, *of_input)
    if approximate[1]:
        gradients[1] = conv2d_weight_grad(grad, input, list(weight.shape), *arguments, *of_weight)
    if bias_apart:
        gradients[2] = grad.sum(0).sum((1, 2))
    return gradients


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, operand, size, *ctx.arguments = inputs[:7]
    ctx.size = list(size)
    ctx.output_shape = output.shape
    ctx.save_for_backward(grad, operand)


def _input_grad_backward(ctx: Any, of_input: Tensor) -> Gradients:
    grad, weight = ctx.saved_tensors
    wants_grad, wants_weight, *_ = ctx.needs_input_grad
    of_grad = F.conv2d(of_input, weight, None, *ctx.arguments) if wants_grad else None
    return padded(ctx, of_grad, _exact_weight_grad(ctx, grad, of_input, weight.shape) if wants_weight else None)


def _weight_grad_backward(ctx: Any, of_weight: Tensor) -> Gradients:
    grad, input = ctx.saved_tensors
    wants_grad, wants_input, *_ = ctx.needs_input_grad
    of_grad = F.conv2d(input, of_weight, None, *ctx.arguments) if wants_grad else None
    return padded(ctx, of_grad, _exact_input_grad(ctx, grad, of_weight, input.shape) if wants_input else None)


def _exact_input_grad(ctx: Any, grad: Tensor, weight: Tensor, size: Any = None) -> Tensor:
    like = grad.new_empty(ctx.size if size is None else size)
    result: Tensor = exact_gradients([True, False, False], grad, like, weight, None, *ctx.arguments)[0]
    return result


def _exact_weight_grad(ctx: Any, grad: Tensor, input: Tensor, size: Any = None) -> Tensor:
    like = grad.new_empty(ctx.size if size is None else size)
    result: Tensor = exact_gradients([False, True, False], grad, input, like, None, *ctx.arguments)[1]
    return result


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, _, _, of_input, input_table, of_weight, weight_table = inputs
    ctx.output_shape = output.shape
    ctx.multipliers = of_input, of_weight
    ctx.save_for_backward(input, weight, input_table, weight_table)


def _linear_backward(ctx: Any, grad: Tensor) -> Gradients:
    input, weight, input_table, weight_table = ctx.saved_tensors
    of_input, of_weight = (ctx.multipliers[0], input_table), (ctx.multipliers[1], weight_table)
    return padded(ctx, *linear_gradients(list(ctx.needs_input_grad[:3]), grad, input, weight, of_input, of_weight))


def linear_gradients(
    wanted: list[bool], grad: Tensor, input: Tensor, weight: Tensor, of_input: Product, of_weight: Product
) -> list[Tensor | None]:
    """Compute the wanted gradients of a dense layer, of input, weight and bias, as `conv2d_gradients` does."""
    gradients: list[Tensor | None] = [None] * 3
    if wanted[0]:
        exact = _is_exact(of_input[0])
        gradients[0] = grad.mm(weight) if exact else linear(grad, weight.t(), None, *of_input, *_EXACT)
    if wanted[1]:
        exact = _is_exact(of_weight[0])
        gradients[1] = grad.t().mm(input) if exact else linear(grad.t(), input.t(), None, *of_weight, *_EXACT)
    if wanted[2]:
        gradients[2] = grad.sum(0)
    return gradients


def _is_exact(handle: str) -> bool:
    return of_handle(handle).is_exact


# torch.func: the operators once more, with rules for forward-mode differentiation and for vmap


def operator(
    name: str,
    save: Callable[..., None],
    backward: Callable[..., Gradients],
    exact: Callable[[Any, Tensor, Tensor], Tensor] | None = None,
    vmap: Callable[..., tuple[Tensor, int]] | None = None,
) -> Callable[..., Tensor]:
    """Return a function that calls an operator, under transforms by the rules of an ``autograd.Function``.

    Args:
        save, backward: as ``torch.library.register_autograd`` takes them.
        exact: the operator with exact products, of two operands; it is linear in each. Without it there are no
            forward-mode derivatives.
        vmap: its rule, with the function to apply as the first argument; without it, a loop.
    """
    registered = getattr(torch.ops.mbm, name)
    torch.library.register_autograd(f"mbm::{name}", backward, setup_context=save)

    class Rules(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Tensor:
            output: Tensor = registered(*inputs)
            return output

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            save(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:2])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Gradients:
            return backward(ctx, grad)

        @staticmethod
        def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, d_bias: Tensor | None = None, *_: Any) -> Tensor:
            if exact is None:
                raise NotImplementedError(f"mbm::{name} has no forward-mode derivatives: use reverse mode")
            a, b = ctx.saved_tensors
            parts = [None if da is None else exact(ctx, da, b), None if db is None else exact(ctx, a, db)]
            if d_bias is not None:
                parts.append(d_bias.reshape(-1, *[1] * (len(ctx.output_shape) - 2)).expand(ctx.output_shape))
            first, *others = [part for part in parts if part is not None]
            for part in others:
                first = first + part
            return first

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
            return (vmap or _loop)(Rules.apply, info, in_dims, *inputs)

    def call(*inputs: Any) -> Tensor:
        output: Tensor = (Rules.apply if _is_transformed() else registered)(*inputs)
        return output

    return call


def _is_transformed() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation is active, for which an operator has no rules."""
    if torch.compiler.is_compiling():
        return False
    is_forward: bool = forward_ad._current_level >= 0
    return is_forward or torch._C._functorch.peek_interpreter_stack() is not None


def _loop(apply: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
    """Apply an operator to each slice along the mapped dimension."""

    def sliced(i: int) -> list[Any]:
        return [x.select(d, i) if isinstance(d, int) else x for x, d in zip(inputs, in_dims, strict=False)]

    return torch.stack([apply(*sliced(i)) for i in range(info.batch_size)]), 0


def _vmap_multiply(
    apply: Callable[..., Tensor], info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    ranks = [x.dim() - (d is not None) for x, d in zip((a, b), in_dims, strict=False)]
    a, b = (
        x if d is None else x.movedim(d, 0)[(slice(None), *[None] * (max(ranks) - rank))]
        for x, d, rank in zip((a, b), in_dims, ranks, strict=False)
    )
    return apply(a, b, *rest), 0


def _vmap_conv2d(
    apply: Callable[..., Tensor],
    info: Any,
    in_dims: tuple[Any, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, int]:
    """Take the mapped dimension as one of images, or, if weights are mapped, as one of groups."""
    size, (of_input, of_weight, of_bias, *_) = info.batch_size, in_dims
    if of_weight is None and of_bias is None:
        output = apply(input.movedim(of_input, 0).flatten(0, 1), weight, bias, *arguments)
        return output.unflatten(0, (size, -1)), 0
    stride, padding, dilation, groups, *rest = arguments

    def mapped(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)

    images, weights = mapped(input, of_input).movedim(0, 1).flatten(1, 2), mapped(weight, of_weight).flatten(0, 1)
    biases = None if bias is None else mapped(bias, of_bias).flatten()
    output = apply(images, weights, biases, stride, padding, dilation, size * groups, *rest)
    return output.unflatten(1, (size, -1)), 1


conv2d_input_grad = operator("conv2d_input_grad", _save_gradient, _input_grad_backward, _exact_input_grad)
conv2d_weight_grad = operator("conv2d_weight_grad", _save_gradient, _weight_grad_backward, _exact_weight_grad)
multiply = operator("multiply", _save_multiply, _multiply_backward, lambda _, a, b: a * b, _vmap_multiply)
conv2d = operator(
    "conv2d",
    _save_conv2d,
    _conv2d_backward,
    lambda ctx, input, weight: F.conv2d(input, weight, None, *ctx.arguments),
    _vmap_conv2d,
)
linear = operator("linear", _save_linear, _linear_backward, lambda _, input, weight: input.mm(weight.t()))


@register_flop_formula([torch.ops.mbm.conv2d])
def _conv2d_flops(input: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count: int = conv_flop_count(input, weight, out_shape)
    return count


@register_flop_formula([torch.ops.mbm.conv2d_input_grad])
def _input_grad_flops(grad: Any, weight: Any, input_size: Any, *_: Any, **__: Any) -> int:
    count: int = conv_flop_count(input_size, weight, grad)
    return count


@register_flop_formula([torch.ops.mbm.conv2d_weight_grad])
def _weight_grad_flops(grad: Any, input: Any, weight_size: Any, *_: Any, **__: Any) -> int:
    count: int = conv_flop_count(input, weight_size, grad)
    return count


@register_flop_formula([torch.ops.mbm.linear])
def _linear_flops(input: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    count: int = 2 * input[0] * input[1] * weight[0]
    return count
