"""ReLU and max-pooling in one layer: on a GPU by a kernel each way, where PyTorch's two layers take five."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mbm_cli.backends.cuda_programs import CudaError, Program, import_cupy, source

_THREADS = 256
_INDEX_LIMIT = 1 << 31
# As in pool.cu, field by field.
_WINDOWS = np.dtype([(name, np.int32) for name in ("height", "width", "kernel", "down", "across")])


class ReLUMaxPool2d(nn.Module):
    """``nn.ReLU`` and ``nn.MaxPool2d`` with windows of this side, which do not overlap: the same values and gradients.

    Takes (N, C, H, W). On a GPU, gradients of float32 inputs have no derivatives.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, input: Tensor) -> Tensor:
        is_plain = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
        suits = input.is_cuda and input.dtype == torch.float32 and 0 < input.numel() < _INDEX_LIMIT
        if suits and is_plain and _has_cupy():
            output: Tensor = _Fused.apply(input.contiguous(), self.side)
            return output
        return F.max_pool2d(F.relu(input), self.side)

    def extra_repr(self) -> str:
        return str(self.side)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, side: int) -> Tensor:
        ctx.save_for_backward(input)
        ctx.side = side
        return relu_max_pool(input, side)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        return relu_max_pool_grad(grad.contiguous(), input, ctx.side), None


@lru_cache(maxsize=1)
def _has_cupy() -> bool:
    """Return whether kernels can be compiled; exact networks do without."""
    try:
        import_cupy()
    except CudaError:
        return False
    return True


@lru_cache(maxsize=1)
def program() -> Program:
    return Program("pooling", source("pool.cu"))


def relu_max_pool(input: Tensor, side: int) -> Tensor:
    """Launch the kernel on a contiguous input that is not empty."""
    output = input.new_empty(*input.shape[:2], *(size // side for size in input.shape[2:]))
    if output.numel() > 0:
        _launch("relu_max_pool", output.numel(), input, (input, output), side)
    return output


def relu_max_pool_grad(grad: Tensor, input: Tensor, side: int) -> Tensor:
    """Launch the kernel of the gradient; all is contiguous."""
    output = torch.empty_like(input)
    windows = math.prod(-(-size // side) for size in input.shape[2:]) * math.prod(input.shape[:2])
    _launch("relu_max_pool_grad", windows, input, (grad, input, output), side)
    return output


def _launch(kernel: str, count: int, input: Tensor, tensors: tuple[Tensor, ...], side: int) -> None:
    height, width = input.shape[2:]
    windows = np.array([(height, width, side, height // side, width // side)], _WINDOWS)
    arguments = *(one.data_ptr() for one in tensors), np.uint32(count), windows
    program().launch(kernel, input.device.index, (-(-count // _THREADS),), (_THREADS,), arguments)
