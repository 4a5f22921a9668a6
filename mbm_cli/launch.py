"""Where the runs of a sweep are computed: one after the other in this process, or several at once in others."""

import ctypes
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection as connections
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from mbm_cli.errors import Interrupted, MbmError, RunError

# What a terminal or a batch system sends to every process of a job; only the parent acts on it.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LISTEN_INTERVAL = 0.05  # seconds between two looks at the pipe, each of which costs as much as a step on a GPU

Tell = Callable[[float], None]  # takes how much of a task is done, 0 to 1
Stopped = Callable[[], bool]
# Computes a task. Worker processes import it by its name, and get tasks by pickling.
Work = Callable[[Any, Tell, Stopped], str]


@dataclass(frozen=True)
class Outcome:
    """What the work returned, or the reason why it failed."""

    result: str | None = None
    reason: str | None = None


def launch(
    tasks: Sequence[Any],
    work: Work,
    jobs: int,
    progress: Callable[[Any, float], None],
    done: Callable[[Any, Outcome], None],
    stopped: Stopped,
) -> None:
    """Compute all tasks, up to ``jobs`` at once; a task that fails does not stop the others.

    With several jobs each is a process; on several CUDA devices, process k uses device k modulo their number.

    Args:
        work: computes a task; called with it, with what takes its progress, and with what says whether to stop.
        progress: called in this process with a task and how much of it is done, 0 to 1.
        done: called in this process with a task and its outcome.
        stopped: called before every step, with several jobs several times a second.

    Raises:
        Interrupted: ``stopped`` returned true.
        RunError: a worker process died; the others have been stopped.
    """
    if jobs == 1:
        for task in tasks:
            done(task, _attempt(task, work, partial(progress, task), stopped))
    else:
        _Pool(tasks, work, jobs, progress, done, stopped).run()


def _attempt(task: Any, work: Work, tell: Tell, stopped: Stopped) -> Outcome:
    try:
        return Outcome(result=work(task, tell, stopped))
    except Interrupted:
        raise
    except MbmError as error:
        return Outcome(reason=str(error))
    except Exception as error:
        return Outcome(reason=f"{type(error).__name__}: {error}")


class _Pool:
    """Worker processes with a task each."""

    def __init__(
        self,
        tasks: Sequence[Any],
        work: Work,
        jobs: int,
        progress: Callable[[Any, float], None],
        done: Callable[[Any, Outcome], None],
        stopped: Stopped,
    ) -> None:
        self.waiting, self.work, self.jobs = deque(tasks), work, min(jobs, len(tasks))
        self.progress, self.done, self.stopped = progress, done, stopped
        self.stopping = False
        self.died: list[str] = []

    def run(self) -> None:
        workers: list[_Worker] = []
        try:
            for k in range(self.jobs):
                workers.append(_Worker(k, self.work))
                self._give_next(workers[k])
            while busy := {worker.connection: worker for worker in workers if worker.task is not None}:
                for connection in connections.wait(list(busy), timeout=LISTEN_INTERVAL):
                    self._hear(busy[connection])  # type: ignore[index]
                if not self.stopping and (self.died or self.stopped()):
                    self.stopping = True
                    for worker in workers:
                        worker.tell_to_stop()
        finally:
            for worker in workers:
                worker.tell_to_stop()
            for worker in workers:
                worker.close()
        if self.died:
            raise RunError(self.died[0])
        if self.waiting:
            raise Interrupted("interrupted")

    def _give_next(self, worker: "_Worker") -> None:
        if self.waiting and not self.stopping:
            worker.give(self.waiting.popleft())
        else:
            worker.tell_to_stop()

    def _hear(self, worker: "_Worker") -> None:
        task = worker.task
        match worker.listen():
            case float(fraction):
                self.progress(task, fraction)
            case Outcome() as outcome:
                worker.task = None
                self.done(task, outcome)
                self._give_next(worker)
            case Interrupted():
                worker.task = None
                self.waiting.append(task)
            case None:
                worker.task = None
                self.died.append(f"{task}: its process {worker.how_it_ended()}")
                self.done(task, Outcome(reason=self.died[-1]))


class _Worker:
    """A worker process, seen from its parent.

    They share a pipe and nothing else, so a dying process cannot leave anything locked. A closed end of the pipe shows
    the other side that this one is gone.
    """

    def __init__(self, number: int, work: Work) -> None:
        # Spawned: OpenMP's threads and a CUDA context do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = theirs, work, _device_environment(number)
        self.process: BaseProcess = context.Process(target=_serve, args=arguments)
        self.task: Any = None
        with _signals_blocked():
            self.process.start()
        theirs.close()

    def give(self, task: Any) -> None:
        self.task = task
        with suppress(OSError):  # listening to a dead process will tell
            self.connection.send(task)

    def tell_to_stop(self) -> None:
        with suppress(OSError):
            self.connection.send(None)

    def listen(self) -> float | Outcome | Interrupted | None:
        """Return progress, an outcome or an interruption; ``None`` if the process is gone."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def how_it_ended(self) -> str:
        self.process.join()
        code = self.process.exitcode
        assert code is not None  # it was joined
        if code >= 0:
            return f"ended with exit code {code}"
        killed = " (is there enough memory?)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{killed}"

    def close(self) -> None:
        self.process.join()
        self.connection.close()


def _device_environment(number: int) -> dict[str, str]:
    """Return the variables with which worker ``number`` sees one CUDA device of several."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")] if listed else [str(k) for k in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[number % count]}


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals until a child started here has installed its handlers; none is lost."""
    resource_tracker.ensure_running()  # spawning would start it, and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, work: Work, environment: dict[str, str]) -> None:
    """Compute tasks in a worker process until there are no more, or the parent is gone."""
    # A killed parent takes its workers along: they would hold runs that a resume computes, or begin others.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        return  # it was killed before
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ.update(environment)  # before CUDA is initialised
    stopped = _Ear(connection)

    def tell(fraction: float) -> None:
        with suppress(OSError):
            connection.send(fraction)

    with suppress(EOFError, OSError):
        while (task := connection.recv()) is not None:
            try:
                connection.send(_attempt(task, work, tell, stopped))
            except Interrupted as interrupted:
                connection.send(interrupted)
                return


class _Ear:
    """Whether a worker is to stop: a message during a task says so, and so does a closed pipe."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.listened = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self.listened < LISTEN_INTERVAL:
            return False
        self.listened = now
        return self.connection.poll()
