"""Where the runs of a sweep are computed: one after the other in this process, several at once in others, on Slurm."""

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mbm_cli import slurm
from mbm_cli.config import Engine
from mbm_cli.errors import Interrupted
from mbm_cli.slurm import INTERRUPTED, LOOK_INTERVAL, Attempt, Done, Look, Stop
from mbm_cli.turns import MOST, Turns, take_turns

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a terminal sends them to all; only the parent acts on them
Work = Callable[[Any, Stop], Turns]  # computes a task; workers import it by its name, and get tasks by pickling


def launch(tasks: list, work: Work, engine: Engine, folder: Path, look: Look, done: Done, stopped: Stop) -> None:
    """Compute all tasks, several at once; a task that fails does not stop the others.

    With several jobs each has a process, or a lane of a cluster (`mbm_cli.slurm`); that of job k uses CUDA device k
    modulo their number. In a process, several tasks can take turns (`mbm_cli.turns`). A task whose process dies is
    computed once more, by itself. Processes go on while they see a file in ``folder``. ``look`` is called often, with
    tasks that another process computes, ``done`` with a task and, if it failed, the reason.
    """
    permission = folder.absolute() / f".computing-{os.getpid()}"
    slurm.end_lanes(permission.parent)  # of a process that was killed
    if engine.on is None and engine.jobs == 1:
        return take_turns(tasks, lambda task: work(task, stopped), engine.at_once, done)
    count = engine.jobs * max(1, -(-len(tasks) // (engine.jobs * (engine.at_once or MOST))))  # as many for each job
    groups = [tasks[first::count] for first in range(min(count, len(tasks)))]  # neighbours take about the same time
    launch_groups = slurm.launch_lanes if engine.on else _launch_workers
    launch_groups(groups, partial(_attempt, work, engine.at_once), engine, permission, look, done, stopped)


def _attempt(work: Work, at_once: int | None, tasks: list, stopped: Stop) -> list[str | None]:
    reasons: list[str | None] = [INTERRUPTED] * len(tasks)
    with suppress(Interrupted):
        take_turns(range(len(tasks)), lambda place: work(tasks[place], stopped), at_once, reasons.__setitem__)
    return reasons


def _launch_workers(
    groups: list[list], attempt: Attempt, engine: Engine, permission: Path, look: Look, done: Done, stopped: Stop
) -> None:
    """Compute groups of tasks in worker processes, which stop when the file ``permission`` is gone."""
    waiting = deque((group, 1) for group in groups)  # with the number of the attempt
    slots = [_Slot(number) for number in range(min(engine.jobs, len(groups)))]
    idle, running = slots.copy(), dict[Future[list[str | None]], tuple[_Slot, list, int]]()
    revoked = partial(_is_gone, permission)
    # After a kill Python's resource tracker removes the pools' semaphores, and would warn of them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    permission.touch()  # to remove it works on a full disk, too; what a killed process leaves, Run.hold removes
    try:
        while running or (waiting and not revoked()):
            while waiting and idle and not revoked():
                slot, (group, number) = idle.pop(), waiting.popleft()
                running[slot.submit(attempt, group, revoked)] = slot, group, number
            for future in wait(running, LOOK_INTERVAL, FIRST_COMPLETED).done:
                slot, group, number = running.pop(future)
                idle.append(slot)
                died = slot.close() if isinstance(future.exception(), BrokenProcessPool) else None
                lost = [INTERRUPTED if number == 1 else f"{task}: its process {died}" for task in group]
                for task, reason in zip(group, lost if died else future.result(), strict=True):
                    waiting.append(([task], number + 1)) if reason == INTERRUPTED else done(task, reason)
                if not waiting:
                    slot.close()  # which frees its memory
            for _, group, _ in running.values():
                look(group)
            if stopped():
                permission.unlink(missing_ok=True)
    finally:
        permission.unlink(missing_ok=True)
        for slot in slots:
            slot.close()
    if waiting:
        raise Interrupted("interrupted")


def _is_gone(file: Path) -> bool:
    return not os.path.exists(file)


class _Slot:
    """A pool of one process, so that its death concerns one task; a new one follows it."""

    def __init__(self, number: int) -> None:
        import torch  # not at the top: a worker first sets which one of several CUDA devices it sees

        count = torch.cuda.device_count()
        names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
        self.environment = {} if count < 2 else {"CUDA_VISIBLE_DEVICES": names[number % count].strip()}
        self.pool: ProcessPoolExecutor | None = None
        self.born: set[Any] = set()

    def submit(self, *call: Any) -> Future[list[str | None]]:
        if self.pool is not None:
            with suppress(BrokenProcessPool):  # its process died between two tasks
                return self.pool.submit(*call)
            self.close()
        # Spawned: OpenMP's threads and a CUDA context do not survive a fork.
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (self.environment,))
        before = set(multiprocessing.active_children())
        # A process inherits what is blocked: no signal reaches it before it ignores them, and none is lost.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            future = self.pool.submit(*call)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.born = set(multiprocessing.active_children()) - before
        return future

    def close(self) -> str | None:
        """Wait for the end of the process, if there is one; return how it ended."""
        if self.pool is None:
            return None
        with suppress(BrokenProcessPool):
            self.pool.submit(os._exit, 0)  # to tear down PyTorch's modules takes a second
        self.pool.shutdown()
        self.pool = None
        code = next((process.exitcode for process in self.born), None)
        if code is None:  # it ended before it was listed
            return "ended at once"
        killed = " (is there enough memory?)" if code == -signal.SIGKILL else ""
        return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}{killed}"


def _begin(environment: dict[str, str]) -> None:
    """Prepare a worker process, before it gets tasks."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(environment)
    gc.set_threshold(100_000)  # as `mbm_cli.cli.main` does, for a quick start
    # It ends at once when the parent is gone: a resume computes what it holds.
    gone = multiprocessing.parent_process().join  # type: ignore[union-attr]
    threading.Thread(target=lambda: os._exit(gone() or 1), daemon=True).start()
