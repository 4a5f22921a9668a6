"""A trained network under other multipliers than its own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tables import exported

from mbm_cli import plots
from mbm_cli.cli import main
from mbm_cli.config import load
from mbm_cli.errors import RequestError, RunError
from mbm_cli.experiments.evaluate import evaluate
from mbm_cli.experiments.setup import load_data
from mbm_cli.experiments.train import train
from mbm_cli.models import lenet
from mbm_cli.multipliers import Multiplier
from mbm_cli.render import Display
from mbm_cli.runs import Run, list_runs
from mbm_cli.tables import console, evaluation_table
from mbm_cli.training import predict

SMALL = ["data.train_limit=200", "data.test_limit=150", "data.eval_batch_size=100", "train.epochs=1", "device=cpu"]


@pytest.fixture(autouse=True, scope="module")
def threads():
    """What a run sets for the process is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """With coarse products, so that other multipliers give other results."""
    output = tmp_path_factory.mktemp("runs")
    return train(load("lenet-mbm", [*SMALL, "model.multiplier=mbm-t16-r7"]), output, Display(), threads=1)[0]


def copy(run: Run, folder: Path, without: str = "") -> Run:
    folder.mkdir(parents=True)
    for path in run.folder.iterdir():
        if path.name != without:
            (folder / path.name).write_bytes(path.read_bytes())
    return Run(folder)


def call(monkeypatch, capfd, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mbm", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, *capfd.readouterr()


def test_the_training_s_own_multiplier_comes_first_and_equals_the_summary(trained, tmp_path):
    made, result, notes = evaluate(trained, ["mbm-t20", "mbm-t16-r7", "exact", "mbm-t20"], tmp_path)
    rows = result["evaluations"]
    assert [row["multiplier"] for row in rows] == ["mbm-t16-r7", "mbm-t20", "exact"]
    assert (result["run"], result["trained_with"]) == (str(trained.folder), "mbm-t16-r7")
    assert rows[0]["test_accuracy"] == trained.summary()["test_accuracy"]
    assert rows[0]["test_loss"] == trained.metrics()[-1]["test_loss"]
    assert rows[0]["difference"] == 0
    assert len({row["test_loss"] for row in rows}) == 3
    for row in rows:
        assert row["difference"] == pytest.approx(100 * (row["test_accuracy"] - rows[0]["test_accuracy"]))
    assert made.folder.parent == tmp_path
    assert made.name.split("-", 1)[1].startswith("lenet-mbm-eval-")
    assert json.loads((made.folder / "eval.json").read_text()) == result
    assert {path.name for path in made.folder.iterdir()} == {"eval.json", "environment.json"}
    assert notes == ["150 test images: one of them is 0.67 points"]


def test_each_row_is_what_a_network_built_with_that_multiplier_gives(trained, tmp_path):
    """Whatever was evaluated before it; a multiplier by layers, too."""
    by_layer = "{conv1: exact, default: mbm-t20}"
    _, result, _ = evaluate(trained, ["mbm-t20", by_layer], tmp_path)
    _, test = load_data(load("lenet-mbm", SMALL), torch.device("cpu"))
    for row, multiplier in zip(
        result["evaluations"][1:], ["mbm-t20", {"conv1": "exact", "default": "mbm-t20"}], strict=True
    ):
        model = lenet(multiplier)
        model.load_state_dict(trained.checkpoint()["model"])
        hits = predict(model, test, 100).argmax(1) == test.labels
        assert row["test_accuracy"] == hits.sum().item() / 150
    assert result["evaluations"][2]["multiplier"] == by_layer


def test_the_confusion_matrices_are_drawn_from_all_answers(trained, tmp_path, monkeypatch):
    seen = {}
    draw = plots.confusions
    monkeypatch.setattr(plots, "confusions", lambda counts: seen.update(counts) or draw(counts))
    made, result, _ = evaluate(trained, ["exact"], tmp_path, plot=True)
    assert (made.folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    _, test = load_data(load("lenet-mbm", SMALL), torch.device("cpu"))
    for row in result["evaluations"]:
        matrix = seen[row["multiplier"]]
        assert matrix.sum(axis=1).tolist() == torch.bincount(test.labels, minlength=10).tolist()
        assert matrix.trace() / 150 == row["test_accuracy"]


def test_a_network_is_not_evaluated_with_another_table_than_it_was_trained_with(trained, tmp_path):
    table = tmp_path / "own.bin"
    exported("mbm", 7, table)
    run = copy(trained, tmp_path / "run")
    run.write("config.yaml", run.config_text().replace("mbm-t16-r7", f"lut:{table}"))
    run.write_checkpoint({**run.checkpoint(), "multipliers": [Multiplier.parse(f"lut:{table}").key]})
    assert evaluate(run, ["exact"], tmp_path / "out")[1]["trained_with"] == f"lut:{table}"
    exported("mitchell", 7, table)
    with pytest.raises(RunError, match=r"is not the multiplier that .* was trained with"):
        evaluate(run, ["exact"], tmp_path / "out")


def test_a_loss_that_is_not_finite_is_null(trained, tmp_path):
    """JSON has no other word for it."""
    run = copy(trained, tmp_path / "run")
    checkpoint = run.checkpoint()
    checkpoint["model"]["fc3.bias"].fill_(torch.nan)
    run.write_checkpoint(checkpoint)
    made, result, _ = evaluate(run, ["exact"], tmp_path / "out")
    assert [row["test_loss"] for row in result["evaluations"]] == [None, None]
    assert "NaN" not in (made.folder / "eval.json").read_text()
    console().print(evaluation_table(result))


def test_what_a_reader_should_know_is_said(trained, tmp_path):
    """Of an accuracy that is not the recorded one, and of a training that has not ended."""
    run = copy(trained, tmp_path / "run")
    checkpoint = run.checkpoint()
    checkpoint["metrics"][-1]["test_accuracy"] = 0.99
    run.write_checkpoint(checkpoint)
    _, _, notes = evaluate(run, ["exact"], tmp_path / "out")
    assert "99.00 %" in notes[1]
    run.write("config.yaml", run.config_text().replace("epochs: 1", "epochs: 3"))
    _, _, notes = evaluate(run, ["exact"], tmp_path / "out")
    assert notes[1].endswith("after 1 of 3 epochs")
    run.write_checkpoint({**checkpoint, "metrics": [], "part": {"step": 2}})
    _, _, notes = evaluate(run, ["exact"], tmp_path / "out")
    assert notes[1].endswith("after 0 of 3 epochs, and 2 steps of the next")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nbm", "--multiplier 'nbm': unknown multiplier family"),
        ("mbm-t23", "--multiplier 'mbm-t23': truncate is 23"),
        ("", "--multiplier ''"),
        ("lut:nowhere.bin", "nowhere.bin"),
        ("{conv9: mbm, default: exact}", "no convolution is called conv9"),
    ],
)
def test_a_wrong_multiplier_is_named_and_nothing_is_written(name, words, trained, tmp_path):
    with pytest.raises(RequestError) as error:
        evaluate(trained, ["mbm", name], tmp_path / "out")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_evaluated(trained, tmp_path):
    without = copy(trained, tmp_path / "without", "checkpoint.pt")
    with pytest.raises(RequestError, match=r"has no checkpoint.*mbm train --resume"):
        evaluate(without, ["exact"], tmp_path / "out")

    damaged = copy(trained, tmp_path / "damaged")
    content = (damaged.folder / "checkpoint.pt").read_bytes()
    (damaged.folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"checkpoint\.pt (cannot be read|is damaged)"):
        evaluate(damaged, ["exact"], tmp_path / "out")

    foreign = copy(trained, tmp_path / "foreign")
    foreign.write_checkpoint({**trained.checkpoint(), "model": {"weight": torch.zeros(1)}})
    with pytest.raises(RunError, match=r"checkpoint\.pt holds no lenet") as error:
        evaluate(foreign, ["exact"], tmp_path / "out")
    assert "\n" not in str(error.value)

    copy(trained, tmp_path / "several" / "inner")
    several = Run(tmp_path / "several")
    several.write_json("plan.json", {})
    with pytest.raises(RequestError, match=r"holds several runs: name one of them, for example .*inner"):
        evaluate(several, ["exact"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(trained, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    output = trained.folder.parent
    code, out, err = call(
        monkeypatch, capfd, "eval", trained.name, "--multiplier", "mbm-t20, exact", "--output", output, "--json"
    )
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert list(result) == ["run", "trained_with", "evaluations"]
    assert list(result["evaluations"][0]) == ["multiplier", "test_accuracy", "test_loss", "difference"]
    assert [row["multiplier"] for row in result["evaluations"]] == ["mbm-t16-r7", "mbm-t20", "exact"]
    assert [run.name for run in list_runs(output)] == [trained.name]  # what an evaluation writes is no run

    code, out, err = call(monkeypatch, capfd, "eval", trained.folder, "--multiplier", "exact", "--threads", 1)
    assert (code, err) == (0, "")
    (made,) = (tmp_path / "runs").iterdir()
    assert out.splitlines()[-1] == f"run: runs/{made.name}"
    assert "trained with it" in out

    assert call(monkeypatch, capfd, "eval", trained.folder, "--multiplier", "exact", "--quiet")[:2] == (0, "")
    for arguments, words in (
        (["nothing", "--multiplier", "mbm"], "no run 'nothing'"),
        ([trained.folder], "--multiplier"),
        ([trained.folder, "--multiplier", "mbm", "--device", "gpu"], "--device"),
    ):
        code, out, err = call(monkeypatch, capfd, "eval", *arguments)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def test_the_table_fits_100_columns(trained, tmp_path, capsys):
    _, result, _ = evaluate(trained, ["exact"], tmp_path)
    long = "lut:" + "a-folder/" * 20 + "table.bin"
    result["evaluations"].append({**result["evaluations"][1], "multiplier": long})
    console().print(evaluation_table(result))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
