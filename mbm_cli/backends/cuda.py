"""The CUDA backend: the kernels of kernels/conv2d.cu, compiled by CuPy, on PyTorch's streams and memory."""

import re
import sys
from functools import cache, lru_cache
from importlib.resources import files
from statistics import median
from threading import Timer
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli.errors import RunError
from mbm_cli.lut import Table
from mbm_cli.multipliers import FRACTION_BITS, Multiplier
from mbm_cli.shapes import conv2d_output_shape

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


# What a function in C may count on without its headers, which NVRTC has not: it knows <math.h> and memcpy by itself.
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


def source(multiplier: Multiplier) -> str:
    """The CUDA source as one text with its header pasted in: the package's resources may have no common folder.

    A function in C stands before it. There are no headers here, so what C's integers are called is said first.
    """
    folder = files("mbm_cli") / "kernels"
    header = (folder / "multiplier.h").read_text(encoding="utf-8").replace("#pragma once\n", "")
    kernels = (folder / "conv2d.cu").read_text(encoding="utf-8").replace('#include "multiplier.h"\n', header)
    if multiplier.code is None:
        return kernels
    text = f'#line 1 "function.h"\n{_C_INCLUDE.sub("", multiplier.code.text)}'
    return f'{_C_INTEGERS}{multiplier.code.renamed(text)}#line 1 "conv2d.cu"\n{kernels}'


def options(multiplier: Multiplier) -> tuple[str, ...]:
    """The compiler's options that make of the source the kernels of a multiplier."""
    family, bits, result_bits = multiplier.family, multiplier.truncate, multiplier.result_bits or FRACTION_BITS
    if multiplier.table is not None:
        family, bits = "table", _table(multiplier).bits
    if multiplier.code is not None:
        family = "function"
    macros = (f"-DFAMILY=mbm::{family.upper()}", f"-DBITS={bits}", f"-DRESULT_BITS={result_bits}")
    function = (f"-DMBM_FUNCTION=::{multiplier.code.NAME}",) if multiplier.code else ()
    return ("-std=c++17", *macros, *function)


def _table(multiplier: Multiplier) -> Table:
    """Of at least two bits, so that a row is whole words."""
    assert multiplier.table is not None
    return multiplier.table.repeated(2)


def import_cupy() -> Any:
    """CuPy, imported when a CUDA tensor first needs it.

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
def kernels(key: str, device: int) -> dict[str, Any]:
    """The kernels of the multiplier with this key, by name, ready to launch on the device with this index.

    Compiling takes seconds, once; CuPy keeps the result on disk, and loads it faster than the message below appears.

    Raises:
        CudaError: CuPy is missing, does not fit, or fails.
        ValueError: a function in C that does not compile.
    """
    cupy = import_cupy()
    multiplier = Multiplier.of_key(key)
    if torch.cuda.is_current_stream_capturing():
        raise CudaError(f"the kernels of {multiplier} are not loaded: run it once before capturing it in a CUDA graph")
    message = f"compiling the CUDA kernels of {multiplier} (once: CuPy keeps them on disk)"
    notice = Timer(0.5, print, (message,), {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        with torch.cuda.device(device), cupy.cuda.Device(device):
            module = cupy.RawModule(code=source(multiplier), options=options(multiplier))
            loaded = {name: module.get_function(name) for name in _KERNELS}
            for kernel in loaded.values():
                kernel.compile()
            return loaded
    except Exception as error:  # of many kinds: the compiler's, the driver's, missing libraries
        lines = str(error).splitlines() or [""]
        if multiplier.code is not None and type(error).__name__ == "CompileException":
            said = next((line for line in lines if "error" in line), lines[0])
            raise ValueError(f"{multiplier.code.function} does not compile: {said}") from None
        first_line = lines[0]
        raise CudaError(
            f"the CUDA kernels of {multiplier} do not compile or load ({type(error).__name__}: {first_line}): "
            "check that the NVIDIA driver is new enough for CuPy's CUDA"
        ) from error
    finally:
        notice.cancel()


@cache  # kernels in CUDA graphs keep its address
def _table_on(key: str, device: int) -> Tensor | None:
    """The table of the multiplier with this key, if any: uint16, a row for each fraction of b, then one of zeros."""
    multiplier = Multiplier.of_key(key)
    if multiplier.table is None:
        return None
    table = _table(multiplier)
    # In C order, which concatenate would not give.
    rows_of_b = np.ascontiguousarray(np.concatenate([table.entries.T, np.zeros((1, 1 << table.bits), np.uint16)]))
    return torch.from_numpy(rows_of_b).to(torch.device("cuda", device))


def _table_address(key: str, device: int) -> int:
    table = _table_on(key, device)
    return 0 if table is None else table.data_ptr()


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def _stream(device: int, handle: int) -> Any:
    """PyTorch's current stream, which has this handle, as CuPy's."""
    cupy = import_cupy()
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
    return cupy.cuda.ExternalStream(handle, device)  # CuPy 13


def _run(multiplier: str, kernel: str, device: int, blocks: int, arguments: tuple) -> None:
    """Launch a kernel on PyTorch's current stream of the device."""
    function = kernels(multiplier, device)[kernel]
    with torch.cuda.device(device), _stream(device, torch.cuda.current_stream(device).cuda_stream):
        function((blocks,), (_THREADS,), arguments)


def multiply(a: Tensor, b: Tensor, multiplier: str) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    a, b = a.contiguous(), b.contiguous()
    output = torch.empty_like(a)
    count, device = a.numel(), a.device.index
    if count > 0:
        # Enough blocks to fill the card; each thread takes every so many-th element.
        blocks = min(-(-count // _THREADS), 16 * _multiprocessors(device))
        arguments = (a.data_ptr(), b.data_ptr(), output.data_ptr(), _table_address(multiplier, device), count)
        _run(multiplier, "multiply", device, blocks, arguments)
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
    if Multiplier.of_key(multiplier).is_exact:
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
    bias_pointer = 0 if bias is None else bias.data_ptr()
    pointers = input.data_ptr(), weight.data_ptr(), bias_pointer, output.data_ptr(), _table_address(multiplier, device)
    conv.view(np.uint64)[: len(pointers)] = pointers
    _run(multiplier, launch.kernel, device, launch.blocks, (conv,))
    return output


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
    # Positions outside of the image are told by rows of 2^29 and more.
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
    """The kernel's name, and the number of blocks."""
    if out_channels <= max(_DIRECT):
        channels = next(n for n in _DIRECT if n >= out_channels)
        blocks_of = {n: groups * -(-pixels // (_THREADS * n)) for n in _DIRECT[channels]}
        # More pixels a thread read the weights less often, but are to leave some blocks for each multiprocessor.
        choices = [n for n in blocks_of if blocks_of[n] >= 3 * multiprocessors]
        of_thread = max(choices, default=min(blocks_of))
        return f"conv2d_direct_{channels}x{of_thread}", blocks_of[of_thread]

    # The tile that needs the least time if every multiprocessor computes one block after the other: large tiles fetch
    # and decode less for each product, small ones leave fewer channels, pixels and multiprocessors without work.
    def blocks(tile: Tile) -> int:
        return groups * -(-out_channels // tile.channels) * -(-pixels // tile.pixels)

    def time(tile: Tile) -> float:
        return -(-blocks(tile) // multiprocessors) * tile.channels * tile.pixels * tile.cost

    best = min(_TILES, key=time)
    return best.kernel, blocks(best)


def ceiling(multiplier: str, device: torch.device | str | int | None = None) -> float:
    """Multiply-accumulates a second of the kernels' instructions alone: operands and sums stay in registers.

    Args:
        multiplier: a key, for example ``"mbm"``.
        device: a CUDA device; the current one without it.
    """
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        blocks, rounds, sums_of_thread = 3 * _multiprocessors(index), 20_000, 64
        numbers = torch.rand(2 * _SLICE, _THREADS, device="cuda") + 0.5
        output = torch.empty(blocks, _THREADS, device="cuda")
        pointers = numbers.data_ptr(), output.data_ptr(), _table_address(multiplier, index)
        arguments = (*pointers, np.int32(rounds), np.int32(_CEILING_RELOAD - 1))
        times = []
        for _ in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            _run(multiplier, "ceiling", index, blocks, arguments)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    return blocks * _THREADS * sums_of_thread * rounds / median(times[1:])


torch.library.impl("mbm::multiply", "cuda", multiply)
torch.library.impl("mbm::conv2d", "cuda", conv2d)
