"""`mbm eval`: a trained network with other multipliers than its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import EPOCH, PNG, SILENT, made, mbm
from tables import exported

from mbm_cli.data import MNIST
from mbm_cli.experiments.evaluate import evaluate
from mbm_cli.models import build
from mbm_cli.runs import Run, list_runs
from mbm_cli.training import predict

LAYERS = "{conv1: exact, default: mbm-t20}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """Train with coarse products, so that others give other results."""
    output = tmp_path_factory.mktemp("runs")
    assert mbm("train", *EPOCH, "--multiplier", "mbm-t16-r7", "--output", output, "--quiet") == SILENT
    return made(output)


@pytest.fixture
def run(trained, tmp_path) -> Run:
    """A copy of the run, to be changed."""
    return Run(Path(shutil.copytree(trained.folder, tmp_path / "run")))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_trainings_multiplier_comes_first_and_equals_its_summary(trained):
    answer = mbm("eval", trained.folder, "--multiplier", "mbm-t20, mbm-t16-r7,exact,mbm-t20", "--json")
    result, rows = answer.json, answer.json["evaluations"]
    (folder,) = Path("runs").iterdir()
    assert folder.name.split("-", 1)[1].startswith("lenet-mbm-eval-")
    assert {path.name for path in folder.iterdir()} == {"eval.json", "environment.json"}
    assert json.loads((folder / "eval.json").read_text()) == result
    assert list_runs(Path("runs")) == []  # nothing was trained
    assert list(result) == ["run", "trained_with", "evaluations"]
    assert (result["run"], result["trained_with"]) == (str(trained.folder), "mbm-t16-r7")
    assert [row["multiplier"] for row in rows] == ["mbm-t16-r7", "mbm-t20", "exact"]
    assert rows[0]["test_accuracy"] == trained.summary().test_accuracy
    assert rows[0]["test_loss"] == trained.metrics()[-1]["test_loss"]
    assert len({row["test_loss"] for row in rows}) == 3
    for row in rows:
        assert list(row) == ["multiplier", "test_accuracy", "test_loss", "difference"]
        assert row["difference"] == pytest.approx(100 * (row["test_accuracy"] - rows[0]["test_accuracy"]))


def test_rows_are_those_of_networks_built_anew(trained, tmp_path):
    """Whatever was evaluated before; confusion matrices hold all answers."""
    made = evaluate(trained, ["mbm-t20", LAYERS], tmp_path)
    _, test = MNIST.load("cpu", test_limit=50)
    multipliers = ["mbm-t16-r7", "mbm-t20", {"conv1": "exact", "default": "mbm-t20"}]
    for row, multiplier in zip(made.result.evaluations, multipliers, strict=True):
        model = build("lenet", MNIST.shape, MNIST.classes, multiplier)
        model.load_state_dict(trained.checkpoint()["model"])
        answers = predict(model, test, 100).argmax(1)
        matrix = made.confusions[row.multiplier]
        assert row.test_accuracy == (answers == test.labels).sum().item() / 50 == matrix.trace() / 50
        assert matrix.sum(axis=0).tolist() == torch.bincount(answers, minlength=10).tolist()
        assert matrix.sum(axis=1).tolist() == torch.bincount(test.labels, minlength=10).tolist()


def test_plot_draws_confusion_matrices(trained):
    for flags in ([], ["--plot"]):
        answer = mbm("eval", trained.folder, "--multiplier", "exact", "--output", "out", *flags, draw=True)
        assert (answer.code, answer.err) == (0, "")
        assert "trained with it" in answer.out
        folder = Path(answer.out.splitlines()[-1].removeprefix("run: "))
        assert (folder / "confusion.png").exists() == bool(flags)
    assert (folder / "confusion.png").read_bytes().startswith(PNG)


def test_changed_table_is_refused():
    exported("mbm", 7, Path("own.bin"))
    assert mbm("train", *EPOCH, "--multiplier", "lut:own.bin", "--quiet") == SILENT
    command = ["eval", made().folder, "--multiplier", "exact"]
    assert mbm(*command, "--json").json["trained_with"].endswith("own.bin")
    exported("mitchell", 7, Path("own.bin"))
    answer = mbm(*command)
    assert (answer.code, answer.out) == (1, "")
    assert f"differs from the multiplier that {made().folder} was trained with" in answer.err


def test_infinite_loss_is_null(run):
    """JSON has no other word for it."""
    checkpoint = run.checkpoint()
    checkpoint["model"]["fc3.bias"].fill_(torch.nan)
    run.write_checkpoint(checkpoint)
    answer = mbm("eval", run.folder, "--multiplier", "exact", "--json")
    assert "NaN" not in answer.out
    assert [row["test_loss"] for row in answer.json["evaluations"]] == [None, None]
    assert mbm("eval", run.folder, "--multiplier", "exact").code == 0


def test_notes_say_what_figures_mean(run):
    def notes() -> str:
        return mbm("eval", run.folder, "--multiplier", "exact").out

    assert "50 test images: one of them is 2 points\n" in notes()
    checkpoint = run.checkpoint()
    checkpoint["metrics"][-1]["test_accuracy"] = 0.99
    run.write_checkpoint(checkpoint)
    assert "training ended with 99.00 % on cpu; on cpu sums differ in the last bits\n" in notes()
    run.write("config.yaml", run.config_text().replace("epochs: 1", "epochs: 3"))
    assert "these are the weights after 1 of 3 epochs\n" in notes()
    run.write_checkpoint({**checkpoint, "metrics": [], "part": {"step": 2}})
    assert "these are the weights after 0 of 3 epochs, and 2 steps of the next\n" in notes()


def test_runs_without_a_network_are_refused(run):
    def refusal() -> str:
        answer = mbm("eval", run.folder, "--multiplier", "exact")
        assert answer.out == ""
        assert answer.err.count("\n") == 1
        assert not Path("runs").exists()
        return f"{answer.code} {answer.err}"

    run.write_checkpoint({**run.checkpoint(), "model": {"weight": torch.zeros(1)}})
    assert f"1 mbm: {run.folder / 'checkpoint.pt'} does not hold a lenet" in refusal()
    content = (run.folder / "checkpoint.pt").read_bytes()
    (run.folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    assert f"1 mbm: {run.folder / 'checkpoint.pt'} is damaged" in refusal()
    (run.folder / "checkpoint.pt").unlink()
    assert f"2 mbm: {run.folder} has no checkpoint yet: mbm resume {run.folder}\n" in refusal()
