"""Run a command in this process on a pseudo-terminal."""

import os
import pty
import struct
import sys
import termios
import threading
from fcntl import ioctl

import pytest

from mbm_cli.cli import main


def on_terminal(columns: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what `mbm` with these arguments shows on a terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["mbm", *arguments])
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 50, columns, 0, 0))
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                shown.extend(os.read(leader, 65536))
            except OSError:  # Linux reports the closed other end so
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit) as end:
            main()
    reader.join()
    os.close(leader)
    assert (end.value.code or 0) == 0
    return shown.decode()
