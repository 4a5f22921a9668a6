"""Code that a user's file holds: executed once a command, and a run's only with `--trust`."""

from pathlib import Path

import pytest
import torch
from commands import COMPARE, EPOCH, SMALL, after, made, mbm

from mbm_cli.experiments import profile_epoch

CODE = """
from pathlib import Path
with Path(__file__).with_name("executions").open("a") as file:
    file.write("x")
def f(a, b): return a * b
def net(shape, classes):
    from torch import nn
    return nn.Sequential(nn.Conv2d(shape[0], 2, 5, 4), nn.Flatten(), nn.Linear(72, classes))
"""
NAME = "python:my.py:f@3"
LAYERS = f"{{conv1: {NAME}, default: mbm}}"
SWEEP = ["sweep", "--vary", f"model.multiplier={NAME},mbm,{LAYERS}"]
NETWORK = ["train", "--set", "model.name=python:my.py:net"]
INTERRUPTED = {
    "network": [*NETWORK, *SMALL, "--epochs", "2"],
    "train": ["train", *SMALL, "--epochs", "2", "--multiplier", LAYERS],
    "compare": [*COMPARE, *EPOCH, "--multiplier", f"{NAME},{LAYERS}"],
    "sweep": [*SWEEP, *EPOCH],
}
COMMANDS = {
    **INTERRUPTED,
    "network and multiplier": [*NETWORK, *EPOCH, "--multiplier", NAME],
    "weights": ["eval", "--model", "python:my.py:net", "--weights", "w.pt", "--multiplier", f"exact,{NAME}"],
    "gradients": ["train", *SMALL, "--epochs", "1", "--backward", NAME],
    "sweep with jobs": [*SWEEP, *EPOCH, "--jobs", "2"],
    "profile epoch": ["profile", "epoch", *SMALL, "--multiplier", LAYERS],
    "characterize": ["characterize", NAME, "mbm", NAME, "--samples", "1000"],
    "configs check": ["configs", "check", "lenet-mbm", "--set", f"model.multiplier={LAYERS}"],
    "multipliers export": ["multipliers", "export", NAME, "out.bin", "--bits", "3"],
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile_epoch, "measure_ceiling", lambda *_: 1e12)
    Path("my.py").write_text(CODE)
    names, shapes = ("0.weight", "0.bias", "2.weight", "2.bias"), ((2, 1, 5, 5), (2,), (10, 72), (10,))
    torch.save(dict(zip(names, map(torch.zeros, shapes), strict=True)), "w.pt")


def executions() -> int:
    """Return how often the file was executed, and begin to count anew."""
    path = Path("executions")
    count = len(path.read_text()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


@pytest.mark.parametrize("name", COMMANDS)
def test_users_file_is_executed_once(name):
    assert mbm(*COMMANDS[name]).code == 0
    assert executions() == 1


@pytest.mark.parametrize("name", INTERRUPTED)
def test_runs_code_needs_trust_and_is_executed_once(name):
    assert mbm(*INTERRUPTED[name], stopped=after(6)).code == 130
    executions()
    run = made().folder
    for command in (["resume", run], ["eval", run, "--multiplier", "mbm"]):
        answer = mbm(*command)
        assert (answer.code, answer.out) == (2, "")
        assert f"{run} names code, python:" in answer.err
        assert "run it with --trust" in answer.err
    assert mbm("runs", "list").code == mbm("runs", "show", run).code == 0
    assert executions() == 0
    commands = [["resume", run, "--trust"]]
    if name == "train":
        commands += [["eval", run, "--multiplier", f"exact,{NAME},{LAYERS}", "--trust"]]
    for command in commands:
        assert mbm(*command).code == 0
        assert executions() == 1
