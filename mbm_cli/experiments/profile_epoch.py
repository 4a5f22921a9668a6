"""`mbm profile epoch`: run one real epoch, and say where its time goes."""

import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mbm_cli import config as configs
from mbm_cli.config import Config
from mbm_cli.device import environment
from mbm_cli.epoch import epoch_order
from mbm_cli.experiments import lifecycle
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.experiments.profile_conv import measure_ceiling, padding_of
from mbm_cli.models import describe_layers
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.nn import ApproxConv2d, ApproxLinear
from mbm_cli.runs import Run
from mbm_cli.training import PHASES, Range, Split, Trainer, learning_rates, no_range

COSTLIEST = 10
LIBRARIES = {"Cudnn": "cuDNN", "Mkldnn": "oneDNN"}  # PyTorch's names of its convolutions' backends
EXACT, GENERATED = "exact", "GeneratedBackwardFor_mbm_"
WARMUP_STEPS = 10
PROFILED_STEPS = 50


@dataclass(frozen=True)
class LayerTimes:
    """An approximate layer's work and times in the epoch; on a GPU the times of its kernels.

    ``multiplications`` are those of an image. The rate and its share of the ceiling are ``None`` where nothing was
    measured, the share also for the exact product. ``backward_library`` is what computes the gradients: a library, or
    the kernels with these multipliers.
    """

    name: str
    multiplier: str
    multiplications: int
    forward_seconds: float
    backward_seconds: float
    macs_per_second: float | None
    share_of_ceiling: float | None
    backward_library: str


@dataclass(frozen=True)
class Costly:
    """An operator, or on a GPU a kernel: calls, seconds of its own, share of all such seconds."""

    name: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class EpochProfile:
    """``profile.json`` of `mbm profile epoch`; seconds throughout.

    Attributes:
        epoch_seconds, eager_epoch_seconds, clocked_epoch_seconds: of an epoch as training runs it, step by step, and
            step by step with a clock at each phase.
        busy_seconds, phase_kernels: on a GPU, the kernels' time in an epoch, and in each phase.
        clock_overhead: what the clocks cost, as a fraction.
        phases: of the clocked epoch; "everything else" is what remains.
        costliest: of the profiled steps.
    """

    config: str
    model: str
    multiplier: str
    device: str
    device_name: str
    threads: int
    steps: int
    cuda_graph: bool
    epoch_seconds: float
    busy_seconds: float | None
    eager_epoch_seconds: float
    clocked_epoch_seconds: float
    clock_overhead: float
    phases: dict[str, float]
    phase_kernels: dict[str, float] | None
    layers: list[LayerTimes]
    profiled_steps: int
    costliest: list[Costly]
    ceilings_macs_per_second: dict[str, float]


def profile_epoch(
    config: Config, output: Path, watch: Watch | None = None, stopped: Stopped = never
) -> Finished[EpochProfile]:
    """Run an epoch as training runs it, then one step by step with a clock at each phase.

    The phases' clocks run through the whole epoch. PyTorch's profiler, which would slow it down, watches some more
    steps: for the operators, for ``trace.json``, and on a GPU for the kernels' times, which are scaled to the epoch.
    The run's folder gets ``profile.json`` and ``trace.json``.

    Raises:
        RequestError, RunError: as ``mbm_cli.experiments.train.train``.
        Interrupted: ``stopped`` returned true; nothing is kept.
    """
    config, device = lifecycle.begin(config)
    data = lifecycle.load_data(config.data, device)
    run = Run.create(output, f"{config.name}-profile-epoch")
    with run.kept_if_complete():
        run.write("config.yaml", configs.dump(config))
        run.write_json("environment.json", environment(device))
        result, trace = _measure(config, device, data, watch or Watch(), stopped)
        run.write_json("profile.json", result)
        run.write("trace.json", trace)
    return Finished(run, result)


def _measure(
    config: Config, device: torch.device, data: tuple[Split, Split], watch: Watch, stopped: Stopped
) -> tuple[EpochProfile, bytes]:
    """Return the result, and the trace for Perfetto."""
    on_gpu = device.type == "cuda"
    order, rates = epoch_order(len(data[0]), config.seed, 1), _rates(config, len(data[0]))

    watch.status("an epoch as training runs it")
    trainer = lifecycle.build_trainer(config, device, data)
    if trainer.cuda_graph:
        trainer.epoch(order, rates, stopped=stopped)  # the first one is slower: graphs are uploaded
    else:
        _some_steps(trainer, config, WARMUP_STEPS)
    real = trainer.epoch(order, rates, stopped=stopped)
    busy = _busy_seconds(trainer, order, rates) if on_gpu else None
    plain = real  # on the CPU, training runs step by step
    if trainer.cuda_graph:
        watch.status("the same epoch, step by step")
        trainer = lifecycle.build_trainer(config.with_train(cuda_graph="off"), device, data)
        _some_steps(trainer, config, WARMUP_STEPS)
        plain = trainer.epoch(order, rates, stopped=stopped)

    watch.status("the same epoch, step by step, a clock at each phase")
    clock = Clock(device)
    trainer.phase = clock
    with _layer_ranges(trainer.model, clock):
        clocked = trainer.epoch(order, rates, stopped=stopped)
    seconds = clock.seconds()
    phases = {phase: seconds.get(phase, 0.0) for phase in PHASES}

    watch.status(f"{PROFILED_STEPS} steps under PyTorch's profiler")
    events, trace, share = _profiled_steps(trainer, config, device)
    if on_gpu:  # clocks would measure how long the launches of a layer take
        kernels = {e.key: e.device_time_total / 1e6 / share for e in events if e.device_type == DeviceType.CPU}

    watch.status("the ceilings")
    ceilings = {
        m: measure_ceiling(m, device, config.train.matrix_units)
        for m in config.model.multiplier.distinct()
        if not (m.is_exact or m.is_integer)
    }
    result = EpochProfile(
        config=config.name,
        model=str(config.model.name),
        multiplier=config.model.products,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if on_gpu else "the CPU",
        threads=torch.get_num_threads(),
        steps=trainer.steps,
        cuda_graph=on_gpu and config.train.cuda_graph == "auto",
        epoch_seconds=real.epoch_seconds,
        busy_seconds=busy,
        eager_epoch_seconds=plain.epoch_seconds,
        clocked_epoch_seconds=clocked.epoch_seconds,
        clock_overhead=clocked.epoch_seconds / plain.epoch_seconds - 1,
        phases={**phases, "everything else": clocked.epoch_seconds - sum(phases.values())},
        phase_kernels={phase: kernels.get(phase, 0.0) for phase in PHASES} if on_gpu else None,
        layers=_layers(trainer, data, kernels if on_gpu else seconds, config, ceilings),
        profiled_steps=min(PROFILED_STEPS, trainer.steps),
        costliest=_costliest(events, on_gpu),
        ceilings_macs_per_second={str(m): ceiling for m, ceiling in ceilings.items()},
    )
    return result, trace


class Clock:
    """Adds up how long each named range takes: ``with clock("forward"): ...``.

    On a GPU the times are the stream's, between two of its points, and include waiting for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._ranges: dict[str, list[_ClockRange]] = defaultdict(list)

    def __call__(self, name: str) -> "_ClockRange":
        opened = _ClockRange(self._stream)
        self._ranges[name].append(opened)
        return opened

    def seconds(self) -> dict[str, float]:
        """Return the sum of each range's times; wait for the device."""
        if self._stream is not None:
            self._stream.synchronize()
        return {name: sum(r.seconds() for r in ranges) for name, ranges in self._ranges.items()}


class _ClockRange:
    """Entered and left once; as cheap as possible, because its cost lies between the ranges."""

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


def _rates(config: Config, images: int) -> Tensor:
    steps = math.ceil(images / config.data.batch_size)
    return learning_rates(config.optimizer.lr, config.optimizer.schedule, 0, steps, steps)


def _some_steps(trainer: Trainer, config: Config, steps: int, phase: Range = no_range) -> float:
    """Run some more steps eagerly, and evaluate as large a part of the test set; return the part."""
    images = min(steps * config.data.batch_size, len(trainer.train))
    share = images / len(trainer.train)
    test = max(1, round(share * len(trainer.test)))
    part = trainer.on(trainer.train[:images], trainer.test[:test], phase=phase)
    part.epoch(torch.arange(images), _rates(config, images))
    return share


def _busy_seconds(trainer: Trainer, order: Tensor, rates: Tensor) -> float:
    """Return the sum of the kernels' times in an epoch as training runs it."""
    with _profiler(ProfilerActivity.CUDA) as profiler:
        trainer.epoch(order, rates)
    events = profiler.key_averages()
    return sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA) / 1e6


def _profiler(*activities: ProfilerActivity) -> profile:
    # Its library reports every start, and a missing GPU, on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=activities, acc_events=True)  # avoids a warning about a second cycle


def _profiled_steps(trainer: Trainer, config: Config, device: torch.device) -> tuple[Any, bytes, float]:
    """Profile some steps; return averages by name, the trace, and the share of the epoch that they are."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _layer_ranges(trainer.model, record_function), _profiler(*activities) as profiler:
        share = _some_steps(trainer, config, PROFILED_STEPS, record_function)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        return profiler.key_averages(), Path(folder, "trace.json").read_bytes(), share


@contextmanager
def _layer_ranges(model: nn.Module, range_of: Range) -> Iterator[None]:
    """Put a range around each layer's forward pass in training, and around its backward pass."""
    open_ranges: dict[str, AbstractContextManager[object]] = {}
    hooks = []

    def begin(name: str) -> None:
        open_ranges[name] = range_of(name)
        open_ranges[name].__enter__()

    def end(name: str) -> None:
        if name in open_ranges:
            open_ranges.pop(name).__exit__(None, None, None)

    def watch(layer: str, module: nn.Conv2d | ApproxLinear) -> None:
        forward, backward = f"forward: {layer}", f"backward: {layer}"

        def after_forward(module: nn.Module, inputs: object, output: Tensor) -> None:
            end(forward)
            if output.requires_grad:  # the layer's backward pass begins with the gradient of its output
                output.register_hook(lambda grad: begin(backward))

        hooks.append(module.register_forward_pre_hook(lambda m, x: begin(forward) if m.training else None))
        hooks.append(module.register_forward_hook(after_forward))
        hooks.append(module.weight.register_post_accumulate_grad_hook(lambda weight: end(backward)))

    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d | ApproxLinear):
            watch(layer, module)
    try:
        # Backward in this thread, so that ranges hold its kernels, too.
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(
    trainer: Trainer,
    data: tuple[Split, Split],
    seconds: dict[str, float],
    config: Config,
    ceilings: dict[Multiplier, float],
) -> list[LayerTimes]:
    """Return the times of the approximate layers."""
    layers = []
    for layer in describe_layers(trainer.model, data[0].images.shape[1:]):
        module = trainer.model.get_submodule(layer.name)
        if not isinstance(module, ApproxConv2d | ApproxLinear):
            continue
        forward, backward = seconds.get(f"forward: {layer.name}", 0.0), seconds.get(f"backward: {layer.name}", 0.0)
        rate = layer.multiplications * len(data[0]) / forward if forward else None
        ceiling = ceilings.get(module.multiplier)
        library = "matrix product"
        if isinstance(module, ApproxConv2d):
            x = data[0].images.new_zeros(config.data.batch_size, *layer.input_shape)
            arguments = module.stride, padding_of(module), module.dilation, False, (0, 0), module.groups
            backend = str(torch._C._select_conv_backend(x, module.weight, module.bias, *arguments))
            library = LIBRARIES.get(backend.rpartition(".")[2], backend)
        layers.append(
            LayerTimes(
                name=layer.name,
                multiplier=str(module.multiplier),
                multiplications=layer.multiplications,
                forward_seconds=forward,
                backward_seconds=backward,
                macs_per_second=rate,
                share_of_ceiling=rate / ceiling if rate and ceiling else None,
                backward_library=library if layer.backward == EXACT else layer.backward,
            )
        )
    return layers


def _costliest(events: Any, on_gpu: bool) -> list[Costly]:
    """Return the operators, on a GPU the kernels, that took the most time themselves."""
    on_host = {event.key for event in events if event.device_type == DeviceType.CPU}
    calls: dict[str, int] = {}
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        name, own = event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if on_gpu:
            if name in on_host:  # a range is reported on the host, and on the GPU as if it were a kernel
                continue
        elif name.startswith(GENERATED):
            # Where an operator has gradients, its kernels run in an event of this name.
            seconds[f"mbm::{name.removeprefix(GENERATED).removesuffix('_default')}"] += own / 1e6
            continue
        elif "::" not in name or name.startswith("autograd::"):
            # Ranges are not operators, and autograd's own events count the operators in layers' ranges once more.
            continue
        seconds[name] += own / 1e6
        calls[name] = event.count
    everything = sum(seconds[name] for name in calls)
    ordered = sorted(calls, key=lambda name: -seconds[name])[:COSTLIEST]
    return [Costly(name, calls[name], seconds[name], seconds[name] / everything) for name in ordered]
