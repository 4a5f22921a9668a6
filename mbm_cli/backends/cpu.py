"""The CPU backend: the C++ kernels of kernels/conv2d_simd.cpp, on PyTorch's threads and memory."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# After torch: the extension then shares the OpenMP runtime that PyTorch has loaded.
from mbm_cli import _cpu
from mbm_cli.multipliers import FRACTION_BITS, Multiplier
from mbm_cli.shapes import conv2d_output_shape


@lru_cache(maxsize=256)
def native(multiplier: str) -> "_cpu.Multiplier":
    """The multiplier, given by its short form, as the kernels take it."""
    parsed = Multiplier.parse(multiplier)
    family = getattr(_cpu.Family, parsed.family)
    return _cpu.Multiplier(family, parsed.truncate, parsed.result_bits or FRACTION_BITS)


def multiply(a: Tensor, b: Tensor, multiplier: str) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()
    output = torch.empty_like(a)
    threads = torch.get_num_threads()
    _cpu.multiply(a.data_ptr(), b.data_ptr(), output.data_ptr(), a.numel(), native(multiplier), threads)
    return output


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: str,
) -> Tensor:
    if Multiplier.parse(multiplier).is_exact:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output = input.new_empty(conv2d_output_shape(input, weight, bias, stride, padding, dilation, groups))
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if output.numel() > 0:
        _cpu.conv2d(
            input.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            output.data_ptr(),
            input.shape,
            input.stride(),
            weight.shape,
            output.shape[2:],
            stride,
            padding,
            dilation,
            groups,
            native(multiplier),
            torch.get_num_threads(),
        )
    return output


def instruction_set() -> str:
    """The widest instruction set that this CPU runs and the kernels have, which is the one they use."""
    return _cpu.instruction_sets()[0]


def ceiling(multiplier: str, rounds: int, threads: int) -> int:
    """Do ``rounds`` rounds of the kernels' arithmetic on registers alone, on each thread; returns the products done."""
    return _cpu.ceiling(native(multiplier), rounds, threads)


torch.library.impl("mbm::multiply", "cpu", multiply)
torch.library.impl("mbm::conv2d", "cpu", conv2d)
