"""`mbm profile epoch`: where an epoch's time goes."""

import json
from pathlib import Path

import pytest
from commands import CPU, PNG, mbm
from torch import nn

from mbm_cli import models
from mbm_cli.experiments import profile_epoch
from mbm_cli.training import PHASES

SMALL = [*CPU, "--set", "data.train_limit=640", "--set", "data.test_limit=200"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile_epoch, "measure_ceiling", lambda *_: 1e12)
        yield


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    return mbm("profile", "epoch", *SMALL, "--output", output, "--json", draw=True).json


def test_files_of_a_profile(result):
    folder = Path(result["run"])
    names = ("config.yaml", "environment.json", "profile.json", "profile.png", "trace.json")
    assert {path.name for path in folder.iterdir()} == {*names}
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert (folder / "profile.png").read_bytes().startswith(PNG)


def test_phases_fill_the_epoch(result):
    assert list(result["phases"]) == [*PHASES, "everything else"]
    assert all(result["phases"][phase] > 0 for phase in PHASES)
    assert sum(result["phases"].values()) == pytest.approx(result["clocked_epoch_seconds"])
    assert result["phases"]["everything else"] < 0.3 * result["clocked_epoch_seconds"]  # 2.5 % of a whole epoch


def test_passes_of_convolutions_lie_within_their_phase(result):
    assert [layer["name"] for layer in result["layers"]] == ["conv1", "conv2"]
    for direction in ("forward", "backward"):
        times = [layer[f"{direction}_seconds"] for layer in result["layers"]]
        assert all(time > 0 for time in times)
        assert sum(times) < result["phases"][direction]
    for layer in result["layers"]:
        assert layer["macs_per_second"] == pytest.approx(layer["multiplications"] * 640 / layer["forward_seconds"])
        assert layer["share_of_ceiling"] == pytest.approx(layer["macs_per_second"] / 1e12)


def test_costliest_are_operators_in_order(result):
    names = [row["name"] for row in result["costliest"]]
    assert {"aten::convolution_backward", "mbm::conv2d"} <= set(names)
    assert all("::" in name for name in names)  # no ranges
    seconds = [row["seconds"] for row in result["costliest"]]
    assert seconds == sorted(seconds, reverse=True)
    # The 10 steps of this epoch are all profiled.
    forward = sum(layer["forward_seconds"] for layer in result["layers"])
    assert seconds[names.index("mbm::conv2d")] > 0.5 * forward


def test_every_layer_and_gradient_is_profiled(tmp_path):
    flags = ["--config", "lenet-everything", "--set", "data.train_limit=64", "--set", "data.test_limit=64"]
    result = mbm("profile", "epoch", *CPU, *flags, "--output", tmp_path, "--json").json
    assert [layer["name"] for layer in result["layers"]] == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert {layer["backward_library"] for layer in result["layers"]} == {"mbm-t16-r7"}
    assert all(layer["backward_seconds"] > 0 for layer in result["layers"])
    names = {row["name"] for row in result["costliest"]}
    assert {"mbm::conv2d", "mbm::conv2d_input_grad", "mbm::conv2d_weight_grad", "mbm::linear"} <= names


def test_network_may_have_one_convolution(monkeypatch, tmp_path):
    def small(shape, classes, width):
        return nn.Sequential(nn.Conv2d(1, 2, 28), nn.Flatten(), nn.Linear(2, 10))

    monkeypatch.setitem(models.MODELS, "lenet", small)
    result = mbm("profile", "epoch", *SMALL, "--output", tmp_path, "--json").json
    assert [layer["name"] for layer in result["layers"]] == ["0"]
