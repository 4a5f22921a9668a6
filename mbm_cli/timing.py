"""How long a call takes, or the parts of a loop, on the CPU and on a GPU."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

LEAST_SECONDS = 0.3
LEAST_REPEATS = 7
GRAPHED_CALLS = 20  # in one CUDA graph, so that its launch does not count


class Clock:
    """Adds up how long each named range takes: ``with clock("forward"): ...``.

    On a GPU the times are the stream's, from one point of it to another, waiting for the host included.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._ranges: dict[str, list[_Range]] = defaultdict(list)

    def __call__(self, name: str) -> "_Range":
        opened = _Range(self._stream)
        self._ranges[name].append(opened)
        return opened

    def seconds(self) -> dict[str, float]:
        """Of each range, over all times that it was entered; waits for the device."""
        if self._stream is not None:
            self._stream.synchronize()
        return {name: sum(r.seconds() for r in ranges) for name, ranges in self._ranges.items()}


class _Range:
    """Entered and left once; as cheap as it can be, because what it costs is between the ranges."""

    __slots__ = ("_end", "_start", "_stream")

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *raised: object) -> None:
        self._end = self._now()

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def seconds(self) -> float:
        return self._end - self._start if self._stream is None else self._start.elapsed_time(self._end) / 1e3


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
