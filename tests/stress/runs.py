"""Start `mbm` and read what it leaves: what kills.py and disk.py share.

Each `mbm` is forked from a process that has imported everything and computed nothing: a start takes a tenth of a
second instead of several.
"""

import glob
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import torch
import yaml

# OpenMP's idle threads would spin on cores that other processes need. OpenBLAS would start threads when numpy is
# imported, and a process with threads must not be forked.
os.environ |= {"GOMP_SPINCOUNT": "0", "OPENBLAS_NUM_THREADS": "1"}
os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # it would warn of what killed processes leave
FORKS = multiprocessing.get_context("forkserver")
# The end of a run draws.
PRELOADED = ["matplotlib.backends.backend_agg", "mbm_cli.cli", "mbm_cli.experiments.resume"]
PRELOADED += ["mbm_cli.report.plots", "mbm_cli.report.progress"]
FORKS.set_forkserver_preload(PRELOADED)

# 13 steps an epoch, the last one smaller; a checkpoint after every second step.
SMALL = ["--device", "cpu", "--threads", "1", "--set", "data.train_limit=200", "--set", "data.batch_size=16"]
SMALL += ["--set", "data.test_limit=50", "--set", "train.checkpoint_every=2", "--quiet"]
TIMES = ("seconds", "per_second")
WAIT = 120  # seconds, for commands that take a few


@dataclass(frozen=True)
class Answer:
    """What a command gave: its exit code (negative: the signal that ended it), standard output and error."""

    code: int
    out: str = ""
    err: str = ""


DONE = Answer(0)  # without a word, as --quiet asks


@dataclass(frozen=True)
class Command:
    """A running `mbm`."""

    process: BaseProcess
    out: IO[str]
    err: IO[str]

    def send(self, number: int) -> None:
        """Send SIGKILL to the process alone, other signals also to its workers, as a terminal does."""
        if self.process.is_alive():
            (os.kill if number == signal.SIGKILL else os.killpg)(self.process.pid, number)

    def wait(self) -> Answer:
        self.process.join(WAIT)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"still running after {WAIT} s")
        return Answer(self.process.exitcode, self.out.read(), self.err.read())


def start(*arguments: object, folder: Path, file_size: int | None = None) -> Command:
    """Start `mbm` with these arguments in a folder; no file can get larger than ``file_size`` bytes."""
    out, err = (tempfile.NamedTemporaryFile("r", errors="replace") for _ in range(2))  # noqa: SIM115 (wait reads them)
    process = FORKS.Process(target=_main, args=([*map(str, arguments)], folder, out.name, err.name, file_size))
    process.start()
    return Command(process, out, err)


def start_until(file: str, *arguments: object, folder: Path) -> Command:
    """Start `mbm` and wait until a run in the folder has written this file, or written it anew."""

    def newest() -> int:
        # Path.glob would trip over folders that are renamed meanwhile.
        found = glob.glob(f"{folder}/runs/**/{file}", recursive=True)
        return max((os.stat(path).st_mtime_ns for path in found), default=0)

    before, end = newest(), time.monotonic() + WAIT
    command = start(*arguments, folder=folder)
    while newest() == before:
        assert time.monotonic() < end, f"no {file}"
        time.sleep(0.002)
    return command


def mbm(*arguments: object, folder: Path, file_size: int | None = None) -> Answer:
    return start(*arguments, folder=folder, file_size=file_size).wait()


def _main(arguments: list[str], folder: Path, out: str, err: str, file_size: int | None) -> None:
    from mbm_cli import cli

    os.setpgid(0, 0)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    os.chdir(folder)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.argv = ["mbm", *arguments]
    cli.main()


def run_in(folder: Path) -> Path | None:
    """Return the run that was made in a folder; a killed process may have left a hidden folder, too."""
    found = [path for path in folder.glob("runs/*") if not path.name.startswith(".")]
    assert len(found) <= 1, f"a run that is resumed stays in its folder: {found}"
    return found[0] if found else None


def resume(run: Path) -> list[str]:
    return ["resume", run.name, "--quiet"]


def state(run: Path) -> dict[str, Any]:
    """Return what a run, or a comparison or sweep and its runs, has come to: all but names and times.

    That is the files, weights, optimizer, random states and metrics; tensors as bytes, to compare each bit.
    """
    runs = [[_read(file) for file in (path, path.with_name("metrics.jsonl"))] for path in run.rglob("checkpoint.pt")]
    flat = sorted((dict(_flat(one)) for one in runs), key=repr)
    files = sorted(path.name for path in run.rglob("*") if path.is_file())
    return dict(_flat({"status": _read(run / "summary.json")["status"], "files": files, "runs": flat}))


def _flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if not str(key).endswith(TIMES):
                yield from _flat(inner, f"{where}/{key}")
    else:
        yield where, value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def check_same(run: Path, expected: dict[str, Any]) -> None:
    found = state(run)
    different = [key for key in found | expected if found.get(key) != expected.get(key)]
    assert not different, [f"{key}: {found.get(key)!r:.80} not {expected.get(key)!r:.80}" for key in different]


def check_readable(folder: Path) -> None:
    """Read every file, but those that a killed process was still writing: their names begin with a dot."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            assert _read(path) is not None, path


def _read(path: Path) -> Any:
    match path.suffix:
        case ".json":
            return json.loads(path.read_text())
        case ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines()]
        case ".yaml":
            return yaml.safe_load(path.read_text())
        case ".pt":
            return torch.load(path, weights_only=True, map_location="cpu")
    return path.read_bytes()


@contextmanager
def stage(what: str) -> Iterator[Path]:
    """Give a part of a script an empty folder, and say that it has passed."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
    print(f"{what}: passed", flush=True)
