"""Comparing exact with approximate training, seed by seed."""

import json
from pathlib import Path

import pytest
import torch
from tables import exported

from mbm_cli import plots
from mbm_cli.config import load
from mbm_cli.errors import Interrupted, RequestError, RunError
from mbm_cli.experiments import compare as experiment
from mbm_cli.experiments.compare import _interval, _ratio_interval, _verdict, compare
from mbm_cli.render import CompareDisplay
from mbm_cli.runs import Run, list_runs
from mbm_cli.tables import comparison_table, console

SMALL = ["data.train_limit=200", "data.test_limit=100", "train.epochs=2", "device=cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The convolutions' share is a timing, which takes a second a column."""
    monkeypatch.setattr(experiment, "convolution_seconds", lambda config, device: 0.001)


def run_compare(output: Path, *multipliers: str, seeds: int = 2, **more) -> tuple[Run, dict]:
    return compare(load("lenet-mbm", SMALL), multipliers, seeds, output, CompareDisplay(), **more)


def test_a_comparison_and_its_runs(tmp_path):
    run, result = run_compare(tmp_path, "mbm", "mbm-t20")
    assert json.loads((run.folder / "compare.json").read_text()) == result
    assert (run.folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert run.summary()["status"] == "completed"
    assert [c["multiplier"] for c in result["columns"]] == ["exact", "mbm", "mbm-t20"]
    inside = {one.name: one.summary() for one in list_runs(run.folder)}
    assert {r["run"] for r in result["runs"]} == set(inside)
    assert len(inside) == 6
    for column in result["columns"]:
        accuracies = [r["test_accuracy"] for r in result["runs"] if r["multiplier"] == column["multiplier"]]
        assert column["test_accuracy"] == accuracies
        assert column["test_accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    exact, mbm, _ = result["columns"]
    assert mbm["accuracy_difference"]["mean"] == pytest.approx(mbm["test_accuracy_mean"] - exact["test_accuracy_mean"])
    # Exact weights evaluated exactly are what training ended with.
    assert exact["trained_exact_evaluated_here"] == exact["test_accuracy"]
    assert mbm["trained_exact_evaluated_here"] == pytest.approx(exact["test_accuracy"], abs=0.05)


def test_runs_of_a_seed_start_alike_and_differ_by_the_multiplier_alone(tmp_path):
    run, result = run_compare(tmp_path, "mbm", seeds=1)
    exact, mbm = (Run(run.folder / r["run"]) for r in result["runs"])
    texts = [
        one.config_text().replace("-exact-", "-mbm-").replace("multiplier: exact", "multiplier: mbm")
        for one in (exact, mbm)
    ]
    assert texts[0] == texts[1]
    weights = [one.checkpoint()["model"]["conv1.weight"] for one in (exact, mbm)]
    assert not torch.equal(*weights)
    assert torch.allclose(*weights, atol=0.05)


def test_a_comparison_that_cannot_be_shown_has_failed(tmp_path, monkeypatch):
    def full(display, what, runs):
        raise OSError("No space left on device")

    monkeypatch.setattr(CompareDisplay, "start", full)
    with pytest.raises(OSError, match="No space left"):
        run_compare(tmp_path, "mbm")
    summary = list_runs(tmp_path)[0].summary()
    assert (summary["status"], summary["reason"]) == ("failed", "OSError: No space left on device")


def test_an_interrupted_comparison_goes_on_without_repeating_runs(tmp_path):
    _, whole = run_compare(tmp_path / "whole", "mbm")
    asked = iter([False] * 18 + [True] * 1000)  # 4 steps an epoch, 8 a run: in the third of four runs
    with pytest.raises(Interrupted, match="after 2 of 4 runs; to go on: mbm compare exact-vs-mbm --resume"):
        run_compare(tmp_path / "cut", "mbm", stopped=lambda: next(asked))
    (run,) = list_runs(tmp_path / "cut")
    assert run.summary()["status"] == "interrupted"
    completed = [one.name for one in list_runs(run.folder) if one.summary()["status"] == "completed"]
    assert len(completed) == 2
    finished = {name: (run.folder / name / "checkpoint.pt").stat().st_mtime_ns for name in completed}
    result = experiment.resume(run, CompareDisplay())
    assert [c["test_accuracy"] for c in result["columns"]] == [c["test_accuracy"] for c in whole["columns"]]
    assert [r["metrics"][-1]["train_loss"] for r in result["runs"]] == [
        r["metrics"][-1]["train_loss"] for r in whole["runs"]
    ]
    assert {n: (run.folder / n / "checkpoint.pt").stat().st_mtime_ns for n in finished} == finished


def test_a_comparison_goes_on_from_another_folder_but_not_with_another_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported("mbm", 7, Path("t.bin"))
    exported("mitchell", 7, Path("other.bin"))
    asked = iter([False] * 18 + [True] * 1000)  # 8 steps a run: the first with the table is finished
    with pytest.raises(Interrupted, match="after 2 of 4 runs"):
        run_compare(tmp_path / "runs", "lut:t.bin", stopped=lambda: next(asked))
    (run,) = list_runs(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("../t.bin").replace("kept.bin")
    Path("../other.bin").replace("../t.bin")
    with pytest.raises(RunError, match=r"is not the multiplier that .* was trained with"):
        experiment.resume(run, CompareDisplay())
    assert run.summary()["status"] == "interrupted"
    Path("kept.bin").replace("../t.bin")
    result = experiment.resume(run, CompareDisplay())
    assert [r["multiplier"] for r in result["runs"]] == ["exact", "lut:t.bin"] * 2


@pytest.mark.parametrize(("field", "value"), [("seeds", 0), ("columns", {}), ("columns", "without exact")])
def test_a_damaged_plan_is_named(tmp_path, field, value):
    with pytest.raises(Interrupted):
        run_compare(tmp_path, "mbm", "mbm-t8", stopped=lambda: True)
    (run,) = list_runs(tmp_path)
    plan = run.read_json("plan.json")
    if value == "without exact":
        value = {name: column for name, column in plan["columns"].items() if name != "exact"}
    run.write_json("plan.json", {**plan, field: value})
    with pytest.raises(RunError, match=rf"plan\.json is damaged \({field}: "):
        experiment.resume(run, CompareDisplay())


def test_multipliers_by_layer_with_names_that_yaml_would_quote(tmp_path):
    layers = '{"conv[1]": exact, "*2": mitchell, default: mbm}'
    _, result = run_compare(tmp_path, layers, seeds=1)
    assert run_compare(tmp_path, result["multipliers"][1], seeds=1)[1]["multipliers"] == result["multipliers"]


def test_seeds_that_there_are_not(tmp_path):
    config = load("lenet-mbm", [*SMALL, f"seed={2**63 - 1}"])
    with pytest.raises(RequestError, match="beyond the last one"):
        compare(config, ["mbm"], 2, tmp_path / "runs", CompareDisplay())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("multipliers", [(), ("exact",), ("mbm", "exact")])
def test_exact_is_compared_with_something_else(tmp_path, multipliers):
    with pytest.raises(RequestError, match="--multiplier mbm"):
        run_compare(tmp_path / "runs", *multipliers)
    assert not (tmp_path / "runs").exists()


def test_the_interval_is_student_s():
    """Of 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027."""
    interval = _interval([1.0, 2.0, 3.0])
    assert interval["mean"] == 2
    assert interval["high"] - 2 == pytest.approx(4.302653 / 3**0.5)
    assert 2 - interval["low"] == pytest.approx(4.302653 / 3**0.5)
    assert _interval([0.5, 0.5]) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert _interval([0.5]) == {"mean": 0.5, "low": None, "high": None}


def test_the_interval_of_a_ratio_is_above_zero():
    """Of 1/2 and 2: their geometric mean is 1, and the interval lies around it as its logarithms do around 0."""
    interval = _ratio_interval([0.5, 2.0])
    assert interval["mean"] == pytest.approx(1)
    assert interval["low"] == pytest.approx(1 / interval["high"])
    assert interval["low"] > 0
    assert _ratio_interval([2.0]) == {"mean": 2.0, "low": None, "high": None}


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("multiplier", ["mbm", "{conv1: mbm-t20, default: exact}"])
def test_the_legend_lies_on_nothing_that_is_drawn(epochs, multiplier, monkeypatch):
    """Neither inside, where there is no room for it, nor on the axes' labels."""
    figures = []
    monkeypatch.setattr(plots, "_png", lambda figure: figures.append(figure) or b"")
    names = ["exact", multiplier]
    metrics = [{"epoch": e + 1, "test_accuracy": 0.9 + e / 20, "train_loss": 0.3 - e / 5} for e in range(epochs)]
    runs = [{"multiplier": name, "metrics": metrics} for name in names for _ in range(2)]
    plots.comparison({"multipliers": names, "epochs": epochs, "seeds": 2, "model": "lenet", "runs": runs})
    (figure,) = figures
    figure.draw_without_rendering()
    if epochs == 1 or multiplier != "mbm":
        legend = figure.legends[0].get_window_extent()
        assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
        assert figure.bbox.containsx(legend.x0)
        assert figure.bbox.containsx(legend.x1)
    else:
        (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
        assert legend.get_window_extent().width < figure.axes[0].bbox.width


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ({"mean": -0.001, "low": -0.004, "high": 0.002}, "not distinguishable from seed noise at 3 seeds"),
        ({"mean": -0.03, "low": -0.04, "high": -0.02}, "more than seed noise at 3 seeds"),
        ({"mean": 0.01, "low": None, "high": None}, "one seed says nothing about noise"),
    ],
)
def test_the_verdict_in_words(interval, words):
    assert words in _verdict({"multiplier": "mbm", "accuracy_difference": interval}, 3)


def test_the_table_fits_100_columns(tmp_path, capsys):
    _, result = run_compare(tmp_path, "mbm", "mbm-t16-r7")
    console().print(comparison_table(result))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("mbm-t16-r7" in line for line in lines)
