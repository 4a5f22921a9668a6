"""The two ways a command fails on purpose; the command line turns them into one line and an exit code."""


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
