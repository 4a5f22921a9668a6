"""Float multipliers on CUDA's bfloat16 matrix units: the kernels of kernels/matrix.cu, where they are allowed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mbm_cli.backends import cuda
from mbm_cli.backends.cuda_programs import (
    Program,
    address,
    divisor,
    filled,
    has_matrix_units,
    multiprocessors_of,
    refuse_capture,
    seconds,
    shared_bytes_of,
    source,
)
from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.operators import Operators
from mbm_cli.multipliers.content import TABLE, of_handle
from mbm_cli.multipliers.float32 import FRACTION_BITS, reference_product

_INDEX_LIMIT = 1 << 31
_MOST_EXPANDED = 1 << 28  # bytes of a weight
_MOST_BITS, _SLOTS = 7, (1, 4, 8, 16, 32)  # fraction bits that are looked at; the kernels' numbers of slots
_RESERVED = 4096  # bytes of a multiprocessor's shared memory that are not the blocks'
# As in matrix.cu: of an expansion, threads, positions of a block and chunks of a segment; of a chunk, bytes and
# channels; threads of a block of products.
_EXPANDERS, _POSITIONS, _SEGMENT, _CHUNK, _CHANNELS, _THREADS = 256, 128, 8, 16, 8, 128
_TURNED = 4 * 16 * (64 + 8) * 4  # bytes in which a block's warps turn their outputs


class Tile(NamedTuple):
    """A kernel: channels and pixels of a block, and how many blocks a multiprocessor holds.

    Attributes:
        step, output: clocks of a multiprocessor on an H100, of 16 products of each sum, and of a block's output.
        of_positions: whether all positions under a block's pixels lie in shared memory.
    """

    channels: int
    pixels: int
    resident: int
    step: int
    output: int
    of_positions: bool = False

    @property
    def kernel(self) -> str:
        return f"{'positions' if self.of_positions else 'layer'}_{self.channels}x{self.pixels}"


_TILES = (
    Tile(64, 256, 2, 240, 5050, of_positions=True),
    Tile(64, 128, 3, 138, 1750, of_positions=True),
    Tile(64, 256, 2, 239, 6500),
    Tile(64, 128, 3, 135, 2950),
    Tile(32, 128, 4, 83, 2400),
)
# Of the same: a step of a block alone, a round of blocks, both launches, bytes a clock of an expansion, launch of the
# scalar kernels, and their products a clock with one slot and with several.
_STEP_ALONE, _ROUND, _LAUNCHES, _EXPANSION, _SCALAR_LAUNCH, _SCALAR = 240, 8000, 3000, 11.7, 5000, (65, 30)

# matrix.cu's structs Operands and Layer, field by field.
_OPERANDS = np.dtype(
    [(name, np.uint64) for name in ("input", "weight", "codes", "expanded", "activations", "weights")]
    + [("kept", np.uint32), ("set", np.uint32)]
    + [(name, np.int32) for name in ("slot_shift", "dropped", "keeps_subnormals")]
    + [(name, np.int64) for name in ("image_stride", "group_stride", "channel_stride", "row_stride", "column_stride")]
    + [(name, np.int64) for name in ("weight_group_stride", "weight_row_stride", "weight_channel_stride")]
    + [(name, np.int32) for name in ("channels", "chunks", "slab")]
    + [("kernel", np.int32, 2), ("in_words", np.int32), ("weight_blocks", np.int32)]
    + [("positions", np.uint32), ("entries", np.uint32)]
    + [(name, np.uint32, 3) for name in ("batch", "plane", "width", "segments", "whole", "out_channels", "of_chunk")],
    align=True,
)
_LAYER = np.dtype(
    [(name, np.uint64) for name in ("codes", "weight", "bias", "output")]
    + [
        (name, np.int32)
        for name in ("chunks", "slab", "length", "steps", "capacity", "out_channels", "groups", "batch")
    ]
    + [(name, np.int32, 2) for name in ("size", "kernel", "stride", "padding", "dilation")]
    + [("pixels", np.uint32)]
    + [(name, np.uint32, 3) for name in ("plane", "width", "channel_tiles", "pixel_tiles")],
    align=True,
)

_allowed: ContextVar[bool] = ContextVar("matrix units are allowed", default=False)
_of_tables = WeakTensorKeyDictionary()


@contextmanager
def allowed(on: bool) -> Iterator[None]:
    """Let forward passes use matrix units, or not, in this thread; elsewhere than on a suitable GPU nothing changes."""
    token = _allowed.set(on)
    try:
        yield
    finally:
        _allowed.reset(token)


def allow_in(model: nn.Module) -> None:
    """Let all forward passes of a model use matrix units, and its backward passes not."""
    tokens: list[Any] = []
    model.register_forward_pre_hook(lambda *_: tokens.append(_allowed.set(True)))
    model.register_forward_hook(lambda *_: _allowed.reset(tokens.pop()), always_call=True)


class Factors(NamedTuple):
    """The significand products of a multiplier as ``u[a] v[slot[a], b]``, all exact in bfloat16.

    Attributes:
        slot, u: int64 and float32 (2^m,), by the m leading bits of the first operand's fraction.
        v: float32 (slots, 2^m); u is 1 where there are several slots.
        keeps_subnormals: whether subnormal operands do not count as zero.
    """

    slot: np.ndarray
    u: np.ndarray
    v: np.ndarray
    keeps_subnormals: bool

    @property
    def slots(self) -> int:
        return len(self.v)

    @property
    def bits(self) -> int:
        return len(self.u).bit_length() - 1


class DeviceFactors(NamedTuple):
    """Factors as the kernels read them.

    Attributes:
        activations: the bits of u with the slot in the lowest ones; ``None`` where u and the slot are bits of the
            operand.
        weights: v.
        arithmetic: the values of the struct's fields.
    """

    activations: Tensor | None
    weights: Tensor
    slots: int
    arithmetic: dict[str, int]


class Launch(NamedTuple):
    """How a layer is launched: the tile, the blocks of both kernels, and arguments with their pointers left open."""

    tile: Tile
    blocks: int
    expansions: int
    shared_bytes: int
    operands: np.ndarray
    layer: np.ndarray


def factorize(handle: str, table: Tensor | None = None) -> Factors | None:
    """Factor the significand products of a multiplier; ``None`` where matrix units cannot compute them exactly.

    Args:
        handle, table: as the operators take them, the table on the CPU.
    """
    multiplier = of_handle(handle)
    if handle.startswith("c:"):
        return None
    bits = FRACTION_BITS - multiplier.truncate
    if handle == TABLE:
        assert table is not None
        bits = table.shape[1].bit_length() - 1
    if bits > _MOST_BITS:
        return None
    significands = 1 + torch.arange(1 << bits) / (1 << bits)
    products = reference_product(significands[:, None], significands, multiplier, table).numpy()
    subnormal = torch.tensor([2.0**-127])
    keeps_subnormals = bool(reference_product(subnormal, torch.ones(1), multiplier, table) != 0)

    integers = (products.astype(np.float64) * (1 << FRACTION_BITS)).astype(np.int64)
    u = integers[:, 0] // np.gcd.reduce(integers[:, 0])
    if np.array_equal(np.outer(u, integers[0]), u[0] * integers):
        power = 2.0 ** math.floor(math.log2(u[0]))
        one = Factors(np.zeros(len(u), np.int64), (u / power).astype(np.float32), products[:1] * power / u[0], False)
        one = one._replace(v=one.v.astype(np.float32), keeps_subnormals=keeps_subnormals)
        if _is_bfloat16(one.u) and _is_bfloat16(one.v):
            return one
    rows, slot = np.unique(products, axis=0, return_inverse=True)
    slots = next((n for n in _SLOTS[1:] if n >= len(rows)), None)
    if slots is None or keeps_subnormals or not _is_bfloat16(rows):
        return None
    v = np.zeros((slots, len(u)), np.float32)
    v[: len(rows)] = rows
    return Factors(slot.reshape(-1), np.ones(len(u), np.float32), v, False)


def _is_bfloat16(values: np.ndarray) -> bool:
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


def factors_of(handle: str, table: Tensor | None, device: int) -> DeviceFactors | None:
    """Return a multiplier's factors on a device, found when they are first asked for.

    Raises:
        CudaError: they are first asked for in a capture.
    """
    if table is None:
        return _of_name(handle, device)
    if table not in _of_tables:
        refuse_capture("the multiplier's factors")
        _of_tables[table] = _on_device(factorize(handle, table.cpu()), table.device)
    made: DeviceFactors | None = _of_tables[table]
    return made


@cache  # captured graphs read them
def _of_name(handle: str, device: int) -> DeviceFactors | None:
    refuse_capture("the multiplier's factors")
    return _on_device(factorize(handle), torch.device("cuda", device))


def _on_device(factors: Factors | None, device: torch.device) -> DeviceFactors | None:
    if factors is None:
        return None

    def copy(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    fractions, dropped = np.arange(len(factors.u)), FRACTION_BITS - factors.bits
    u = factors.u.view(np.uint32)
    set_bits = int(np.bitwise_and.reduce(u)) & (1 << FRACTION_BITS) - 1
    kept = 0xFF800000 | int(np.bitwise_or.reduce(u)) & (1 << FRACTION_BITS) - 1 & ~set_bits
    shift = factors.bits - (int(factors.slot.max()) + 1).bit_length() + 1 if factors.slots > 1 else factors.bits
    is_arithmetic = np.array_equal(fractions << dropped & kept | set_bits, u & (1 << FRACTION_BITS) - 1)
    is_arithmetic &= u.max() < 0x40000000 and np.array_equal(fractions >> shift, factors.slot)
    table = None if is_arithmetic else copy(u.view(np.int32) | factors.slot.astype(np.int32))
    arithmetic = {"kept": kept, "set": set_bits, "slot_shift": shift + dropped, "dropped": dropped}
    arithmetic["keeps_subnormals"] = int(factors.keeps_subnormals)
    made = DeviceFactors(table, copy(factors.v), factors.slots, arithmetic)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read it, too
    return made


@lru_cache(maxsize=len(_SLOTS))
def program(slots: int) -> Program:
    name = f"matrix units, {slots} slot{'s'[: slots != 1]}"
    return Program(name, source("matrix.cu"), (f"-DSLOTS={slots}",), headers=("implicit_gemm.cuh",), shared=True)


def run(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    multiplier: str,
    table: Tensor | None,
) -> None:
    """Compute a convolution into ``output``, which is contiguous: on matrix units where that is allowed and pays.

    Raises:
        RuntimeError, CudaError: as `cuda.run`, `factors_of` and `Program.kernel`.
    """
    device = input.device.index
    launch = None
    suits = not geometry.exchanged and (geometry.is_dense or not geometry.divisible)
    if suits and _allowed.get() and has_matrix_units(device):
        factors = factors_of(multiplier, table, device)
        if factors is not None:
            launch = plan(geometry, factors.slots, multiprocessors_of(device), shared_bytes_of(device))
    if launch is None:
        return cuda.run(geometry, input, weight, bias, output, multiplier, table)
    assert factors is not None
    operands, layer, tile = launch.operands.copy(), launch.layer.copy(), launch.tile
    codes = input.new_empty(int(operands["positions"][0]) * int(operands["chunks"][0]) * _CHUNK, dtype=torch.uint8)
    expanded = input.new_empty(int(operands["entries"][0]) * factors.slots * _CHUNK, dtype=torch.uint8)
    pointers = [address(one) for one in (input, weight, codes, expanded, factors.activations, factors.weights)]
    operands.view(np.uint64)[: len(pointers)] = pointers
    for field, value in factors.arithmetic.items():
        operands[field] = value
    if input.data_ptr() % 16 != 0:  # of a view
        operands["in_words"] = 0
    layer.view(np.uint64)[:4] = [address(one) for one in (codes, expanded, bias, output)]
    kernels = program(factors.slots)
    kernels.launch("expand", device, (launch.expansions,), (_EXPANDERS,), (operands,))
    kernels.launch(tile.kernel, device, (launch.blocks,), (_THREADS,), (layer,), launch.shared_bytes)


def chosen_path(geometry: Geometry, multiplier: str, table: Tensor | None, device: int) -> str:
    """Return how a forward pass is computed where matrix units are allowed: on ``matrix units``, or ``scalar``."""
    factors = factors_of(multiplier, table, device) if has_matrix_units(device) else None
    if factors is None:
        return "scalar"
    launch = plan(geometry, factors.slots, multiprocessors_of(device), shared_bytes_of(device))
    return "scalar" if launch is None else "matrix units"


def ceiling(multiplier: str, table: Tensor | None, device: int) -> float | None:
    """Measure the multiply-accumulates a second of the matrix units alone; ``None`` where they cannot compute them."""
    factors = factors_of(multiplier, table, device) if has_matrix_units(device) else None
    if factors is None:
        return None
    blocks, rounds = 3 * multiprocessors_of(device), 20_000
    output = torch.empty(blocks, _THREADS, device=torch.device("cuda", device))
    arguments = output.data_ptr(), np.int32(rounds)
    with torch.cuda.device(device):
        time = seconds(lambda: program(1).launch("ceiling", device, (blocks,), (_THREADS,), arguments))
    products = 16 * 16 * 8 * 16 * (_THREADS // 32)  # of a block's round
    return blocks * rounds * products / time / factors.slots


def _chunks_of_step(slots: int) -> int:
    return 4 if slots <= 4 else 2 if slots <= 8 else 1


@lru_cache(maxsize=1024)
def plan(g: Geometry, slots: int, multiprocessors: int, shared: int) -> Launch | None:
    """Choose the tile for a layer, and lay out the arguments; ``None`` where the scalar kernels are to compute it.

    Args:
        shared: bytes of a multiprocessor's shared memory.
    """
    if g.steps == 0:
        return None
    plane, elements, pixels = math.prod(g.size), math.prod(g.kernel), g.batch * math.prod(g.out_size)
    positions, rows = g.groups * g.batch * plane, g.groups * g.out_channels
    chunks, of_step = -(-g.channels // _CHANNELS), _chunks_of_step(slots)
    reach = math.prod(g.size[i] + 2 * g.padding[i] + g.dilation[i] * g.kernel[i] for i in range(2))
    most = rows * elements * (chunks + _SEGMENT) * slots
    if (
        max(positions * chunks + _POSITIONS, pixels + 256, reach, most) >= _INDEX_LIMIT
        or most * _CHUNK > _MOST_EXPANDED
    ):
        return None
    fitting = [tile for tile in _TILES if _resident(tile, g, slots, shared) > 0]
    if not fitting:
        return None
    tile = min(fitting, key=lambda tile: _clocks(g, slots, multiprocessors, tile, shared))
    if not _pays(g, slots, multiprocessors, tile, shared):
        return None
    slab, steps = _steps(tile, g, slots)
    slabs = -(-chunks // slab) * elements
    channel_tiles, pixel_tiles = -(-g.out_channels // tile.channels), -(-pixels // tile.pixels)
    segments, entries = -(-chunks // _SEGMENT), rows * steps * of_step
    of_input = min(-(-positions // _POSITIONS) * segments, 6 * multiprocessors)
    of_weight = min(-(-entries * slots // _EXPANDERS), 2 * multiprocessors)
    common = {"chunks": chunks, "slab": slab, "kernel": g.kernel}
    names = ("image_stride", "group_stride", "channel_stride", "row_stride", "column_stride")
    of_weights = ("weight_group_stride", "weight_row_stride", "weight_channel_stride")
    operands = filled(
        _OPERANDS,
        **common,
        **dict(zip(names + of_weights, g.input_strides + g.weight_strides, strict=True)),
        channels=g.channels,
        in_words=_in_words(g),
        weight_blocks=of_weight,
        positions=positions,
        entries=entries,
        batch=divisor(g.batch),
        plane=divisor(plane),
        width=divisor(g.size[1]),
        segments=divisor(segments),
        whole=divisor(steps * of_step),
        out_channels=divisor(g.out_channels),
        of_chunk=divisor(chunks),
    )
    layer = filled(
        _LAYER,
        **common,
        **{name: getattr(g, name) for name in ("out_channels", "groups", "batch")},
        **{name: getattr(g, name) for name in ("size", "stride", "padding", "dilation")},
        length=slabs,
        steps=steps,
        capacity=_positions_of_tile(g, tile.pixels) if tile.of_positions else 0,
        pixels=pixels,
        plane=divisor(math.prod(g.out_size)),
        width=divisor(g.out_size[1]),
        channel_tiles=divisor(channel_tiles),
        pixel_tiles=divisor(pixel_tiles),
    )
    blocks = g.groups * channel_tiles * pixel_tiles
    return Launch(tile, blocks, of_weight + of_input, _shared_bytes(tile, g, slots), operands, layer)


def _steps(tile: Tile, g: Geometry, slots: int) -> tuple[int, int]:
    """Return the chunks of a slab, and the steps of a sum."""
    chunks, of_step, elements = -(-g.channels // _CHANNELS), _chunks_of_step(slots), math.prod(g.kernel)
    if not tile.of_positions:
        slab = math.gcd(chunks, of_step)
        return slab, -(-chunks * elements // of_step)
    slabs = -(-chunks // _SEGMENT)
    slab = -(-chunks // (slabs * of_step)) * of_step
    return slab, slabs * elements * slab // of_step


def _shared_bytes(tile: Tile, g: Geometry, slots: int) -> int:
    """Return the bytes of a block: of the steps that are fetched, and of the positions; at last, of its outputs."""
    of_step = _chunks_of_step(slots) * _CHUNK
    if not tile.of_positions:
        return max(_TURNED, 3 * (tile.channels * slots + tile.pixels) * of_step)
    positions = (_positions_of_tile(g, tile.pixels) + 1) * _SEGMENT * _CHUNK
    return max(_TURNED, (4 if slots == 1 else 3) * tile.channels * slots * of_step + positions)


def _resident(tile: Tile, g: Geometry, slots: int, shared: int) -> int:
    """Return how many blocks a multiprocessor holds."""
    return min(tile.resident, (shared - _RESERVED) // _shared_bytes(tile, g, slots))


@lru_cache(maxsize=1024)
def _positions_of_tile(g: Geometry, pixels: int) -> int:
    """Return how many positions lie, at most, from the first to the last row under a tile's windows."""
    plane, width = math.prod(g.out_size), g.out_size[1]
    first = np.arange(0, g.batch * plane, pixels, dtype=np.int64)
    last = np.minimum(first + pixels, g.batch * plane) - 1
    below = (g.kernel[0] - 1) * g.dilation[0]

    def row(pixel: np.ndarray, down: int) -> np.ndarray:
        in_image = pixel % plane // width * g.stride[0] - g.padding[0] + down
        return pixel // plane * g.size[0] + np.clip(in_image, 0, g.size[0] - 1)

    return int((row(last, below) - row(first, 0) + 1).max()) * g.size[1]


def _clocks(g: Geometry, slots: int, multiprocessors: int, tile: Tile, shared: int) -> float:
    """Return the clocks of a tile's blocks, which run in rounds of as many as the multiprocessors hold."""
    pixels, (_, steps) = g.batch * math.prod(g.out_size), _steps(tile, g, slots)
    blocks = g.groups * -(-g.out_channels // tile.channels) * -(-pixels // tile.pixels)
    resident = _resident(tile, g, slots, shared)
    rounds, rest = divmod(-(-blocks // multiprocessors), resident)
    of_units = steps * _chunks_of_step(slots) * max(1, slots / 2)  # steps of 16 products
    of_units /= 2 if slots == 1 else 1

    def time(at_once: int) -> float:
        return max(at_once * tile.step, _STEP_ALONE) * of_units + at_once * tile.output + _ROUND

    return rounds * time(resident) + (time(rest) if rest else 0)


def _pays(g: Geometry, slots: int, multiprocessors: int, tile: Tile, shared: int) -> bool:
    """Return whether a layer is expected to take less time than the scalar kernels do."""
    chunks = -(-g.channels // _CHANNELS)
    of_input = g.groups * g.batch * math.prod(g.size) * (4 * g.channels + _CHUNK * chunks)
    of_weight = g.groups * g.out_channels * math.prod(g.kernel) * (4 * g.channels + _CHUNK * chunks * slots)
    expansion = (of_input + of_weight) / (_EXPANSION * multiprocessors)
    rate = _SCALAR[slots > 1] * (1 if g.out_channels >= 32 else 0.5)
    scalar = _SCALAR_LAUNCH + g.products / (rate * multiprocessors)
    return _LAUNCHES + expansion + _clocks(g, slots, multiprocessors, tile, shared) < scalar


def _in_words(g: Geometry) -> int:
    """Return 1 where four positions lie together in memory, 2 where eight channels do, aligned each, else 0."""
    image, group, channel, row, column = g.input_strides
    if (column, row) == (1, g.size[1]) and (math.prod(g.size) | image | group | channel) % 4 == 0:
        return 1
    return 2 if channel == 1 and g.channels % 8 == 0 and (image | group | row | column) % 4 == 0 else 0


Operators("cuda", run)
