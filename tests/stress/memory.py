"""Train hundreds of epochs, and dozens of runs, in one process: memory does not grow.

``python tests/stress/memory.py [EPOCHS [DEVICE]]`` trains 300 epochs on a small part of MNIST, then a tenth as many
runs one after the other, on ``cpu`` or ``cuda``.

After the warm-up, 300 epochs may add 8 MiB and 30 runs 4 MiB, the largest step aside: an epoch's metrics are some KiB,
and the C library's allocator cannot give all free pages back. The weights and the optimizer's state, kept from each,
would add 200 or 20 MiB. Of a GPU's memory nothing may be added.
"""

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from mbm_cli import cli

# Bytes that may be added.
ONCE, EACH_EPOCH = 1 << 20, 24 << 10
EACH_RUN = 4 * EACH_EPOCH


def mbm(*arguments: object) -> None:
    """Run `mbm` in this process."""
    sys.argv = ["mbm", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise


def used() -> tuple[int, int]:
    """Return the bytes of this process's memory, and of the GPU's that its tensors occupy."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc's: pages that its allocator keeps, and that hold nothing
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def check(what: str, seen: list[tuple[int, int]], each: int) -> None:
    """Add up what each look found more than the look before, but for a quarter of them (the warm-up) and one step."""
    steps = np.diff(seen[len(seen) // 4 :], axis=0)
    process, device = steps.sum(0) - [steps[:, 0].max(), 0]
    print(f"{len(seen)} {what}: process {process / 1024:+,.0f} KiB, GPU {device / 1024:+,.0f} KiB", flush=True)
    assert process <= ONCE + len(seen) * each
    assert device <= 0


def main(epochs: int = 300, device: str = "cpu") -> None:
    small = ["--quiet", "--device", device, "--threads", 1, "--set", "data.train_limit=256"]
    small += ["--set", "data.test_limit=100", "--set", "train.checkpoint_every=2"]
    with tempfile.TemporaryDirectory() as folder:
        train = ["train", "--output", folder, *small]
        after_epochs = []

        def look(event: str, arguments: tuple[object, ...]) -> None:
            # An epoch ends with its metrics, written under another name and then renamed.
            if event == "os.rename" and os.path.basename(str(arguments[1])) == "metrics.jsonl":
                if not after_epochs:
                    gc.freeze()  # what has been imported by now, so that a collection takes no tenths of a second
                after_epochs.append(used())

        sys.addaudithook(look)
        mbm(*train, "--epochs", epochs)
        check(f"epochs on {device}", after_epochs, EACH_EPOCH)
        after_runs = []
        for _ in range(max(8, epochs // 10)):
            mbm(*train, "--epochs", 1)
            after_runs.append(used())
        check(f"runs on {device}", after_runs, EACH_RUN)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
