"""The operators of a backend, all from one function that computes the convolution of a `Geometry`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli.backends import geometry
from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.shapes import conv2d_output_shape, linear_output_shape
from mbm_cli.multipliers.content import of_handle

# Takes a geometry, its input, weight and bias, the contiguous output to write, and a handle with its table.
Run = Callable[[Geometry, Tensor, Tensor, Tensor | None, Tensor, str, Tensor | None], None]
Pair = tuple[int, int]


class Operators:
    """``mbm::conv2d``, its gradients and ``mbm::linear`` for a kind of device; ``run`` computes their sums."""

    def __init__(self, device: str, run: Run) -> None:
        self._run = run
        for operator in (self.conv2d, self.conv2d_input_grad, self.conv2d_weight_grad, self.linear):
            torch.library.impl(f"mbm::{operator.__name__}", device, operator)

    def _compute(self, geometry: Geometry, input: Tensor, weight: Tensor, *rest: Any) -> None:
        if not input.dtype == weight.dtype == torch.float32:
            raise RuntimeError(f"the multiplier takes float32, not {input.dtype} and {weight.dtype}")
        self._run(geometry, input, weight, *rest)

    def conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        multiplier: str,
        table: Tensor | None = None,
        *_: object,  # the multipliers of the gradients
    ) -> Tensor:
        if of_handle(multiplier).is_exact:
            with _no_autocast(input):
                return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        output = input.new_empty(conv2d_output_shape(input, weight, bias, stride, padding, dilation, groups))
        if output.numel() > 0:
            weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
            sizes = _pair(output.shape[2:]), _pair(stride), _pair(padding), _pair(dilation)
            shapes = tuple(input.shape), input.stride(), tuple(weight.shape)
            self._compute(geometry.forward(*shapes, *sizes, groups), input, weight, bias, output, multiplier, table)
        return output

    def conv2d_input_grad(
        self,
        grad: Tensor,
        weight: Tensor,
        input_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        multiplier: str,
        table: Tensor | None = None,
    ) -> Tensor:
        if of_handle(multiplier).is_exact:
            like = grad.new_empty(input_size)
            return exact_gradients([True, False, False], grad, like, weight, None, stride, padding, dilation, groups)[0]
        output = grad.new_empty(input_size)
        if output.numel() == 0:
            return output
        weight = weight.contiguous()

        def stride_1(weight: Tensor, into: Tensor, padding: Pair, dilation: Pair) -> None:
            shapes = tuple(grad.shape), grad.stride(), tuple(weight.shape), _pair(into.shape[2:])
            self._compute(
                geometry.input_grad(*shapes, padding, dilation, groups), grad, weight, None, into, multiplier, table
            )

        if _pair(stride) == (1, 1):
            stride_1(weight, output, _pair(padding), _pair(dilation))
            return output
        # The elements of each residue modulo the stride are those of a convolution with stride 1.
        rows, columns = (
            list(geometry.phases(input_size[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]))
            for i in range(2)
        )
        for row in rows:
            for column in columns:
                part = weight[:, :, row.kernel, column.kernel].contiguous()
                into = output.new_zeros(*input_size[:2], row.size, column.size)
                if part.numel() > 0:
                    stride_1(part, into, (row.padding, column.padding), (row.dilation, column.dilation))
                output[:, :, row.first :: stride[0], column.first :: stride[1]] = into
        return output

    def conv2d_weight_grad(
        self,
        grad: Tensor,
        input: Tensor,
        weight_size: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        multiplier: str,
        table: Tensor | None = None,
    ) -> Tensor:
        if of_handle(multiplier).is_exact:
            like = grad.new_empty(weight_size)
            return exact_gradients([False, True, False], grad, input, like, None, stride, padding, dilation, groups)[1]
        if grad.numel() == 0:
            return grad.new_zeros(weight_size)
        output, grad = grad.new_empty(weight_size), grad.contiguous()
        shapes = tuple(input.shape), input.stride(), tuple(grad.shape), _pair(weight_size[2:])
        sizes = _pair(stride), _pair(padding), _pair(dilation)
        self._compute(geometry.weight_grad(*shapes, *sizes, groups), input, grad, None, output, multiplier, table)
        return output

    def linear(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        multiplier: str,
        table: Tensor | None = None,
        *_: object,
    ) -> Tensor:
        if of_handle(multiplier).is_exact:
            with _no_autocast(input):
                return F.linear(input, weight, bias)
        shape = linear_output_shape(input, weight, bias)
        if 0 in (*shape, input.shape[1]):
            return input.new_zeros(shape) if bias is None else bias.expand(shape).clone()
        output, bias = input.new_empty(shape), None if bias is None else bias.contiguous()
        dense = geometry.linear(tuple(input.shape), input.stride(), len(weight), weight.stride())
        self._compute(dense, input, weight, bias, output, multiplier, table)
        return output


def _no_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Keep exact products in float32: what follows reads them as that."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()


def exact_gradients(
    wanted: list[bool],
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_shape: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Any:
    """Compute the wanted gradients of an exact convolution: of input, weight and bias.

    One call reaches cuDNN on the GPU and oneDNN on the CPU, and computes only what is wanted.
    """
    of_forward = stride, padding, dilation, False, [0, 0], groups  # not transposed, hence no output padding
    return torch.ops.aten.convolution_backward(grad, input, weight, bias_shape, *of_forward, wanted)


def _pair(values: Any) -> Pair:
    first, second = values
    return int(first), int(second)
