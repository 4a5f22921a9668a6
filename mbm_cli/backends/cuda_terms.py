"""Integer multipliers of few terms on CUDA: the kernels of kernels/integer_mma.cu, on int8 matrix units."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mbm_cli.backends.cuda_programs import (
    Program,
    address,
    divisor,
    filled,
    multiprocessors_of,
    refuse_capture,
    seconds,
    source,
)
from mbm_cli.backends.geometry import Geometry
from mbm_cli.multipliers.factor import Integers, Terms

_INDEX_LIMIT = 1 << 31
_MOST_EXPANDED = 1 << 29  # bytes of the input at once: of larger batches, images are computed in slices
# As in integer_mma.cu: of an expansion, threads, positions of a block, and entries of a table.
_EXPANDERS, _POSITIONS, _BLOCKS, _CODES = 256, 128, 16, 256
_EXPANSIONS = 4  # blocks of a multiprocessor
_THREADS, _STAGES, _ROW, _CHUNK = 128, 3, 64, 16  # of a block of products; bytes of a step, and of a copy


class Tile(NamedTuple):
    """Channels and pixels of a block, how many blocks a multiprocessor holds, and clocks measured on an H100.

    Attributes:
        step, step_alone: of a block's step among others, and at least.
        output: of a block's beginning and end, for the most part the memory's.
    """

    channels: int
    pixels: int
    resident: int
    step: int
    step_alone: int
    output: int

    @property
    def kernel(self) -> str:
        return f"layer_{self.channels}x{self.pixels}"

    @property
    def shared_bytes(self) -> int:
        return (self.channels + self.pixels) * _ROW * _STAGES


_TILES = (Tile(64, 128, 3, 430, 700, 3000), Tile(64, 64, 4, 330, 470, 900), Tile(32, 128, 4, 380, 560, 1500))
# Clocks of a multiprocessor on an H100: of launches and latencies, and of an expansion's positions by 64 channels.
_PRODUCTS, _OUTPUT_ALONE, _EXPANSION, _ITEM, _ITEM_TERM, _SCATTERED = 5500, 6000, 8000, 1000, 750, 4000
_CEILING_ROUNDS, _CEILING_SUMS = 20_000, 16  # of a warp, each of 16 x 8

# integer_mma.cu's structs Operand and Layer, field by field.
_OPERAND = np.dtype(
    [(name, np.uint64) for name in ("codes", "expanded", "sums", "factors", "constants")]
    + [(name, np.int64) for name in ("image_stride", "group_stride", "row_stride", "column_stride")]
    + [(name, np.int32) for name in ("channel_stride", "channels", "terms", "words", "in_words")]
    + [("count", np.uint32), ("total", np.uint32), ("padding_code", np.uint32)]
    + [(name, np.uint32, 3) for name in ("batch", "plane", "width", "segments")],
    align=True,
)
_STRIDES = ("image_stride", "group_stride", "channel_stride", "row_stride", "column_stride")
_LAYER = np.dtype(
    [(name, np.uint64) for name in ("input", "weight", "output", "input_sums", "weight_sums", "scale", "bias")]
    + [
        (name, np.int32)
        for name in ("chunks", "slab", "slabs", "length", "steps", "segments", "out_channels", "groups", "batch")
    ]
    + [(name, np.int32, 2) for name in ("size", "kernel", "stride", "padding", "dilation")]
    + [("pixels", np.uint32), ("outside", np.uint32)]
    + [(name, np.uint32, 3) for name in ("plane", "width", "channel_tiles", "pixel_tiles")],
    align=True,
)


class DeviceTerms(NamedTuple):
    """Terms as the kernels read them.

    Attributes:
        u, v: int32 (number / 4 rounded up, 256): words of four terms' bytes by code.
        f, g: int32 (256,), modulo 2^32.
        number: R, how many terms there are.
        has_f, has_g: whether any of these is not zero.
    """

    u: Tensor
    v: Tensor
    f: Tensor
    g: Tensor
    number: int
    has_f: bool
    has_g: bool


class Launch(NamedTuple):
    """How a layer is launched: the tile, the blocks of both kernels, and arguments with their pointers left open."""

    tile: Tile
    blocks: int
    expansions: tuple[int, int]  # of the input and of the weight
    shared_bytes: int
    input: np.ndarray
    weight: np.ndarray
    layer: np.ndarray


def on_device(terms: Terms, device: torch.device) -> DeviceTerms:
    """Return a table's terms as the kernels read them.

    Raises:
        CudaError: during a capture, which cannot copy them.
    """
    if device.type == "cuda":
        refuse_capture("the multiplier's terms")

    def words(vectors: np.ndarray) -> Tensor:
        padded = np.zeros((-(-terms.count // 4) * 4, _CODES), np.int8)
        padded[: terms.count] = vectors
        quads = padded.reshape(-1, 4, _CODES).transpose(0, 2, 1).reshape(-1)
        return torch.from_numpy(quads.view(np.int32).reshape(-1, _CODES)).to(device)

    def constants(values: Integers) -> Tensor:
        return torch.from_numpy((values & 0xFFFFFFFF).astype(np.uint32).view(np.int32)).to(device)

    made = words(terms.u.T), words(terms.v), constants(terms.f), constants(terms.g)
    return DeviceTerms(*made, terms.count, bool(terms.f.any()), bool(terms.g.any()))


@lru_cache(maxsize=1)
def program() -> Program:
    return Program(
        "integer multipliers of few terms", source("integer_mma.cu"), headers=("implicit_gemm.cuh",), shared=True
    )


def run(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    terms: DeviceTerms,
    padding_code: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Add up table entries into ``output``, which is contiguous and not empty.

    Args:
        input, weight: codes of 8 bits; the weight is contiguous.
        output: int32 sums; with a scale, float32.
        padding_code: the code of elements outside the image.
        scale, bias: float32 of each output channel: float(sum) * scale + bias, rounded after each operation.

    Raises:
        RuntimeError, CudaError: as `plan` and `Program.kernel`.
    """
    of_slice = _images_at_once(geometry, terms.number)
    for first in range(0, geometry.batch, of_slice):
        images = slice(first, first + of_slice)
        part = geometry._replace(batch=min(of_slice, geometry.batch - first))
        _run(part, input[images], weight, output[images], terms, padding_code, scale, bias)


def _run(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    terms: DeviceTerms,
    padding_code: int,
    scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    device = input.device.index
    launch = plan(geometry, terms.number, multiprocessors_of(device))
    operands, expanded, all_sums = [], [], []
    for template, codes, factors, constants, needed in (
        (launch.input, input, terms.u, terms.f, terms.has_f),
        (launch.weight, weight, terms.v, terms.g, terms.has_g),
    ):
        operand = template.copy()
        total = int(operand["total"][0])
        to = codes.new_empty(total * int(operand["words"][0]), dtype=torch.int32)
        sums = codes.new_empty(total * int(launch.layer["segments"][0]), dtype=torch.int32) if needed else None
        pointers = [codes.data_ptr(), to.data_ptr(), address(sums), factors.data_ptr(), constants.data_ptr()]
        operand.view(np.uint64)[: len(pointers)] = pointers
        if codes.data_ptr() % 4 != 0:  # of a view
            operand["in_words"] = 0
        operands.append(operand)
        expanded.append(to)
        all_sums.append(sums)
    operands[0]["padding_code"] = padding_code & 255
    layer = launch.layer.copy()
    layer.view(np.uint64)[:7] = [address(one) for one in (*expanded, output, *all_sums, scale, bias)]
    of_weight = launch.expansions[1]
    arguments = (*operands, np.int32(of_weight))
    program().launch("expand", device, (sum(launch.expansions),), (_EXPANDERS,), arguments, launch.shared_bytes)
    tile = launch.tile
    program().launch(tile.kernel, device, (launch.blocks,), (_THREADS,), (layer,), tile.shared_bytes)


def _words(g: Geometry, count: int) -> int:
    """Return the words of an expanded position: one for each term of four channels, in whole chunks."""
    chunks = -(-(-(-g.channels // 4) * count) // 4)
    if chunks > 1:  # so that most copies of neighbouring threads are next to each other
        chunks += -chunks % (4 if chunks > 10 else 2)
    return 4 * chunks


def _images_at_once(g: Geometry, count: int) -> int:
    of_image = g.groups * math.prod(g.size) * _words(g, count) * 4
    return max(1, min(g.batch, _MOST_EXPANDED // max(1, of_image)))


@lru_cache(maxsize=1024)
def plan(g: Geometry, count: int, multiprocessors: int) -> Launch:
    """Choose the tile for a layer of ``count`` terms, and lay out the arguments.

    Raises:
        RuntimeError: positions, or the chunks of the weight, need indices of more than 32 bits.
    """
    plane, elements, pixels = math.prod(g.size), math.prod(g.kernel), g.batch * math.prod(g.out_size)
    positions, of_weight = g.groups * g.batch * plane, g.groups * g.out_channels * elements
    words = _words(g, count)
    chunks = words // 4
    slab = math.gcd(chunks, _ROW // _CHUNK)
    tile = min(_TILES, key=lambda tile: _products_clocks(g, count, multiprocessors, tile))
    channel_tiles, pixel_tiles = -(-g.out_channels // tile.channels), -(-pixels // tile.pixels)
    blocks = g.groups * channel_tiles * pixel_tiles
    reach = math.prod(g.size[i] + 2 * g.padding[i] + g.dilation[i] * g.kernel[i] for i in range(2))
    most = max(positions + _POSITIONS, pixels + tile.pixels, reach, of_weight * words, 4 * elements * words)
    if max(most, blocks, abs(g.input_strides[2])) >= _INDEX_LIMIT:
        raise RuntimeError(
            f"an integer convolution of {g.batch} x {g.channels * g.groups} x {list(g.size)} with "
            f"{g.out_channels * g.groups} kernels of {list(g.kernel)} needs indices of more than 32 bits for its "
            "positions or in the weight: use smaller batches or images"
        )

    blocks_of_four = -(-g.channels // 4)
    segments = -(-blocks_of_four // _BLOCKS)
    tile_words = _POSITIONS * max(min(_BLOCKS, blocks_of_four) * min(4, count) | 1, _EXPANDERS // 32)
    shared_bytes = 4 * ((-(-count // 4) + 1) * _CODES + tile_words)
    common = {"channels": g.channels, "terms": count, "words": words, "segments": divisor(segments)}
    input = filled(
        _OPERAND,
        **common,
        **dict(zip(_STRIDES, g.input_strides, strict=True)),
        in_words=_in_words(g.channels, plane, g.size[1], g.input_strides),
        count=positions,
        total=positions + 1,
        batch=divisor(g.batch),
        plane=divisor(plane),
        width=divisor(g.size[1]),
    )
    of_rows = (g.steps, g.out_channels * g.steps, elements, elements, 1)
    weight = filled(
        _OPERAND,
        **common,
        **dict(zip(_STRIDES, of_rows, strict=True)),
        in_words=_in_words(g.channels, elements, elements, of_rows),
        count=of_weight,
        total=of_weight,
        batch=divisor(g.out_channels),
        plane=divisor(elements),
        width=divisor(elements),
    )
    layer = filled(
        _LAYER,
        **{name: getattr(g, name) for name in ("out_channels", "groups", "batch")},
        **{name: getattr(g, name) for name in ("size", "kernel", "stride", "padding", "dilation")},
        chunks=chunks,
        slab=slab,
        segments=segments,
        slabs=chunks // slab,
        length=elements * chunks // slab,
        steps=-(-elements * chunks * _CHUNK // _ROW),
        pixels=pixels,
        outside=positions,
        plane=divisor(math.prod(g.out_size)),
        width=divisor(g.out_size[1]),
        channel_tiles=divisor(channel_tiles),
        pixel_tiles=divisor(pixel_tiles),
    )
    expansions = [
        min(-(-n // _POSITIONS) * segments, _EXPANSIONS * multiprocessors) for n in (positions + 1, of_weight)
    ]
    return Launch(tile, blocks, (expansions[0], expansions[1]), shared_bytes, input, weight, layer)


def _in_words(channels: int, plane: int, width: int, strides: tuple[int, ...]) -> int:
    """Return 1 where any four positions from a multiple of four lie together in memory, 2 where channels do, else 0."""
    image, group, channel, row, column = strides
    if (column, row) == (1, width) and (plane | image | group | channel) % 4 == 0:
        return 1
    return 2 if channel == 1 and (channels | image | group | row | column) % 4 == 0 else 0


@lru_cache(maxsize=1024)
def expected_clocks(geometry: Geometry, count: int, multiprocessors: int) -> float:
    """Return the clocks of a multiprocessor that a layer of ``count`` terms is expected to take; inf for none."""
    of_slice = _images_at_once(geometry, count)
    part = geometry._replace(batch=min(of_slice, geometry.batch))
    try:
        launch = plan(part, count, multiprocessors)
    except RuntimeError:
        return math.inf
    clocks = 0.0
    for operand in (launch.input, launch.weight):
        items = -(-int(operand["total"][0]) // _POSITIONS) * int(operand["segments"][0, 0])
        filled = min(1, geometry.channels / (4 * _BLOCKS))
        of_channels = _ITEM_TERM * count + _SCATTERED * (int(operand["in_words"][0]) == 0)
        clocks += items / multiprocessors * (_ITEM + filled * of_channels)
    clocks += _EXPANSION + _products_clocks(part, count, multiprocessors, launch.tile)
    return clocks * geometry.batch / part.batch


def _products_clocks(g: Geometry, count: int, multiprocessors: int, tile: Tile) -> float:
    """Return the clocks of a tile's blocks, which run in rounds of as many as the multiprocessors hold."""
    steps = -(-math.prod(g.kernel) * _words(g, count) * 4 // _ROW)
    pixels = g.batch * math.prod(g.out_size)
    blocks = g.groups * -(-g.out_channels // tile.channels) * -(-pixels // tile.pixels)
    rounds, rest = divmod(-(-blocks // multiprocessors), tile.resident)

    def time(at_once: int) -> float:
        return max(at_once * tile.step, tile.step_alone) * steps + max(at_once * tile.output, _OUTPUT_ALONE)

    return _PRODUCTS + rounds * time(tile.resident) + (time(rest) if rest else 0)


def ceiling(device: torch.device) -> float:
    """Measure the int8 multiply-accumulates a second of the matrix units, as mma.sync drives them, on registers."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        blocks = 4 * multiprocessors_of(index)
        output = torch.empty(blocks, _THREADS, dtype=torch.int32, device="cuda")
        arguments = output.data_ptr(), np.int32(_CEILING_ROUNDS)
        time = seconds(lambda: program().launch("ceiling", index, (blocks,), (_THREADS,), arguments))
    return blocks * _THREADS // 32 * _CEILING_ROUNDS * _CEILING_SUMS * 16 * 8 * 32 / time
