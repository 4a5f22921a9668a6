"""Run CUDA kernels on the CPU: their text is translated to C++ and compiled with sanitizers (see cuda.h)."""

import ctypes
import hashlib
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mbm_cli import pooling
from mbm_cli.backends import cuda_integers, cuda_matrix, cuda_quantize, cuda_terms
from mbm_cli.backends.cuda_programs import Program

HEADER = Path(__file__).with_name("cuda.h")
COMPILE = ["g++", "-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-shared", "-fsanitize=address,undefined"]
COMPILE += ["-fsanitize-recover=address", "-ffp-contract=off"]
SLOTS = (1, 4, 8, 16, 32)
PROGRAMS = [cuda_terms.program, cuda_integers.program, cuda_quantize.program, pooling.program]
PROGRAMS += [lambda slots=slots: cuda_matrix.program(slots) for slots in SLOTS]

# The functions of cuda.h that take the place of PTX, by an instruction that no other piece of PTX has.
FUNCTIONS = {
    "cp.async.ca": "copy_async",
    "cp.async.commit_group": "commit_copies",
    "cp.async.wait_group": "await_copies",
    "cp.async.wait_all": "await_all_copies",
    "ldmatrix": "load_matrices",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16": "multiply_bfloat16",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8": "multiply_int8",
    "mul.rn.f32": "multiply_floats",
    "add.rn.f32": "add_floats",
    "shl.b64": "shift_wide",
    "dp4a.u32.u32": "add_dot_product",
    "@inside ld.global": "load_if_inside",
}
_STRING = r'"(?:[^"\\]|\\.)*"'
_NESTED = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
_PTX = re.compile(rf"asm(?: volatile)?\((?:{_STRING}|{_NESTED}|[^()\"])*\);")
_OPERAND = re.compile(rf'"[=+]?\w"({_NESTED})')
_KERNEL = re.compile(r'wanted\("(\w+)"\)|^[A-Z]+\((?:\w+, )?([a-z]\w*), \d', re.MULTILINE)


def translated(text: str) -> str:
    """Return a kernel's text without PTX, with as many lines."""

    def call(ptx: re.Match) -> str:
        (name,) = (name for instruction, name in FUNCTIONS.items() if instruction in ptx[0])
        return f"{name}({', '.join(_OPERAND.findall(ptx[0]))});" + "\n" * ptx[0].count("\n")

    text = _PTX.sub(call, text).replace("extern __shared__ uint4 memory[];", "uint4*& memory = shared_memory;")
    assert not re.search(r"\basm\b|extern __shared__", re.sub("//.*", "", text))
    return text


def compiled(program: Program, folder: Path) -> Path:
    """Return a program's library, compiled when it is not in the folder yet."""
    kernels = Path(program.options[1].removeprefix("-I"))
    headers = {name: (kernels / name).read_text() for name in ("entry.cuh", "implicit_gemm.cuh")}
    macros = [option for option in program.options if option.startswith("-DSLOTS")]
    digest = hashlib.sha256(repr((program.text, headers, HEADER.read_text(), COMPILE, macros)).encode()).hexdigest()
    made = folder / digest[:16]
    if (made / "kernels.so").exists():
        return made / "kernels.so"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for name, text in headers.items():
        (made / name).write_text(translated(text))
    exports = "\n".join(f"EXPORT({''.join(name)})" for name in _KERNEL.findall(program.text))
    # Without a name for other files, variables in static shared memory get AddressSanitizer's borders.
    text = f'#include "cuda.h"\nnamespace {{\n#line 1 "{program.name}"\n{translated(program.text)}\n}}\n{exports}\n'
    (made / "kernels.cpp").write_text(text)
    command = [*COMPILE, *macros, f"-I{HEADER.parent}", made / "kernels.cpp", "-o", made / "unfinished.so"]
    subprocess.run(command, check=True)
    return (made / "unfinished.so").rename(made / "kernels.so")


@cache
def static_variables(library: Path) -> list[tuple[int, str]]:
    """Return the size and the name of a library's static variables, each with its function."""
    symbols = subprocess.run(["nm", "-SC", library], check=True, capture_output=True, text=True).stdout
    return [(int(size, 16), name) for size, name in re.findall(r"^\w+ (\w+) b (.*::.*)$", symbols, re.MULTILINE)]


class Emulated:
    """Takes the place of a `Program`.

    Args:
        library: as `compiled` returns it.
        shared: bytes of shared memory that a block can have.
        late: whether asynchronous copies end as late as a wait allows; otherwise they end at once.
    """

    def __init__(self, library: Path, shared: int, late: bool) -> None:
        self._library, self._shared, self._late = library, shared, late

    def launch(
        self,
        kernel: str,
        device: None,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        shared_bytes: int = 0,
    ) -> None:
        """Run a kernel and check that it does nothing wrong."""
        # Of all functions that have a name like the kernel's: at least what the kernel takes.
        static = sum(
            size
            for size, name in static_variables(self._library)
            if re.search(rf"\b{kernel.partition('_')[0]}\b", name)
        )
        assert shared_bytes + static <= self._shared, f"{kernel}: {shared_bytes} + {static} bytes of shared memory"
        values = [np.asarray(np.uint64(one) if isinstance(one, int) else one) for one in arguments]
        launch = np.array([*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared_bytes, self._late], np.uint32)
        run = ctypes.CDLL(str(self._library))[f"run_{kernel}"]
        run.restype = ctypes.c_char_p
        pointers = (ctypes.c_void_p * len(values))(*(one.ctypes.data for one in values))
        errors = run(ctypes.c_void_p(launch.ctypes.data), pointers).decode()
        assert not errors, f"{kernel}, {grid} blocks: {errors}"
