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

from mbm_cli.config import Engine
from mbm_cli.errors import Interrupted, RunError
from mbm_cli.launch import launch
from mbm_cli.slurm import LOOK_INTERVAL
from mbm_cli.turns import Turns

WAIT = "wait"  # the task that ends only when it is stopped
KILLED = "its process was ended by SIGKILL (is there enough memory?)"


def work(task, stopped) -> Turns[None]:
    """Do what the task says; leave a file with its name, the process and the device."""
    yield
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
        case "kill once" if not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        case "nap":
            time.sleep(2 * LOOK_INTERVAL)
        case "exit":
            os._exit(3)
        case "wait":
            Path(f"waiting {os.getpid()}").touch()
            while not stopped():
                time.sleep(0.01)
            raise Interrupted("interrupted")
        case "hold":
            with open("held", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                print("held", file=file, flush=True)
                time.sleep(600)
    Path(f"{task} in {os.getpid()} on {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}").touch()


class Log:
    """Records what `launch` reports."""

    def __init__(self) -> None:
        self.reasons: list[tuple[str, str | None]] = []
        self.looks: set[str] = set()

    def launch(self, tasks: list[str], engine: Engine, stopped=lambda: False) -> None:
        launch(tasks, work, engine, Path(), self.looks.update, lambda *one: self.reasons.append(one), stopped)


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield Log()
    assert multiprocessing.active_children() == []
    assert list(tmp_path.glob(".*")) == []


def test_jobs_get_equal_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes: set[int] = set()  # of four groups: two for each job
    engine = Engine(jobs=2, at_once=4)
    launch(["nap"] * 10, work, engine, Path(), lambda group: sizes.add(len(group)), lambda *one: None, lambda: False)
    assert sizes == {2, 3}


def test_nothing_to_compute(log):
    log.launch([], Engine(jobs=2))
    assert log.reasons == []


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("jobs", [1, 2])
def test_failed_task_does_not_stop_the_others(log, jobs, at_once):
    tasks = ["a", "fail", "crash", "b"] + ["signal"] * (jobs > 1)
    log.launch(tasks, Engine(jobs=jobs, at_once=at_once))
    reasons = dict(log.reasons)
    assert reasons == dict.fromkeys(tasks) | {"fail": "the loss is nan", "crash": "KeyError: 'x'"}
    left = {path.name.split()[0]: int(path.name.split()[2]) for path in Path().iterdir()}
    assert left.keys() == {task for task in tasks if task not in ("fail", "crash")}
    assert (os.getpid() in left.values()) == (jobs == 1)


@pytest.mark.parametrize(
    ("task", "reason", "others", "at_once"),
    [
        ("kill", f"kill: {KILLED}", [], 1),
        ("exit", "exit: its process ended with exit code 3", ["a", "b", "c"], 1),
        ("kill once", None, [], 1),
        ("kill once", None, ["a", "b", "c"], 4),
    ],
    ids=["killed", "ended", "killed once", "killed once in turn"],
)
def test_task_of_a_dead_process_is_tried_once_more(log, task, reason, others, at_once):
    log.launch([task, *others], Engine(jobs=2, at_once=at_once))
    assert sorted(log.reasons) == sorted([(task, reason), *((other, None) for other in others)])


@pytest.mark.parametrize(
    ("jobs", "at_once", "tasks", "done"),
    [(1, 1, ["a", WAIT, "b"], "a"), (2, 1, ["a", WAIT, WAIT], "a"), (2, 2, ["a", "b", WAIT, WAIT], "ab")],
    ids=["one process", "two", "two with two in turn"],
)
def test_interrupt_keeps_what_is_done(log, jobs, at_once, tasks, done):
    engine = Engine(jobs=jobs, at_once=at_once)
    with pytest.raises(Interrupted):
        log.launch(tasks, engine, stopped=lambda: len(list(Path().glob("waiting *"))) == jobs)
    assert sorted(log.reasons) == [(task, None) for task in done]
    assert (WAIT in log.looks) == (jobs > 1)


def test_removed_file_stops_the_workers(log, tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()

    def remove(tasks: list[str]) -> None:
        for path in folder.iterdir():
            path.unlink()

    with pytest.raises(Interrupted):
        launch([WAIT, WAIT, "a"], work, Engine(jobs=2), folder, remove, lambda *_: None, lambda: False)


def test_failing_callback_stops_the_workers(log):
    def fail(task: str, reason: str | None) -> None:
        raise RunError("the disk is full")

    with pytest.raises(RunError, match="the disk is full"):
        launch(["a", WAIT], work, Engine(jobs=2), Path(), log.looks.update, fail, lambda: False)


@pytest.mark.parametrize(
    ("count", "listed", "devices"),
    [(1, None, ["all"]), (2, None, ["0", "1", "0"]), (2, " GPU-1, 5", ["GPU-1"])],
)
def test_worker_k_sees_device_k(log, monkeypatch, count, listed, devices):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    log.launch(["device"] * len(devices), Engine(jobs=4))
    assert sorted(path.name.split()[-1] for path in Path().iterdir()) == sorted(devices)


def test_worker_ends_with_its_parent(tmp_path):
    """At once, not at its next step: what it holds is free for a resume."""
    script = "from test_launch import *; Log().launch(['hold'], Engine(jobs=2))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    held = tmp_path / "held"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment) as parent:
        while not (held.exists() and held.read_text()):
            time.sleep(0.02)
        parent.kill()
    end = time.monotonic() + 5
    with held.open() as file:
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < end
                time.sleep(0.02)
