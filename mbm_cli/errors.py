"""The ways a command fails on purpose, and the wording that their messages share."""

import difflib
from collections.abc import Iterable


class MbmError(Exception):
    """A failure with a message for the user: what went wrong, where, and what to do next.

    Args:
        message: one line.
        hint: a second one, where the first would be too long with it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RequestError(MbmError):
    """The request was wrong (config, flag, name): nothing was started and nothing was written."""

    exit_code = 2


class RunError(MbmError):
    """The request was right, but the run failed (data damaged, folder not writable, loss not finite)."""


class Interrupted(MbmError):
    """The user stopped the run; what was done is kept."""

    exit_code = 130


def nearest(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the choice that is spelt most like a word."""
    close = difflib.get_close_matches(str(word)[:100].lower(), choices, n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``; did you mean ...?``, or nothing where no choice is close."""
    close = nearest(word, choices, cutoff)
    return f"; did you mean {close}?" if close else ""


def clip(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def first_line(error: BaseException) -> str:
    """Write an error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
