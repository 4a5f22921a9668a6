"""Compiles the emulated kernels, and loads the sanitizers into the worker processes of pytest-xdist."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import emulator  # noqa: E402

RANDOM_BITS, MOST_RANDOM_BITS = Path("/proc/sys/vm/mmap_rnd_bits"), 28
SANITIZERS = ("libasan.so", "libstdc++.so")  # the last one, because exceptions pass through the first


def _missing(config: pytest.Config) -> str | None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the emulator is for x86-64 and Linux"
    if int(RANDOM_BITS.read_text() if RANDOM_BITS.exists() else 0) > MOST_RANDOM_BITS:
        return f"AddressSanitizer may not start where {RANDOM_BITS} is more than {MOST_RANDOM_BITS}"
    if shutil.which("g++") is None or not all(map(os.path.isabs, _sanitizers())):
        return "needs g++ with its sanitizers"
    if not os.environ.get("LD_PRELOAD") and not config.getoption("numprocesses", None):
        return "the sanitizers are loaded into worker processes: add -n 2"
    return None


def _sanitizers() -> list[str]:
    commands = [["g++", f"-print-file-name={name}"] for name in SANITIZERS]
    return [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in commands]


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("LD_PRELOAD") or _missing(config) is not None:
        return
    folder = config.cache.mkdir("emulator")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda program: emulator.compiled(program(), folder), emulator.PROGRAMS))
    os.environ["LD_PRELOAD"] = " ".join(_sanitizers())
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0:use_sigaltstack=0:halt_on_error=0"


@pytest.fixture(scope="session")
def libraries(request):
    """Return the library of a program."""
    if reason := _missing(request.config):
        pytest.skip(reason)
    return lambda program: emulator.compiled(program, request.config.cache.mkdir("emulator"))
