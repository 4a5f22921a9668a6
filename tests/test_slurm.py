"""What `--on` needs is checked before anything is written; tests/engines has sweeps on a real Slurm."""

import sys
from pathlib import Path

import pytest
from commands import SWEEP, mbm

ON = "slurm://gpu?gpus=1&cpus=4&time=60"


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """Return the only folder in which programs are found; it is empty."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def refusal() -> str:
    answer = mbm(*SWEEP, "--on", ON)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)
    assert not Path("runs").exists()
    return answer.err


def test_missing_slurm_is_named(programs):
    assert "--on needs Slurm, and pip install 'mbm-cli[slurm]' ([Errno 2] No such file" in refusal()


def test_missing_submitit_is_named(programs, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "--on needs Slurm, and pip install 'mbm-cli[slurm]' (import of submitit" in refusal()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo low; echo high", "no partition 'gpu', there are low, high"),
        ("echo no controller >&2; exit 1", "no controller"),
    ],
)
def test_answer_of_slurm_is_shown(script, message, programs):
    (programs / "sinfo").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "sinfo").chmod(0o755)
    assert message in refusal()
