"""`mbm doctor`: what it checks, and the wrong products that it finds."""

import pytest
import torch
from commands import mbm

from mbm_cli.experiments import doctor
from mbm_cli.multipliers.float32 import FAMILIES
from mbm_cli.multipliers.names import Multiplier

CPU = torch.device("cpu")


def test_every_family_is_checked():
    assert {Multiplier.parse(name).family for name in doctor.CHECKED} == FAMILIES.keys()


def test_healthy_installation_passes():
    reported = []
    result = doctor.doctor(report=reported.append)
    assert result.passed
    assert result.checks == reported
    names = {check.name for check in result.checks}
    assert {"python", "torch", "cpu", "cpu kernels", "mnist", "products on cpu"} <= names


def test_sign_of_nan_counts_in_products(monkeypatch):
    right = doctor.multiply

    def negative(*args, **kwargs):
        products = right(*args, **kwargs)
        return torch.where(products.isnan(), -products, products)

    monkeypatch.setattr(doctor, "multiply", negative)
    assert "0xFFC00000, not 0x7FC00000" in doctor.self_check(CPU, 0).found


@pytest.mark.parametrize("wrong", ["multiply", "conv2d"])
def test_one_wrong_bit_is_found(monkeypatch, wrong):
    right = getattr(doctor, wrong)

    def off_by_one(*args, **kwargs):
        products = right(*args, **kwargs).clone()
        products.view(torch.int32).flatten()[4711] ^= 1
        return products

    monkeypatch.setattr(doctor, wrong, off_by_one)
    check = doctor.self_check(CPU, 0)
    assert f"{wrong} with " in check.found
    assert "(1 differ)" in check.found
    assert "do not train" in check.problem


def test_missing_data_fails_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("MBM_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(doctor, "CHECKED", ["mbm"])
    answer = mbm("doctor", "--json")
    assert answer.code == 1
    assert "see the problems above" in answer.err
    assert not answer.json["passed"]
    (mnist,) = (check for check in answer.json["checks"] if check["name"] == "mnist")
    assert "mbm data fetch" in mnist["problem"]
