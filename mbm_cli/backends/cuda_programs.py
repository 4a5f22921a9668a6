"""CUDA programs: compiled by CuPy kernel by kernel, when one is first launched, on PyTorch's streams and memory."""

import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.resources import files
from statistics import median
from threading import Timer
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbm_cli.errors import RunError


class CudaError(RunError, RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says what to install."""


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


def refuse_capture(name: str) -> None:
    """Refuse to load kernels during a capture, before anything that it does not allow.

    After a failed capture PyTorch could not draw random numbers.

    Raises:
        CudaError: the current stream is being captured.
    """
    if torch.cuda.is_current_stream_capturing():
        raise CudaError(f"{name}: not loaded yet, so run it once before capturing it in a CUDA graph")


def source(name: str) -> str:
    """Return the text of a file of kernels."""
    return files("mbm_cli").joinpath("kernels", name).read_text(encoding="utf-8")


class Program:
    """The text of kernels, and the options with which NVRTC compiles it.

    To compile a kernel takes a fraction of a second, once: CuPy keeps the result on disk. The macro ONLY names the
    kernel, and the text leaves the others empty, see kernels/entry.cuh.

    Args:
        name: what the kernels are for, for messages.
        headers: what the text includes, besides entry.cuh.
        shared: whether kernels may take as much shared memory as a block can have.
    """

    def __init__(
        self,
        name: str,
        text: str,
        options: tuple[str, ...] = (),
        headers: tuple[str, ...] = (),
        shared: bool = False,
    ) -> None:
        folder = files("mbm_cli").joinpath("kernels")
        # CuPy's cache on disk does not look into headers.
        digest = zlib.crc32(b"".join(folder.joinpath(header).read_bytes() for header in ("entry.cuh", *headers)))
        self.name, self.text, self._shared = name, text, shared
        self.options = "-std=c++17", f"-I{folder}", f"-DHEADER_DIGEST=0x{digest:08x}", *options
        self._loaded: dict[tuple[str, int], Any] = {}

    def kernel(self, kernel: str, device: int, quiet: bool = False) -> Any:
        """Return a kernel, ready to launch on the device with this index; unless ``quiet``, say if that takes long.

        Raises:
            CudaError: CuPy is missing, does not fit, or fails; its cause is CuPy's error.
        """
        if (kernel, device) not in self._loaded:
            refuse_capture(f"the kernels of {self.name}")
            self._loaded[kernel, device] = self._load(kernel, device, quiet)
        return self._loaded[kernel, device]

    def _load(self, kernel: str, device: int, quiet: bool) -> Any:
        cupy = import_cupy()
        message = f"compiling the CUDA kernel {kernel} of {self.name} (once: CuPy keeps it on disk)"
        notice = Timer(0.5, print, (message,), {"file": sys.stderr, "flush": True})
        notice.daemon = True
        if not quiet:
            notice.start()
        try:
            with torch.cuda.device(device), cupy.cuda.Device(device) as selected:
                module = cupy.RawModule(code=self.text, options=(*self.options, f'-DONLY="{kernel}"'))
                function = module.get_function(kernel)
                function.compile()
                if self._shared:
                    most = int(selected.attributes["MaxSharedMemoryPerBlockOptin"])
                    function.max_dynamic_shared_size_bytes = most - function.shared_size_bytes
                return function
        except Exception as error:  # of many kinds: the compiler's, the driver's, missing libraries
            line = (str(error).splitlines() or [""])[0]
            raise CudaError(
                f"the CUDA kernel {kernel} of {self.name} does not compile or load ({type(error).__name__}: {line}): "
                "check that the NVIDIA driver is new enough for CuPy's CUDA"
            ) from error
        finally:
            notice.cancel()

    def launch(
        self,
        kernel: str,
        device: int,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Launch a kernel on PyTorch's current stream of the device; within `noted`, note it instead."""
        kernels = _noted.get()
        if kernels is not None:
            kernels[self, kernel] = None
            return
        function = self.kernel(kernel, device)
        with torch.cuda.device(device), current_stream(device):
            function(grid, block, arguments, shared_mem=shared_bytes)


_noted: ContextVar[dict[tuple[Program, str], None] | None] = ContextVar("launches are noted", default=None)


@contextmanager
def noted() -> Iterator[dict[tuple[Program, str], None]]:
    """Note the kernels that this thread would launch, for `load`, and launch none: outputs are left uninitialised."""
    kernels: dict[tuple[Program, str], None] = {}
    token = _noted.set(kernels)
    try:
        yield kernels
    finally:
        _noted.reset(token)


def load(wanted: Iterable[tuple[Program, str]], device: int) -> None:
    """Load kernels, compiling several at once.

    Raises:
        CudaError: as `Program.kernel`.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda one: one[0].kernel(one[1], device, quiet=True), wanted))


def seconds(launch: Callable[[], None]) -> float:
    """Return the median time of a kernel's launches on PyTorch's current stream, after a warm-up."""
    times = []
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return median(times[1:])


@lru_cache(maxsize=64)
def multiprocessors_of(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def has_matrix_units(device: int) -> bool:
    """Return whether a device has the matrix units that the kernels use, those of compute capability 8.0."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=64)
def shared_bytes_of(device: int) -> int:
    """Return the shared memory of a multiprocessor; a block can have 1 KiB less."""
    return int(import_cupy().cuda.Device(device).attributes["MaxSharedMemoryPerMultiprocessor"])


@lru_cache(maxsize=64)
def _stream(device: int, handle: int) -> Any:
    """Return PyTorch's current stream, which has this handle, as CuPy's."""
    cupy = import_cupy()
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(torch.cuda.current_stream(device))
    return cupy.cuda.ExternalStream(handle, device)  # CuPy 13


def current_stream(device: int) -> Any:
    """Return PyTorch's current stream of a device as CuPy's."""
    return _stream(device, torch.cuda.current_stream(device).cuda_stream)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def filled(layout: np.dtype, **values: object) -> np.ndarray:
    """Return a kernel's argument with these fields; the others are zero."""
    struct = np.zeros(1, layout)
    for field, value in values.items():
        struct[field] = value
    return struct


def divisor(size: int) -> tuple[int, int, int]:
    """Return a size, a reciprocal and a shift, a Divisor of implicit_gemm.cuh."""
    shift = max(0, (size - 1).bit_length() - 1)
    return size, -(-(1 << 32 + shift) // size) % (1 << 32), shift
