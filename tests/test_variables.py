"""Environment variables of libraries: how OpenMP's threads wait, and what is set for a GPU."""

import os
from pathlib import Path

import pytest
from commands import mbm

from mbm_cli.variables import OF_GPU, OF_TURNS, set_variables

CORES = os.cpu_count() or 1


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", *OF_GPU, *OF_TURNS):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("load", "spins"),
    [("0.0 0.0 0.0 1/300 7", "10000"), (f"9.0 9.0 9.0 {1 + CORES}/300 7", "0"), ("nothing", "10000")],
)
def test_threads_spin_on_a_quiet_machine_only(monkeypatch, load, spins):
    monkeypatch.setattr(Path, "read_text", lambda path: load)
    set_variables()
    assert os.environ["GOMP_SPINCOUNT"] == spins


@pytest.mark.parametrize(
    ("name", "value"), [("GOMP_SPINCOUNT", "77"), ("OMP_WAIT_POLICY", "active"), ("DISABLE_ADDMM_CUDA_LT", "0")]
)
def test_the_users_choice_stands(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    set_variables()
    assert os.environ[name] == value
    if name == "OMP_WAIT_POLICY":
        assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize(
    ("command", "queues"),
    [
        (["train"], None),
        (["sweep"], "32"),
        (["sweep", "--at-once", "1"], None),
        (["compare", "exact-vs-mbm"], None),
        (["compare", "exact-vs-mbm", "--at-once", "auto"], "32"),
        (["search", "--candidates", "mbm"], "32"),
    ],
)
def test_only_runs_in_turn_ask_for_more_queues(command, queues):
    mbm(*command, "--config", "missing")
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == queues
