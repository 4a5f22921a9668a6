"""The CUDA backend: the kernels of kernels/conv2d.cu, compiled by CuPy, on PyTorch's streams and memory."""

import re
import sys
import zlib
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli.backends.shapes import conv2d_output_shape
from mbm_cli.errors import RunError
from mbm_cli.multipliers.code import Function, first_compiler_error
from mbm_cli.multipliers.content import TABLE, of_handle
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
    + [("slice", np.int32, 3), ("pixels", np.uint32)],
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


class CudaError(RunError, RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says what to install."""


class Tile(NamedTuple):
    """A tiled kernel: output channels and pixels of a block, and a product's time as a multiple of the first's."""

    kernel: str
    channels: int
    pixels: int
    cost: float


_TILES = (
    Tile("conv2d_64x128", 64, 128, 1.0),
    Tile("conv2d_32x128", 32, 128, 1.06),
    Tile("conv2d_16x32", 16, 32, 1.3),
)
_DIRECT = {1: (4,), 4: (2,), 6: (1, 2), 8: (2,)}  # output channels of the direct kernels, and pixels of a thread
_KERNELS = (
    *(tile.kernel for tile in _TILES),
    *(f"conv2d_direct_{channels}x{pixels}" for channels, choices in _DIRECT.items() for pixels in choices),
    "multiply",
    "ceiling",
)


class Launch(NamedTuple):
    """How a convolution is launched: the kernel, the number of blocks, and the argument with its pointers left open."""

    kernel: str
    blocks: int
    conv: np.ndarray


class Program(NamedTuple):
    """What NVRTC compiles: the text of conv2d.cu, and options that make it the kernels of one multiplier."""

    source: str
    options: tuple[str, ...]


def program(handle: str, table_bits: int = 0) -> Program:
    """Return the program of a multiplier; ``table_bits`` are the fraction bits of its table.

    A function in C stands in front of the kernels. NVRTC has no standard headers, so C's integers are defined first.
    """
    multiplier = of_handle(handle)
    header, kernels = (files("mbm_cli").joinpath("kernels", name) for name in ("multiplier.h", "conv2d.cu"))
    text, function = kernels.read_text(encoding="utf-8"), multiplier.content
    family, bits, result_bits = multiplier.family, multiplier.truncate, multiplier.result_bits or FRACTION_BITS
    extra = []
    if handle == TABLE:
        family, bits = "table", table_bits
    if isinstance(function, Function):
        family, extra = "function", [f"-DMBM_FUNCTION=::{function.CALLED}", "-fmad=false"]
        users = function.renamed(f'#line 1 "function.h"\n{_C_INCLUDE.sub("", function.text)}')
        text = f'{_C_INTEGERS}{users}#line 1 "conv2d.cu"\n{text}'
    macros = (f"-DFAMILY=mbm::{family.upper()}", f"-DBITS={bits}", f"-DRESULT_BITS={result_bits}")
    # CuPy's cache on disk does not look into headers.
    digest = f"-DHEADER_DIGEST=0x{zlib.crc32(header.read_bytes()):08x}"
    return Program(text, ("-std=c++17", f"-I{Path(str(header)).parent}", digest, *macros, *extra))


def _table_bits(table: Tensor | None) -> int:
    return 0 if table is None else table.shape[1].bit_length() - 1


def import_cupy() -> Any:
    """Import CuPy, when a CUDA tensor first needs it.

    Raises:
        CudaError: it is not installed, or for another CUDA than PyTorch's.
    """
    wanted = (torch.version.cuda or "13").split(".")[0]
    install = f"pip install 'mbm-cli[cuda{wanted}]'"
    try:
        import cupy
    except ImportError as error:
        raise CudaError(f"the CUDA kernels need CuPy ({error}): {install}") from error
    found = str(cupy.cuda.runtime.runtimeGetVersion() // 1000)
    if found != wanted:
        raise CudaError(
            f"CuPy is for CUDA {found}, but PyTorch for CUDA {wanted}: pip uninstall cupy-cuda{found}x, then {install}"
        )
    return cupy


@lru_cache(maxsize=256)
def kernels(handle: str, table_bits: int, device: int) -> dict[str, Any]:
    """Return a multiplier's kernels by name, ready to launch on the device with this index.

    Compiling takes seconds, once; CuPy keeps the result on disk, and loads it before the message below is due.

    Raises:
        CudaError: CuPy is missing, does not fit, or fails.
        ValueError: a function in C that does not compile.
    """
    function = of_handle(handle).content
    name = function.name if isinstance(function, Function) else f"{handle}{table_bits or ''}"
    # Before anything that a capture does not allow: after a failed one, PyTorch cannot draw random numbers.
    if torch.cuda.is_current_stream_capturing():
        raise CudaError(f"the kernels of {name} are not loaded: run it once before capturing it in a CUDA graph")
    cupy = import_cupy()
    message = f"compiling the CUDA kernels of {name} (once: CuPy keeps them on disk)"
    notice = Timer(0.5, print, (message,), {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        with torch.cuda.device(device), cupy.cuda.Device(device):
            source, options = program(handle, table_bits)
            module = cupy.RawModule(code=source, options=options)
            loaded = {kernel: module.get_function(kernel) for kernel in _KERNELS}
            for kernel in loaded.values():
                kernel.compile()
            return loaded
    except Exception as error:  # of many kinds: the compiler's, the driver's, missing libraries
        lines = str(error).splitlines() or [""]
        if isinstance(function, Function) and type(error).__name__ == "CompileException":
            raise ValueError(f"{name} does not compile: {first_compiler_error(str(error))}") from None
        raise CudaError(
            f"the CUDA kernels of {name} do not compile or load ({type(error).__name__}: {lines[0]}): "
            "check that the NVIDIA driver is new enough for CuPy's CUDA"
        ) from error
    finally:
        notice.cancel()


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def _stream(device: int, handle: int) -> Any:
    """Return PyTorch's current stream, which has this handle, as CuPy's."""
    cupy = import_cupy()
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
    return cupy.cuda.ExternalStream(handle, device)  # CuPy 13


def _run(handle: str, table: Tensor | None, kernel: str, device: int, blocks: int, arguments: tuple) -> None:
    """Launch a kernel on PyTorch's current stream of the device."""
    function = kernels(handle, _table_bits(table), device)[kernel]
    with torch.cuda.device(device), _stream(device, torch.cuda.current_stream(device).cuda_stream):
        function((blocks,), (_THREADS,), arguments)


def multiply(a: Tensor, b: Tensor, multiplier: str, table: Tensor | None = None) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()
    output = torch.empty_like(a)
    count, device = a.numel(), a.device.index
    if count > 0:
        # Enough blocks to fill the card; a thread steps through the elements by the number of threads.
        blocks = min(-(-count // _THREADS), 16 * _multiprocessors(device))
        arguments = (a.data_ptr(), b.data_ptr(), output.data_ptr(), _address(table), count)
        _run(multiplier, table, "multiply", device, blocks, arguments)
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
    if output.numel() == 0:
        return output
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    device = input.device.index
    launch = plan(
        tuple(input.shape),
        input.stride(),
        tuple(weight.shape),
        tuple(output.shape),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        _multiprocessors(device),
    )
    conv = launch.conv.copy()
    pointers = input.data_ptr(), weight.data_ptr(), _address(bias), output.data_ptr(), _address(table)
    conv.view(np.uint64)[: len(pointers)] = pointers
    _run(multiplier, table, launch.kernel, device, launch.blocks, (conv,))
    return output


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=1024)
def plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    weight_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    multiprocessors: int,
) -> Launch:
    """Choose the kernel for a convolution, and lay out its argument.

    Raises:
        RuntimeError: an image, the weight, or the number of output positions has more elements than 32 bits index.
    """
    out_channels, channels, *kernel = weight_shape
    out_channels //= groups
    pixels = out_shape[0] * out_shape[2] * out_shape[3]
    name, blocks = _choose_kernel(out_channels, groups, pixels, multiprocessors)

    reach = [max(shape[2 + i], dilation[i] * (kernel[i] - 1) + 1 + padding[i]) for i in range(2)]
    image = sum((n - 1) * step for n, step in zip((shape[1], *reach), strides[1:], strict=True))
    weights = out_channels * groups * channels * kernel[0] * kernel[1]
    # Positions outside the image are encoded as row >= 2^29.
    if max(image, weights, pixels, blocks, 8 * max(reach)) >= _INDEX_LIMIT:
        raise RuntimeError(
            f"a convolution of {list(shape)} with {list(weight_shape)} needs indices of more than 32 bits within an "
            "image, in the weight, or for its output positions: use smaller batches or images"
        )

    steps, column = divmod(_SLICE, kernel[1])
    channel, row = divmod(steps, kernel[0])
    values: list[object] = [*strides, channels, out_channels, groups]
    values += [shape[2:], kernel, out_shape[2:], stride, padding, dilation, (channel, row, column), pixels]
    conv = np.zeros(1, _CONV2D)
    for field, value in zip(list(_CONV2D.fields or ())[5:], values, strict=True):
        conv[field] = value
    return Launch(name, blocks, conv)


def _choose_kernel(out_channels: int, groups: int, pixels: int, multiprocessors: int) -> tuple[str, int]:
    """Return the kernel's name and the number of blocks."""
    if out_channels <= max(_DIRECT):
        channels = next(n for n in _DIRECT if n >= out_channels)
        blocks_of = {n: groups * -(-pixels // (_THREADS * n)) for n in _DIRECT[channels]}
        # More pixels a thread read the weights less often, but every multiprocessor needs some blocks.
        choices = [n for n in blocks_of if blocks_of[n] >= 3 * multiprocessors]
        of_thread = max(choices, default=min(blocks_of))
        return f"conv2d_direct_{channels}x{of_thread}", blocks_of[of_thread]

    # Choose the tile with the least time if every multiprocessor computes its blocks one after the other. Large tiles
    # fetch and decode less for each product; small ones leave fewer channels, pixels and multiprocessors idle.
    def blocks(tile: Tile) -> int:
        return groups * -(-out_channels // tile.channels) * -(-pixels // tile.pixels)

    def time(tile: Tile) -> float:
        return -(-blocks(tile) // multiprocessors) * tile.channels * tile.pixels * tile.cost

    best = min(_TILES, key=time)
    return best.kernel, blocks(best)


def ceiling(handle: str, table: Tensor | None, device: torch.device) -> float:
    """Measure the multiply-accumulates a second of the kernels' instructions alone, all operands in registers.

    Args:
        handle, table: the multiplier as the operators take it, the table on the device.
        device: a CUDA device.
    """
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        blocks, rounds, sums_of_thread = 3 * _multiprocessors(index), 20_000, 64
        numbers = torch.rand(2 * _SLICE, _THREADS, device="cuda") + 0.5
        output = torch.empty(blocks, _THREADS, device="cuda")
        pointers = numbers.data_ptr(), output.data_ptr(), _address(table)
        arguments = (*pointers, np.int32(rounds), np.int32(_CEILING_RELOAD - 1))
        times = []
        for _ in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            _run(handle, table, "ceiling", index, blocks, arguments)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    return blocks * _THREADS * sums_of_thread * rounds / median(times[1:])


torch.library.impl("mbm::multiply", "cuda", multiply)
torch.library.impl("mbm::conv2d", "cuda", conv2d)
