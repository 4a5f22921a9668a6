"""`mbm profile conv`, on shapes small enough for a test."""

import json
import sys
import time

import pytest
import torch

from mbm_cli import timing
from mbm_cli.cli import main
from mbm_cli.config import load
from mbm_cli.errors import Interrupted
from mbm_cli.experiments import profile
from mbm_cli.experiments.profile import ConvShape

ARGUMENTS = ["profile", "conv", "--device", "cpu", "--threads", "1", "--set", "data.batch_size=8"]
COLUMNS = {
    "name",
    "shape",
    "batch",
    "multiplications",
    "forward_seconds",
    "exact_forward_seconds",
    "backward_seconds",
    "macs_per_second",
    "share_of_ceiling",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Small shapes, one of them too large for the limit, and few repeats."""
    shapes = (ConvShape("", 4, 8, 16, 3, 1, 14), ConvShape("huge", 10_000, 64, 64, 3, 1, 56))
    monkeypatch.setattr(profile, "REFERENCE_SHAPES", shapes)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.02)
    monkeypatch.setattr(timing, "LEAST_REPEATS", 3)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mbm", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return (end.value.code or 0, *capsys.readouterr())


def test_the_figures_of_a_profile(monkeypatch, capsys, tmp_path):
    code, out, _ = run_command(monkeypatch, capsys, *ARGUMENTS, "--multiplier", "mbm-t16-r7", "--json")
    assert code == 0
    result = json.loads(out)
    (folder,) = (tmp_path / "runs").iterdir()
    assert tmp_path / result.pop("run") == folder
    assert json.loads((folder / "profile.json").read_text()) == result
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "environment.json", "profile.json"}
    assert "multiplier: mbm-t16-r7" in (folder / "config.yaml").read_text()

    assert (result["multiplier"], result["device"], result["threads"]) == ("mbm-t16-r7", "cpu", 1)
    ceiling = result["ceiling_macs_per_second"]
    assert ceiling > 0
    rows = result["convolutions"]
    # The model's own convolutions first, at the config's batch size.
    assert [(row["name"], row["batch"], row["multiplications"]) for row in rows] == [
        ("lenet conv1", 8, 8 * 117_600),
        ("lenet conv2", 8, 8 * 240_000),
        ("", 4, 4 * 16 * 14 * 14 * 8 * 9),
    ]
    assert [word in rows[1]["shape"] for word in ("6->16", "5x5", "14x14")] == [True] * 3
    for row in rows:
        assert row.keys() == COLUMNS
        assert row["backward_seconds"].keys() == {"torch_nn_grad", "two_calls", "one_call"}
        assert min(row["forward_seconds"], row["exact_forward_seconds"], *row["backward_seconds"].values()) > 0
        assert row["macs_per_second"] == pytest.approx(row["multiplications"] / row["forward_seconds"])
        assert row["share_of_ceiling"] == pytest.approx(row["macs_per_second"] / ceiling)
        assert row["share_of_ceiling"] > 0


def test_the_table_fits_100_columns(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(profile, "REFERENCE_SHAPES", (ConvShape("lenet conv2", 256, 6, 16, 5, 0, 14),))
    code, out, _ = run_command(monkeypatch, capsys, *ARGUMENTS, "--multiplier", "mitchell-t16-r7")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 100
    for word in ("mitchell-t16-r7", "lenet conv1", "GMAC/s", "ms", "backward", "threads: 1"):
        assert word in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"run: runs/{folder.name}" in out


def test_quiet_prints_nothing(monkeypatch, capsys):
    assert run_command(monkeypatch, capsys, *ARGUMENTS, "--quiet") == (0, "", "")


def test_an_interrupt_leaves_no_folder(tmp_path):
    asked = iter([False, True])
    config = load("lenet-mbm", ["device=cpu", "data.batch_size=8"])
    with pytest.raises(Interrupted, match="nothing was kept"):
        profile.profile_conv(config, tmp_path, 1, stopped=lambda: next(asked))
    assert not list(tmp_path.iterdir())


def test_the_exact_multiplier_has_nothing_to_profile(monkeypatch, capsys, tmp_path):
    code, out, err = run_command(monkeypatch, capsys, *ARGUMENTS, "--config", "lenet-exact")
    assert (code, out) == (2, "")
    assert "--multiplier mbm" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("median", [timing.median_seconds, timing.median_eager_seconds])
def test_a_median_is_of_enough_repeats_after_a_warm_up(median, monkeypatch):
    """The warm-up is slow here and does not count; one slow repeat does not either."""
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0)
    naps = iter([0.05, 0.05, 0, 0.05, 0])
    assert median(lambda: time.sleep(next(naps)), torch.device("cpu")) < 0.025
    assert next(naps, None) is None


@pytest.mark.parametrize("median", [timing.median_seconds, timing.median_eager_seconds])
def test_a_quick_call_is_repeated_for_long_enough(median):
    calls = []
    median(lambda: calls.append(None), torch.device("cpu"))
    assert len(calls) > 50  # a microsecond each, for 20 ms


@pytest.mark.parametrize(
    ("shape", "multiplications"),
    [
        (ConvShape("", 1, 1, 1, 1, 0, 1), 1),
        (ConvShape("", 64, 1, 6, 5, 2, 28), 64 * 117_600),
        (ConvShape("", 2, 3, 5, 3, 0, 4), 2 * 5 * 2 * 2 * 3 * 9),
    ],
)
def test_the_multiplications_of_a_shape(shape, multiplications):
    assert shape.multiplications == multiplications
