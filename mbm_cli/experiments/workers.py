"""Many training runs: one after the other in this process, or several at once, each worker process with its share."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import connection as connections
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from mbm_cli.config import Config
from mbm_cli.data import Split, load_mnist
from mbm_cli.errors import Interrupted, MbmError, RunError
from mbm_cli.experiments import setup
from mbm_cli.experiments.member import members, train_member
from mbm_cli.render import Display
from mbm_cli.runs import Run
from mbm_cli.training import Progress

# What a terminal or a batch system sends to every process of a job; only this process acts on it.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LISTEN_INTERVAL = 0.05  # seconds between two looks at whether to stop, which cost as much as a step on a GPU


@dataclass(frozen=True)
class Task:
    """A run to train in ``folder``, or to go on with.

    Attributes:
        label: what a person calls it.
        begun: the run, where there is one.
        threads: CPU threads of the run.
    """

    label: str
    folder: Path
    config: Config
    begun: Run | None
    threads: int


@dataclass(frozen=True)
class Outcome:
    """The name of a run that was completed, or the reason why it was not."""

    run: str | None = None
    reason: str | None = None


TellProgress = Callable[[Task, float], None]  # how much of the run is done, 0 to 1
TellOutcome = Callable[[Task, Outcome], None]
Load = Callable[[Config], tuple[Split, Split]]


def work_here(tasks: Sequence[Task], progress: TellProgress, done: TellOutcome, stopped: Callable[[], bool]) -> None:
    """Train one after the other in this process. A run that fails does not keep the others from being trained.

    Raises:
        Interrupted: ``stopped``, which is asked before every step, said so.
    """
    load = _loader()
    for task in tasks:
        done(task, _train(task, load, partial(progress, task), stopped))


def work_in_processes(
    tasks: Sequence[Task],
    processes: int,
    progress: TellProgress,
    done: TellOutcome,
    stopped: Callable[[], bool],
) -> None:
    """Train up to ``processes`` runs at once; on several CUDA devices, worker k uses device k modulo their number.

    Args:
        progress, done: called in this process.
        stopped: asked several times a second; workers then stop after their step.

    Raises:
        Interrupted: ``stopped`` said so.
        RunError: a worker died; the others have been stopped.
    """
    waiting = deque(tasks)
    workers: list[_Worker] = []
    deaths: list[str] = []
    stopping = False

    def give_next(worker: _Worker) -> None:
        if waiting and not stopping:
            worker.give(waiting.popleft())
        else:
            worker.tell_to_stop()

    def hear(worker: _Worker) -> None:
        task = worker.task
        assert task is not None  # nobody listens to the others
        match worker.listen():
            case float(fraction):
                progress(task, fraction)
            case Outcome() as outcome:
                worker.task = None
                done(task, outcome)
                give_next(worker)
            case Interrupted():
                worker.task = None
                waiting.append(task)
            case None:
                worker.task = None
                deaths.append(f"{task.label}: its process {worker.how_it_ended()}")
                _mark_failed(task, deaths[-1])

    try:
        for k in range(min(processes, len(tasks))):
            workers.append(_Worker(k))
            give_next(workers[k])
        while busy := {worker.connection: worker for worker in workers if worker.task}:
            ready = connections.wait(list(busy), timeout=LISTEN_INTERVAL)
            for worker in [worker for connection, worker in busy.items() if connection in ready]:
                hear(worker)
            if not stopping and (deaths or stopped()):
                stopping = True
                for worker in workers:
                    worker.tell_to_stop()
    finally:
        for worker in workers:
            worker.tell_to_stop()
        for worker in workers:
            worker.close()
    if deaths:
        raise RunError(deaths[0])
    if waiting:
        raise Interrupted("interrupted")


class _Worker:
    """A process that trains what it is given, seen from outside.

    It is spoken to through a pipe of its own: nothing is shared that a dying process could leave locked, and an end
    of the pipe that closes tells the other side that this one is gone.
    """

    def __init__(self, number: int) -> None:
        # Not forked: OpenMP's threads and a CUDA context do not survive that.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, _device_environment(number)))
        self.task: Task | None = None
        with _signals_blocked():
            self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # a process that is gone is noticed when it is listened to
            self.connection.send(task)

    def tell_to_stop(self) -> None:
        with suppress(OSError):
            self.connection.send(None)

    def listen(self) -> float | Outcome | Interrupted | None:
        """What it says: its progress, what became of the task, that it was interrupted; ``None`` where it is gone."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def how_it_ended(self) -> str:
        self.process.join()
        code = self.process.exitcode
        assert code is not None  # it was waited for
        if code >= 0:
            return f"ended with exit code {code}"
        killed = " (is there enough memory?)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{killed}"

    def close(self) -> None:
        self.process.join()
        self.connection.close()


def _device_environment(number: int) -> dict[str, str]:
    """What makes worker ``number`` see the one CUDA device that is its own, where there are several."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")] if listed else [str(k) for k in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[number % count]}


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process that is started here is deaf until it says what is to be done with signals; none is lost."""
    resource_tracker.ensure_running()  # spawning starts it, and that would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, environment: dict[str, str]) -> None:
    """A worker's whole life: train what comes until there is nothing more, or the one who asks is gone."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.environ.update(environment)  # before CUDA is initialised
    load, stopped = _loader(), _Ear(connection)

    def tell(fraction: float) -> None:
        with suppress(OSError):
            connection.send(fraction)

    with suppress(EOFError, OSError):
        while (task := connection.recv()) is not None:
            try:
                connection.send(_train(task, load, tell, stopped))
            except Interrupted as interrupted:
                connection.send(interrupted)
                return


class _Ear:
    """Whether a worker is to stop: whatever comes while it trains says so, and an end that is closed, too."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.listened = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self.listened < LISTEN_INTERVAL:
            return False
        self.listened = now
        return self.connection.poll()


class _Watch(Display):
    """Tells how much of a run is done."""

    def __init__(self, epochs: int, tell: Callable[[float], None]) -> None:
        self.epochs, self.tell = epochs, tell

    def progress(self, epoch: int, progress: Progress) -> None:
        self.tell((epoch - 1 + progress.step / progress.steps) / self.epochs)


def _train(task: Task, load: Load, tell: Callable[[float], None], stopped: Callable[[], bool]) -> Outcome:
    watch = _Watch(task.config.train.epochs, tell)
    try:
        data = load(task.config)
        run, _ = train_member(task.folder, task.config, task.begun, watch, stopped, data, task.threads)
    except Interrupted:
        raise
    except MbmError as error:
        return Outcome(reason=str(error))
    except Exception as error:  # of one run, which may not be that of the next
        return Outcome(reason=f"{type(error).__name__}: {error}")
    return Outcome(run=run.name)


def _loader() -> Load:
    """Loads a config's data, unless it is what the run before had."""
    load = lru_cache(maxsize=1)(load_mnist)

    def load_for(config: Config) -> tuple[Split, Split]:
        data = config.data
        root = Path(data.root) if data.root else None
        return load(setup.prepare(config), root, data.train_limit, data.test_limit)

    return load_for


def _mark_failed(task: Task, reason: str) -> None:
    """In the summary of a run whose process cannot do it any more."""
    with suppress(MbmError):  # how the worker ended is what is to be told
        run = task.begun or members(task.folder).get(task.config.name)
        if run is not None:
            run.write_json("summary.json", {**run.summary(), "status": "failed", "reason": reason})
