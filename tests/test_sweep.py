"""A run for every combination of values, one after the other or several at once."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tables import exported

from mbm_cli import plots
from mbm_cli.cli import main
from mbm_cli.config import load
from mbm_cli.errors import Interrupted, RequestError, RunError
from mbm_cli.experiments import compare as comparison
from mbm_cli.experiments import sweep as experiment
from mbm_cli.experiments import train as training_run
from mbm_cli.experiments import workers
from mbm_cli.experiments.member import member_name, members
from mbm_cli.experiments.sweep import resume, sweep
from mbm_cli.render import CompareDisplay, Display, PlainSweepDisplay, SweepDisplay
from mbm_cli.runs import Run, list_runs
from mbm_cli.tables import console, sweep_table

SMALL = ["data.train_limit=200", "data.test_limit=100", "train.epochs=2", "device=cpu"]  # 4 steps an epoch
SETTINGS = [argument for setting in SMALL for argument in ("--set", setting)]
MULTIPLIERS = "model.multiplier=mbm,mbm-t20"
MBM = str(Path(sys.executable).with_name("mbm"))
UNTIMED = ["values", "seed", "status", "test_accuracy", "best_test_accuracy", "test_loss", "train_loss", "epochs"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What a run sets for the process is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def undrawn(monkeypatch):
    """No time is spent on the runs' curves."""
    monkeypatch.setattr(plots, "curves", lambda epochs, title: b"")


def run_sweep(output: Path, *vary: str, seeds: int = 2, jobs: int = 1, display=None, settings=(), **more):
    config = load("lenet-mbm", [*SMALL, *settings])
    return sweep(config, vary, seeds, jobs, output, display or SweepDisplay(), threads=1, **more)


def untimed(result: dict) -> list[dict]:
    return [{field: row[field] for field in UNTIMED} for row in result["runs"]]


def weights(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    return {name: one.checkpoint()["model"] for name, one in members(run.folder).items()}


def same_weights(a: Run, b: Run) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(
        torch.equal(first[name][key], second[name][key]) for name in first for key in first[name]
    )


def statuses(run: Run) -> list[str]:
    return [one.summary()["status"] for one in list_runs(run.folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Run, dict]:
    """A sweep of two multipliers and two seeds, one run after the other."""
    return run_sweep(tmp_path_factory.mktemp("whole"), MULTIPLIERS)


# What comes out


def test_a_sweep_and_its_runs(tmp_path, undrawn):
    display = PlainSweepDisplay()
    run, result = run_sweep(tmp_path, "optimizer.lr=0.001,1e-2", MULTIPLIERS, display=display)
    assert json.loads((run.folder / "sweep.json").read_text()) == result
    assert (run.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert re.fullmatch(r"\d{8}T\d{6}Z-lenet-mbm-sweep-[0-9a-f]+", run.name)
    combinations = [(0.001, "mbm"), (0.001, "mbm-t20"), (0.01, "mbm"), (0.01, "mbm-t20")]
    assert [tuple(one["values"].values()) for one in result["combinations"]] == combinations
    order = [(*combination, seed) for combination in combinations for seed in (0, 1)]
    assert [(*row["values"].values(), row["seed"]) for row in result["runs"]] == order
    assert (result["model"], result["device"], result["epochs"], result["threads"]) == ("lenet", "cpu", 2, 1)

    inside = {one.name: one for one in list_runs(run.folder)}
    assert {row["run"] for row in result["runs"]} == set(inside)
    for row in result["runs"]:
        one, last = inside[row["run"]], inside[row["run"]].metrics()[-1]
        config = load(str(one.folder / "config.yaml"))
        assert (config.optimizer.lr, str(config.model.multiplier), config.seed) == (
            *row["values"].values(),
            row["seed"],
        )
        assert one.environment()["threads"] == 1
        assert [row[f] for f in ("test_accuracy", "test_loss", "train_loss")] == [
            last[f] for f in ("test_accuracy", "test_loss", "train_loss")
        ]
    for i, one in enumerate(result["combinations"]):
        rows = result["runs"][2 * i : 2 * i + 2]
        a, b = (row["test_accuracy"] for row in rows)
        assert one["test_accuracy"] == [a, b]
        assert one["test_accuracy_mean"] == pytest.approx((a + b) / 2)
        assert one["test_accuracy_std"] == pytest.approx(abs(a - b) / 2**0.5)
        assert one["test_accuracy_best"] == max(row["best_test_accuracy"] for row in rows)
        assert one["test_loss_mean"] == pytest.approx((rows[0]["test_loss"] + rows[1]["test_loss"]) / 2)
        assert one["runs"] == [row["run"] for row in rows]
        assert one["failed"] == 0

    with (run.folder / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["optimizer.lr", "model.multiplier", *experiment.CSV_FIELDS]
    for line, row in zip(table, result["runs"], strict=True):
        assert (float(line["optimizer.lr"]), line["model.multiplier"]) == tuple(row["values"].values())
        assert float(line["test_accuracy"]) == row["test_accuracy"]
        assert (line["status"], line["run"], int(line["epochs"])) == ("completed", row["run"], 2)

    summary = run.summary()
    assert (summary["status"], summary["multiplier"], summary["epochs"]) == ("completed", "mbm, mbm-t20", 16)
    assert len(summary["epoch_seconds"]) == len(summary["train_seconds"]) == 16
    assert [one.name for one in list_runs(tmp_path)] == [run.name]


def test_several_at_once_give_the_same_bits(whole, tmp_path):
    run, result = run_sweep(tmp_path, MULTIPLIERS, jobs=2)
    assert untimed(result) == untimed(whole[1])
    assert same_weights(run, whole[0])
    assert {**result, "jobs": 1, "runs": [], "combinations": []} == {**whole[1], "runs": [], "combinations": []}
    assert multiprocessing.active_children() == []


def test_a_run_of_a_sweep_is_an_ordinary_run(whole, tmp_path):
    config = load("lenet-mbm", [*SMALL, "model.multiplier=mbm-t20", "seed=1"])
    alone, _ = training_run.train(config, tmp_path, Display(), threads=1)
    ours = Run(whole[0].folder / whole[1]["combinations"][1]["runs"][1])
    assert alone.metrics()[-1]["test_loss"] == ours.metrics()[-1]["test_loss"]
    text = re.sub("^name: .*", "name: lenet-mbm", ours.config_text())
    assert text == alone.config_text()


@pytest.mark.parametrize(("available", "jobs", "share"), [(2, 1, 2), (7, 3, 2), (2, 8, 1)])
def test_threads_are_shared_and_kept(available, jobs, share, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(experiment, "work_here", lambda tasks, *more: asked.append((1, tasks[0].threads)))
    monkeypatch.setattr(experiment, "work_in_processes", lambda tasks, n, *more: asked.append((n, tasks[0].threads)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: available)
    with pytest.raises(KeyError):  # nothing has been computed
        sweep(load("lenet-mbm", SMALL), [MULTIPLIERS], 1, jobs, tmp_path, SweepDisplay())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for more, expected in ((None, jobs), (4, 4)):
        with pytest.raises(KeyError):
            resume(list_runs(tmp_path)[0], more, SweepDisplay())
        assert asked[-1] == (expected, share)
    assert asked[0] == (jobs, share)


# Going on, and what can go wrong


def test_an_interrupted_sweep_goes_on_without_repeating_runs(whole, tmp_path):
    asked = iter([False] * 14 + [True] * 1000)  # 8 steps a run: in the second epoch of the second of four
    with pytest.raises(Interrupted, match=r"after 1 of 4 runs; to go on: mbm sweep --resume \S+-sweep-"):
        run_sweep(tmp_path, MULTIPLIERS, stopped=lambda: next(asked))
    (run,) = list_runs(tmp_path)
    assert run.summary()["status"] == "interrupted"
    assert not (run.folder / "sweep.json").exists()
    assert statuses(run) == ["completed", "interrupted"]
    done, cut = (one.folder / "checkpoint.pt" for one in list_runs(run.folder))
    before = done.stat().st_mtime_ns
    assert torch.load(cut, weights_only=True)["epoch"] == 1
    result = resume(run, None, SweepDisplay())
    assert untimed(result) == untimed(whole[1])
    assert same_weights(run, whole[0])
    assert done.stat().st_mtime_ns == before
    assert len(list_runs(run.folder)) == 4
    # Complete: nothing is trained again.
    times = [(one.folder / "checkpoint.pt").stat().st_mtime_ns for one in list_runs(run.folder)]
    assert untimed(resume(run, 2, SweepDisplay())) == untimed(result)
    assert [(one.folder / "checkpoint.pt").stat().st_mtime_ns for one in list_runs(run.folder)] == times


def test_a_sweep_goes_on_from_another_folder_but_not_with_another_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported("mbm", 7, Path("t.bin"))
    asked = iter([False] * 10 + [True] * 1000)  # 8 steps a run: the one with the table is finished
    with pytest.raises(Interrupted, match="after 1 of 2 runs"):
        run_sweep(tmp_path / "runs", "model.multiplier=lut:t.bin,mbm", seeds=1, stopped=lambda: next(asked))
    (run,) = list_runs(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    kept = Path("../t.bin").read_bytes()
    exported("mitchell", 7, Path("../t.bin"))
    with pytest.raises(RunError, match=r"is not the multiplier that .* was trained with"):
        resume(run, None, SweepDisplay())
    Path("../t.bin").write_bytes(kept)
    result = resume(run, None, SweepDisplay())
    assert [row["values"] for row in result["runs"]] == [{"model.multiplier": m} for m in ("lut:t.bin", "mbm")]


def test_a_damaged_plan_is_named(whole, tmp_path):
    run = Run(shutil.copytree(whole[0].folder, tmp_path / "run"))
    plan = run.read_json("plan.json")
    for field, value in (
        ("seeds", "3"),
        ("seeds", 0),
        ("jobs", -1),
        ("threads", 0),
        ("combinations", []),
        ("vary", None),
    ):
        run.write_json("plan.json", {**plan, field: value})
        with pytest.raises(RunError, match=rf"plan\.json is damaged \({field}: "):
            resume(run, None, SweepDisplay())


def test_a_sweep_of_another_kind_of_device_is_not_gone_on_with(whole, tmp_path):
    """Whatever its config.yaml says: what is varied has configs of its own."""
    run = Run(shutil.copytree(whole[0].folder, tmp_path / "run"))
    plan = run.read_json("plan.json")
    for one in plan["combinations"]:
        one["config"]["device"] = "auto"
    run.write_json("plan.json", plan)
    before = "cpu" if torch.cuda.is_available() else "cuda"
    run.write_json("environment.json", {**run.environment(), "device": before})
    with pytest.raises(RequestError, match=rf"was begun on {before}, not on .* or start it anew"):
        resume(run, None, SweepDisplay())


def test_an_interrupt_of_several_at_once(tmp_path):
    """Of every process of the command, as terminals and batch systems send it; nothing waits for its turn any more."""
    command = [MBM, "sweep", "--vary", MULTIPLIERS, "--seeds", "1", "--jobs", "2", "--threads", "1", *SETTINGS]
    command += ["--set", "train.epochs=100000", "--output", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        started = time.monotonic()
        while len(list(tmp_path.glob("*/*/checkpoint.pt"))) < 2 and time.monotonic() - started < 60:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (run,) = list_runs(tmp_path)
    assert f"interrupted after 0 of 2 runs; to go on: mbm sweep --resume {run.folder}" in err
    assert "Traceback" not in err
    assert run.summary()["status"] == "interrupted"
    assert statuses(run) == ["interrupted"] * 2
    one = list_runs(run.folder)[0]
    assert one.checkpoint()["epoch"] == one.summary()["epochs"] == len(one.metrics()) >= 1


def test_a_worker_that_is_killed_ends_the_sweep(tmp_path):
    killed = []

    def kill_one() -> bool:
        if not killed and len(list(tmp_path.glob("*/*/checkpoint.pt"))) == 2:
            victim = multiprocessing.active_children()[0]
            killed.append(victim.pid)
            victim.kill()
        return False

    with pytest.raises(RunError, match=r"mbm(-t20)?, seed \d: its process was ended by SIGKILL") as error:
        run_sweep(tmp_path, MULTIPLIERS, jobs=2, stopped=kill_one, settings=["train.epochs=100000"])
    (run,) = list_runs(tmp_path)
    assert f"mbm sweep --resume {run.folder}" in error.value.hint
    assert run.summary()["status"] == "failed"
    assert "SIGKILL" in run.summary()["reason"]
    assert sorted(statuses(run)) == ["failed", "interrupted"]
    assert multiprocessing.active_children() == []


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, undrawn):
    display = PlainSweepDisplay()
    with pytest.raises(RunError, match=r"1 of 2 runs failed, the first one: epoch 1 of 2: the loss of step") as error:
        run_sweep(tmp_path, "optimizer.lr=1e30,0.001", seeds=1, display=display)
    (run,) = list_runs(tmp_path)
    assert error.value.hint.endswith(f"mbm sweep --resume {run.folder}")
    result = run.read_json("sweep.json")
    assert [row["status"] for row in result["runs"]] == ["failed", "completed"]
    failed, fine = result["combinations"]
    assert (failed["test_accuracy_mean"], failed["failed"], failed["test_accuracy"]) == (None, 1, [])
    assert (fine["failed"], fine["test_accuracy_std"]) == (0, None)
    assert run.summary()["status"] == "failed"
    assert (run.folder / "sweep.png").exists()
    console().print(sweep_table(result))
    with pytest.raises(RunError, match="1 of 2 runs failed"):
        resume(run, None, SweepDisplay())


BAD_VARY = [
    ([], ["--vary model.multiplier=mbm,mbm-t8"]),
    (["nonsense"], ["--vary 'nonsense'", "section.field=A,B"]),
    (["optimizer.lrr=1,2"], ["--vary", "'optimizer.lrr'", "did you mean optimizer.lr?"]),
    (["optimizer.lr=0.001,-1"], ["--vary: optimizer.lr must be", "-1"]),
    (["optimizer.lr=0.001,"], ["--vary: optimizer.lr must be", "null"]),
    (["model.multiplier=mbm,nbm"], ["--vary: model.multiplier", "'nbm'", "did you mean mbm?"]),
    (["model.multiplier={conv9: mbm, default: exact},mbm"], ["--vary", "conv9", "conv1, conv2"]),
    (["model.multiplier=lut:nowhere.bin"], ["nowhere.bin"]),
    (["model=lenet"], ["--vary model", "section"]),
    (
        ["optimizer.name=sgd,adam", "optimizer.momentum=0.9"],
        ["--vary: optimizer.momentum: belongs to the optimizer sgd, not to adam"],
    ),
    (["seed=1,2"], ["--vary seed", "--seeds"]),
    (["name=a,b"], ["--vary name"]),
    (["optimizer.lr=1", "optimizer.lr=2"], ["--vary optimizer.lr is given twice"]),
    (["optimizer.lr=0.001,1e-3"], ["optimizer.lr=1e-3 is the same as optimizer.lr=0.001"]),
    (["model.multiplier=mbm,mbm-t0"], ["mbm-t0 is the same as"]),
]


@pytest.mark.parametrize(("vary", "parts"), BAD_VARY)
def test_a_wrong_value_is_named_and_nothing_is_written(vary, parts, tmp_path):
    with pytest.raises(RequestError) as error:
        run_sweep(tmp_path / "runs", *vary)
    assert [part for part in parts if part not in str(error.value)] == []
    assert "--set" not in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_each_command_goes_on_with_its_own_folders(whole, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(RequestError, match="is not a sweep"):
        resume(Run(tmp_path), None, SweepDisplay())
    with pytest.raises(RequestError, match="is not a comparison"):
        comparison.resume(whole[0], CompareDisplay())
    with pytest.raises(RequestError, match=r"holds several runs: name one of them, for example .*-1-mbm-seed0-"):
        training_run.resume(whole[0], None, Display())


def test_names_of_runs_can_be_names_of_folders():
    assert member_name(["lenet", "mbm-t16-r7"], 3) == "lenet-mbm-t16-r7-seed3"
    names = {member_name([f"lut:/a/{folder}/{'long' * 20}.bin"], 2**63 - 1) for folder in "bc"}
    assert len(names) == 2
    for name in names:
        assert load("lenet-mbm", [f"name={name}"]).name == name


# Several GPUs


@pytest.mark.parametrize(
    ("count", "listed", "devices"),
    [
        (1, None, [{}, {}]),
        (0, "", [{}, {}]),
        (2, None, [{"CUDA_VISIBLE_DEVICES": d} for d in "010"]),
        (3, "5, 7,GPU-1", [{"CUDA_VISIBLE_DEVICES": d} for d in ("5", "7", "GPU-1", "5")]),
    ],
)
def test_each_worker_has_a_device_of_its_own(count, listed, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert [workers._device_environment(k) for k in range(len(devices))] == devices


# What is shown


def combination(accuracy: float, **values: object) -> dict:
    fields = {name.replace("__", "."): value for name, value in values.items()}
    return {"values": fields, "test_accuracy": [accuracy, accuracy + 0.01]}


def test_accuracy_is_drawn_against_truncated_bits_where_they_are_varied():
    names = ["exact", "mbm", "mbm-t20", "mitchell", "mbm-t16-r7", "mbm-t20-r3", "drum-k4"]
    drawn = [combination(0.9, model__multiplier=name) for name in names]
    lines = experiment._lines(drawn, ["model.multiplier"])
    assert [(line.label, list(line.accuracies)) for line in lines] == [
        ("exact", [0]),
        ("mbm", [0, 20]),
        ("mitchell", [0]),
        ("mbm-tT-rR", [16, 20]),
        ("drum", [20]),
    ]
    assert lines[1].accuracies[20] == [0.9, 0.91]
    two = [combination(0.9, model__multiplier=m, optimizer__lr=lr) for m in ("mbm", "mbm-t8") for lr in (0.1, 0.2)]
    assert [line.label for line in experiment._lines(two, ["model.multiplier", "optimizer.lr"])] == [
        "mbm, 0.1",
        "mbm, 0.2",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["exact", "mbm"],
        ["exact", "mbm-t20"],
        ["mbm-t8-r7", "mbm-t8-r6", "mbm"],
        ["{conv1: exact, default: mbm}", "mbm", "mbm-t8"],
    ],
)
def test_otherwise_combinations_are_drawn_one_by_one(names):
    drawn = [combination(0.9, model__multiplier=name) for name in names]
    assert experiment._lines(drawn, ["model.multiplier"]) is None
    assert experiment._lines([combination(0.9, optimizer__lr=0.1)], ["optimizer.lr"]) is None


def texts(figure) -> dict[str, object]:
    figure.draw_without_rendering()
    axes = figure.axes[0]
    return {text.get_text(): text.get_window_extent() for text in axes.texts}


def test_what_the_paper_reports_stands_below_the_points_it_belongs_to(monkeypatch):
    """And on nothing else: each text is below all points, and no two overlap."""
    figures = []
    monkeypatch.setattr(plots, "_png", figures.append)
    line = plots.SweepLine
    plots.sweep_lines(
        [
            line("mbm", "mbm", False, {0: [0.98, 0.985], 8: [0.98], 20: [0.90]}),
            line("mitchell", "mitchell", False, {0: [0.97], 20: [0.5]}),
            line("mbm", "mbm-tT-rR", True, {20: [0.3]}),
        ],
        experiment.REPORTED,
    )
    shown = texts(figures[0])
    found = " ".join(" ".join(shown).split())
    for words in (
        "mbm: area ÷ 11.7, power ÷ 16.1 mitchell: area ÷ 13.6, power ÷ 19.2",
        "mbm: area ÷ 28, power ÷ 57",
        "against an IEEE single-precision multiplier, as the paper reports",
    ):
        assert words in found
    boxes = list(shown.values())
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    lowest = figures[0].axes[0].transData.transform((0, 30))[1]
    assert all(box.y1 < lowest for box in boxes)
    plots.sweep_lines([line("drum", "drum", False, {3: [0.9], 5: [0.8]})], experiment.REPORTED)
    assert texts(figures[1]) == {}


def test_very_many_combinations_are_drawn_as_far_as_they_can_be_read(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_png", figures.append)
    plots.sweep_ranges([(f"name {i}", [i / 1000, i / 900]) for i in range(500)], "optimizer.lr")
    labels = [text.get_text() for text in figures[0].axes[0].get_yticklabels()]
    assert labels == [f"name {i}" for i in range(440, 500)]
    assert "best 60 of 500" in figures[0].get_suptitle()


def test_the_table_fits_100_columns(whole, capsys):
    result = json.loads(json.dumps(whole[1]))
    result["combinations"][0]["values"]["model.multiplier"] = "{conv1: lut:" + "folder/" * 20 + "}"
    console().print(sweep_table(result))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_the_command(tmp_path, monkeypatch, capfd, undrawn):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mbm", "sweep", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capfd.readouterr()

    code, out, err = call("--vary", MULTIPLIERS, "--threads", 1, *SETTINGS, "--epochs", 1, "--seed", 5)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "lenet-mbm: 2 combinations of model.multiplier, 1 seed"
    assert re.match(r"run 1/2: mbm, seed 5: test accuracy \d+\.\d\d %, \d+\.\d\d s an epoch", lines[1])
    assert re.match(r"run 2/2: mbm-t20, seed 5: ", lines[2])
    (folder,) = Path("runs").iterdir()
    assert lines[-1] == f"run: runs/{folder.name}"

    code, out, err = call("--resume", folder.name, "--jobs", 2, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {**json.loads((folder / "sweep.json").read_text()), "run": f"runs/{folder.name}"}
    assert call("--resume", folder.name, "--quiet") == (0, "", "")

    for arguments, words in (
        ([], "--vary"),
        (["--vary", "seed=1"], "--seeds"),
        (["--resume", "nothing"], "'nothing'"),
        (["--resume", folder.name, "--vary", "optimizer.lr=1"], "--vary"),
        (["--resume", folder.name, "--threads", 1], "--threads"),
        (["--vary", MULTIPLIERS, "--jobs", 0], "--jobs"),
    ):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") <= 2
    assert len(list(Path("runs").iterdir())) == 1


def test_on_a_terminal_a_bar_counts_runs_and_their_parts(monkeypatch, capfd):
    from mbm_cli.render import LiveSweepDisplay

    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    display = LiveSweepDisplay()
    row = {"status": "completed", "test_accuracy": 0.5, "epoch_seconds": 1.0}
    display.start("what", 4, 1)
    display.progress("mbm, seed 0", 0.5)
    display.progress("mbm, seed 1", 0.25)
    display.bar.refresh()
    display.run_done("mbm, seed 0", row)
    display.bar.refresh()
    display.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().out)
    assert "what; 1 of 4 runs are done" in shown
    assert re.search(r"mbm, seed 0 and 1 more .* 1\.8/4 runs", shown)
    assert "run 2/4: mbm, seed 0: test accuracy 50.00 %" in shown
    assert re.search(r"mbm, seed 1 .* 2\.2/4 runs", shown)
