"""Signals, whatever the process is doing when they come."""

import os
import signal
import sys

import pytest

from mbm_cli.terminal import stop_on_signal


class Locked:
    """A stream in the middle of a write."""

    def write(self, text: str) -> int:
        raise RuntimeError("reentrant call")


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_within_a_write_is_heard(number, monkeypatch, capfd):
    """What writes may hold the stream's lock: the message goes past it."""
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
