"""`mbm profile epoch`: one real epoch, and where its time went."""

import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mbm_cli import config as configs
from mbm_cli import plots
from mbm_cli.config import Config
from mbm_cli.data import Split, epoch_order
from mbm_cli.environment import environment
from mbm_cli.experiments import setup
from mbm_cli.experiments.profile import backward_paths, measure_ceiling
from mbm_cli.models import describe_layers
from mbm_cli.multipliers import Multiplier
from mbm_cli.nn import MBMConv2d
from mbm_cli.runs import Run
from mbm_cli.timing import Clock, median_eager_seconds
from mbm_cli.training import PHASES, Range, Trainer, learning_rates, no_range

NAIVE_PRODUCTS = 200_000  # a tenth of a second in Python
COSTLIEST = 10
LIBRARIES = {"Cudnn": "cuDNN", "Mkldnn": "oneDNN"}  # as PyTorch calls its convolutions' backends
WARMUP_STEPS = 10
PROFILED_STEPS = 50


def profile_epoch(
    config: Config,
    output: Path,
    threads: int | None = None,
    report: Callable[[str], None] = lambda doing: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Run, dict[str, Any]]:
    """Run an epoch as training runs it, then one step by step with a clock at each phase, and tell where the time went.

    The phases' clocks run through the whole epoch. PyTorch's profiler, which would slow it down, watches some steps
    more: for the operators, for ``trace.json``, and on a GPU for the kernels' times, which are told as if for all steps
    of the epoch. Seconds throughout; the run's folder gets ``profile.json``, ``profile.png`` and ``trace.json``.

    Raises:
        RequestError, RunError: as ``train`` does.
        Interrupted: ``stopped`` said so; nothing is kept then.
    """
    device = setup.prepare(config, threads)
    data = setup.load_data(config, device)
    run = Run.create(output, f"{config.name}-profile-epoch")
    with run.kept_if_complete():
        run.write("config.yaml", configs.dump(config))
        run.write_json("environment.json", environment(device))
        result, trace = _measure(config, device, data, report, stopped)
        run.write_json("profile.json", result)
        run.write("profile.png", plots.epoch_profile(result))
        run.write("trace.json", trace)
    return run, result


def _measure(
    config: Config,
    device: torch.device,
    data: tuple[Split, Split],
    report: Callable[[str], None],
    stopped: Callable[[], bool],
) -> tuple[dict[str, Any], bytes]:
    """The result, and the trace for Perfetto."""
    on_gpu = device.type == "cuda"
    order, rates = epoch_order(len(data[0]), config.seed, 1), _rates(config, len(data[0]))

    report("an epoch as training runs it")
    trainer = setup.build_trainer(config, device, data)
    if trainer.cuda_graph:
        trainer.epoch(order, rates, stopped=stopped)  # its first one is slower: graphs are uploaded
    else:
        _some_steps(trainer, config, WARMUP_STEPS)
    real = trainer.epoch(order, rates, stopped=stopped)
    busy = _busy_seconds(trainer, order, rates) if on_gpu else None
    plain = real  # on the CPU, training runs step by step
    if trainer.cuda_graph:
        report("the same epoch, step by step")
        off = config.train.model_copy(update={"cuda_graph": "off"})
        trainer = setup.build_trainer(config.model_copy(update={"train": off}), device, data)
        _some_steps(trainer, config, WARMUP_STEPS)
        plain = trainer.epoch(order, rates, stopped=stopped)

    report("the same epoch, step by step, a clock at each phase")
    clock = Clock(device)
    trainer.phase = clock
    with _layer_ranges(trainer.model, clock):
        clocked = trainer.epoch(order, rates, stopped=stopped)
    seconds = clock.seconds()
    phases = {phase: seconds.get(phase, 0.0) for phase in PHASES}

    report(f"{PROFILED_STEPS} steps under PyTorch's profiler")
    events, trace, share = _profiled_steps(trainer, config, device)
    if on_gpu:  # a layer's clock would tell how long its launches took
        kernels = {e.key: e.device_time_total / 1e6 / share for e in events if e.device_type == DeviceType.CPU}
    layer_seconds = kernels if on_gpu else seconds

    report("the ceiling, the three ways backward, the naive loop")
    ceilings = {m: measure_ceiling(m, device) for m in config.model.multiplier.distinct() if not m.is_exact}
    layers = _layers(trainer, data, layer_seconds, config, ceilings)
    naive = _naive_products_per_second()
    forward_products = sum(layer["multiplications"] for layer in layers) * len(data[0])
    result = {
        "config": config.name,
        "model": config.model.name,
        "multiplier": str(config.model.multiplier),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else "the CPU",
        "threads": torch.get_num_threads(),
        "steps": trainer.steps,
        "cuda_graph": on_gpu and config.train.cuda_graph == "auto",
        "epoch_seconds": real.epoch_seconds,
        "busy_seconds": busy,
        "eager_epoch_seconds": plain.epoch_seconds,
        "clocked_epoch_seconds": clocked.epoch_seconds,
        "clock_overhead": clocked.epoch_seconds / plain.epoch_seconds - 1,
        "phases": {**phases, "everything else": clocked.epoch_seconds - sum(phases.values())},
        "phase_kernels": {phase: kernels.get(phase, 0.0) for phase in PHASES} if on_gpu else None,
        "layers": layers,
        "profiled_steps": min(PROFILED_STEPS, trainer.steps),
        "costliest": _costliest(events, on_gpu),
        "ceilings_macs_per_second": {str(m): ceiling for m, ceiling in ceilings.items()},
        "backward_paths": _compare_backward(trainer.model, data[0], config.data.batch_size, device),
        "naive": {
            "products_per_second": naive,
            "epoch_seconds": forward_products / naive,
            "ratio": forward_products / naive / real.epoch_seconds,
        },
    }
    result["answers"] = _answers(result)
    return result, trace


def _rates(config: Config, images: int) -> Tensor:
    steps = math.ceil(images / config.data.batch_size)
    return learning_rates(config.optimizer.lr, config.optimizer.schedule, 0, steps, steps)


def _some_steps(trainer: Trainer, config: Config, steps: int, phase: Range = no_range) -> float:
    """Some steps more of a trainer, eager, and an evaluation of a part of the test set as large; tells how large."""
    images = min(steps * config.data.batch_size, len(trainer.train))
    share = images / len(trainer.train)
    test = max(1, round(share * len(trainer.test)))
    batches = config.data.batch_size, config.data.eval_batch_size
    part = Trainer(trainer.model, trainer.optimizer, trainer.train[:images], trainer.test[:test], *batches, phase=phase)
    part.epoch(torch.arange(images), _rates(config, images))
    return share


def _busy_seconds(trainer: Trainer, order: Tensor, rates: Tensor) -> float:
    """How long the GPU was computing in an epoch as it really runs: the sum of its kernels' times."""
    with _profiler(ProfilerActivity.CUDA) as profiler:
        trainer.epoch(order, rates)
    events = profiler.key_averages()
    return sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA) / 1e6


def _profiler(*activities: ProfilerActivity) -> profile:
    # Its library tells of every start, and of a GPU that is missing, on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return profile(activities=activities, acc_events=True)  # else it warns that a second cycle would begin anew


def _profiled_steps(trainer: Trainer, config: Config, device: torch.device) -> tuple[Any, bytes, float]:
    """What the profiler saw in some steps: averages by name, the trace, and which share of the epoch it was."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _layer_ranges(trainer.model, record_function), _profiler(*activities) as profiler:
        share = _some_steps(trainer, config, PROFILED_STEPS, record_function)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        return profiler.key_averages(), Path(folder, "trace.json").read_bytes(), share


@contextmanager
def _layer_ranges(model: nn.Module, range_of: Range) -> Iterator[None]:
    """Put a range around each convolution's forward pass in training, and around its backward pass."""
    open_ranges: dict[str, AbstractContextManager[object]] = {}
    hooks = []

    def begin(name: str) -> None:
        open_ranges[name] = range_of(name)
        open_ranges[name].__enter__()

    def end(name: str) -> None:
        if name in open_ranges:
            open_ranges.pop(name).__exit__(None, None, None)

    def watch(layer: str, module: nn.Conv2d) -> None:
        forward, backward = f"forward: {layer}", f"backward: {layer}"

        def after_forward(module: nn.Module, inputs: object, output: Tensor) -> None:
            end(forward)
            if output.requires_grad:  # the gradient of the output is what the layer's backward begins with
                output.register_hook(lambda grad: begin(backward))

        hooks.append(module.register_forward_pre_hook(lambda m, x: begin(forward) if m.training else None))
        hooks.append(module.register_forward_hook(after_forward))
        hooks.append(module.weight.register_post_accumulate_grad_hook(lambda weight: end(backward)))

    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            watch(layer, module)
    try:
        # In this thread, so that a range holds the kernels of its backward pass, too.
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
) -> list[dict[str, Any]]:
    """The convolutions: their work in an image, their times in the epoch, their rate, who computes their gradients."""
    layers = []
    for layer in describe_layers(trainer.model, data[0].images.shape[1:]):
        module = trainer.model.get_submodule(layer.name)
        if not isinstance(module, MBMConv2d):
            continue
        forward, backward = seconds.get(f"forward: {layer.name}", 0.0), seconds.get(f"backward: {layer.name}", 0.0)
        rate = layer.multiplications * len(data[0]) / forward if forward else None
        ceiling = ceilings.get(module.multiplier)
        x = data[0].images.new_zeros(config.data.batch_size, *layer.input_shape)
        arguments = module.stride, module.padding, module.dilation, False, (0, 0), module.groups
        library = torch._C._select_conv_backend(x, module.weight, module.bias, *arguments)
        layers.append(
            {
                "name": layer.name,
                "multiplier": str(module.multiplier),
                "multiplications": layer.multiplications,
                "forward_seconds": forward,
                "backward_seconds": backward,
                "macs_per_second": rate,
                "share_of_ceiling": rate / ceiling if rate and ceiling else None,
                "backward_library": LIBRARIES.get(str(library).rpartition(".")[2], str(library)),
            }
        )
    return layers


def _costliest(events: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """The operators (on a GPU the kernels) that took the most time themselves."""
    on_host = {event.key for event in events if event.device_type == DeviceType.CPU}
    rows: list[dict[str, Any]] = []
    inside: dict[str, float] = defaultdict(float)
    for event in events:
        if on_gpu:
            # A range is told twice: on the host, and on the GPU as if it were a kernel.
            if event.key in on_host:
                continue
            seconds = event.self_device_time_total / 1e6
        else:
            # Where an operator has gradients, its kernels run in an event of this name, called by the operator's own.
            if event.key.startswith("GeneratedBackwardFor_mbm_"):
                inside[f"mbm::{event.key.split('_')[2]}"] += event.self_cpu_time_total / 1e6
                continue
            # Ranges are no operators, and autograd's own events count operators within the layers' ranges once more.
            if "::" not in event.key or event.key.startswith("autograd::"):
                continue
            seconds = event.self_cpu_time_total / 1e6
        rows.append({"name": event.key, "calls": event.count, "seconds": seconds})
    for row in rows:
        row["seconds"] += inside[row["name"]]
    everything = sum(row["seconds"] for row in rows)
    rows.sort(key=lambda row: -row["seconds"])
    return [{**row, "share": row["seconds"] / everything} for row in rows[:COSTLIEST]]


def _compare_backward(model: nn.Module, train: Split, batch: int, device: torch.device) -> dict[str, float]:
    """Seconds of the three ways to both gradients, for the model's second convolution."""
    layers = [layer for layer in describe_layers(model, train.images.shape[1:]) if layer.kind == "Conv2d"]
    layer = layers[1]
    module = model.get_submodule(layer.name)
    assert isinstance(module, nn.Conv2d)
    x = torch.randn(batch, *layer.input_shape, device=device)
    grad = torch.randn(batch, *layer.output_shape, device=device)
    with torch.no_grad():
        paths = backward_paths(x, module.weight.detach(), grad, int(module.padding[0]))
        return {name: median_eager_seconds(call, device) for name, call in paths}


def _naive_products_per_second() -> float:
    """The story's loop: patches cut out in Python, one product at a time. On a few patches, timed."""
    image = torch.rand(32, 32).tolist()
    kernel = torch.rand(5, 5).tolist()
    done, start = 0, time.perf_counter()
    while done < NAIVE_PRODUCTS:
        for row in range(28):
            for column in range(28):
                patch = [line[column : column + 5] for line in image[row : row + 5]]
                total = 0.0
                for i in range(5):
                    for j in range(5):
                        total += patch[i][j] * kernel[i][j]
        done += 28 * 28 * 25
    return done / (time.perf_counter() - start)


def _answers(result: dict[str, Any]) -> list[str]:
    """The three suspicions of the first attempt, answered with what was just measured, on this machine."""
    paths, naive, seconds = result["backward_paths"], result["naive"], result["epoch_seconds"]
    forward = sum(layer["forward_seconds"] for layer in result["layers"])
    library = result["layers"][0]["backward_library"]
    grad = paths["torch_nn_grad"] / paths["one_call"]
    loop = (
        f"{naive['epoch_seconds'] / 3600:.2g} h" if naive["epoch_seconds"] > 600 else f"{naive['epoch_seconds']:.0f} s"
    )
    return [
        f"torch.nn.grad in the backward pass: both gradients take {grad:.2f} times one call to {library} "
        f"({1e6 * paths['torch_nn_grad']:,.0f} against {1e6 * paths['one_call']:,.0f} us), which cannot make hours of "
        f"the {result['phases']['backward']:.2f} s that all backward passes take.",
        f"A forward pass that is not parallel: the loop over patches in Python needs {loop} for an epoch's products "
        f"(extrapolated from {NAIVE_PRODUCTS:,}), the kernels {forward:.2f} s.",
        f"The hardware: both ran on this machine, where a whole epoch takes {seconds:.2f} s and the loop alone "
        f"{naive['ratio']:,.0f} times as long.",
    ]
