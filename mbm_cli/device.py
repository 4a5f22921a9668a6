"""The device that computes: which one, with which libraries' settings, on which machine."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import torch

from mbm_cli.errors import RequestError
from mbm_cli.variables import OF_GPU, OF_TURNS, set_for_gpu


def choose_device(name: str) -> torch.device:
    """Return the device of a name, ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and make it PyTorch's current one.

    ``auto`` is a GPU where there is one. Its libraries' variables are set first, because to ask for a GPU starts CUDA.

    Raises:
        RequestError: there is no such device.
    """
    set_for_gpu()
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind != "cpu" and torch.cuda.is_available() else 0
    if kind == "cuda" and count == 0:
        raise RequestError("device: cuda was asked for, but PyTorch finds no CUDA device here: use cpu or auto")
    if index and int(index) >= count:
        raise RequestError(f"device: there is no {name}, only cuda:0 to cuda:{count - 1}")
    if count == 0:
        return torch.device("cpu")
    if index:
        torch.cuda.set_device(int(index))
    return torch.device("cuda", torch.cuda.current_device())


def set_arithmetic(deterministic: bool) -> None:
    """Set how a GPU's libraries compute in this process.

    Args:
        deterministic: with deterministic algorithms and in float32; otherwise with any, and in TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.deterministic = deterministic


def environment(device: torch.device) -> dict[str, object]:
    """Describe this process and machine for ``environment.json``, in plain values."""
    found: dict[str, object] = {
        "mbm": version("mbm-cli"),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "openmp": {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")},
        "device": str(device),
        "command": sys.argv,
        "deterministic": torch.backends.cudnn.deterministic,
        "tf32": torch.backends.cudnn.allow_tf32,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["cuda"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "runtime": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "variables": {name: os.environ.get(name) for name in OF_GPU | OF_TURNS},
        }
    return found


def _git_commit() -> str | None:
    """Return the commit of the checkout that the package is imported from; ``None`` for an installed package."""
    with_package = next(iter(getattr(files("mbm_cli"), "_paths", [files("mbm_cli")])))
    command = ["git", "-C", str(with_package), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
