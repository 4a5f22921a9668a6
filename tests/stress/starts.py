"""Starts of `mbm` in a tenth of a second: forked from a process that has imported everything and computed nothing."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MBM = str(Path(sys.executable).with_name("mbm"))
FILE_OPERATIONS = {"open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "tempfile.mkstemp"}
CAPABILITY_VERSION = 0x20080522
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
WAIT = 120  # seconds for a command of a few steps


@dataclass(frozen=True)
class Answer:
    """What a command gave: its exit code (less than 0: the signal that ended it), standard output and error."""

    code: int
    out: str
    err: str

    @property
    def is_clean(self) -> bool:
        """Whether it was answered as promised: in a line or two, by a known exit code."""
        known = self.code in (0, 1, 2, 130)
        return known and "Traceback" not in self.err and "This is unexpected" not in self.err


@dataclass(frozen=True)
class Started:
    """A command that is running; its output goes into files beside its folder."""

    server: "Server"
    pid: int
    out: Path
    err: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # not reaped before it is waited for: the number is no other process's

    def wait(self, seconds: float = WAIT) -> Answer:
        """Wait for its end; what hangs is killed, and an error."""
        code = self.server.ask({"wait": self.pid, "seconds": seconds})
        if code is None:
            self.kill()
            self.server.ask({"wait": self.pid, "seconds": WAIT})
            raise TimeoutError(f"still running after {seconds} s")
        return Answer(code, *(path.read_text(errors="replace") for path in (self.out, self.err)))

    def has_ended(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


class Server:
    """The process that is forked."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.started = 0
        # numpy's BLAS would start threads when it is imported, and a process that has some is not to be forked.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: dict[str, Any]) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        arguments: Sequence[object],
        folder: Path,
        environment: dict[str, str | None] | None = None,
        file_size: int | None = None,
        die_at: int | None = None,
        unprivileged: bool = False,
    ) -> Started:
        """Start `mbm` with these arguments in a folder.

        Args:
            environment: variables that differ from this process's; ``None`` takes one away.
            file_size: the most bytes that a file can get.
            die_at: the number of the operation on a file below the folder, from 1 on, before which it is killed.
            unprivileged: permissions bind it, even if this process is root's.
        """
        self.started += 1
        out, err = (self.logs / f"{self.started}.{name}" for name in ("out", "err"))
        request = {
            "start": [str(argument) for argument in arguments],
            "folder": str(folder),
            "out": str(out),
            "err": str(err),
            "environment": environment or {},
            "file_size": file_size,
            "die_at": die_at,
            "unprivileged": unprivileged,
        }
        return Started(self, self.ask(request), out, err)

    def run(self, *arguments: object, folder: Path, **how: Any) -> Answer:
        return self.start(arguments, folder, **how).wait()


@contextmanager
def server(logs: Path) -> Iterator[Server]:
    """A server while it is needed; commands' output is kept in the folder ``logs``."""
    logs.mkdir(exist_ok=True)
    made = Server(logs)
    try:
        yield made
    finally:
        made.process.stdin.close()
        made.process.wait()


def _serve() -> None:
    """Answer each line of standard input with one of standard output."""
    import torch._dynamo  # noqa: F401  (an optimizer's first step imports it)
    import torchvision.datasets.mnist  # noqa: F401

    from mbm_cli import cli, data, render, tables  # noqa: F401
    from mbm_cli.experiments import compare, sweep, train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        answer = _fork(request) if "start" in request else _wait(request["wait"], request["seconds"])
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any]) -> int:
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads is not to be forked"
    pid = os.fork()
    if pid == 0:
        try:
            code = _child(request)
        except BaseException as error:
            os.write(2, f"the stress test's own failure: {error!r}\n".encode())
            code = 99
        os._exit(code)
    return pid


def _wait(pid: int, seconds: float) -> int | None:
    """The exit code, or the signal as a negative number; ``None`` if it has not ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def _child(request: dict[str, Any]) -> int:
    from mbm_cli import cli

    for number, path, flags in (
        (0, "/dev/null", os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o644), number)
    os.chdir(request["folder"])
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if request["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], request["file_size"]))
    if request["unprivileged"]:
        _obey_permissions()
    if request["die_at"] is not None:
        _die_at(request["die_at"], request["folder"])
    sys.argv = ["mbm", *request["start"]]
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _obey_permissions() -> None:
    """Give up what lets root read and write where nobody may."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)  # of those that are in effect
    assert libc.capset(header, sets) == 0


def _die_at(operation: int, folder: str) -> None:
    seen = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in FILE_OPERATIONS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(folder):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    _serve()
