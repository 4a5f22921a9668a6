"""What a run was computed with: versions, device, processor, the commit of the code."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import torch

from mbm_cli.device import LIBRARY_VARIABLES


def environment(device: torch.device) -> dict[str, object]:
    """A description of this process and machine for ``environment.json``: plain values only."""
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
            "variables": {name: os.environ.get(name) for name in LIBRARY_VARIABLES},
        }
    return found


def _git_commit() -> str | None:
    """The commit of the checkout that the package is imported from; ``None`` for an installed package."""
    with_package = next(iter(getattr(files("mbm_cli"), "_paths", [files("mbm_cli")])))
    command = ["git", "-C", str(with_package), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
