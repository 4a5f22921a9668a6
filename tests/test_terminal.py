"""Streams and signals: closed, full or without a reader; heard whatever the process is doing."""

import os
import pty
import re
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from commands import SMALL, SWEEP, made, mbm
from stress.runs import FORKS

from mbm_cli import cli
from mbm_cli.terminal import make_writable, stop_on_signal

ENDLESS = [*SMALL, "--epochs", "100000"]
LISTED = [sys.executable, "-m", "mbm_cli", "configs", "list"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Enter an empty folder; put the handlers of signals back."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start_on(output: str, errors: str, arguments: list[str]) -> BaseProcess:
    """Start `mbm` in a session of its own, to which the terminal belongs that it writes to."""
    process = FORKS.Process(target=_main, args=(os.getcwd(), output, errors, arguments), daemon=True)
    process.start()
    return process


def _main(folder: str, output: str, errors: str, arguments: list[str]) -> None:
    os.chdir(folder)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.dup2(os.open(errors, os.O_RDWR | os.O_CREAT), 2)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    sys.argv = ["mbm", *arguments]
    cli.main()


# Streams


def test_closed_output_is_harmless():
    done = subprocess.run(["bash", "-c", '"$0" "$@" >&-', *LISTED], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_full_output_is_named():
    with open("/dev/full", "w") as full:
        done = subprocess.run(LISTED, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "mbm: standard output cannot be written (No space left on device): free space\n"


@pytest.mark.parametrize("command", [["train"], SWEEP])
def test_lost_reader_interrupts_a_run(command, tmp_path):
    """As in `mbm train | head -1`."""
    os.mkfifo("pipe")
    process = start_on("pipe", "errors", [*command, *ENDLESS])
    open("pipe").close()
    process.join(60)
    assert process.exitcode == 130
    assert re.fullmatch(r"mbm: interrupted .*; to resume: mbm resume runs/\S+\n", Path("errors").read_text())
    assert made().summary().status == "interrupted"


def test_characters_outside_the_encoding_are_escaped(monkeypatch):
    with open("out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        make_writable("stdout")
        print("lut:é.bin")
    assert Path("out").read_text() == "lut:\\xe9.bin\n"


def test_control_characters_in_messages_are_escaped():
    answer = mbm("runs", "show", "one", "--output", "a\n\nb\x1b[2J\u202e")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(r"mbm: no run 'one', neither as a path nor in a\n\nb\x1b[2J\u202e: ")
    assert answer.err.count("\n") == 1


# Signals


class Locked:
    """A stream in the middle of a write."""

    def write(self, text: str) -> int:
        raise RuntimeError("reentrant call")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_within_a_write_is_heard(number, monkeypatch, capfd):
    """The message avoids the stream, whose lock the interrupted write may hold."""
    signal.signal(number, signal.SIG_DFL)
    with stop_on_signal() as stopped, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Locked())
        patch.setattr(sys, "stderr", Locked())
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped()
    assert "stopping after this step; once more stops at once" in capfd.readouterr().err


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signal() as stopped:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stopped()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("command", [["train"], SWEEP])
def test_closed_terminal_interrupts_a_run(command):
    leader, follower = pty.openpty()
    name = os.ttyname(follower)
    process = start_on(name, name, [*command, *ENDLESS])
    while not list(Path().glob("runs/**/checkpoint.pt")):
        os.read(leader, 65536)
    os.close(follower)
    os.close(leader)
    process.join(60)
    assert process.exitcode == 130
    run = made()
    assert run.summary().status == "interrupted"
    member = made(run.folder) if run.has_several else run
    assert member.summary().status == "interrupted"
    assert member.summary().epochs == member.checkpoint()["epoch"] >= 1
