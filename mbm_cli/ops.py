"""The functions of the Python side: products, convolutions and dense layers, which check their arguments."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli import autograd, autograd_integers
from mbm_cli.multipliers.content import integer_table, operands, resolve, resolve_backward
from mbm_cli.multipliers.integer import Operands
from mbm_cli.multipliers.names import Backward, Multiplier

# The multiplier of the gradients: one for both, "same" for the layer's own, or a mapping of "input" and "weight".
BackwardLike = Backward | Multiplier | Mapping[str, Multiplier | str] | str
MOST = 2**31 - 1  # of an integer sum


def multiply(a: Tensor, b: Tensor, multiplier: Multiplier | str = "mbm") -> Tensor:
    """Multiply ``a`` and ``b``, element by element, as the multiplier does.

    Gradients are those of the exact product (straight-through). Under autocast the operands are cast to float32.

    An integer multiplier, for example ``"drum-int8-k4"``, takes codes instead, as `integer_conv2d` does, and returns
    int32 products.

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
    multiplier = resolve(multiplier)
    if multiplier.is_integer:
        _check_codes(a, b, "a", "b", multiplier)
        return integer_table(multiplier, a.device)[a.long() & 255, b.long() & 255]
    a, b, _ = _float32_in_autocast(a, b)
    _check_operands(a, b, "a", "b")
    return autograd.multiply(a, b, *operands(multiplier, a.device))


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
    if forward.is_integer:
        raise ValueError(
            f"{forward} multiplies integer codes, which these floats have no scales for: use integer_conv2d or "
            "integer_linear on codes, or the layers ApproxConv2d and ApproxLinear, which quantise"
        )
    return forward, *resolve_backward(backward).of_layer(forward)


def integer_conv2d(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_code: int = 0,
    multiplier: Multiplier | str = "exact-int8",
    path: str = "auto",
) -> Tensor:
    """Sum the products of an integer multiplier over the windows of a convolution, exactly. There is no gradient.

    Args:
        input: codes, (N, C, H, W) or (C, H, W): int8 for a signed multiplier, uint8 for an unsigned one.
        weight: codes of the same type, (O, C / groups, kH, kW).
        stride, padding, dilation, groups: as in `conv2d`.
        padding_code: the code of padded positions, whose products count like any others.
        multiplier: an integer ``Multiplier`` or its name, for example ``"int8:FILE.c"``; a file is read at each call.
        path: how the sums are computed: ``auto``, or one way that the device has (CPU: ``terms``, ``lookup``; CUDA:
            ``terms``, ``rows``, ``direct``); all give the same sums.

    Returns:
        int32, (N, O, H', W') or (O, H', W').

    Raises:
        RuntimeError: codes of another type, or beyond the multiplier's bits; arguments that do not fit together.
        ValueError: not an integer multiplier, or sums that 32 bits might not hold.
    """
    multiplier, operands = _integer(multiplier)
    _check_tensors(input=input, weight=weight)
    _check_codes(input, weight, "input", "weight", multiplier)
    padding_code = _number(padding_code, "padding_code")
    if not operands.least <= padding_code <= operands.most:
        raise ValueError(f"padding_code is {padding_code}, but {operands} has {operands.least} to {operands.most}")
    if weight.dim() != 4 or input.dim() not in (3, 4):
        raise RuntimeError(f"the input has 3 or 4 dimensions and the weight 4, not {input.dim()} and {weight.dim()}")
    _refuse_long_sums(math.prod(weight.shape[1:]), multiplier.content.largest)
    stride, dilation = _pair(_numbers(stride, "stride"), "stride"), _pair(_numbers(dilation, "dilation"), "dilation")
    paddings = padding if isinstance(padding, str) else _numbers(padding, "padding")
    if isinstance(paddings, str):
        input, paddings = _resolve_padding(input, weight, stride, paddings, dilation, padding_code)
    batch = input.unsqueeze(0) if input.dim() == 3 else input
    arguments = stride, _pair(paddings, "padding"), dilation, _number(groups, "groups"), padding_code
    output = autograd_integers.integer_conv2d(batch, weight, *arguments, integer_table(multiplier, input.device), path)
    return output.squeeze(0) if input.dim() == 3 else output


def integer_linear(
    input: Tensor, weight: Tensor, multiplier: Multiplier | str = "exact-int8", path: str = "auto"
) -> Tensor:
    """Sum the products of an integer multiplier over the inputs of a dense layer, exactly. There is no gradient.

    Args:
        input: codes, (..., K), as in `integer_conv2d`.
        weight: codes, (O, K).
        multiplier, path: as in `integer_conv2d`.

    Returns:
        int32, (..., O).

    Raises:
        RuntimeError, ValueError: as `integer_conv2d`.
    """
    _check_tensors(input=input, weight=weight)
    if input.dim() < 1 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise RuntimeError(f"an input {list(input.shape)} does not fit a weight {list(weight.shape)}")
    rows = input.reshape(math.prod(input.shape[:-1]), weight.shape[1], 1, 1)
    output = integer_conv2d(rows, weight[:, :, None, None], multiplier=multiplier, path=path)
    return output.reshape(*input.shape[:-1], len(weight))


def _integer(multiplier: Multiplier | str) -> tuple[Multiplier, Operands]:
    resolved = resolve(multiplier)
    if resolved.operands is None:
        raise ValueError(f"{resolved} multiplies floats; codes take an integer multiplier, for example exact-int8")
    return resolved, resolved.operands


def _refuse_long_sums(steps: int, largest: int, note: str = "") -> None:
    """Refuse sums of so many products of up to a magnitude that could leave 32 bits.

    Raises:
        ValueError: they could.
    """
    if steps * largest > MOST:
        raise ValueError(
            f"a sum of {steps:,} products of up to {largest:,}{note} can leave 32 bits; with this multiplier "
            f"{MOST // largest:,} products fit"
        )


def _largest_without_offsets(bits: int, table: Tensor, scales: tuple[Tensor, ...]) -> int:
    """Return the largest magnitude of T[a, b] - z_a b - z_b a + z_a z_b, for the zero points that there are."""
    numbers = torch.arange(1 << bits)
    errors = table[: 1 << bits, : 1 << bits].cpu().long() - torch.outer(numbers, numbers)
    z_a, z_b = scales[1].cpu().long(), scales[3].cpu().long().unique()
    return max(int((errors + torch.outer(numbers - z_a, numbers - z)).abs().max()) for z in z_b)


def operands_to_quantize(
    input: Tensor, weight: Tensor, bias: Tensor | None, axis: int, channels: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a layer's operands in float32, checked before they change its scales.

    Args:
        axis: of the input's channels, from the end.
        channels: how many there are.

    Raises:
        RuntimeError: an input that is not float32, or does not fit.
    """
    _check_tensors(input=input)
    input, weight, bias = _float32_in_autocast(input, weight, bias)
    _check_operands(input, weight, "input", "weight")
    if input.dim() < -axis or input.shape[axis] != channels:
        raise RuntimeError(f"an input {list(input.shape)} does not fit a weight {list(weight.shape)}")
    return input, weight, bias


def quantized_conv2d_of_operands(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bounds: tuple[int, bool, int, int],
    table: Tensor,
    *gradients: Any,
) -> Tensor:
    """Compute a convolution of quantised operands, for a layer.

    Args:
        scales: scale and zero point of input and weight.
        bounds, table: of the multiplier's ``IntegerTable``, the table as a tensor on the input's device.
        gradients: a handle and a table or ``None`` for the gradients of input and weight.
    """
    steps, (bits, signed, largest, largest_error) = math.prod(weight.shape[1:]), bounds
    if signed:
        _refuse_long_sums(steps, largest)
    elif steps * (largest_error + 4**bits) > MOST:  # which no zero points exceed
        known = not torch.compiler.is_compiling()
        largest = _largest_without_offsets(bits, table, scales) if known else largest_error + 4**bits
        _refuse_long_sums(steps, largest, " (without zero points)")
    if isinstance(padding, str):
        input, padding = _resolve_padding(input, weight, list(stride), padding, list(dilation))
    batch = input.unsqueeze(0) if input.dim() == 3 else input
    arguments = list(stride), list(padding), list(dilation), groups, bits, signed, table
    output = autograd_integers.quantized_conv2d(batch, weight, bias, *scales, *arguments, *gradients)
    return output.squeeze(0) if input.dim() == 3 else output


def quantized_linear_of_operands(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    *multipliers: Any,
) -> Tensor:
    """Compute a dense layer of quantised operands, for a layer, as `quantized_conv2d_of_operands`."""
    _check_tensors(input=input)
    rows = input.reshape(math.prod(input.shape[:-1]), weight.shape[1], 1, 1)
    arguments = [1, 1], [0, 0], [1, 1], 1
    output = quantized_conv2d_of_operands(rows, weight[:, :, None, None], bias, scales, *arguments, *multipliers)
    return output.reshape(*input.shape[:-1], len(weight))


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


def _check_codes(a: Tensor, b: Tensor, name_a: str, name_b: str, multiplier: Multiplier) -> None:
    operands = multiplier.operands
    assert operands is not None
    wanted = torch.int8 if operands.signed else torch.uint8
    for name, tensor in ((name_a, a), (name_b, b)):
        if tensor.dtype != wanted:
            raise RuntimeError(f"{name} is {tensor.dtype}, but {multiplier} takes codes as {wanted}")
        capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
        if operands.bits < 8 and tensor.numel() and not capturing and not torch.compiler.is_compiling():
            low, high = (int(end) for end in tensor.aminmax())
            if low < operands.least or high > operands.most:
                found = low if low < operands.least else high
                raise RuntimeError(
                    f"{name} has the code {found}, but {operands} has {operands.least} to {operands.most}"
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
    input: Tensor, weight: Tensor, stride: list[int], padding: str, dilation: list[int], value: int = 0
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
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2), value=value)
    return input, [total[0] // 2, total[1] // 2]
