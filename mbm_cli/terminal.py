"""The process's surroundings: output streams, signals, and errors as lines with an exit code."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mbm_cli.errors import MbmError

# A second one of these ends the process at once. SIGHUP, from a closing terminal, may come twice by itself.
IMPATIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def make_writable(name: str) -> None:
    """Make writing to a standard stream succeed if it is closed, or if its encoding lacks a character."""
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
    elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def report_error(error: Any, hint: str = "") -> int:
    """Print an error as a line or two on standard error; return the exit code."""
    if isinstance(error, MbmError):
        message, hint, code = str(error), error.hint or hint, error.exit_code
    elif type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return 0
    elif hasattr(error, "format_message"):  # a usage error of click, which newer versions of Typer carry inside
        command = error.ctx.command_path if error.ctx else "mbm"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        message, code = f"{message}; see {command} --help", 2
    elif type(error).__name__ == "Abort":  # the end of input at a question
        message, hint, code = "nothing was answered, so nothing was done", "", 1
    elif isinstance(error, BrokenPipeError):
        sys.stdout = None  # no reader is left, and flushing at exit would fail again
        return 1
    elif isinstance(error, OSError) and error.errno in NO_SPACE and error.filename is None:
        sys.stdout = None  # flushing at exit would fail again
        message, code = f"standard output cannot be written ({error.strerror}): free space", 1
    else:
        message, code = f"{type(error).__name__}: {error}", 1
        hint = "This is unexpected; --debug shows where it happened."
    with suppress(OSError):  # a terminal that was closed
        print(f"mbm: {_visible(message)}" + (f"\n{_visible(hint)}" if hint else ""), file=sys.stderr)
    return code


def _visible(text: str) -> str:
    """Escape what a terminal would interpret: a file's name may hold line breaks or control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield whether a signal asked to stop. A second interrupt or SIGTERM ends the process at once.

    SIGHUP asks, too, unless it is ignored (``nohup``).
    """
    asked = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for again in IMPATIENT_SIGNALS:
            signal.signal(again, lambda number, frame: leave_at_once())
        if number == signal.SIGHUP:
            _detach_terminal()
        _write_at_once(2, "\nstopping after this step; once more stops at once\n")

    without_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = IMPATIENT_SIGNALS if without_terminal else (*IMPATIENT_SIGNALS, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _detach_terminal() -> None:
    """Discard further output if a stream is no file: its terminal is gone, and writing to it would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(nowhere, descriptor)


def leave_at_once() -> None:
    """End the process as an interrupt does, without waiting for anything."""
    if os.isatty(1):
        _write_at_once(1, "\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(130)


def _write_at_once(descriptor: int, text: str) -> None:
    """Write without a stream: the interrupted code may hold its lock."""
    with suppress(OSError):
        os.write(descriptor, text.encode())
