"""Where an epoch's time goes."""

import json

import pytest

from mbm_cli.config import load
from mbm_cli.errors import Interrupted
from mbm_cli.experiments import profile_epoch as experiment
from mbm_cli.tables import console, epoch_profile_tables
from mbm_cli.training import PHASES

SMALL = ["data.train_limit=640", "data.test_limit=200", "device=cpu"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "measure_ceiling", lambda multiplier, device: 1e12)
        return experiment.profile_epoch(load("lenet-mbm", SMALL), tmp_path_factory.mktemp("runs"))


def test_the_phases_are_measured_and_fill_the_epoch(profiled):
    _, result = profiled
    assert list(result["phases"]) == [*PHASES, "everything else"]
    assert all(result["phases"][phase] > 0 for phase in PHASES)
    assert sum(result["phases"].values()) == pytest.approx(result["clocked_epoch_seconds"])
    assert result["phases"]["everything else"] < 0.3 * result["clocked_epoch_seconds"]  # 2.5 % of a whole epoch


def test_each_convolution_s_passes_are_within_their_phase(profiled):
    _, result = profiled
    assert [layer["name"] for layer in result["layers"]] == ["conv1", "conv2"]
    for direction in ("forward", "backward"):
        times = [layer[f"{direction}_seconds"] for layer in result["layers"]]
        assert all(time > 0 for time in times)
        assert sum(times) < result["phases"][direction]
    for layer in result["layers"]:
        assert layer["macs_per_second"] == pytest.approx(layer["multiplications"] * 640 / layer["forward_seconds"])
        assert layer["share_of_ceiling"] == pytest.approx(layer["macs_per_second"] / 1e12)


def test_the_operators_that_cost_most(profiled):
    _, result = profiled
    names = [row["name"] for row in result["costliest"]]
    assert "aten::convolution_backward" in names
    ours = next(row for row in result["costliest"] if row["name"] == "mbm::conv2d")
    forward = sum(layer["forward_seconds"] for layer in result["layers"])  # of 10 steps as all of them are profiled
    assert ours["seconds"] > 0.5 * forward
    seconds = [row["seconds"] for row in result["costliest"]]
    assert seconds == sorted(seconds, reverse=True)
    assert all("::" in name for name in names)  # operators, not ranges


def test_the_run_s_files(profiled):
    run, result = profiled
    assert json.loads((run.folder / "profile.json").read_text()) == result
    assert json.loads((run.folder / "trace.json").read_text())["traceEvents"]
    assert (run.folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.folder.glob(".*"))


def test_the_three_suspicions_are_answered_in_100_columns(profiled, capsys):
    _, result = profiled
    console().print(epoch_profile_tables(result))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for number, word in enumerate(("torch.nn.grad", "not parallel", "hardware"), 1):
        assert f"{number}. " in out
        assert word in out


def test_an_interrupt_leaves_no_folder(tmp_path):
    asked = iter([False] * 12)  # past the warm-up, within the first epoch
    with pytest.raises(Interrupted):
        experiment.profile_epoch(load("lenet-mbm", SMALL), tmp_path, stopped=lambda: next(asked, True))
    assert not list(tmp_path.iterdir())
