"""Run `mbm` in this process, as the tests of its commands do: importing PyTorch once is enough."""

import io
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from stress.runs import FORKS

from mbm_cli import cli
from mbm_cli.data import DATASETS
from mbm_cli.experiments import profile_conv
from mbm_cli.report import plots
from mbm_cli.runs import Run, list_runs

CPU = ["--device", "cpu", "--threads", "1"]
# An epoch has 4 steps, the last one smaller.
SMALL = [*CPU, "--set", "data.train_limit=60", "--set", "data.batch_size=16", "--set", "data.test_limit=50"]
EPOCH = [*SMALL, "--epochs", "1"]
COMPARE = ["compare", "exact-vs-mbm", "--seeds", "1"]
SWEEP = ["sweep", "--vary", "model.multiplier=mbm,mbm-t20"]
KINDS = {"train": ["train", *SMALL, "--epochs", "2"], "compare": [*COMPARE, *EPOCH], "sweep": [*SWEEP, *EPOCH]}
# Its files are verified once.
MNIST = SimpleNamespace(
    **{name: getattr(DATASETS["mnist"], name) for name in ("name", "shape", "classes", "damage")},
    **{name: cache(getattr(DATASETS["mnist"], name)) for name in ("fetch", "load")},
)
PNG = b"\x89PNG\r\n"


class Answer(NamedTuple):
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


SILENT = Answer(0, "", "")


def mbm(*arguments: object, stopped: Callable[[], bool] | None = None, draw: bool = False) -> Answer:
    """Run a command.

    Args:
        stopped: says, instead of a signal, whether to stop.
        draw: draw the pictures, half a second each.
    """
    out, err = io.StringIO(), io.StringIO()
    if "--jobs" in arguments:
        forkserver.ensure_running()  # launch would start it, and all that it forks, with signals blocked
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["mbm", *map(str, arguments)])
        # Workers are forked from a process that has imported PyTorch; test_resume.py has some that are spawned.
        patch.setattr(multiprocessing, "get_context", lambda method: FORKS)
        patch.setitem(DATASETS, "mnist", MNIST)
        patch.setattr(profile_conv, "LEAST_SECONDS", 0.01)
        if stopped is not None:
            patch.setattr(cli, "stop_on_signal", lambda: nullcontext(stopped))
        if not draw:
            patch.setattr(plots, "pictures", lambda result, made: {})
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            torch.set_num_threads(threads)
            signal.signal(signal.SIGINT, handler)
    return Answer(end.value.code or 0, out.getvalue(), err.getvalue())


def after(steps: int) -> Callable[[], bool]:
    """Return what stops a command when it has asked so many times: before each step, or each part of a measurement."""
    asked = iter(range(steps))
    return lambda: next(asked, None) is None


def made(output: str | Path = "runs") -> Run:
    """Return the only run in a folder."""
    (run,) = list_runs(Path(output))
    return run


def contents(folder: str | Path = ".") -> dict[str, bytes | None]:
    """Return every file's bytes by its path, and the folders."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}
