"""The CPU backend: the C++ kernels of kernels/conv2d_simd.cpp, on PyTorch's threads and memory."""

import ctypes
from functools import cache, lru_cache
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# After torch: the extension then shares the OpenMP runtime that PyTorch has loaded.
from mbm_cli import _cpu
from mbm_cli.backends.shapes import conv2d_output_shape
from mbm_cli.multipliers.code import Function, compile_library
from mbm_cli.multipliers.content import TABLE, of_handle
from mbm_cli.multipliers.float32 import FRACTION_BITS

_SOURCES = ("multiplier.h", "conv2d.h", "conv2d_simd.cpp")

# Of each table its products of significands, which the kernels read, for as long as the table lives.
_significands = WeakTensorKeyDictionary()


def native(handle: str, table: Tensor | None) -> "_cpu.Multiplier":
    """Return a multiplier as the kernels take it.

    Raises:
        ValueError: a function in C that does not compile.
    """
    if handle != TABLE:
        return _native(handle)
    assert table is not None
    if table not in _significands:
        _significands[table] = _rows_of_significands(table)
    rows = _significands[table]
    return _cpu.Multiplier(TABLE, len(rows).bit_length() - 1, FRACTION_BITS, table=rows.data_ptr())


@lru_cache(maxsize=256)
def _native(handle: str) -> "_cpu.Multiplier":
    multiplier = of_handle(handle)
    if isinstance(multiplier.content, Function):
        return _cpu.Multiplier("function", 0, FRACTION_BITS, kernels=_compiled(multiplier.content))
    return _cpu.Multiplier(multiplier.family, multiplier.truncate, multiplier.result_bits or FRACTION_BITS)


def _rows_of_significands(table: Tensor) -> Tensor:
    """Return the products of significands, float32 (2^m, 2^m), a row for each fraction of b; m is at least 7."""
    bits = table.shape[1].bit_length() - 1
    repeats = 1 << max(0, 7 - bits)
    rows = (table[:-1].int() << (FRACTION_BITS - bits)) + (127 << FRACTION_BITS)
    return rows.view(torch.float32).repeat_interleave(repeats, 0).repeat_interleave(repeats, 1)


@cache  # a library stays loaded
def _compiled(function: Function) -> int:
    """Compile the kernels that call a user's function; return their address. Raises as `compile_library`."""
    sources = {name: (files("mbm_cli") / "kernels" / name).read_text(encoding="utf-8") for name in _SOURCES}
    macros = ["-DMBM_ISA=function", f"-DMBM_FUNCTION=::{function.CALLED}"]
    library = compile_library(function, '#include "conv2d_simd.cpp"\n', sources, macros)
    library.mbm_kernels.restype = ctypes.c_void_p
    return library.mbm_kernels()


def multiply(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None = None) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()
    output = torch.empty_like(a)
    threads = torch.get_num_threads()
    _cpu.multiply(a.data_ptr(), b.data_ptr(), output.data_ptr(), a.numel(), native(multiplier, table), threads)
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
    table: Tensor | None = None,
) -> Tensor:
    if of_handle(multiplier).is_exact:
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
            native(multiplier, table),
            torch.get_num_threads(),
        )
    return output


def instruction_set() -> str:
    """Return the widest instruction set that this CPU runs and the kernels have, which is the one they use."""
    return _cpu.instruction_sets()[0]


def ceiling(handle: str, table: Tensor | None, rounds: int, threads: int) -> int:
    """Run ``rounds`` rounds of the kernels' arithmetic on registers alone, on each thread; return the products done."""
    return _cpu.ceiling(native(handle, table), rounds, threads)


torch.library.impl("mbm::multiply", "cpu", multiply)
torch.library.impl("mbm::conv2d", "cpu", conv2d)
