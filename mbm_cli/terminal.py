"""A process and who looks at it: streams, signals, and errors as lines with an exit code."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mbm_cli.errors import MbmError

# An interrupt, a polite kill: a process that hears one again leaves at once. A closed terminal, SIGHUP, asks it to
# stop, too, but may do so twice by itself.
IMPATIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Terminal(io.FileIO):
    """Once it is gone, what is said to it is lost, and that is no error."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def make_writable(name: str) -> None:
    """Whatever a stream's encoding, and even if it is closed, now or later, writing to it does not fail for that."""
    stream = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        return
    if not isinstance(stream, io.TextIOWrapper):
        return
    if stream.isatty():
        terminal = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
        stream = io.TextIOWrapper(terminal, stream.encoding, stream.errors, line_buffering=True)
        setattr(sys, name, stream)
    if stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def report_error(error: Any) -> int:
    """Print an error as a line or two on standard error; gives the exit code."""
    hint = ""
    if isinstance(error, MbmError):
        message, hint, code = str(error), error.hint, error.exit_code
    elif type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        return 0
    elif hasattr(error, "format_message"):  # a usage error of click, which newer versions of Typer carry inside
        command = error.ctx.command_path if error.ctx else "mbm"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        message, code = f"{message}; see {command} --help", 2
    elif isinstance(error, BrokenPipeError):
        sys.stdout = None  # whoever read us is gone; nothing is left to be said to them
        return 1
    elif isinstance(error, OSError) and error.errno in NO_SPACE and error.filename is None:
        sys.stdout = None  # what is left in its buffer would fail again
        message, code = f"standard output cannot be written ({error.strerror}): free space", 1
    else:
        message, code = f"{type(error).__name__}: {error}", 1
        hint = "This is unexpected; --debug shows where it happened."
    print(f"mbm: {_visible(message)}" + (f"\n{_visible(hint)}" if hint else ""), file=sys.stderr)
    return code


def _visible(text: str) -> str:
    """A line as a terminal can show it: a file's name may hold line breaks, or what clears the screen."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first of the signals asks to stop at the next step, a second interrupt or polite kill stops at once.

    A closed terminal does not, where it was to be ignored (``nohup``).
    """
    asked = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        for again in IMPATIENT_SIGNALS:
            signal.signal(again, lambda number, frame: leave_at_once())
        _write_at_once(2, "\nstopping after this step; once more stops at once\n")

    without_terminal = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = IMPATIENT_SIGNALS if without_terminal else (*IMPATIENT_SIGNALS, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_at_once() -> None:
    """As an interrupt ends a process, without waiting for anything."""
    if os.isatty(1):
        _write_at_once(1, "\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(130)


def _write_at_once(descriptor: int, text: str) -> None:
    """Without a stream, whose lock the very code may hold that a signal has interrupted."""
    with suppress(OSError):
        os.write(descriptor, text.encode())
