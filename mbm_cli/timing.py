"""How long a call takes, or the parts of a loop, on the CPU and on a GPU."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

LEAST_SECONDS = 0.3
LEAST_REPEATS = 7
GRAPHED_CALLS = 20  # in one CUDA graph, so that its launch does not count


class Clock:
    """Adds up how long each named range takes: ``with clock("forward"): ...``.

    On a GPU the times are the stream's, from one point of it to another, waiting for the host included.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ranges: dict[str, list[tuple]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._ranges[name].append((start, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Of each range, over all times that it was entered; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return {
            name: sum(a.elapsed_time(b) / 1e3 if self._on_gpu else b - a for a, b in ranges)
            for name, ranges in self._ranges.items()
        }


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call over repeats, after a warm-up.

    On a GPU the call is captured in a CUDA graph and replayed, so that the time is the kernels', not the host's.
    """
    call()
    call()
    if device.type == "cuda":
        return _median(_graph_timer(call, device))
    return _median(lambda: _host_seconds(call))


def median_eager_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The same without a graph: what a caller waits, launches included."""
    call()
    call()

    def timed() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _median(lambda: _host_seconds(timed))


def _median(seconds: Callable[[], float]) -> float:
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < LEAST_REPEATS or time.perf_counter() - start < LEAST_SECONDS:
        times.append(seconds())
    return statistics.median(times)


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _graph_timer(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPHED_CALLS):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / GRAPHED_CALLS

    seconds()
    return seconds
