"""A run's folder from elsewhere runs no code unless that is asked for."""

import json
from pathlib import Path

import pytest

from mbm_cli import cli
from mbm_cli.config import code_named_in

CODE = "from pathlib import Path\nPath('executed').touch()\ndef f(a, b): return a * b\n"
LIMITS = ["--set", "data.train_limit=100", "--set", "data.test_limit=50", "--device", "cpu", "--epochs", "1"]


@pytest.fixture
def mbm(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mbm", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    return call


@pytest.fixture
def run(mbm) -> str:
    """A run with a multiplier in Python; what it left behind when it was executed is gone."""
    Path("my.py").write_text(CODE)
    code, out, err = mbm("train", *LIMITS, "--multiplier", "python:my.py:f", "--json")
    assert code == 0, err
    Path("executed").unlink()
    return json.loads(out)["run"]


@pytest.mark.parametrize(
    "command",
    [["train", "--epochs", "2", "--resume"], ["eval", "--multiplier", "mbm"], ["runs", "show"], ["runs", "list"]],
)
def test_nothing_is_executed(mbm, run, command):
    code, _, err = mbm(*command, *([run] if command != ["runs", "list"] else []))
    if command[0] == "runs":
        assert code == 0, err
    else:
        assert code == 2
        assert "names code, python:" in err
        assert "--trust" in err
    assert not Path("executed").exists()


def test_with_trust_it_is(mbm, run):
    code, _, err = mbm("train", "--epochs", "2", "--resume", run, "--trust")
    assert code == 0, err
    assert Path("executed").exists()


def test_a_comparison_and_its_runs_are_looked_at(mbm):
    Path("my.py").write_text(CODE)
    code, out, err = mbm("compare", "exact-vs-mbm", *LIMITS, "--seeds", "1", "--multiplier", "python:my.py:f", "--json")
    assert code == 0, err
    Path("executed").unlink()
    assert mbm("compare", "exact-vs-mbm", "--resume", json.loads(out)["run"])[0] == 2
    assert not Path("executed").exists()


def test_trust_alone_is_refused(mbm):
    assert mbm("train", "--trust")[0] == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("model: {multiplier: 'python:a.py:f'}", "python:a.py:f"),
        ('model: {multiplier: "\\x70ython:a.py:f"}', "python:a.py:f"),
        ("model: {multiplier: {conv1: 'c:a.h:f', default: mbm}}", "c:a.h:f"),
        ('{"vary": {"model.multiplier": ["mbm", "{conv1: c:a.h:f, default: mbm}"]}}', "c:a.h:f"),
        ("model: {multiplier: 'lut:a.bin'}", None),
        ("c: {python: mbm}", None),
    ],
)
def test_code_is_found_however_it_is_written(text, code):
    assert code_named_in(text, "config.yaml") == code
