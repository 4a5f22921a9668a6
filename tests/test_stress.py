"""What `make stress` does at length, in little: kills, damage, full disks, memory; and where mbm is started from."""

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from pseudo_terminal import on_terminal
from stress import disk, kills, memory
from stress.starts import MBM, Answer, Server, server

from mbm_cli.runs import list_runs

ONE_EPOCH = [*kills.TRAIN, "--epochs", "1"]


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("logs")) as made:
        yield made


# Kills


def test_a_run_that_is_killed_at_any_time_ends_as_if_it_had_not_been(at, tmp_path):
    phases = kills.kill_at_random(at, tmp_path, kills=5, epochs=3)
    assert phases.total() == 5


def test_before_each_operation_on_a_file(at, tmp_path):
    assert kills.kill_before_operations(at, tmp_path, every=75) > 1


def test_sigterm(at, tmp_path):
    kills.interrupt(at, tmp_path, signal.SIGTERM, "train", Random(0))


@pytest.mark.parametrize("together", [kills.start_together, kills.resume_together])
def test_two_at_a_time(together, at, tmp_path):
    together(at, tmp_path)


# Disks and damage


def test_a_file_that_becomes_too_large(at, tmp_path):
    disk.limit_file_sizes(at, tmp_path, sizes=2)


def test_folders_that_cannot_be_written(at, tmp_path):
    disk.write_nowhere(at, tmp_path)


def test_damaged_files(at, tmp_path):
    for damage in (disk.damage_data, disk.damage_runs, disk.damage_tables):
        damage(at, kills.made(tmp_path / damage.__name__), 1)


# Memory


def test_memory_does_not_grow_from_epoch_to_epoch(tmp_path):
    threads = torch.get_num_threads()
    assert memory.of_epochs(15, "cpu", tmp_path)["process"] <= memory.GROWTH
    torch.set_num_threads(threads)


# Where it is started


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_without_a_home_folder(home, at, tmp_path):
    data = str(disk.data.data_root(None))
    environment = {"HOME": home, "MBM_DATA_DIR": data, "XDG_CACHE_HOME": None, "MPLCONFIGDIR": None}
    assert at.run(*ONE_EPOCH, "--quiet", folder=tmp_path, environment=environment) == Answer(0, "", "")


def test_a_terminal_that_is_closed_stops_a_run_in_order(tmp_path):
    """What it has done is kept, though nobody can be told any more."""
    leader, follower = pty.openpty()
    # A terminal belongs to the first process that opens it in a session of its own.
    begin = (
        "import os, signal, sys\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "terminal = os.open(sys.argv[1], os.O_RDWR)\nfor stream in range(3): os.dup2(terminal, stream)\n"
        "os.execv(sys.argv[2], sys.argv[2:])"
    )
    command = [sys.executable, "-c", begin, os.ttyname(follower), MBM, *kills.TRAIN, "--epochs", "1000"]
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    shown = b""
    while b"2/1000" not in shown:
        shown += os.read(leader, 65536)
    os.close(follower)
    os.close(leader)
    assert process.wait(60) == 130
    (run,) = list_runs(tmp_path / "runs")
    summary, checkpoint = run.summary(), run.checkpoint()
    assert (summary["status"], summary["epochs"]) == ("interrupted", checkpoint["epoch"])


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["lenet-mbm", "a-name-of-64-characters-" + 40 * "x"])
@pytest.mark.parametrize("columns", [100, 80, 60])
def test_names_of_runs_are_whole_on_a_terminal(columns, name, own_folder, monkeypatch):
    """They are there to be copied, and words to be looked for."""
    monkeypatch.setenv("NO_COLOR", "1")
    on_terminal(100, [*ONE_EPOCH, "--quiet", "--set", f"name={name}"], monkeypatch)
    (run,) = list_runs(Path("runs"))
    summary = {
        **run.summary(),
        "status": "interrupted",
        "multiplier": "exact, mbm-t16-r7, {conv1: exact, default: mbm}",
    }
    run.write_json("summary.json", summary)
    listed = on_terminal(columns, ["runs", "list"], monkeypatch)
    assert run.name in listed if columns > len(run.name) + 5 else run.name in listed.replace("\r\n", "")
    assert "interrupted" in listed
    assert f"{100 * summary['test_accuracy']:.2f} %" in listed


def test_twenty_columns(own_folder, monkeypatch):
    """Every word and number is there, in lines of its own; a name that is longer goes on in the next line."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    text = on_terminal(20, ONE_EPOCH, monkeypatch)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "layer: conv1\r\n" in plain
    assert "mults/image: 117,600\r\n" in plain
    assert re.search(r"1/1 +\d+\.\d\d %", plain)
    (run,) = list_runs(Path("runs"))
    listed = on_terminal(20, ["runs", "list"], monkeypatch)
    assert run.name in listed.replace("\r\n", "")
    assert "status: completed\r\n" in listed
    assert "for example: \r\nmbm-t16-r7\r\n" in on_terminal(20, ["multipliers", "list"], monkeypatch)
    assert max(len(line) for line in listed.splitlines()) <= 20


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_a_terminal_without_colours(name, value, own_folder, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    text = on_terminal(100, ONE_EPOCH, monkeypatch)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)
    assert name != "TERM" or "\x1b" not in text
    assert "test accuracy" in text
