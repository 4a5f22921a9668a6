"""Several computations in turn, in one process and one thread: on a GPU each has a stream of its own, so they overlap.

A computation is a generator that yields wherever it can give up its turn, and returns its result. On a GPU a turn
launches work without waiting for it, so that the work of other turns fills what one small network leaves idle.
"""

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from mbm_cli.errors import Interrupted, MbmError

R = TypeVar("R")
Turns = Generator[None, None, R]

STEPS = 16  # of a turn: a change of turns costs more than launching a step
MOST = 16  # computations at once
SPARE = 2  # times the memory of one computation that must be free before another begins


def finish(turns: Turns[R]) -> R:
    """Compute to the end without giving up a turn; return the result."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            result: R = end.value
            return result


def take_turns(
    tasks: Sequence[Any],
    begin: Callable[[Any], Turns[object]],
    at_once: int | None,
    done: Callable[[Any, str | None], None],
) -> None:
    """Compute all tasks, up to ``at_once`` in turn; one that fails does not stop the others.

    A task computes what it would alone: of several at once, each has its own random numbers, and its own settings of
    PyTorch, and on the current CUDA device a stream.

    Args:
        begin: starts to compute a task.
        at_once: ``None`` is as many as memory allows, up to 16.
        done: called with a task and, if it failed, the reason.

    Raises:
        Interrupted: a task was interrupted. The others had their turns until they were, too.
    """
    waiting, active, interrupted = deque(tasks), list[_Computation](), False
    most, device = at_once or MOST, None
    if most > 1 and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    memory, slots = _Memory(device), [_Slot(device) for _ in range(min(most, len(tasks)))]
    try:
        while active or (waiting and not interrupted):
            now = most if at_once else min(most, len(active) + 1)  # what one takes is known after its turn
            while waiting and not interrupted and len(active) < now and (memory.has_room(len(active)) or at_once):
                active.append(_Computation(waiting.popleft(), begin, slots.pop()))
            for one in active.copy():
                if one.go_on():
                    continue
                active.remove(one)
                slots.append(one.slot)
                if one.reason is not None:
                    gc.collect()  # what a failed computation had on the device
                if one.is_interrupted:
                    interrupted = True
                elif one.lacked_memory and active:
                    most = len(active)  # which have it: this one is tried again when another has ended
                    waiting.append(one.task)
                else:
                    done(one.task, one.reason)
    finally:
        for one in active:
            one.turns.close()
    if interrupted:
        raise Interrupted("interrupted")


class _Computation:
    """A task that is being computed, and why it ended if it failed."""

    def __init__(self, task: Any, begin: Callable[[Any], Turns[object]], slot: "_Slot") -> None:
        self.task, self.turns, self.slot = task, begin(task), slot
        self.reason: str | None = None
        self.is_interrupted = self.lacked_memory = False

    def go_on(self) -> bool:
        """Take a turn; return whether more is to be computed."""
        with self.slot.turn():
            try:
                for _ in range(STEPS):
                    next(self.turns)
            except StopIteration:
                return False
            except Exception as error:  # it is not kept: its traceback holds all that was computed with
                known = isinstance(error, MbmError)
                self.reason = str(error) if known else f"{type(error).__name__}: {error}"
                self.is_interrupted = isinstance(error, Interrupted)
                self.lacked_memory = is_out_of_memory(error.__cause__ or error)
                return False
        return True


class _Slot:
    """What a computation has of its own: a stream, random numbers, and the settings of PyTorch that a run can have."""

    def __init__(self, device: torch.device | None) -> None:
        self._stream = torch.cuda.Stream(device) if device else None
        self._state = _state()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # for what is on the device already
            self._generator = torch.cuda.default_generators[self._stream.device_index]
            self._random = self._generator.clone_state()

    @contextmanager
    def turn(self) -> Iterator[None]:
        shared_state, shared_random = _state(), None
        _set_state(self._state)
        if self._stream is not None:
            # Graphs that are captured in a turn keep this generator state, and advance it when they are replayed.
            shared_random = self._generator.graphsafe_get_state()
            self._generator.graphsafe_set_state(self._random)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if shared_random is not None:
                self._random = self._generator.graphsafe_get_state()  # another one after a failed capture
                self._generator.graphsafe_set_state(shared_random)
            self._state = _state()
            _set_state(shared_state)


def _state() -> tuple[Any, ...]:
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = cuda.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    return torch.get_rng_state(), torch.get_num_threads(), *settings


def _set_state(state: tuple[Any, ...]) -> None:
    random, threads, *settings = state
    torch.set_rng_state(random)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = settings[:2]
    torch.backends.cudnn.deterministic = settings[2]


class _Memory:
    """The memory of a GPU, from which computations take equal parts."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._before = self._free() if device else 0

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def has_room(self, active: int) -> bool:
        """Return whether another computation fits beside those that are active; the first one's peak is a new one."""
        if active == 0 and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        if active == 0 or self._device is None:
            return active == 0
        free = self._free()
        return free * active > SPARE * (self._before - free)


def in_turn(device: torch.device) -> bool:
    """Return whether several computations take turns on a CUDA device, whose memory they share, and this is one."""
    return device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


def is_out_of_memory(error: BaseException | None) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
