"""Runs in lists, side by side and deleted; tables for papers; what the command line suggests."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from commands import COMPARE, EPOCH, SWEEP, mbm


@pytest.fixture
def runs(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    to = ["--output", output]
    mbm("train", *EPOCH, "--name", "first", "--note", "as in table 2", *to)
    mbm("train", *EPOCH, "--multiplier", "mbm-t20", *to)
    mbm("characterize", "mbm", "--samples", "100", *to)
    mbm("eval", one(output, "first"), "--multiplier", "exact", *to)
    return output


def one(runs: Path, name: str) -> Path:
    """Return the only folder of this name."""
    (found,) = (path for path in runs.iterdir() if path.name.split("-", 1)[1].rpartition("-")[0] == name)
    return found


def test_lists_hold_every_kind_of_result(runs):
    rows = list(csv.DictReader(io.StringIO(mbm("runs", "list", "--csv", "--output", runs).out)))
    assert sorted(row["kind"] for row in rows) == ["errors", "evaluation", "training", "training"]
    first = next(row for row in rows if row["note"])
    assert (first["note"], first["multiplier"], first["kind"]) == ("as in table 2", "mbm", "training")
    assert float(first["test_accuracy"]) > 0
    assert next(row for row in rows if row["kind"] == "evaluation")["multiplier"] == "mbm, exact"


@pytest.mark.parametrize("columns", [100, 80])
def test_narrow_lists_keep_multiplier_device_and_epochs(columns, runs, monkeypatch):
    monkeypatch.setattr("mbm_cli.report.text.WIDTH", columns)
    shown = mbm("runs", "list", "--output", runs).out
    assert max(map(len, shown.splitlines())) <= columns
    for word in ("multiplier", "device", "epochs", "test acc", "mbm-t20"):
        assert word in shown


def test_several_runs_stand_side_by_side(runs):
    names = [one(runs, "first").name, one(runs, "lenet-mbm").name]
    shown = mbm("runs", "show", *names, "--output", runs).out
    assert all(name in shown for name in names)
    assert "model.multiplier" in shown
    assert "optimizer.lr" not in shown  # it does not differ
    assert len(mbm("runs", "show", *names, "--output", runs, "--json").json["runs"]) == 2


def test_deleting_asks_unless_told(runs, monkeypatch):
    first, second, errors = one(runs, "first"), one(runs, "lenet-mbm"), one(runs, "characterize")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert mbm("runs", "delete", first.name, "--output", runs).code == 2
    answer = mbm("runs", "delete", first.name, "--output", runs)  # there is no more input
    assert (answer.code, answer.err.splitlines()[-1]) == (1, "mbm: nothing was answered, so nothing was done")
    assert first.exists()
    assert mbm("runs", "delete", first.name, errors.name, "--yes", "--output", runs).code == 0
    assert second.exists()
    assert not first.exists()
    assert not errors.exists()
    assert mbm("runs", "delete", "nothing", "--yes", "--output", runs).code == 2


@pytest.mark.parametrize("command", [COMPARE, SWEEP])
def test_results_come_as_csv_and_latex(command, tmp_path):
    table = tmp_path / "table.tex"
    answer = mbm(*command, *EPOCH, "--output", tmp_path / "runs", "--latex", table, "--json")
    rows = list(csv.DictReader(next(Path(answer.json["run"]).glob("*.csv")).open()))
    assert [row["status"] for row in rows] == ["completed"] * 2
    text = table.read_text()
    assert text.count(r"\\") == text.count("\n") - 6
    assert r"\begin{tabular}" in text
    answer = mbm(*command, *EPOCH, "--output", tmp_path / "other", "--latex", tmp_path / "missing" / "t.tex")
    assert answer.code == 2
    assert not (tmp_path / "other").exists()


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = mbm("train", "--dry-run", *EPOCH)
    assert answer.code == 0
    assert "4 steps an epoch, 1 epoch" in answer.out
    assert "conv2" in answer.out
    assert list(tmp_path.iterdir()) == []
    assert mbm("train", "--dry-run", *EPOCH, "--json").json["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--lr", "0.1"], "did you mean --set optimizer.lr=...?"),
        (["--batch-size", "32"], "did you mean --set data.batch_size=...?"),
        (["--model", "cnn3"], "did you mean --set model.name=...?"),
        (["--multiplier", "drum-6"], "did you mean drum-k6?"),
    ],
)
def test_a_wrong_flag_is_answered_with_the_right_one(arguments, hint):
    answer = mbm("train", *arguments)
    assert answer.code == 2
    assert hint in answer.err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("mbm train --multiplier mb", "mbm-t16-r7"),
        ("mbm train --set opt", "optimizer.lr="),
        ("mbm train --config cn", "cnn3-mbm"),
        ("mbm runs show fir", "first-"),
    ],
)
def test_names_are_completed(words, found, runs):
    parts = words.split()
    code = "import os, sys; sys.argv = ['mbm']; from mbm_cli.cli import main; main()"
    environment = {
        "_MBM_COMPLETE": "complete_bash",
        "COMP_WORDS": words.replace("show ", f"show --output {runs} ") if "show" in words else words,
        "COMP_CWORD": str(len(parts) - 1 + 2 * ("show" in words)),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert any(line.startswith(found) for line in done.stdout.split()), done


def test_lists_need_no_pytorch(runs):
    code = f"import sys; sys.argv = ['mbm', 'runs', 'list', '--output', {str(runs)!r}]; from mbm_cli.cli import main\n"
    code += "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("name", "words"), [("cuda:1", "no CUDA device|there is no cuda:1"), ("gpu", "auto, cpu, cuda or cuda:N")]
)
def test_a_missing_device_is_named(name, words):
    answer = mbm("train", "--device", name, *EPOCH[4:])
    assert answer.code == 2
    assert any(word in answer.err for word in words.split("|"))
