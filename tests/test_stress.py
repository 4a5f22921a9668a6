"""Run the scripts of tests/stress in small, and `mbm` where a home, a terminal or its colours are missing."""

import json
import os
import pty
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
        "import kills, disk; kills.main(3); disk.main(2)",
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


def test_closed_terminal_interrupts_run(tmp_path):
    leader, follower = pty.openpty()
    # A terminal belongs to the first process that opens it in a session of its own.
    begin = (
        "import os, signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "terminal = os.open(sys.argv[1], os.O_RDWR)\nfor stream in range(3): os.dup2(terminal, stream)\n"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    command = [sys.executable, "-c", begin, os.ttyname(follower), MBM, *EPOCH, "--epochs", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), start_new_session=True)
    shown = b""
    while b"2/1000" not in shown:
        shown += os.read(leader, 65536)
    os.close(follower)
    os.close(leader)
    assert process.wait(60) == 130
    (run,) = tmp_path.glob("runs/*")
    summary = json.loads((run / "summary.json").read_text())
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert (summary["status"], summary["epochs"]) == ("interrupted", checkpoint["epoch"])


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
