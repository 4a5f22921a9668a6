"""A command in this process that believes to be on a terminal."""

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
    """What a command that is started in this process shows on a terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "argv", ["mbm", *arguments])
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 50, columns, 0, 0))
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                shown.extend(os.read(leader, 65536))
            except OSError:  # how Linux says that the other end is closed
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
