"""`--init`: training starts from the weights of a run or a file; `--epochs` that extend a finished schedule."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from commands import EPOCH, SMALL, made, mbm


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    mbm("train", "--config", "lenet-exact", *EPOCH)
    return made().folder


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.mark.parametrize("form", ["run", "checkpoint", "state_dict"])
def test_training_starts_from_the_weights(form, trained):
    torch.save(state(trained), "weights.pt")
    named = {"run": trained.name, "checkpoint": trained / "checkpoint.pt", "state_dict": "weights.pt"}[form]
    # With a rate of nearly zero the weights stay what they are.
    still = ["--set", "optimizer.lr=1e-30", "--set", "optimizer.name=sgd"]
    answer = mbm("train", "--init", named, "--multiplier", "mbm-t8", *EPOCH, *still, "--json")
    assert answer.code == 0, answer.err
    run = Path(answer.json["run"])
    assert answer.json["multiplier"] == "mbm-t8"
    assert same(state(run), state(trained))
    source = Path(named) if form != "run" else trained / "checkpoint.pt"
    recorded = json.loads((run / "environment.json").read_text())["init"]
    assert recorded["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert Path(recorded["path"]) == source.absolute()


def test_the_runs_config_is_the_base(trained):
    answer = mbm("train", "--init", trained.name, "--multiplier", "mbm", "--json")
    config = (Path(answer.json["run"]) / "config.yaml").read_text()
    assert "name: lenet-exact" in config
    assert "train_limit: 60" in config


def test_a_resume_does_not_need_the_old_run(trained):
    argument = ["train", "--init", trained.name, "--multiplier", "mbm", *SMALL, "--epochs", "2", "--json"]
    whole = mbm(*argument)
    stopped = iter([False] * 2)
    assert mbm(*argument, stopped=lambda: next(stopped, True)).code == 130
    (run,) = (path for path in Path("runs").iterdir() if "interrupted" in (path / "summary.json").read_text())
    (run / "checkpoint.pt").unlink()
    (trained / "checkpoint.pt").unlink()
    assert mbm("resume", run).code == 0
    assert same(state(run), state(Path(whole.json["run"])))


def test_comparisons_and_sweeps_start_from_it_too(trained):
    for command in (["compare", "exact-vs-mbm", "--seeds", "1"], ["sweep", "--vary", "optimizer.lr=0.001,0.002"]):
        answer = mbm(*command, "--init", trained.name, "--multiplier", "mbm", *EPOCH, "--json")
        assert answer.code == 0, answer.err
        members = [path.parent for path in Path(answer.json["run"]).glob("*/init.pt")]
        assert len(members) == 2


def test_what_does_not_fit_is_named_layer_by_layer(trained):
    answer = mbm("train", "--init", trained.name, "--config", "cnn3-mbm", *EPOCH)
    assert answer.code == 2
    assert "bn1.weight is missing" in answer.err
    torch.save({**state(trained), "fc3.bias": torch.zeros(7)}, "weights.pt")
    answer = mbm("train", "--init", "weights.pt", *EPOCH)
    assert "fc3.bias has shape [7], not [10]" in answer.err
    Path("nonsense.pt").write_bytes(b"nonsense")
    assert mbm("train", "--init", "nonsense.pt", *EPOCH).code == 2
    assert len(list(Path("runs").iterdir())) == 1


def test_code_that_the_run_names_is_not_executed(trained, tmp_path):
    Path("product.py").write_text("raise SystemExit('executed')\n")
    config = trained / "config.yaml"
    config.write_text(config.read_text().replace("multiplier: exact", f"multiplier: python:{tmp_path}/product.py:f"))
    answer = mbm("train", "--init", trained.name, *EPOCH)
    assert answer.code == 2
    assert "names code" in answer.err
    assert mbm("train", "--init", trained.name, "--multiplier", "mbm", *EPOCH).code == 0


def test_a_schedule_that_is_extended_is_noted(trained):
    answer = mbm("resume", trained.name, "--epochs", "2")
    assert answer.code == 0
    assert "note: the learning rate fell to zero over 1 epoch and starts again at 0.0005" in answer.err
    mbm("train", *EPOCH, "--set", "optimizer.schedule=none", "--output", "constant")
    assert "note" not in mbm("resume", made("constant").folder, "--epochs", "2").err
    (trained / "checkpoint.pt").unlink()  # then there is one schedule over all epochs
    assert "note" not in mbm("resume", trained.name, "--epochs", "3").err


def test_a_whole_module_is_no_file_of_weights(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "whole.pt")
    answer = mbm("eval", "--weights", tmp_path / "whole.pt", "--multiplier", "mbm")
    assert answer.code == 2
    assert "holds more than tensors: write torch.save(model.state_dict(), FILE)" in answer.err
    assert "\x1b" not in answer.err


def test_code_that_the_gradients_name_is_not_executed(trained, tmp_path):
    Path("product.py").write_text("raise SystemExit('executed')\n")
    config = trained / "config.yaml"
    config.write_text(config.read_text().replace("backward: exact", f"backward: python:{tmp_path}/product.py:f"))
    answer = mbm("train", "--init", trained.name, "--multiplier", "mbm", *EPOCH)
    assert answer.code == 2
    assert "names code" in answer.err
