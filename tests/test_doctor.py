"""What mbm doctor looks at, and that it sees wrong products."""

import pytest
import torch

from mbm_cli.experiments import doctor as experiment
from mbm_cli.multipliers import FAMILIES, Multiplier


def test_every_family_is_checked():
    assert {Multiplier.parse(name).family for name in experiment.CHECKED} == FAMILIES.keys()


def test_all_is_well_here():
    told = []
    result = experiment.doctor(0, told.append)
    assert result["passed"]
    names = [check["name"] for check in result["checks"]]
    assert names == [check.name for check in told]
    assert {"python", "torch", "cpu", "cpu kernels", "mnist", "products on cpu"} <= set(names)


def test_another_nan_is_seen(monkeypatch):
    """Of a product; which NaN a sum is, the device decides."""
    right = experiment.multiply

    def negative(*args, **kwargs):
        products = right(*args, **kwargs)
        return torch.where(products.isnan(), -products, products)

    monkeypatch.setattr(experiment, "multiply", negative)
    assert "0xFFC00000, not 0x7FC00000" in experiment.self_check(torch.device("cpu"), 0).found


@pytest.mark.parametrize("wrong", ["multiply", "conv2d"])
def test_one_wrong_bit_is_seen(monkeypatch, wrong):
    right = getattr(experiment, wrong)

    def off_by_one(*args, **kwargs):
        products = right(*args, **kwargs).clone()
        products.view(torch.int32).flatten()[4711] ^= 1
        return products

    monkeypatch.setattr(experiment, wrong, off_by_one)
    check = experiment.self_check(torch.device("cpu"), 0)
    assert f"{wrong} with " in check.found
    assert "(1 differ)" in check.found
    assert "do not train" in check.problem


def test_missing_data_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("MBM_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(experiment, "CHECKED", ["mbm"])
    result = experiment.doctor()
    assert not result["passed"]
    (mnist,) = (check for check in result["checks"] if check["name"] == "mnist")
    assert "mbm data fetch" in mnist["problem"]
