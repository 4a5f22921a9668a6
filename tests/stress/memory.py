"""Train hundreds of epochs, and dozens of runs, in one process: memory does not grow.

``python tests/stress/memory.py [EPOCHS [DEVICE]]`` trains 300 epochs on a small part of MNIST, then a tenth as many
runs one after the other, on ``cpu`` or ``cuda``.

After the warm-up, 300 epochs or 30 runs may add 8 MiB: an epoch's metrics are some KiB, and the C library's allocator
keeps memory between pieces in use. A tensor kept from each epoch or run would exceed that: the logits of the 256
training images are 10 KiB, the weights and the optimizer's state 720 KiB. Of a GPU's memory nothing may be added.
"""

import gc
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

# OpenMP's idle threads would spin on cores that other processes need.
os.environ["GOMP_SPINCOUNT"] = "0"

import torch  # noqa: E402

from mbm_cli import cli  # noqa: E402

LIMIT = 8 << 20  # bytes


def mbm(*arguments: object) -> None:
    """Run `mbm` in this process."""
    sys.argv = ["mbm", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, f"mbm ended with {end.code}"


def used() -> tuple[int, int]:
    """Return the bytes of this process's memory, and of the GPU's that its tensors occupy."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def check(what: str, seen: list[tuple[int, int]], warm_up: int) -> None:
    """Compare medians of as many looks as the warm-up had, from its end and from the end of all."""
    before, after = ([median(one) for one in zip(*looks)] for looks in (seen[warm_up : 2 * warm_up], seen[-warm_up:]))
    process, device = after[0] - before[0], after[1] - before[1]
    print(f"{len(seen)} {what}: process {process / 1024:+,.0f} KiB, GPU {device / 1024:+,.0f} KiB", flush=True)
    assert process <= LIMIT and device <= 0, "memory grows"


def main(epochs: int = 300, device: str = "cpu") -> None:
    small = ["--quiet", "--device", device, "--threads", 1, "--set", "data.train_limit=256"]
    small += ["--set", "data.test_limit=100", "--set", "train.checkpoint_every=2"]
    with tempfile.TemporaryDirectory() as folder:
        train = ["train", "--output", folder, *small]
        after_epochs = []

        def look(event: str, arguments: tuple[object, ...]) -> None:
            # An epoch ends with its metrics, written under another name and then renamed.
            if event == "os.rename" and os.path.basename(str(arguments[1])) == "metrics.jsonl":
                after_epochs.append(used())

        sys.addaudithook(look)
        mbm(*train, "--epochs", epochs)
        check(f"epochs on {device}", after_epochs, min(10, epochs // 3))
        after_runs = []
        for _ in range(max(4, epochs // 10)):
            mbm(*train, "--epochs", 2)
            after_runs.append(used())
        check(f"runs on {device}", after_runs, min(3, len(after_runs) // 3))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
