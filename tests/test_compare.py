"""`mbm compare exact-vs-mbm`: the same start and the same batches for every multiplier, and statistics of pairs."""

import math

import pytest
import torch
from commands import EPOCH, PNG, SILENT, SMALL, made, mbm

from mbm_cli.runs import Run, list_runs

COMPARE = ["compare", "exact-vs-mbm"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_comparison_holds_its_runs_and_figures():
    command = [*COMPARE, *SMALL, "--epochs", 2, "--seeds", 2, "--multiplier", "mbm,mbm-t20"]
    result = mbm(*command, "--json", draw=True).json
    run = made()
    assert (run.folder / "compare.png").read_bytes().startswith(PNG)
    assert run.summary().status == "completed"
    assert (
        [column["multiplier"] for column in result["columns"]] == ["exact", "mbm", "mbm-t20"] == result["multipliers"]
    )
    # Seed by seed, so that an interrupted comparison has pairs.
    assert [(row["multiplier"], row["seed"]) for row in result["runs"]] == [
        (multiplier, seed) for seed in (0, 1) for multiplier in result["multipliers"]
    ]
    assert {row["run"] for row in result["runs"]} == {one.name for one in list_runs(run.folder)}
    for column in result["columns"]:
        rows = [row for row in result["runs"] if row["multiplier"] == column["multiplier"]]
        assert column["test_accuracy"] == [row["test_accuracy"] for row in rows]
        assert column["test_accuracy_mean"] == pytest.approx(sum(column["test_accuracy"]) / 2)
        assert column["train_loss_mean"] == pytest.approx(sum(row["metrics"][-1]["train_loss"] for row in rows) / 2)
        assert column["epochs_to"] == {"0.98": [None, None], "0.99": [None, None]}
    exact, mbm_column, _ = result["columns"]
    # Exact weights evaluated exactly are what training ended with.
    assert exact["trained_exact_evaluated_here"] == exact["trained_here_evaluated_exact"] == exact["test_accuracy"]
    assert mbm_column["trained_exact_evaluated_here"] == pytest.approx(exact["test_accuracy"], abs=0.1)
    assert exact["accuracy_difference"] is exact["epoch_seconds_ratio"] is None


def test_gradients_have_columns_of_their_own():
    """Check that a multiplier is combined with each of the gradients, and that the exact column stays exact."""
    everything = "{conv2d: mbm-t16-r7, linear: mbm-t16-r7}"
    flags = ["--multiplier", everything, "--backward", "exact,{weight: same}"]
    result = mbm(*COMPARE, *EPOCH, "--seeds", 1, *flags, "--json").json
    assert result["multipliers"] == [
        "exact",
        everything,
        f"{everything}, backward {{input: exact, weight: same}}",
    ]
    runs = list_runs(made().folder)
    found = {(str(run.config().model.multiplier), str(run.config().model.backward)) for run in runs}
    assert len(runs) == len(found) == 3
    assert ("exact", "exact") in found
    losses = [column["train_loss_mean"] for column in result["columns"]]
    assert len(set(losses)) == 3


def test_paired_runs_differ_by_the_multiplier_alone():
    assert mbm(*COMPARE, *EPOCH, "--seeds", 1, "--quiet") == SILENT
    exact, approximate = list_runs(made().folder)
    assert (
        exact.config_text().replace("-exact-", "-mbm-").replace("multiplier: exact", "multiplier: mbm")
        == approximate.config_text()
    )
    weights = [one.checkpoint()["model"]["conv1.weight"] for one in (exact, approximate)]
    assert not torch.equal(*weights)
    assert torch.allclose(*weights, atol=0.05)
    assert all(one.folder.name.split("-")[1] == "lenet" for one in (exact, approximate))


def test_multipliers_by_layer_are_read_back():
    """Also where YAML would quote their names. One seed has no interval."""
    layers = '{"conv[1]": exact, "*2": mitchell, default: mbm}'
    result = mbm(*COMPARE, *EPOCH, "--seeds", 1, "--multiplier", layers, "--json").json
    again = mbm(*COMPARE, *EPOCH, "--seeds", 1, "--multiplier", result["multipliers"][1], "--json").json
    assert again["multipliers"] == result["multipliers"]
    for name in ("accuracy_difference", "epoch_seconds_ratio"):
        interval = result["columns"][1][name]
        assert (interval["low"], interval["high"]) == (None, None)
    assert "one seed says nothing about noise, use --seeds 3 or more" in result["verdicts"][0]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Run:
    output = tmp_path_factory.mktemp("runs")
    assert mbm(*COMPARE, *EPOCH, "--seeds", 3, "--output", output, "--quiet") == SILENT
    return made(output)


# Student's t(0.975, 2) is 4.302653.
HALF = 4.302653 / math.sqrt(3)


@pytest.mark.parametrize(
    ("accuracies", "mean", "half", "verdict"),
    [
        ((0.91, 0.92, 0.93), 0.02, 0.01 * HALF, "not distinguishable from seed noise at 3 seeds"),
        ((0.92, 0.93, 0.94), 0.03, 0.01 * HALF, "more than seed noise at 3 seeds"),
        ((0.86, 0.87, 0.88), -0.03, 0.01 * HALF, "more than seed noise at 3 seeds"),
        ((0.91, 0.91, 0.91), 0.01, 0, "more than seed noise at 3 seeds"),
    ],
)
def test_difference_has_students_interval(accuracies, mean, half, verdict, compared):
    """A comparison concludes from what its runs' files say."""
    seconds = iter([0.5, 1.0, 2.0])
    for member in list_runs(compared.folder):
        seed, exact = member.config().seed, str(member.config().model.multiplier) == "exact"
        accuracy, time = (0.9, 1.0) if exact else (accuracies[seed], next(seconds))
        summary = {**member.read_json("summary.json"), "test_accuracy": accuracy, "epoch_seconds": [time]}
        member.write_json("summary.json", summary)
    result = mbm("resume", compared.folder, "--json").json
    (_, column), (said,) = result["columns"], result["verdicts"]
    difference, ratio = column["accuracy_difference"], column["epoch_seconds_ratio"]
    assert difference["mean"] == pytest.approx(mean)
    assert (difference["low"], difference["high"]) == pytest.approx((mean - half, mean + half), rel=1e-5)
    assert said.startswith(f"mbm: {100 * mean:+.2f} points of test accuracy against exact (95 % interval ")
    assert said.endswith(verdict)
    # Of 1/2, 1 and 2: the geometric mean, and an interval that stays above zero.
    assert ratio["mean"] == pytest.approx(1)
    assert 0 < ratio["low"] == pytest.approx(1 / ratio["high"])
