"""The CPU backend: the C++ kernels of kernels/conv2d_simd.cpp, on PyTorch's threads and memory."""

import ctypes
from functools import cache, lru_cache
from importlib.resources import files

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# After torch: the extension then shares the OpenMP runtime that PyTorch has loaded.
from mbm_cli import _cpu
from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.operators import Operators
from mbm_cli.multipliers.code.c import Function, compile_library
from mbm_cli.multipliers.content import TABLE, exchange, of_handle
from mbm_cli.multipliers.float32 import FRACTION_BITS

_BYTES = 4
_PARTS = 16  # of a sum over the images of a batch; a constant, so that results do not depend on the threads
_WIDTH = 32  # positions of a dense layer's rows, two vectors of the widest instruction set
_SOURCES = ("multiplier.h", "conv2d.h", "conv2d_simd.cpp")

# Of each table its products of significands, which the kernels read, for as long as the table lives.
_significands = WeakTensorKeyDictionary()


def native(handle: str, table: Tensor | None, exchanged: bool = False) -> "_cpu.Multiplier":
    """Return a multiplier as the kernels take it, with its operands exchanged if asked for.

    Raises:
        ValueError: a function in C that does not compile.
    """
    if handle != TABLE:
        return _native(handle, exchanged)
    assert table is not None
    if exchanged:
        table = exchange(table)
    if table not in _significands:
        _significands[table] = _rows_of_significands(table)
    rows = _significands[table]
    return _cpu.Multiplier(TABLE, len(rows).bit_length() - 1, FRACTION_BITS, table=rows.data_ptr())


@lru_cache(maxsize=256)
def _native(handle: str, exchanged: bool) -> "_cpu.Multiplier":
    multiplier = of_handle(handle)
    if isinstance(multiplier.content, Function):
        return _cpu.Multiplier("function", 0, FRACTION_BITS, kernels=_compiled(multiplier.content, exchanged))
    return _cpu.Multiplier(multiplier.family, multiplier.truncate, multiplier.result_bits or FRACTION_BITS)


def _rows_of_significands(table: Tensor) -> Tensor:
    """Return the products of significands, float32 (2^m, 2^m), a row for each fraction of b; m is at least 7."""
    bits = table.shape[1].bit_length() - 1
    repeats = 1 << max(0, 7 - bits)
    rows = (table[:-1].int() << (FRACTION_BITS - bits)) + (127 << FRACTION_BITS)
    return rows.view(torch.float32).repeat_interleave(repeats, 0).repeat_interleave(repeats, 1)


@cache  # a library stays loaded
def _compiled(function: Function, exchanged: bool) -> int:
    """Compile the kernels that call a user's function; return their address. Raises as `compile_library`."""
    sources = {name: (files("mbm_cli") / "kernels" / name).read_text(encoding="utf-8") for name in _SOURCES}
    main = f'{function.define(exchanged)}#include "conv2d_simd.cpp"\n'
    library = compile_library(function, main, sources, ["-DMBM_ISA=function"])
    library.mbm_kernels.restype = ctypes.c_void_p
    return library.mbm_kernels()


def multiply(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None = None) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()
    output = torch.empty_like(a)
    threads = torch.get_num_threads()
    _cpu.multiply(a.data_ptr(), b.data_ptr(), output.data_ptr(), a.numel(), native(multiplier, table), threads)
    return output


def run(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    multiplier: str,
    table: Tensor | None,
) -> None:
    """Compute a convolution into ``output``, which is contiguous. Raises as `native`."""
    kernels = native(multiplier, table, geometry.exchanged)
    g = geometry
    if min(g.dilation) < 0:  # the kernel backwards
        weight = weight.flip(2, 3)
        extents = [g.dilation[i] * (g.kernel[i] - 1) for i in range(2)]
        padding = g.padding[0] - extents[0], g.padding[1] - extents[1]
        g = g._replace(dilation=(-g.dilation[0], -g.dilation[1]), padding=padding)
    pointers = input.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), output.data_ptr()
    if g.exchanged and g.groups == 1 and g.channels > 1:
        _sum_of_parts(g, pointers, output, kernels)
    elif g.is_dense:
        _dense(g, pointers, kernels)
    else:
        _call(g, pointers, (g.out_size[1], 1), kernels)


def _sum_of_parts(g: Geometry, pointers: tuple[int, ...], output: Tensor, kernels: "_cpu.Multiplier") -> None:
    """Compute as groups the parts of sums, which can be few, over the images of a batch, and add them up."""
    of_part = -(-g.channels // _PARTS)
    whole, rest = divmod(g.channels, of_part)
    parts = output.new_empty(whole + (rest > 0), *output.shape)
    channel_stride, weight_stride = g.input_strides[2], g.weight_strides[2]
    grouped = g._replace(
        channels=of_part,
        groups=whole,
        input_strides=(g.input_strides[0], of_part * channel_stride, *g.input_strides[2:]),
        weight_strides=(of_part * weight_stride, *g.weight_strides[1:]),
        output_strides=(g.output_strides[0], output.numel(), g.output_strides[2]),
    )
    input, weight, bias, _ = pointers
    _call(grouped, (input, weight, bias, parts.data_ptr()), (g.out_size[1], 1), kernels)
    if rest:
        done = whole * of_part
        last = input + _BYTES * done * channel_stride, weight + _BYTES * done * weight_stride, bias
        rest_of_it = grouped._replace(channels=rest, groups=1)
        _call(rest_of_it, (*last, parts[whole].data_ptr()), (g.out_size[1], 1), kernels)
    torch.sum(parts, 0, out=output)


def _dense(g: Geometry, pointers: tuple[int, ...], kernels: "_cpu.Multiplier") -> None:
    """Take the images, which have one element, as the positions of one image with rows of equal length."""
    image, _, channel, *_ = g.input_strides
    out_image, _, out_channel = g.output_strides
    whole = g.batch // _WIDTH * _WIDTH
    for first, count, width in ((0, whole, _WIDTH), (whole, g.batch - whole, g.batch - whole)):
        if count:
            size = count // width, width
            of_input = channel, image * width, image
            wide = g._replace(batch=1, size=size, out_size=size, stride=(1, 1), input_strides=(0, 0, *of_input))
            wide = wide._replace(output_strides=(0, 0, out_channel))
            input, weight, bias, output = pointers
            moved = input + _BYTES * first * image, weight, bias, output + _BYTES * first * out_image
            _call(wide, moved, (out_image * width, out_image), kernels)


def _call(
    g: Geometry, pointers: tuple[int, ...], strides_of_plane: tuple[int, int], kernels: "_cpu.Multiplier"
) -> None:
    input, weight, bias, output = pointers
    _cpu.conv2d(
        input,
        weight,
        bias,
        output,
        (g.batch, g.groups, g.channels, g.out_channels),
        g.size,
        g.kernel,
        g.out_size,
        g.stride,
        g.padding,
        g.dilation,
        g.input_strides,
        g.weight_strides,
        (*g.output_strides, *strides_of_plane),
        kernels,
        torch.get_num_threads(),
    )


def instruction_set() -> str:
    """Return the widest instruction set that this CPU runs and the kernels have, which is the one they use."""
    return _cpu.instruction_sets()[0]


def ceiling(handle: str, table: Tensor | None, rounds: int, threads: int) -> int:
    """Run ``rounds`` rounds of the kernels' arithmetic on registers alone, on each thread; return the products done."""
    return _cpu.ceiling(native(handle, table), rounds, threads)


torch.library.impl("mbm::multiply", "cpu", multiply)
Operators("cpu", run)
