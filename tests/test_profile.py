"""`mbm profile conv`, on small shapes."""

import itertools

import pytest
import torch
from commands import CPU, mbm

from mbm_cli import config as configs
from mbm_cli.backends.cuda_programs import Program
from mbm_cli.experiments import lifecycle, profile_conv
from mbm_cli.experiments.profile_conv import ConvShape

COMMAND = ["profile", "conv", *CPU, "--set", "data.batch_size=8"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    above = ConvShape.square("above the limit", 10_000, 64, 64, 3, 1, 56)
    shapes = (ConvShape.square("", 4, 8, 16, 3, 1, 14), ConvShape("", 4, 20, 10), above)
    monkeypatch.setattr(profile_conv, "REFERENCE_SHAPES", shapes)


def test_convolutions_of_the_model_come_first(tmp_path):
    result = mbm(*COMMAND, "--multiplier", "mbm-t16-r7", "--json").json
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "environment.json", "profile.json"}
    assert "multiplier: mbm-t16-r7" in (folder / "config.yaml").read_text()
    assert [result[field] for field in ("multiplier", "device", "threads")] == ["mbm-t16-r7", "cpu", 1]
    ceiling, rows = result["ceiling_macs_per_second"], result["convolutions"]
    assert ceiling > 0
    assert [(row["name"], row["batch"], row["multiplications"]) for row in rows] == [
        ("lenet conv1", 8, 8 * 117_600),
        ("lenet conv2", 8, 8 * 240_000),
        ("", 4, 4 * 16 * 14 * 14 * 8 * 9),
        ("", 4, 4 * 20 * 10),
    ]
    assert rows[-1]["shape"] == "20->10 dense"
    assert rows[1]["shape"] == "6->16 5x5 14x14"
    for row in rows:
        ways = set() if "dense" in row["shape"] else {"torch_nn_grad", "two_calls", "one_call"}
        assert row["backward_seconds"].keys() == ways
        assert row["gradient_seconds"].keys() == row["exact_gradient_seconds"].keys() == {"input", "weight"}
        parts = [row[f"{part}_seconds"].values() for part in ("backward", "gradient", "exact_gradient")]
        assert min(row["forward_seconds"], row["exact_forward_seconds"], *itertools.chain(*parts)) > 0
        assert row["macs_per_second"] == pytest.approx(row["multiplications"] / row["forward_seconds"])
        assert row["share_of_ceiling"] == pytest.approx(row["macs_per_second"] / ceiling)
        assert row["layers"] == (row["name"] != "")


def test_only_the_shown_times_of_integers_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr(profile_conv, "_eager_seconds", lambda call, device: measured.append(call) or 1e-3)
    rows = mbm(*COMMAND, "--multiplier", "mbm-int8", "--json").json["convolutions"]
    assert len(measured) == 3 * len(rows) == 12
    for row in rows:
        assert row["forward_seconds"] == row["quantized_seconds"] == row["exact_forward_seconds"] == 1e-3
        assert row["gradient_seconds"] == row["exact_gradient_seconds"] == row["backward_seconds"] == {}


def test_equal_layers_are_timed_once(monkeypatch):
    unknown = ConvShape.square("", 4, 8, 16, 3, 1, 14)
    other = ConvShape.square("lenet conv1", 64, 1, 6, 5, 2, 28)
    monkeypatch.setattr(profile_conv, "REFERENCE_SHAPES", (unknown, other))
    config, device = lifecycle.begin(configs.load("resnet20-mbm", ["data.batch_size=8", "device=cpu"]))
    shapes = profile_conv._shapes(config, device)
    assert {shape.name: layers for shape, layers in shapes.items()} == {
        "resnet20 conv1": 1,
        "resnet20 stage1.0.conv1": 6,
        "resnet20 stage2.0.conv1": 1,
        "resnet20 stage2.0.conv2": 5,
        "resnet20 stage3.0.conv1": 1,
        "resnet20 stage3.0.conv2": 5,
        "": 0,
    }


@pytest.mark.parametrize("seconds", [1e-6, 1e-4, 0.004, 0.02, 0.5])
def test_time_to_measure_is_bounded(monkeypatch, seconds):
    blocks = []

    def block(call, calls, device):
        blocks.append(calls * seconds)
        return blocks[-1] * (10 if len(blocks) % 3 == 0 else 1)  # every third one is disturbed

    monkeypatch.setattr(profile_conv, "_block_seconds", block)
    assert profile_conv._eager_seconds(lambda: None, torch.device("cpu")) == pytest.approx(seconds)
    assert len(blocks) >= 5
    assert sum(blocks) <= max(0.2, 5 * seconds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("multiplier", ["mbm", "drum-k6", "drum-uint8-k4"])
def test_kernels_are_compiled_before_they_are_timed(monkeypatch, multiplier):
    loaded, load, time_shape = [], Program._load, profile_conv._time_shape

    def noting_load(self, kernel, *rest):
        loaded.append(kernel)
        return load(self, kernel, *rest)

    def without_loading(*arguments):
        before = len(loaded)
        timed = time_shape(*arguments)
        assert loaded[before:] == []
        return timed

    monkeypatch.setattr(Program, "_load", noting_load)
    monkeypatch.setattr(profile_conv, "_time_shape", without_loading)
    command = ["profile", "conv", "--multiplier", multiplier, "--set", "train.matrix_units=true", "--device", "cuda"]
    rows = mbm(*command, "--json").json["convolutions"]
    assert {row["path"] for row in rows} <= {None, "scalar", "matrix units"} or multiplier == "drum-uint8-k4"
