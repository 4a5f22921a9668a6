"""Environment variables that libraries read once, when they are loaded or first used; a choice of the user's stands."""

import os
import statistics
import time
from pathlib import Path

# Of the libraries of a GPU.
OF_GPU = {
    # Let cuDNN choose algorithms by a model of their times. With its decision tree the gradients of LeNet's second
    # convolution take twice as long at batch 64, and four times at batch 256.
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B": "1",
    # Compute small linear layers by cuBLAS: cuBLASLt chooses kernels for long sums, which take twice the time.
    "DISABLE_ADDMM_CUDA_LT": "1",
}
# Let the streams of 16 runs in turn reach a GPU on queues of their own. By default there are 8, so runs wait for
# others; with 32 it takes 0.3 s longer to create a context.
OF_TURNS = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
_QUIET, _BUSY = "10000", "0"  # turns of GOMP_SPINCOUNT; docs/performance.md has the measurements
_SAMPLES, _PAUSE = 7, 0.001  # seconds


def set_variables() -> None:
    """Set the variables, best before PyTorch is imported.

    OpenMP's threads spin at a barrier before they sleep. That saves the time to wake up, a quarter of a small step.
    Where other processes want the cores, it takes away the time in which the threads that are waited for could run: an
    epoch would take 30 times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _BUSY if _is_busy() else _QUIET)
    set_for_gpu()


def set_for_gpu() -> None:
    _set(OF_GPU)


def set_for_turns() -> None:
    """Set what runs in turn need; once PyTorch is imported, this has no effect."""
    _set(OF_TURNS)


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _is_busy() -> bool:
    """Return whether other processes run on most of the cores."""
    try:
        running = []
        for _ in range(_SAMPLES):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
            time.sleep(_PAUSE)
        others = statistics.median(running) - 1
        return others > (os.cpu_count() or 1) / 2
    except (OSError, ValueError, IndexError):  # another system than Linux
        return False
