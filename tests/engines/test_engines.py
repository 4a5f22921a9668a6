"""Sweeps whose processes are killed, cancelled, preempted and requeued: each ends with the undisturbed bits."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stress.runs import DONE, SMALL, check_same, mbm, run_in, start, state

from mbm_cli.runs import list_runs

LOCAL, SLURM = ["--jobs", "2", "--on", "local"], ["--jobs", "2", "--on", "slurm://low?time=5"]
IN_TURN = ["--at-once", "2", "--on", "slurm://low?time=5"]  # two runs in one lane
EPOCHS = [*SMALL, "--set", "train.checkpoint_every=8", "--epochs", "24"]  # a few seconds
ONE, TWO = "mbm", "mbm,mbm-t20"  # runs
WAIT = 60  # seconds for anything


@pytest.fixture(autouse=True)
def engine_is_there(request):
    """Start Slurm for the tests that need it."""
    local = "callspec" in request.node.keywords and request.node.callspec.params.get("engine") is LOCAL
    if not local or "other" in request.node.callspec.params:
        request.getfixturevalue("slurm")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Callable[[str], dict]:
    """Return what becomes of a sweep to which nothing happens."""
    states = {}

    def of(multipliers: str) -> dict:
        if multipliers not in states:
            folder = tmp_path_factory.mktemp("undisturbed")
            assert mbm(*sweep(multipliers), folder=folder) == DONE
            states[multipliers] = state(run_in(folder))
        return states[multipliers]

    return of


def sweep(multipliers: str) -> list[str]:
    return ["sweep", "--vary", f"model.multiplier={multipliers}", *EPOCHS]


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(folder: Path) -> list[int]:
    """Return the processes of a sweep that compute runs: workers of this machine, or lanes."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            inside = os.readlink(process / "cwd") == str(folder)
        except OSError:  # it has ended
            continue
        if inside and "python" in words[0] and ({"submitit.core._submit", "--multiprocessing-fork"} & {*words}):
            found.append(int(process.name))
    return found


def begun(folder: Path, multipliers: str) -> Callable[[], bool]:
    """Return what says whether all runs have come to a checkpoint."""
    return lambda: len(list(folder.glob("runs/*/*/checkpoint.pt"))) == len(multipliers.split(","))


def slurm_says(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def jobs() -> list[str]:
    return slurm_says("squeue", "--noheader", "--partition=low", "--array", "--format=%A")


@pytest.mark.parametrize(("engine", "disturbed"), [(IN_TURN, 2), (SLURM, 1)], ids=["one lane", "two lanes"])
def test_killed_lane_changes_no_bit(engine, disturbed, undisturbed, tmp_path):
    process = start(*sweep(TWO), *engine, folder=tmp_path)
    wait_for(begun(tmp_path, TWO))
    os.kill(workers(tmp_path)[0], signal.SIGKILL)
    assert process.wait() == DONE
    check_same(run_in(tmp_path), undisturbed(TWO))
    assert sum("resumed" in run.environment() for run in list_runs(run_in(tmp_path))) == disturbed


def test_failing_run_stops_no_other(undisturbed, tmp_path):
    vary = ["--vary", "optimizer.lr=1e30,0.001"]
    answer = mbm("sweep", *vary, "--multiplier", ONE, *EPOCHS, *IN_TURN, folder=tmp_path)
    assert answer.code == 1
    assert "1 of 2 runs failed, the first one: epoch 1 of 24: the loss of step" in answer.err
    (good,) = [run for run in list_runs(run_in(tmp_path)) if run.summary().status == "completed"]
    expected = {key: value for key, value in undisturbed(ONE).items() if key.startswith("/runs")}
    assert {key: value for key, value in state(good.folder).items() if key.startswith("/runs")} == expected


@pytest.mark.parametrize(
    ("engine", "other", "multipliers"), [(LOCAL, SLURM, TWO), (SLURM, LOCAL, ONE)], ids=["to slurm", "to local"]
)
def test_interrupted_sweep_resumes_on_another_engine(engine, other, multipliers, undisturbed, tmp_path):
    process = start(*sweep(multipliers), *engine, folder=tmp_path)
    wait_for(begun(tmp_path, multipliers))
    process.send(signal.SIGINT)
    answer = process.wait()
    assert (answer.code, workers(tmp_path), jobs()) == (130, [], [])
    assert {run.summary().status for run in list_runs(run_in(tmp_path))} == {"interrupted"}
    assert mbm("resume", run_in(tmp_path), "--quiet", *other, folder=tmp_path) == DONE
    check_same(run_in(tmp_path), undisturbed(multipliers))


@pytest.mark.parametrize("engine", [LOCAL, SLURM], ids=["local", "slurm"])
def test_killed_parent_loses_nothing(engine, undisturbed, tmp_path):
    process = start(*sweep(ONE), *engine, folder=tmp_path)
    wait_for(begun(tmp_path, ONE))
    process.send(signal.SIGKILL)
    process.wait()
    end = {"completed"} if engine is SLURM else {"stopped"}  # lanes go on
    wait_for(lambda: {run.summary().status for run in list_runs(run_in(tmp_path))} == end)
    assert mbm("resume", run_in(tmp_path), "--quiet", folder=tmp_path) == DONE
    check_same(run_in(tmp_path), undisturbed(ONE))


def test_resume_replaces_lanes_that_still_compute(undisturbed, tmp_path):
    process = start(*sweep(ONE), *SLURM, folder=tmp_path)
    wait_for(begun(tmp_path, ONE))
    process.send(signal.SIGKILL)
    process.wait()
    assert mbm("resume", run_in(tmp_path), "--quiet", *LOCAL, folder=tmp_path) == DONE
    assert jobs() == []
    check_same(run_in(tmp_path), undisturbed(ONE))


@pytest.mark.parametrize("how", ["preempt", "requeue", "time limit"])
def test_requeued_lane_computes_each_step_once(how, undisturbed, tmp_path):
    process = start(*sweep(ONE), *SLURM, folder=tmp_path)
    wait_for(begun(tmp_path, ONE))
    (job,) = jobs()
    if how == "preempt":
        slurm_says("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    elif how == "requeue":
        slurm_says("scontrol", "requeue", job)
    else:  # the signal that Slurm sends before
        slurm_says("scancel", "--signal=USR2", job)
    wait_for(lambda: slurm_says("squeue", "--noheader", f"--jobs={job}", "--format=%T") == ["PENDING"])
    (run,) = list_runs(run_in(tmp_path))
    assert run.summary().status == "interrupted"
    slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm holds it for two minutes
    assert process.wait() == DONE
    check_same(run_in(tmp_path), undisturbed(ONE))
    assert len(run.environment()["resumed"]) == 1
