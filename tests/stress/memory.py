"""Hundreds of epochs, and dozens of runs, in one process: its memory, and the GPU's, does not grow.

``python tests/stress/memory.py [EPOCHS [DEVICE]]`` trains 300 epochs on a small part of MNIST, then a tenth as many
runs one after the other, as a comparison does, on ``cpu`` or ``cuda``.

What may grow is small: the metrics, of which each epoch adds a dictionary (some KiB, with what is written of it), and
what the C library's allocator keeps between pieces that are in use, which settles. A tensor of an epoch that was kept
would show: the logits of the 256 training images alone are 10 KiB, the weights and the optimizer's state 720 KiB, the
images 780 KiB. So after the warm-up, 300 epochs may add 8 MiB (28 KiB each), and 30 runs as much (280 KiB each); on a
GPU, whose allocator tells exact numbers, nothing.
"""

import gc
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from mbm_cli.config import load
from mbm_cli.experiments import setup
from mbm_cli.experiments import train as experiment
from mbm_cli.render import Display

SETTINGS = ["data.train_limit=256", "data.test_limit=100", "train.checkpoint_every=2", "train.deterministic=true"]
GROWTH = 8 << 20  # bytes, over 300 epochs or 30 runs, and over fewer
WARM_UP = 10  # epochs
WARM_UP_RUNS = 3
FULL = 300


def used(device: str) -> dict[str, int]:
    """Bytes that this process holds, and of the GPU's memory its tensors."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"process": pages * 4096}
    if device == "cuda":
        torch.cuda.synchronize()
        found["device"] = torch.cuda.memory_allocated()
    return found


class Watch(Display):
    """Looks at the memory after each epoch."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seen: list[dict[str, int]] = []

    def epoch(self, metrics: dict[str, Any]) -> None:
        self.seen.append(used(self.device))


def growth(seen: list[dict[str, int]], warm_up: int) -> dict[str, int]:
    """From behind the warm-up to the end; medians of as many looks as the warm-up had, which none of them can sway."""
    before, after = seen[warm_up : 2 * warm_up], seen[-warm_up:]
    return {name: int(median(one[name] for one in after) - median(one[name] for one in before)) for name in seen[0]}


def of_epochs(epochs: int, device: str, folder: Path) -> dict[str, int]:
    watch = Watch(device)
    experiment.train(_config(device, epochs), folder / "epochs", watch, threads=1)
    return growth(watch.seen, min(WARM_UP, epochs // 3))


def of_runs(runs: int, device: str, folder: Path) -> dict[str, int]:
    config = _config(device, 2)
    data = setup.load_data(config, torch.device(device))
    seen = []
    for _ in range(runs):
        experiment.train(config, folder / "runs", Display(), threads=1, data=data)
        seen.append(used(device))
    return growth(seen, min(WARM_UP_RUNS, runs // 3))


def _config(device: str, epochs: int) -> Any:
    return load("lenet-mbm", [*SETTINGS, f"device={device}", f"train.epochs={epochs}"])


def main(epochs: int = FULL, device: str = "cpu") -> int:
    failures, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        for what, measure, number in (("epochs", of_epochs, epochs), ("runs", of_runs, max(4, epochs // 10))):
            grown = measure(number, device, Path(temporary))
            fine = grown["process"] <= GROWTH and grown.get("device", 0) <= 0
            failures += not fine
            words = ", ".join(f"{name} {size / 1024:+,.0f} KiB" for name, size in grown.items())
            print(f"{number} {what} on {device}: {words}{'' if fine else ': FAILED, it grows'}", flush=True)
    print(f"memory.py: {failures} failures, {time.monotonic() - began:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *sys.argv[2:3]))
