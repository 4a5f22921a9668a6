"""Where the runs of a sweep are computed: one after the other in this process, several at once in others, on Slurm."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mbm_cli import slurm
from mbm_cli.errors import Interrupted, MbmError

# What a terminal or a batch system sends to every process of a job; only the parent acts on it.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK_INTERVAL = 0.1  # seconds between two looks at what the workers have written

Stopped = Callable[[], bool]
# Computes a task. Worker processes import it by its name, and get tasks by pickling.
Work = Callable[[Any, Stopped], object]
Done = Callable[[Any, str | None], None]


def launch(
    tasks: Sequence[Any],
    work: Work,
    jobs: int,
    folder: Path,
    look: Callable[[Any], None],
    done: Done,
    stopped: Stopped,
    on: slurm.Slurm | None = None,
) -> None:
    """Compute all tasks, up to ``jobs`` at once; a task that fails does not stop the others.

    With several jobs each has a process; on several CUDA devices, that of job k uses device k modulo their number. A
    task whose process dies is computed once more, in a new process. On Slurm each of the jobs is a lane of
    `mbm_cli.slurm`.

    Args:
        work: computes a task; called with it, and with what says whether to stop.
        folder: where worker processes see a file for as long as they are to go on.
        look: called in this process, a few times a second, with each task that another process computes.
        done: called in this process with a task and, if it failed, the reason.
        stopped: called before every step, with several jobs several times a second.

    Raises:
        Interrupted: ``stopped`` returned true.
    """
    permission = folder.absolute() / f".computing-{os.getpid()}"
    slurm.end_lanes(permission.parent)  # of a process that was killed
    if on is not None:
        slurm.launch_lanes(tasks, partial(_attempt, work=work), jobs, permission, look, done, stopped, on)
        return
    if jobs > 1:
        _launch_workers(tasks, work, jobs, permission, look, done, stopped)
        return
    for task in tasks:
        done(task, _attempt(task, work, stopped))


def _attempt(task: Any, work: Work, stopped: Stopped) -> str | None:
    """Compute a task; return the reason if it fails."""
    try:
        work(task, stopped)
    except Interrupted:
        raise
    except MbmError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _launch_workers(
    tasks: Sequence[Any],
    work: Work,
    jobs: int,
    permission: Path,
    look: Callable[[Any], None],
    done: Done,
    stopped: Stopped,
) -> None:
    """Compute tasks in worker processes, which stop when the file ``permission`` is gone."""
    waiting = deque((task, 1) for task in tasks)  # with the number of the attempt
    slots = [_Slot(number) for number in range(min(jobs, len(tasks)))]
    idle, running = slots.copy(), dict[Future[str | None], tuple[_Slot, Any, int]]()
    revoked = partial(_is_gone, permission)
    # After a kill Python's resource tracker removes the pools' semaphores, and would warn of them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    permission.touch()  # to remove it works on a full disk, too; what a killed process leaves, Run.hold removes
    try:
        while running or (waiting and not revoked()):
            while waiting and idle and not revoked():
                slot, (task, attempt) = idle.pop(), waiting.popleft()
                running[slot.submit(_attempt, task, work, revoked)] = slot, task, attempt
            for future in wait(running, LOOK_INTERVAL, FIRST_COMPLETED).done:
                slot, task, attempt = running.pop(future)
                idle.append(slot)
                error = future.exception()
                died = slot.close() if isinstance(error, BrokenProcessPool) else None
                if isinstance(error, Interrupted):  # its worker sees no file: stop the others, too
                    permission.unlink(missing_ok=True)
                if isinstance(error, Interrupted) or (died and attempt == 1):
                    waiting.append((task, attempt + 1))
                else:
                    done(task, f"{task}: its process {died}" if died else future.result())
                if not waiting:
                    slot.close()  # which frees its memory
            for _, task, _ in running.values():
                look(task)
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
        self.environment = _device_environment(number)
        self.pool: ProcessPoolExecutor | None = None
        self.born: set[BaseProcess] = set()

    def submit(self, *call: Any) -> Future[str | None]:
        if self.pool is not None:
            with suppress(BrokenProcessPool):  # its process died between two tasks
                return self.pool.submit(*call)
            self.close()
        # Spawned: OpenMP's threads and a CUDA context do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, _begin, (self.environment,))
        before = set(multiprocessing.active_children())
        with _signals_blocked():
            future = self.pool.submit(*call)
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
        if code >= 0:
            return f"ended with exit code {code}"
        killed = " (is there enough memory?)" if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{killed}"


def _device_environment(number: int) -> dict[str, str]:
    """Return the variables with which worker ``number`` sees one CUDA device of several."""
    import torch  # not at the top: a worker sets these variables before

    count = torch.cuda.device_count()
    if count < 2:
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")] if listed else [str(k) for k in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[number % count]}


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals, which a process started here inherits: none reaches it before it ignores them, none is lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(environment: dict[str, str]) -> None:
    """Prepare a worker process, before it gets tasks, and with them PyTorch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End at once when the parent is gone: a resume computes what this process holds."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
