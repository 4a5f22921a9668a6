"""How long a call takes, on the CPU and on a GPU."""

import statistics
import time
from collections.abc import Callable

import torch

LEAST_SECONDS = 0.3
LEAST_REPEATS = 7
GRAPHED_CALLS = 20  # in one CUDA graph, so that its launch does not count


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
