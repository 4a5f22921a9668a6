"""Integer multipliers on CUDA: by terms where that is expected to be faster (cuda_terms.py), otherwise by look-ups.

The kernels of kernels/integer.cu look products up in a table of 256 x 256.
"""

import math
import operator
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mbm_cli.backends import cuda_terms
from mbm_cli.backends.cuda_programs import (
    Program,
    address,
    divisor,
    has_matrix_units,
    import_cupy,
    multiprocessors_of,
    refuse_capture,
    source,
)
from mbm_cli.backends.cuda_terms import DeviceTerms
from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.integers import IntegerOperators
from mbm_cli.multipliers.factor import factorize

_INDEX_LIMIT, _GRID_LIMIT = 1 << 31, 0xFFFF
# As in integer.cu: the tile of rows and its bytes of shared memory, twice that where there is room; channels, threads.
_ROWS_CHANNELS, _ROWS_PIXELS, _ROWS_THREADS, _ROWS_BYTES = 64, 768, 384, 256 * 144
_STATIC_BYTES, _MOST_THREADS, _GATHERED, _WARP = 2048, 1024, 2, 32
_COLUMNS = {False: (2, 4, 8), True: (1, 4)}  # output channels of a block, by whether entries are wide
_PATHS = {"auto": ("rows", "columns", "gather"), "direct": ("columns", "gather")}

# integer.cu's struct Conv2d, field by field.
_CONV2D = np.dtype(
    [(name, np.uint64) for name in ("input", "weight", "output", "table", "scale", "bias")]
    + [(name, np.int32) for name in ("image_stride", "group_stride", "channel_stride", "row_stride", "column_stride")]
    + [(name, np.int32) for name in ("channels", "out_channels", "groups")]
    + [(name, np.int32, 2) for name in ("size", "kernel", "out_size", "stride", "padding", "dilation")]
    + [(name, np.uint32) for name in ("pixels", "offset", "padding_code", "buffer")]
    + [(name, np.uint32, 3) for name in ("plane", "width", "kernel_elements", "kernel_width")]
    + [(name, np.int32) for name in ("padded", "in_words")],
    align=True,
)

# Clocks of a multiprocessor, measured on an H100.
_ROWS_STEP = 2050  # of a tile; unbuffered, 10 % more
_BUILD = 9  # of a channel's line
_BUFFER = 4500  # a buffer's latencies, which the blocks of a multiprocessor share
_LOOK_UP = {2: 3.5, 4: 6.3, 8: 10.6}  # of a warp's vectors, by their size in 16 bits
_RESIDENT = {2: 1536, 4: 1536, 8: 1024}  # threads of a multiprocessor, which registers limit
_FETCH, _FETCH_APART = 2.5, 37  # of a warp's codes, next to each other in memory and apart
_GATHER, _GATHER_FETCH, _GATHER_WARPS = 6, 11, 16


class Entries(NamedTuple):
    """A table as the kernels read it.

    Attributes:
        lines: one for each code b. Of entries that fit 16 bits, a word holds those of a and a + 128.
        least: what was subtracted from each entry.
        wide: whether the entries take 32 bits.
    """

    lines: Tensor
    least: int
    wide: bool


class Launch(NamedTuple):
    """How a convolution is launched; the argument's pointers and the table's offset are left open."""

    kernel: str
    grid: tuple[int, int, int]
    threads: tuple[int, ...]
    shared_bytes: int
    conv: np.ndarray
    clocks: float  # expected, of a multiprocessor


class Choice(NamedTuple):
    """A kernel with its blocks, and the clocks that it is expected to take."""

    time: float
    kernel: str
    grid: tuple[int, int, int]
    threads: tuple[int, ...]
    shared_bytes: int
    buffer: int


_entries, _terms = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


def entries(table: Tensor) -> Entries:
    """Return a table as the kernels read it, made when the table is first met and kept for as long as it lives.

    Raises:
        CudaError: the table is first met in a capture, which cannot wait for its range.
    """
    if table not in _entries:
        refuse_capture("the multiplier's table")
        least, most = torch.stack(torch.aminmax(table)).tolist()
        wide = most - least > 0xFFFF
        lines = table.t().contiguous()
        if wide:
            least = 0
        else:
            lines = lines - least
            lines = lines[:, :128] | lines[:, 128:] << 16
        torch.cuda.current_stream(table.device).synchronize()  # other streams read it, too
        _entries[table] = Entries(lines.contiguous(), least, wide)
    made: Entries = _entries[table]
    return made


def terms_of(table: Tensor) -> DeviceTerms | None:
    """Return a table's terms, found when they are first asked for and kept for as long as the table lives.

    Raises:
        CudaError: they are first asked for in a capture.
    """
    if table not in _terms:
        refuse_capture("the multiplier's terms")
        terms = factorize(table.cpu().numpy())
        _terms[table] = None if terms is None else cuda_terms.on_device(terms, table.device)
    found: DeviceTerms | None = _terms[table]
    return found


@lru_cache(maxsize=1)
def program() -> Program:
    return Program("integer multipliers", source("integer.cu"), headers=("implicit_gemm.cuh",), shared=True)


@lru_cache(maxsize=64)
def _shared_bytes(device: int) -> int:
    """Return the most shared memory that a block can have."""
    return int(import_cupy().cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"])


def run(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    table: Tensor,
    padding_code: int,
    path: str,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Add up table entries into ``output``, which is contiguous and not empty.

    Args:
        input, weight: codes of 8 bits, whose bytes index the table; the weight is contiguous.
        output: int32 sums; with a scale, float32.
        table: int32 (256, 256), entry [a, b] for the code a of the input and b of the weight.
        padding_code: the code of elements outside the image.
        path: "terms", on matrix units; "rows"; "direct", the better one of "columns" and "gather"; "auto", the best.
        scale, bias: float32 of each output channel: float(sum) * scale + bias, rounded after each operation.

    Raises:
        RuntimeError, CudaError: as `plan`, `Program.kernel` and `entries`.
        ValueError: an unknown path; or "terms" where there are none, or no matrix units for them.
    """
    device = input.device.index
    read = entries(table)
    aligned = (input.data_ptr() | weight.data_ptr()) % 4 == 0
    launch, geometry_of_look_up = _look_up(geometry, device, read.wide, aligned, path)
    most = {"auto": launch.clocks, "terms": math.inf}.get(path, 0)
    terms = _chosen_terms(geometry, table, most)
    if path == "terms" and terms is None:
        raise ValueError("there are no terms of this table, or no matrix units for them: take the path auto")
    if terms is not None:
        cuda_terms.run(geometry, input, weight, output, terms, padding_code, scale, bias)
        return
    if geometry_of_look_up is not geometry:
        input = input.t().contiguous().t()
    pointers = [tensor.data_ptr() for tensor in (input, weight, output, read.lines)]
    conv = launch.conv.copy()
    conv.view(np.uint64)[:6] = [*pointers, address(scale), address(bias)]
    conv["offset"] = geometry.steps * read.least % (1 << 32)
    conv["padding_code"] = padding_code & 255
    program().launch(launch.kernel, device, launch.grid, launch.threads, (conv,), launch.shared_bytes)


def _look_up(g: Geometry, device: int, wide: bool, aligned: bool, path: str) -> tuple[Launch, Geometry]:
    """Return how table entries are looked up, and the geometry, with transposed strides if the input is transposed."""
    settings = multiprocessors_of(device), _shared_bytes(device), wide, aligned, "auto" if path == "terms" else path
    launch = plan(g, *settings)
    if g.is_dense and not launch.kernel.startswith("gather"):  # the lanes of a warp fetch neighbours in memory, then
        g = g._replace(input_strides=(1, 0, g.batch, 0, 0))
        launch = plan(g, *settings)
    return launch, g


def _chosen_terms(g: Geometry, table: Tensor, most: float) -> DeviceTerms | None:
    """Return the table's terms if they are expected to take fewer clocks than ``most``."""
    device = table.device.index
    if not has_matrix_units(device):
        return None
    multiprocessors = multiprocessors_of(device)
    if cuda_terms.expected_clocks(g, 1, multiprocessors) >= most:  # to find terms takes up to a second
        return None
    terms = terms_of(table)
    if terms is None or cuda_terms.expected_clocks(g, terms.number, multiprocessors) >= most:
        return None
    return terms


@lru_cache(maxsize=1024)
def plan(g: Geometry, multiprocessors: int, shared_bytes: int, wide: bool, aligned: bool, path: str) -> Launch:
    """Choose the kernel for a convolution, and lay out its argument.

    Raises:
        RuntimeError: the input, the weight, or the output positions need indices of more than 32 bits.
        ValueError: an unknown path.
    """
    named = _PATHS.get(path, (path,))
    choices = [c for c in _choices(g, multiprocessors, shared_bytes, wide) if c.kernel.split("_")[0] in named]
    if not choices:
        raise ValueError(f"a path is auto, rows, direct, columns or gather, not {path!r}")
    clocks, kernel, grid, threads, dynamic, buffer = min(choices, key=operator.itemgetter(0))

    pixels = g.batch * math.prod(g.out_size)
    reach = [max(g.size[i], g.dilation[i] * (g.kernel[i] - 1) + 1) + abs(g.padding[i]) for i in range(2)]
    lengths = (g.batch, g.groups, g.channels, *reach)
    span = sum((n - 1) * stride for n, stride in zip(lengths, g.input_strides, strict=True))
    weights = g.out_channels * g.groups * g.steps
    most = max(span, weights, _WARP * g.steps, pixels + _MOST_THREADS, 2 * max(reach))
    if most >= _INDEX_LIMIT or max(grid[1:]) > _GRID_LIMIT:
        raise RuntimeError(
            f"an integer convolution of {g.batch} x {g.channels * g.groups} x {list(g.size)} with "
            f"{g.out_channels * g.groups} kernels of {list(g.kernel)} needs indices of more than 32 bits within the "
            "input, in the weight, or for its output positions: use smaller batches or images"
        )
    in_words = aligned and g.is_dense and g.input_strides[2] == 1 and (g.input_strides[0] | g.steps) % 4 == 0
    values: list[object] = [*g.input_strides, g.channels, g.out_channels, g.groups]
    values += [g.size, g.kernel, g.out_size, g.stride, g.padding, g.dilation, pixels, 0, 0, buffer]
    elements = math.prod(g.kernel)
    values += [divisor(n) for n in (math.prod(g.out_size), g.out_size[1], elements, g.kernel[1])]
    values += [any(g.padding), in_words]
    conv = np.zeros(1, _CONV2D)
    for field, value in zip(list(_CONV2D.fields or ())[6:], values, strict=True):
        conv[field] = value
    return Launch(kernel, grid, threads, dynamic, conv, clocks)


def _choices(g: Geometry, multiprocessors: int, shared_bytes: int, wide: bool) -> Iterator[Choice]:
    """Yield the ways of computing a convolution. Blocks run in rounds of one on each multiprocessor."""
    pixels = g.batch * math.prod(g.out_size)
    of_word, suffix = (1, "_wide") if wide else (2, "")  # channels

    def blocks(channels: int, of_block: int) -> tuple[int, int, int]:
        return -(-pixels // of_block), -(-g.out_channels // channels), g.groups

    def time(grid: tuple[int, int, int], of_block: float) -> float:
        return -(-math.prod(grid) // multiprocessors) * of_block

    fetch = _FETCH if g.input_strides[0 if g.is_dense else 4] == 1 else _FETCH_APART

    grid, dynamic = blocks(_ROWS_CHANNELS * of_word // 2, _ROWS_PIXELS), 2 * _ROWS_BYTES
    of_step = _ROWS_STEP + _ROWS_PIXELS / _WARP * (fetch - _FETCH)
    name = f"rows{suffix}"
    if dynamic + _STATIC_BYTES > shared_bytes:
        name, dynamic, of_step = f"{name}_unbuffered", _ROWS_BYTES, 1.1 * of_step
    yield Choice(time(grid, g.steps * of_step), name, grid, (_ROWS_THREADS,), dynamic, 0)

    for channels in _COLUMNS[wide]:
        size, bytes_of_step = 2 * channels // of_word, channels // of_word * 1024 + 16 + 4 * channels
        for warps in range(1, _MOST_THREADS // _WARP + 1):
            grid = blocks(channels, warps * _WARP)
            # Two blocks of a multiprocessor build and look up in turn.
            room = shared_bytes - 1024 if math.prod(grid) <= multiprocessors else shared_bytes // 2 - 1024
            buffers = -(-g.steps // (room // bytes_of_step))
            buffer = -(-g.steps // buffers)
            of_step = channels * _BUILD + warps * (_LOOK_UP[size] + fetch)
            # Few warps need parts to hide latencies. Otherwise a part has 16 steps, or it does not pay.
            parts = max(1, min(16, _MOST_THREADS // _WARP // warps, buffer // (16 if warps >= 8 else 4)))
            dynamic = max(buffer * bytes_of_step, 4 * parts * warps * _WARP)
            threads = (warps * _WARP, parts)
            rounds = -(-math.prod(grid) // multiprocessors)
            at_once = max(1, min(rounds, _RESIDENT[size] // math.prod(threads), shared_bytes // dynamic))
            of_block = g.steps * of_step + buffers * _BUFFER / at_once
            yield Choice(time(grid, of_block), f"columns{suffix}_{channels}", grid, threads, dynamic, buffer)

    grid = blocks(_GATHERED, _WARP)
    parts = min(
        max(1, g.steps // 8), _MOST_THREADS // _WARP, max(1, _GATHER_WARPS * multiprocessors // math.prod(grid))
    )
    of_block = g.steps * (_GATHERED * _GATHER + _GATHER_FETCH)
    yield Choice(time(grid, of_block), f"gather{suffix}", grid, (parts * _WARP,), 0, 0)


def chosen_path(geometry: Geometry, table: Tensor) -> tuple[str, int]:
    """Return what "auto" takes for operands in order: "terms" and how many, or the kernel that looks up, and 0."""
    launch, _ = _look_up(geometry, table.device.index, entries(table).wide, True, "auto")
    terms = _chosen_terms(geometry, table, launch.clocks)
    return (launch.kernel, 0) if terms is None else ("terms", terms.number)


IntegerOperators("cuda", run, scales=True)
