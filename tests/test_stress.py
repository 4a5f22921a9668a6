"""Run the scripts of tests/stress in small, and `mbm` where a home, a terminal or its colours are missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pseudo_terminal import on_terminal

from mbm_cli.data import data_root

MBM = str(Path(sys.executable).with_name("mbm"))
EPOCH = ["train", "--device", "cpu", "--threads", "1", "--epochs", "1"]
EPOCH += ["--set", "data.train_limit=60", "--set", "data.test_limit=50"]


# Two in a process, which shares what takes seconds to import.
@pytest.mark.parametrize(
    "code",
    [
        "import kills, disk; kills.main(2); disk.main(2)",
        "import memory, convolutions; memory.main(12); convolutions.main(150, 0)",
    ],
    ids=["kills and disk", "memory and convolutions"],
)
def test_small_stress_passes(code):
    command = [sys.executable, "-c", code]
    scripts = Path(__file__).with_name("stress")
    done = subprocess.run(command, cwd=scripts, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def environment() -> dict[str, str]:
    # OpenMP's idle threads would spin on cores that other processes need.
    return {**os.environ, "GOMP_SPINCOUNT": "0"}


@pytest.mark.parametrize(("name", "value", "forbidden"), [("TERM", "dumb", r"\x1b"), ("NO_COLOR", "1", r"\x1b\[3\d")])
def test_terminal_without_colours_gets_none(name, value, forbidden, own_folder, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    text = on_terminal(100, EPOCH, monkeypatch)
    assert "test accuracy" in text
    assert not re.search(forbidden, text)


def test_run_needs_no_home_folder(own_folder, monkeypatch):
    Path("file").touch()
    monkeypatch.setenv("MBM_DATA_DIR", str(data_root(None)))
    monkeypatch.setenv("HOME", os.path.abspath("file/home"))  # not even root can make that
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "test accuracy" in on_terminal(100, EPOCH, monkeypatch)


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
