"""Runs with integer multipliers: quantised training, resumed, evaluated, retrained, compared, profiled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import COMPARE, EPOCH, SMALL, after, made, mbm

from mbm_cli.multipliers.content import resolve
from mbm_cli.runs import Run

INT8 = "{conv2d: drum-int8-k5, linear: exact-uint8}"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def state(run: Run) -> dict[str, torch.Tensor]:
    return torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "scales", [{}, {"activations": "lsq", "weights": "lsq"}, {"activations": "percentile"}], ids=str
)
def test_interrupted_run_resumes_bit_for_bit(scales):
    settings = [x for name, value in scales.items() for x in ("--set", f"quantize.{name}={value}")]
    command = ["train", *SMALL, "--epochs", "2", "--multiplier", INT8, *settings]
    assert mbm(*command, "--output", "whole").code == 0
    assert mbm(*command, "--output", "stopped", stopped=after(6)).code == 130
    run = made("stopped")
    assert mbm("resume", run.folder).code == 0
    assert same(state(run), state(made("whole")))
    names = list(state(run))
    assert {"conv1.quantizer.input_range", "fc1.quantizer.format"} <= set(names)
    assert ("conv1.quantizer.log_weight_scale" in names) == (scales.get("weights") == "lsq")


def test_float_run_is_calibrated_and_evaluated():
    assert mbm("train", *EPOCH, "--config", "lenet-exact").code == 0
    table = resolve("drum-int8-k3").content.entries
    np.save("circuit.npy", table)
    names = f"{INT8},{{conv2d: drum-int8-k3}},{{conv2d: int8:circuit.npy}}"
    answer = mbm("eval", made().name, "--multiplier", names, "--json")
    exact, int8, drum, circuit = answer.json["evaluations"]
    assert abs(int8["test_loss"] - exact["test_loss"]) < 0.05
    assert drum["test_loss"] != exact["test_loss"]
    assert (circuit["test_loss"], circuit["test_accuracy"]) == (drum["test_loss"], drum["test_accuracy"])


def test_evaluation_takes_the_scales_of_the_checkpoint():
    answer = mbm("train", *EPOCH, "--multiplier", INT8, "--json")
    evaluated = mbm("eval", answer.json["run"], "--multiplier", INT8, "--json").json["evaluations"]
    assert evaluated[0]["test_loss"] == made().metrics()[-1]["test_loss"]


def test_retraining_starts_from_weights_and_calibrates():
    assert mbm("train", *EPOCH, "--config", "lenet-exact").code == 0
    still = ["--set", "optimizer.lr=1e-30", "--set", "optimizer.name=sgd", "--output", "again"]
    assert mbm("train", "--init", made().folder, "--multiplier", INT8, *EPOCH, *still).code == 0
    weights = {name: value for name, value in state(made("again")).items() if ".quantizer." not in name}
    assert same(weights, state(made()))
    # The scales of a run go along with its weights, and stay where no layer needs them.
    assert mbm("train", "--init", made("again").folder, *EPOCH, "--multiplier", "mbm", "--output", "floats").code == 0
    assert not any(".quantizer." in name for name in state(made("floats")))


def test_comparison_and_profile():
    answer = mbm(*COMPARE, *EPOCH, "--multiplier", f"exact-int8,{INT8}", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["multipliers"] == ["exact", "exact-int8", INT8]
    answer = mbm("profile", "epoch", *SMALL, "--multiplier", INT8, "--output", "profiles")
    assert answer.code == 0, answer.err
    assert "drum-int8-k5" in answer.out


def test_gradients_with_a_float_multiplier_train():
    answer = mbm("train", *EPOCH, "--multiplier", INT8, "--backward", "mbm-t16-r7", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["multiplier"] == f"{INT8}, backward mbm-t16-r7"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multiplier", "exact-int9"], "exact-int9: operands have 2 to 8 bits, not 9"),
        (["--multiplier", "exact-int8", "--backward", "same"], "same: gradients take a float multiplier"),
        (["--multiplier", "int8:none.npy"], "none.npy: no such file"),
        (["--multiplier", "mbm-uint16"], "networks take operands of up to 8 bits"),
        (["--multiplier", "exact-int8", "--set", "quantize.activations=lsp"], "did you mean lsq?"),
        (["--set", "quantize.calibration_images=0"], "quantize.calibration_images must be a whole number from 1"),
    ],
)
def test_wrong_requests_write_nothing(arguments, message):
    answer = mbm("train", *EPOCH, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert message in answer.err
    assert len(answer.err.splitlines()) <= 2
    assert not list(Path().iterdir())
