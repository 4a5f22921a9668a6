"""Compiling CUDA kernels without a GPU."""

import re

import pytest

from mbm_cli.backends.cuda_programs import Program


def local_memory(program: Program, architecture: str, checks: str = "") -> dict[str, int]:
    """Compile as CuPy does, which adds the first two options; return the bytes of local memory of each kernel."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    options = ("-ftz=true", "--device-as-default-execution-space", *program.options)
    encoded = [o.encode() for o in (*options, f"-arch={architecture}", "--ptxas-options=-v")]
    _, program = nvrtc.nvrtcCreateProgram(f"{program.text}\n{checks}".encode(), b"kernels.cu", 0, [], [])
    (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    _, length = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * length
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack frame", log.decode(), re.DOTALL)
    return {name: int(stack) for name, stack in found}
