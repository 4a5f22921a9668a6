"""The CUDA backend: the kernels of kernels/conv2d.cu, compiled by CuPy, on PyTorch's streams and memory."""

import math
import operator
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mbm_cli.backends.cuda_programs import CudaError, Program, address, multiprocessors_of, seconds, source
from mbm_cli.backends.geometry import Geometry
from mbm_cli.multipliers.code.c import Function
from mbm_cli.multipliers.code.compiler import first_compiler_error
from mbm_cli.multipliers.content import TABLE, exchange, of_handle
from mbm_cli.multipliers.float32 import FRACTION_BITS

# As in conv2d.cu: threads of a block, and steps of a sum between two barriers of a tiled kernel.
_THREADS, _SLICE = 128, 8
_INDEX_LIMIT = 1 << 31  # of the 32-bit indices; offsets between images and in the output have 64 bits
_CEILING_RELOAD = 4096  # rounds, a power of two

# conv2d.cu's struct Conv2d, field by field.
_CONV2D = np.dtype(
    [(name, np.uint64) for name in ("input", "weight", "bias", "output", "table")]
    + [("image_stride", np.int64)]
    + [(name, np.int32) for name in ("channel_stride", "row_stride", "column_stride")]
    + [(name, np.int32) for name in ("channels", "out_channels", "groups")]
    + [(name, np.int32, 2) for name in ("size", "kernel", "out_size", "stride", "padding", "dilation")]
    + [("slice", np.int32, 3), ("pixels", np.uint32)]
    + [(name, np.int64) for name in ("input_group_stride", "input_channel_stride")]
    + [(name, np.int64) for name in ("weight_group_stride", "weight_row_stride")]
    + [(name, np.int64) for name in ("out_image_stride", "out_group_stride", "out_channel_stride", "part_stride")]
    + [(name, np.int32) for name in ("part_slices", "weight_channel_gap")],
    align=True,
)


# NVRTC has no standard headers; it knows what is in <math.h>, and memcpy, without them.
_C_INCLUDE = re.compile(
    r"^[ \t]*#[ \t]*include[ \t]*<(?:stdint\.h|cstdint|stdbool\.h|math\.h|cmath|string\.h|cstring)>", re.MULTILINE
)
_C_INTEGERS = """typedef unsigned char uint8_t; typedef signed char int8_t;
typedef unsigned short uint16_t; typedef short int16_t;
typedef unsigned int uint32_t; typedef int int32_t;
typedef unsigned long long uint64_t; typedef long long int64_t;
"""


_SOURCES = ("entry.cuh", "multiplier.h", "arithmetic.cuh", "conv2d.cu")


class Tile(NamedTuple):
    """A kernel: output channels and pixels of a block, and a product's time as a multiple of the first's.

    Attributes:
        cost: in forward convolutions, where it decides the order of sums, so that it stays.
        cost_of_parts: in sums that are added up in parts.
    """

    kernel: str
    channels: int
    pixels: int
    cost: float
    cost_of_parts: float


_TILES = (
    Tile("conv2d_64x128", 64, 128, 1.0, 1.0),
    Tile("conv2d_32x128", 32, 128, 1.06, 1.06),
    Tile("conv2d_16x32", 16, 32, 1.3, 1.4),
)
# Of the times in `_choose_kernel`, measured on an H100.
_BUSY_FROM, _STEPS_OF_A_BLOCK, _SUM_LAUNCH, _SUM_ELEMENT = 2.2, 24, 100_000, 0.2
_LEAST_STEPS, _MOST_PARTS = 32, 512
_TRANSPOSE_FROM = 1 << 28  # products of a dense layer from which transposing its input pays
_DIRECT = {1: (4,), 4: (2,), 6: (1, 2), 8: (2,)}  # output channels of the direct kernels, and pixels of a thread


class Launch(NamedTuple):
    """How a convolution is launched: the kernel, the blocks, and the argument with its pointers left open.

    Attributes:
        parts: of each sum, computed by as many times the blocks into outputs of their own, which must be added up.
    """

    kernel: str
    blocks: int
    parts: int
    conv: np.ndarray


class Variant(NamedTuple):
    """What the kernels of a multiplier are compiled for.

    Attributes:
        free: any strides, and sums in parts; otherwise forward convolutions alone, a few per cent faster.
        exchanged: a function is called with its operands exchanged.
    """

    free: bool = False
    exchanged: bool = False


FORWARD = Variant()


@lru_cache(maxsize=256)
def program(handle: str, table_bits: int = 0, variant: Variant = FORWARD) -> Program:
    """Return the program of a multiplier; ``table_bits`` are the fraction bits of its table.

    A function in C stands in front of the kernels. NVRTC has no standard headers, so C's integers are defined first.
    """
    multiplier = of_handle(handle)
    *headers, kernels = _SOURCES
    text, function = source(kernels), multiplier.content
    family, bits, result_bits = multiplier.family, multiplier.truncate, multiplier.result_bits or FRACTION_BITS
    name, extra = f"{handle}{table_bits or ''}", []
    if handle == TABLE:
        family, bits = "table", table_bits
    if isinstance(function, Function):
        name, family, extra = function.name, "function", ["-fmad=false"]
        users = function.renamed(f'#line 1 "function.h"\n{_C_INCLUDE.sub("", function.text)}')
        text = f'{_C_INTEGERS}{users}{function.define(variant.exchanged)}#line 1 "conv2d.cu"\n{text}'
    macros = (
        f"-DLAYOUT_IS_FREE={int(variant.free)}",
        f"-DFAMILY=mbm::{family.upper()}",
        f"-DBITS={bits}",
        f"-DRESULT_BITS={result_bits}",
    )
    name += " for gradients and dense layers" if variant.free else ""
    return Program(name, text, (*macros, *extra), tuple(headers))


def _table_bits(table: Tensor | None) -> int:
    return 0 if table is None else table.shape[1].bit_length() - 1


def _launch(
    handle: str,
    table: Tensor | None,
    kernel: str,
    device: int,
    grid: tuple[int, ...],
    arguments: tuple,
    variant: Variant = FORWARD,
) -> None:
    """Launch a kernel on PyTorch's current stream of the device.

    Raises:
        CudaError: as `Program.kernel`.
        ValueError: a function in C that does not compile.
    """
    try:
        program(handle, _table_bits(table), variant).launch(kernel, device, grid, (_THREADS,), arguments)
    except CudaError as error:
        function, cause = of_handle(handle).content, error.__cause__
        if not isinstance(function, Function) or type(cause).__name__ != "CompileException":
            raise
        raise ValueError(f"{function.name} does not compile: {first_compiler_error(str(cause))}") from None


def multiply(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None = None) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()
    output = torch.empty_like(a)
    count, device = a.numel(), a.device.index
    if count > 0:
        # Enough blocks to fill the card; a thread steps through the elements by the number of threads.
        blocks = min(-(-count // _THREADS), 16 * multiprocessors_of(device))
        arguments = (a.data_ptr(), b.data_ptr(), output.data_ptr(), address(table), count)
        _launch(multiplier, table, "multiply", device, (blocks,), arguments)
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
    """Compute a convolution into ``output``, which is contiguous.

    Raises:
        RuntimeError, CudaError: as `plan` and `_launch`.
    """
    device = input.device.index
    if input.dim() == 2 and geometry.products >= _TRANSPOSE_FROM:
        # The threads of a warp fetch for one step: neighbours in memory, then.
        input = input.t().contiguous().t()
        geometry = geometry._replace(input_strides=(1, 0, input.stride(1), 0, 0))
    launch = plan(geometry, multiprocessors_of(device))
    parts = output if launch.parts == 1 else output.new_empty(launch.parts, *output.shape)
    variant = Variant(geometry.divisible, geometry.exchanged and multiplier.startswith("c:"))
    if geometry.exchanged and table is not None:
        table = exchange(table)
    conv = launch.conv.copy()
    pointers = input.data_ptr(), weight.data_ptr(), address(bias), parts.data_ptr(), address(table)
    conv.view(np.uint64)[: len(pointers)] = pointers
    _launch(multiplier, table, launch.kernel, device, (launch.blocks, launch.parts), (conv,), variant)
    if launch.parts > 1:
        torch.sum(parts, 0, out=output)


@lru_cache(maxsize=1024)
def plan(g: Geometry, multiprocessors: int) -> Launch:
    """Choose the kernel for a convolution, and lay out its argument.

    Raises:
        RuntimeError: an image, the weight, or the number of output positions has more elements than 32 bits index.
    """
    pixels = g.batch * math.prod(g.out_size)
    name, blocks, parts = _choose_kernel(g, pixels, multiprocessors)
    all_slices = -(-g.steps // _SLICE)
    slices = -(-all_slices // parts)
    parts = -(-all_slices // slices)

    reach = [max(g.size[i], abs(g.dilation[i]) * (g.kernel[i] - 1) + 1 + abs(g.padding[i])) for i in range(2)]
    _, _, channel_stride, *of_image = g.input_strides
    image = sum((n - 1) * step for n, step in zip(reach, of_image, strict=True))
    if not g.exchanged:  # otherwise the channels are images
        image += (g.channels - 1) * channel_stride
    gap = g.weight_strides[2] - math.prod(g.kernel)
    # Positions outside the image are encoded as row >= 2^29.
    if max(image, g.steps, g.out_channels * g.groups * g.steps, gap, pixels, blocks, 8 * max(reach)) >= _INDEX_LIMIT:
        raise RuntimeError(
            f"a convolution of {g.batch} x {g.channels * g.groups} x {list(g.size)} with {g.out_channels * g.groups} "
            f"kernels of {list(g.kernel)} needs indices of more than 32 bits within an image, in the weight, or for "
            "its output positions: use smaller batches or images"
        )

    steps, column = divmod(_SLICE, g.kernel[1])
    channel, row = divmod(steps, g.kernel[0])
    image_stride, group_stride, _, *rows_and_columns = g.input_strides
    values: list[object] = [image_stride, 0 if g.divisible else channel_stride, *rows_and_columns]
    values += [g.channels, g.out_channels, g.groups]
    values += [g.size, g.kernel, g.out_size, g.stride, g.padding, g.dilation, (channel, row, column), pixels]
    values += [group_stride, channel_stride, *g.weight_strides[:2], *g.output_strides, g.outputs, slices, gap]
    conv = np.zeros(1, _CONV2D)
    for field, value in zip(list(_CONV2D.fields or ())[5:], values, strict=True):
        conv[field] = value
    return Launch(name, blocks, parts, conv)


def _choose_kernel(g: Geometry, pixels: int, multiprocessors: int) -> tuple[str, int, int]:
    """Return the kernel's name, the number of blocks, and the parts of a sum."""
    if not g.divisible and g.out_channels <= max(_DIRECT):
        channels = next(n for n in _DIRECT if n >= g.out_channels)
        blocks_of = {n: g.groups * -(-pixels // (_THREADS * n)) for n in _DIRECT[channels]}
        # More pixels a thread read the weights less often, but every multiprocessor needs some blocks.
        sizes = [n for n in blocks_of if blocks_of[n] >= 3 * multiprocessors]
        of_thread = max(sizes, default=min(blocks_of))
        return f"conv2d_direct_{channels}x{of_thread}", blocks_of[of_thread], 1

    # Choose the tile with the least time if every multiprocessor computes its blocks one after the other. Large tiles
    # fetch and decode less for each product; small ones leave fewer channels, pixels and multiprocessors idle.
    def blocks(tile: Tile) -> int:
        return g.groups * -(-g.out_channels // tile.channels) * -(-pixels // tile.pixels)

    if not g.divisible:

        def time_whole(tile: Tile) -> float:
            return -(-blocks(tile) // multiprocessors) * tile.channels * tile.pixels * tile.cost

        best = min(_TILES, key=time_whole)
        return best.kernel, blocks(best), 1

    # The same, in products of a multiprocessor. One or two blocks of it do not keep it busy, a block costs as much as
    # some steps to begin and to end, and adding up parts costs a launch and the memory's time.
    def time(tile: Tile, parts: int) -> float:
        of_multiprocessor = max(-(-blocks(tile) * parts // multiprocessors), _BUSY_FROM)
        work = tile.channels * tile.pixels * tile.cost_of_parts * (g.steps / parts + _STEPS_OF_A_BLOCK)
        return of_multiprocessor * work + (parts > 1) * (_SUM_LAUNCH + _SUM_ELEMENT * parts * g.outputs)

    most = max(1, min(_MOST_PARTS, g.steps // _LEAST_STEPS))
    # Full rounds of three blocks on each multiprocessor, or as many as there can be.
    choices: list[tuple[float, Tile, int]] = []
    for tile in _TILES:
        full = (n * 3 * multiprocessors // blocks(tile) for n in (1, 2))
        choices += [(time(tile, parts), tile, parts) for parts in {1, most, *full} if 1 <= parts <= most]
    if g.out_channels <= max(_DIRECT):
        channels = next(n for n in _DIRECT if n >= g.out_channels)
        for of_thread in _DIRECT[channels]:
            cost = 1 + 3 / channels  # of fetching and decoding, too
            direct = Tile(f"conv2d_direct_{channels}x{of_thread}", channels, _THREADS * of_thread, cost, cost)
            choices.append((time(direct, 1), direct, 1))
    _, tile, parts = min(choices, key=operator.itemgetter(0))
    return tile.kernel, blocks(tile), parts


def ceiling(handle: str, table: Tensor | None, device: torch.device) -> float:
    """Measure the multiply-accumulates a second of the kernels' instructions alone, all operands in registers.

    Args:
        handle, table: the multiplier as the operators take it, the table on the device.
        device: a CUDA device.
    """
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        blocks, rounds, sums_of_thread = 3 * multiprocessors_of(index), 20_000, 64
        numbers = torch.rand(2 * _SLICE, _THREADS, device="cuda") + 0.5
        output = torch.empty(blocks, _THREADS, device="cuda")
        pointers = numbers.data_ptr(), output.data_ptr(), address(table)
        arguments = (*pointers, np.int32(rounds), np.int32(_CEILING_RELOAD - 1))
        time = seconds(lambda: _launch(handle, table, "ceiling", index, (blocks,), arguments))
    return blocks * _THREADS * sums_of_thread * rounds / time


torch.library.impl("mbm::multiply", "cuda", multiply)
