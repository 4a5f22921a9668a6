"""The system's compilers of C and C++, and programs that end at a time limit."""

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

SECONDS = 300.0  # to compile


def compile_program(command: list[str], name: str, seconds: float = SECONDS) -> None:
    """Run a compiler's command.

    Args:
        name: of the function that is compiled, for errors.

    Raises:
        ValueError: it fails, with its first error, or takes longer.
    """
    try:
        code, output = run(command, seconds, stderr=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} does not compile within {seconds:.0f} s") from None
    if code:
        raise ValueError(f"{name} does not compile: {first_compiler_error(output)}")


def run(command: list[str], seconds: float, stderr: int = subprocess.DEVNULL) -> tuple[int, str]:
    """Run a command; return its exit code and, from a pipe, its errors. What it started ends with it at the limit.

    Raises:
        subprocess.TimeoutExpired: it takes longer.
    """
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=null, stdout=null, stderr=stderr, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=max(seconds, 0))
        except BaseException:  # an interrupt, too: a session of its own gets none from the terminal
            with suppress(ProcessLookupError, PermissionError):  # it may have ended just now
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, errors or ""


def first_compiler_error(output: str) -> str:
    """Return the first error of a C or C++ compiler's or NVRTC's output, with the line of the user's file."""
    if missing := re.search(r"undefined reference to .*", output):
        return missing[0]
    lines = [line for line in output.splitlines() if "error" in line] or [output.strip() or "no reason given"]
    users = re.search(r"function\.h[:(](\d+)[^e]*(?:fatal )?error:? *(.*)", lines[0])
    return f"line {users[1]}: {users[2]}" if users else lines[0]


def find_compiler(language: str = "C++") -> list[str]:
    """Find the system's compiler: that in CXX or CC, else the one that built Python, else the usual names.

    Raises:
        ValueError: there is none.
    """
    variable, names = {"C++": ("CXX", ("c++", "g++", "clang++")), "C": ("CC", ("cc", "gcc", "clang"))}[language]
    named = [os.environ.get(variable), sysconfig.get_config_var(variable), *names]
    for command in (shlex.split(name) for name in named if name):
        if shutil.which(command[0]):
            return command
    raise ValueError(
        f"a multiplier in C needs a {language} compiler on the CPU: install one ({' or '.join(names[1:])}), or name it "
        f"in {variable}"
    )


@lru_cache(maxsize=1)
def cpu_flags() -> str:
    """Return what -march=native stands for here: other machines may share the cache's disk."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()
