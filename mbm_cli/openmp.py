"""How OpenMP's threads wait, which libgomp reads when PyTorch loads it."""

import os
import statistics
import time
from pathlib import Path

_QUIET, _BUSY = "10000", "0"  # turns of GOMP_SPINCOUNT; docs/performance.md has the measurements
_SAMPLES, _PAUSE = 7, 0.001  # seconds


def set_waiting() -> None:
    """Choose how long a thread spins at a barrier before it sleeps; a choice of the user's stands.

    Spinning saves the time to wake up, a quarter of a small step. Where other processes want the cores, it takes away
    the time in which the threads that are waited for could run: an epoch would take 30 times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _BUSY if _is_busy() else _QUIET)


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
