"""Where the runs of a sweep are computed: in this process, or in worker processes that fail in every way."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mbm_cli.errors import Interrupted, RunError
from mbm_cli.launch import Outcome, launch

WAIT = "wait"  # the task that ends only when it is stopped


def work(task, tell, stopped) -> str:
    """Do what the task says."""
    match task:
        case "fail":
            raise RunError("the loss is nan")
        case "crash":
            raise KeyError("x")
        case "signal":  # as a terminal sends it to every process
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "wait":
            tell(0.5)
            while not stopped():
                time.sleep(0.01)
            raise Interrupted("interrupted")
        case "device":
            return os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        case file if os.path.isfile(file):
            with open(file, "w") as begun:
                fcntl.flock(begun, fcntl.LOCK_EX)
                print("begun", file=begun, flush=True)
                time.sleep(600)
    tell(1.0)
    return f"{task} in {os.getpid()}"


class Log:
    """Records what `launch` reports."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, Outcome]] = []
        self.progress: list[tuple[str, float]] = []

    def launch(self, tasks: list[str], jobs: int, stopped=lambda: False) -> None:
        progress, done = lambda *one: self.progress.append(one), lambda *one: self.outcomes.append(one)
        launch(tasks, work, jobs, progress, done, stopped)


@pytest.fixture
def log():
    yield Log()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_failed_task_does_not_stop_the_others(log, jobs):
    tasks = ["a", "fail", "crash", "b"] + ["signal"] * (jobs > 1)
    log.launch(tasks, jobs)
    outcomes = dict(log.outcomes)
    assert outcomes.keys() == set(tasks)
    assert outcomes["fail"] == Outcome(reason="the loss is nan")
    assert outcomes["crash"] == Outcome(reason="KeyError: 'x'")
    done = [task for task in tasks if task not in ("fail", "crash")]
    assert sorted(log.progress) == sorted((task, 1.0) for task in done)
    for task in done:
        name, _, process = outcomes[task].result.partition(" in ")
        assert name == task
        assert (int(process) == os.getpid()) == (jobs == 1)


@pytest.mark.parametrize(
    ("task", "how"),
    [("kill", r"was ended by SIGKILL \(is there enough memory\?\)"), ("exit", "ended with exit code 3")],
)
def test_dead_worker_stops_the_others(log, task, how):
    with pytest.raises(RunError, match=f"^{task}: its process {how}$") as error:
        log.launch([task, WAIT, "never"], jobs=2)
    assert log.outcomes == [(task, Outcome(reason=str(error.value)))]


@pytest.mark.parametrize(("jobs", "tasks"), [(1, ["a", WAIT, "b"]), (2, ["a", WAIT, WAIT])])
def test_interrupt_keeps_what_is_done(log, jobs, tasks):
    with pytest.raises(Interrupted):
        log.launch(tasks, jobs, stopped=lambda: log.progress.count((WAIT, 0.5)) == jobs)
    assert [task for task, _ in log.outcomes] == ["a"]


def test_failing_callback_stops_the_workers(log):
    def fail(task: str, outcome: Outcome) -> None:
        raise RunError("the disk is full")

    with pytest.raises(RunError, match="the disk is full"):
        launch(["a", WAIT], work, 2, lambda *_: None, fail, lambda: False)


@pytest.mark.parametrize(
    ("count", "listed", "devices"),
    [(1, None, ["all"]), (2, None, ["0", "1", "0"]), (2, " GPU-1, 5", ["GPU-1"])],
)
def test_worker_k_sees_device_k(log, monkeypatch, count, listed, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    log.launch(["device"] * len(devices), jobs=4)
    assert sorted(outcome.result for _, outcome in log.outcomes) == sorted(devices)


def test_worker_ends_with_its_parent(tmp_path):
    """At once, not at its next step: what it holds is free for a resume."""
    file = tmp_path / "task"
    file.touch()
    script = f"from test_launch import *; Log().launch([{str(file)!r}], jobs=2)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent) as parent:
        while not file.read_text():
            time.sleep(0.02)
        parent.kill()
    with file.open("w") as ended:
        fcntl.flock(ended, fcntl.LOCK_EX)
