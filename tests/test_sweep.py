"""`mbm sweep`: a run for every combination of values, and what becomes of threads, jobs and dead processes."""

import csv
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from commands import EPOCH, PNG, SILENT, SMALL, SWEEP, made, mbm
from stress.runs import check_same, state
from tables import exported

from mbm_cli.errors import Interrupted
from mbm_cli.experiments import members
from mbm_cli.runs import Run, list_runs

COLUMNS = ["optimizer.lr", "model.multiplier", "seed", "status", "test_accuracy", "best_test_accuracy", "test_loss"]
COLUMNS += ["train_loss", "epochs", "epoch_seconds", "train_seconds", "run"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sweep_holds_every_combination_and_seed():
    vary = ["--vary", "optimizer.lr=0.001,1e-2", "--vary", "model.multiplier=mbm,mbm-t20", "--seeds", 2]
    result = mbm("sweep", *vary, *SMALL, "--epochs", 2, "--json", draw=True).json
    run = made()
    assert re.fullmatch(r"\d{8}T\d{6}Z-lenet-mbm-sweep-[0-9a-f]+", run.name)
    files = {path.name for path in run.folder.iterdir() if path.is_file()}
    assert files == {f"{name}.json" for name in ("environment", "plan", "summary", "sweep")} | {
        *("config.yaml", "sweep.csv", "sweep.png")
    }
    assert (run.folder / "sweep.png").read_bytes().startswith(PNG)
    combinations = [(0.001, "mbm"), (0.001, "mbm-t20"), (0.01, "mbm"), (0.01, "mbm-t20")]
    assert [tuple(one["values"].values()) for one in result["combinations"]] == combinations
    order = [(*combination, seed) for combination in combinations for seed in (0, 1)]
    assert [(*row["values"].values(), row["seed"]) for row in result["runs"]] == order
    assert [result[field] for field in ("model", "device", "epochs", "threads")] == ["lenet", "cpu", 2, 1]

    members = {member.name: member for member in list_runs(run.folder)}
    assert {row["run"] for row in result["runs"]} == set(members)
    for row in result["runs"]:
        member = members[row["run"]]
        config, last = member.config(), member.metrics()[-1]
        assert [config.optimizer.lr, str(config.model.multiplier)] == [*row["values"].values()]
        assert (config.seed, member.environment()["threads"]) == (row["seed"], 1)
        for field in ("test_accuracy", "test_loss", "train_loss"):
            assert row[field] == last[field]
        assert not (member.folder / "curves.png").exists()
    for i, one in enumerate(result["combinations"]):
        rows = result["runs"][2 * i : 2 * i + 2]
        a, b = (row["test_accuracy"] for row in rows)
        assert one["test_accuracy"] == [a, b]
        assert one["test_accuracy_mean"] == pytest.approx((a + b) / 2)
        assert one["test_accuracy_std"] == pytest.approx(abs(a - b) / 2**0.5)
        assert one["test_accuracy_best"] == max(row["best_test_accuracy"] for row in rows)
        assert one["test_loss_mean"] == pytest.approx((rows[0]["test_loss"] + rows[1]["test_loss"]) / 2)
        assert (one["runs"], one["failed"]) == ([row["run"] for row in rows], 0)

    with (run.folder / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == COLUMNS
    for line, row in zip(lines, result["runs"], strict=True):
        assert [float(line["optimizer.lr"]), line["model.multiplier"]] == [*row["values"].values()]
        assert float(line["test_accuracy"]) == row["test_accuracy"]
        assert (line["status"], line["run"], line["epochs"]) == ("completed", row["run"], "2")

    summary = run.summary()
    assert (summary.status, summary.multiplier, summary.epochs) == ("completed", "mbm, mbm-t20", 16)
    assert len(summary.epoch_seconds) == len(summary.train_seconds) == 16
    assert [one.name for one in list_runs(Path("runs"))] == [run.name]


def test_jobs_change_nothing_but_times():
    one = mbm(*SWEEP, *EPOCH, "--output", "one", "--json").json
    two = mbm(*SWEEP, *EPOCH, "--output", "two", "--jobs", 2, "--json").json
    check_same(made("two").folder, state(made("one").folder))
    for result in (one, two):
        for row in (*result["runs"], *result["combinations"]):
            for field in ("run", "runs", *(field for field in row if "_seconds" in field)):
                row.pop(field, None)
    assert {**one, "jobs": 2, "run": two["run"]} == two
    assert multiprocessing.active_children() == []


def test_seeds_alone_need_no_vary():
    answer = mbm("sweep", "--seeds", 3, *EPOCH, draw=True)
    assert "lenet-mbm: lenet, 3 seeds" in answer.out
    (one,) = made().read_json("sweep.json")["combinations"]
    runs = list_runs(made().folder)
    assert (one["values"], len(one["test_accuracy"]), {run.config().seed for run in runs}) == ({}, 3, {0, 1, 2})
    seconds = sorted(sum(run.summary().train_seconds) for run in runs)
    assert one["train_seconds_median"] == pytest.approx(seconds[1])


def test_members_are_ordinary_runs():
    assert mbm(*SWEEP, *EPOCH, "--seed", 1, "--quiet") == SILENT
    member = next(one for one in list_runs(made().folder) if "-mbm-t20-" in one.name)
    assert mbm("train", *EPOCH, "--seed", 1, "--multiplier", "mbm-t20", "--output", "alone", "--quiet") == SILENT
    alone = made("alone")
    check_same(member.folder, state(alone.folder))
    assert re.sub("^name: .*", "name: lenet-mbm", member.config_text()) == alone.config_text()
    assert mbm("eval", member.folder, "--multiplier", "exact", "--quiet") == SILENT


def test_runs_in_turn_come_to_what_they_do_one_after_the_other():
    assert mbm(*SWEEP, *EPOCH, "--quiet") == SILENT
    assert mbm(*SWEEP, *EPOCH, "--at-once", 2, "--output", "turns", "--quiet") == SILENT
    check_same(made("turns").folder, state(made().folder))
    assert made("turns").plan().at_once == 2


@pytest.mark.parametrize(("available", "jobs", "threads"), [(2, 1, 2), (7, 3, 2), (2, 8, 1)])
def test_threads_are_shared_among_jobs_and_kept(available, jobs, threads, monkeypatch):
    asked = []

    def launch(tasks, work, engine, *more):
        asked.append((engine.jobs, {task.config.train.threads for task in tasks}))
        raise Interrupted("interrupted")

    monkeypatch.setattr(members, "launch", launch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: available)
    assert mbm(*SWEEP, "--jobs", jobs).code == 130
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for more in ([], ["--jobs", 4]):
        assert mbm("resume", made().name, *more).code == 130
    assert asked == [(jobs, {threads}), (jobs, {threads}), (4, {threads})]


@pytest.mark.parametrize("multipliers", ["mbm", "mbm,mbm-t20"], ids=["one slot", "two slots"])
def test_killed_process_changes_no_bit(multipliers):
    command = ["sweep", "--vary", f"model.multiplier={multipliers}", *SMALL, "--epochs", 20, "--quiet"]
    assert mbm(*command, "--output", "undisturbed") == SILENT
    killed = set()

    def kill_one() -> bool:
        if not killed and list(Path().glob("runs/*/*/checkpoint.pt")):
            kill_workers(killed, 1)
        return False

    assert mbm(*command, "--jobs", 2, stopped=kill_one) == SILENT
    assert len(killed) == 1
    check_same(made().folder, state(made("undisturbed").folder))
    assert sum("resumed" in member.environment() for member in list_runs(made().folder)) == 1


def test_run_whose_process_dies_twice_fails_alone():
    killed = set()

    def kill_longer() -> bool:
        """Kill the process of the longer run once it has a checkpoint, and again once it is resumed."""
        longer = next((Run(path.parent) for path in Path().glob("runs/*/*-100000-*/checkpoint.pt")), None)
        shorter_is_done = list(Path().glob("runs/*/summary.json")) and made().summary().epochs == 1
        if longer and shorter_is_done and (not killed or "resumed" in longer.environment()):
            kill_workers(killed)
        return False

    vary = ["--vary", "train.epochs=1,100000", "--vary", "optimizer.lr=0.001"]
    answer = mbm("sweep", *vary, *SMALL, "--jobs", 2, "--quiet", stopped=kill_longer)
    run, label = made(), "100000, 0.001, seed 0"
    assert answer.code == 1
    message, hint = answer.err.splitlines()
    reason = f"{label}: its process was ended by SIGKILL (is there enough memory?)"
    assert message == f"mbm: 1 of 2 runs failed, the first one: {reason}"
    assert hint == f"To resume: mbm resume {run.folder}"
    assert run.summary().status == "failed"
    assert sorted(member.summary().status for member in list_runs(run.folder)) == ["completed", "failed"]
    assert [row["reason"] for row in run.read_json("sweep.json")["runs"]] == [None, reason]
    assert multiprocessing.active_children() == []


def kill_workers(killed: set[int], most: int = 8) -> None:
    """Kill worker processes that were not killed before."""
    for worker in [one for one in multiprocessing.active_children() if one.pid not in killed][:most]:
        killed.add(worker.pid)
        worker.kill()


def test_failing_run_does_not_stop_the_others():
    vary = ["--vary", "optimizer.name=sgd", "--vary", "optimizer.lr=1e30,0.001"]
    answer = mbm("sweep", *vary, *EPOCH, "--jobs", 2, "--quiet")
    assert answer.code == 1
    assert re.match(r"mbm: 1 of 2 runs failed, the first one: epoch 1 of 1: the loss of step . of 4 is nan", answer.err)
    assert [one.summary().status for one in list_runs(made().folder)].count("completed") == 1


def test_long_names_of_values_stay_apart():
    files = [Path(folder, f"{'long' * 20}.bin") for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        exported("mbm", 3, file)
    vary = f"model.multiplier={','.join(f'lut:{file}' for file in files)}"
    assert mbm("sweep", "--vary", vary, *EPOCH, "--seed", 2**63 - 1, "--quiet") == SILENT
    names = {member.config().name for member in list_runs(made().folder)}
    assert len(names) == 2
    assert max(map(len, names)) <= 64


def test_curves_of_members_are_drawn_on_request():
    assert mbm(*SWEEP, *EPOCH, "--pictures", "--quiet", draw=True) == SILENT
    assert [(one.folder / "curves.png").read_bytes()[:6] for one in list_runs(made().folder)] == [PNG, PNG]


def test_exact_members_have_exact_gradients():
    """Check that a multiplier of the gradients acts on the members that have a layer for it."""
    vary = ["--vary", "model.multiplier=exact,mbm", "--backward", "mbm"]
    assert mbm("sweep", *vary, *EPOCH, "--quiet") == SILENT
    runs = list_runs(made().folder)
    assert {(str(run.config().model.multiplier), str(run.config().model.backward)) for run in runs} == {
        ("exact", "exact"),
        ("mbm", "mbm"),
    }
