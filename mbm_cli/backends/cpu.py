"""The CPU backend: the C++ kernels of kernels/conv2d_simd.cpp, on PyTorch's threads and memory."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

import platformdirs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# After torch: the extension then shares the OpenMP runtime that PyTorch has loaded.
from mbm_cli import _cpu
from mbm_cli.backends.shapes import conv2d_output_shape
from mbm_cli.errors import RunError
from mbm_cli.multipliers.code import Function
from mbm_cli.multipliers.content import TABLE, of_handle
from mbm_cli.multipliers.float32 import FRACTION_BITS

_SOURCES = ("multiplier.h", "conv2d.h", "conv2d_simd.cpp")
# As in CMakeLists.txt, which explains them; the function is compiled for this machine alone.
_OPTIONS = "-std=c++17 -O3 -fno-trapping-math -fno-math-errno -ffp-contract=fast -fPIC -shared -fvisibility=hidden"
_COMPILE_SECONDS = 300


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
    """Compile the kernels that call a user's function, once, into the user's cache folder; return their address.

    Raises:
        ValueError: there is no compiler, or it rejects the function; the message has its first error.
        RunError: the cache cannot be used.
    """
    compiler = _compiler()
    flags = [*_OPTIONS.split(), "-march=native"] if platform.machine() in ("x86_64", "AMD64") else _OPTIONS.split()
    sources = {name: (files("mbm_cli") / "kernels" / name).read_text(encoding="utf-8") for name in _SOURCES}
    content = [function.digest, *compiler, *flags, _cpu_flags(), *sources.values()]
    digest = hashlib.sha256("\0".join(content).encode()).hexdigest()[:32]
    library = platformdirs.user_cache_path("mbm") / "functions" / f"{digest}.so"
    try:
        if not library.exists():
            _compile(function, [*compiler, *flags], sources, library)
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        raise RunError(
            f"{library.parent}, where compiled functions are kept, cannot be used ({error}): name another cache folder "
            "in XDG_CACHE_HOME"
        ) from error
    loaded.mbm_kernels.restype = ctypes.c_void_p
    return loaded.mbm_kernels()


def _compile(function: Function, compiler: list[str], sources: dict[str, str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        Path(folder, "function.h").write_text(function.text, encoding="utf-8")
        renamed = function.renamed('#include "function.h"')
        Path(folder, "kernels.cpp").write_text(f'#include <cstdint>\n{renamed}#include "conv2d_simd.cpp"\n')
        macros = ["-DMBM_ISA=function", f"-DMBM_FUNCTION=::{function.CALLED}"]
        command = [*compiler, *macros, "-o", f"{folder}/kernels.so", f"{folder}/kernels.cpp"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{function.name} does not compile within {_COMPILE_SECONDS} s") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            said = (errors or [done.stderr.strip() or "no reason given"])[0].replace(f"{folder}/", "")
            raise ValueError(f"{function.name} does not compile: {said}")
        os.replace(f"{folder}/kernels.so", library)


def _compiler() -> list[str]:
    """Find the system's C++ compiler: CXX, else the one that built Python, else the usual names."""
    named = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for command in (shlex.split(name) for name in named if name):
        if shutil.which(command[0]):
            return command
    raise ValueError("a c: multiplier needs a C++ compiler on the CPU: install one (g++ or clang++), or name it in CXX")


@lru_cache(maxsize=1)
def _cpu_flags() -> str:
    """Return what -march=native stands for here: other machines may share the cache's disk."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


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
