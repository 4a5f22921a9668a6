"""`mbm profile conv`, on small shapes."""

import itertools

import pytest
from commands import CPU, mbm

from mbm_cli.experiments import profile_conv
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
