"""The functions of the Python side: ``multiply``, ``conv2d`` and ``linear``, which check their arguments."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli import autograd
from mbm_cli.multipliers.content import operands, resolve, resolve_backward
from mbm_cli.multipliers.names import Backward, Multiplier

# The multiplier of the gradients: one for both, "same" for the layer's own, or a mapping of "input" and "weight".
BackwardLike = Backward | Multiplier | Mapping[str, Multiplier | str] | str


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
    return autograd.multiply(a, b, *operands(resolve(multiplier), a.device))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    multiplier: Multiplier | str = "mbm",
    backward: BackwardLike = "exact",
) -> Tensor:
    """Compute ``torch.nn.functional.conv2d`` with the multiplier's products; sums are float32, the bias is exact.

    Gradients are those of the convolution, from the saved operands (straight-through), with the products of
    ``backward``; their own derivatives are exact. Under autocast operands are cast to float32.

    Args:
        input: float32, (N, C, H, W) or (C, H, W), any memory format.
        weight: float32, (O, C / groups, kH, kW).
        bias: float32, (O,), or ``None``.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, ``"same"`` and ``"valid"`` included;
            up to 2^31 - 1.
        multiplier: a ``Multiplier`` or its name, for example ``"mbm-t16-r7"``; a file that is named is read at each
            call.
        backward: of both gradients: a ``Multiplier`` or its name, or ``"same"``; or a mapping with ``"input"`` and
            ``"weight"``, for one each. The gradient is the first operand of its products.

    Returns:
        float32, (N, O, H', W') or (O, H', W').

    Raises:
        RuntimeError: operands that are not float32, not dense or on two devices, or arguments that do not fit together;
            or a dimension other than the batch is empty.
        TypeError: arguments of a type that ``torch.nn.functional.conv2d`` does not take either.
        ValueError: not a multiplier, or a number of more than 64 bits.
    """
    products = _products(multiplier, backward)
    if all(one.is_exact for one in products):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    _check_tensors(input=input)
    arguments = [one for product in products for one in operands(product, input.device)]
    return conv2d_of_operands(input, weight, bias, stride, padding, dilation, groups, *arguments)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    multiplier: Multiplier | str = "mbm",
    backward: BackwardLike = "exact",
) -> Tensor:
    """Compute ``torch.nn.functional.linear`` with the multiplier's products; sums are float32, the bias is exact.

    Gradients and autocast are as in `conv2d`.

    Args:
        input: float32, (..., K).
        weight: float32, (O, K).
        bias: float32, (O,), or ``None``.
        multiplier, backward: as in `conv2d`.

    Returns:
        float32, (..., O).

    Raises:
        RuntimeError: operands that are not float32, not dense or on two devices, or that do not fit together.
        TypeError: an operand that is not a tensor.
        ValueError: not a multiplier.
    """
    products = _products(multiplier, backward)
    if all(one.is_exact for one in products):
        return F.linear(input, weight, bias)
    _check_tensors(input=input)
    return linear_of_operands(input, weight, bias, *[x for one in products for x in operands(one, input.device)])


def _products(multiplier: Multiplier | str, backward: BackwardLike) -> tuple[Multiplier, Multiplier, Multiplier]:
    """Return the resolved multipliers of the forward pass and of the gradients of input and weight."""
    forward = resolve(multiplier)
    return forward, *resolve_backward(backward).of_layer(forward)


def linear_of_operands(input: Tensor, weight: Tensor, bias: Tensor | None, *products: Any) -> Tensor:
    """Compute `linear` for multipliers as `conv2d_of_operands` takes them."""
    _check_tensors(input=input, weight=weight, **({} if bias is None else {"bias": bias}))
    input, weight, bias = _float32_in_autocast(input, weight, bias)
    _check_operands(input, weight, "input", "weight")
    if bias is not None:
        _check_operands(weight, bias, "weight", "bias")
    if input.dim() < 1 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"an input {list(input.shape)} does not fit a weight {list(weight.shape)}")
    output = autograd.linear(input.reshape(math.prod(input.shape[:-1]), weight.shape[1]), weight, bias, *products)
    return output.reshape(*input.shape[:-1], len(weight))


def conv2d_of_operands(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    *products: Any,
) -> Tensor:
    """Compute `conv2d` for multipliers as layers keep them.

    Args:
        products: of the forward pass and of the gradients of input and weight, each a handle and a table or ``None``
            on the input's device.
    """
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
    output = autograd.conv2d(batch, weight, bias, stride, padding, dilation, groups, *products)
    return output.squeeze(0) if input.dim() == 3 else output


def _float32_in_autocast(a: Tensor, b: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast to float32 where autocast is on, as PyTorch's own float32-only operators do."""
    kind = a.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return a, b, c
    return a.float(), b.float(), None if c is None else c.float()


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
