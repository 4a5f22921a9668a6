"""`mbm profile epoch`: one real epoch, and where its time went."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from mbm_cli.experiments import train as training_run
from mbm_cli.experiments.profile import backward_paths, measure_ceiling
from mbm_cli.models import describe_layers
from mbm_cli.nn import MBMConv2d
from mbm_cli.runs import Run
from mbm_cli.timing import median_eager_seconds
from mbm_cli.training import PHASES, Trainer, learning_rates

NAIVE_PRODUCTS = 200_000  # a tenth of a second in Python
COSTLIEST = 10


def profile_epoch(
    config: Config, output: Path, threads: int | None = None, report: Callable[[str], None] = lambda doing: None
) -> tuple[Run, dict[str, Any]]:
    """Run an epoch as training runs it, then one step by step under PyTorch's profiler, and tell where the time went.

    Phases are ranges that the profiler measures each for itself: on the CPU what they took, on a GPU what their kernels
    took. Seconds throughout; the run's folder gets ``profile.json``, ``profile.png`` and ``trace.json`` (for Perfetto).

    Raises:
        RequestError, RunError: as ``train`` does.
    """
    device = training_run.prepare(config, threads)
    data = training_run.load_data(config, device)
    run = Run.create(output, f"{config.name}-profile-epoch")
    run.write("config.yaml", configs.dump(config))
    run.write_json("environment.json", environment(device))

    report("an epoch as training runs it")
    trainer = training_run.build_trainer(config, device, data)
    order, rates = epoch_order(len(data[0]), config.seed, 1), _rates(config, trainer.steps)
    trainer.epoch(order, rates)  # the warm-up: everything compiled, allocated, captured
    real = trainer.epoch(order, rates)
    busy = _busy_seconds(trainer, order, rates) if device.type == "cuda" else None

    report("the same epoch, step by step, under the profiler")
    eager_config = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": "off"})})
    eager = training_run.build_trainer(eager_config, device, data)
    eager.epoch(order, rates)
    unprofiled = eager.epoch(order, rates)
    seconds, profiler = _profiled_epoch(eager, order, rates, device)
    profiler.export_chrome_trace(str(run.folder / ".trace.json"))
    (run.folder / ".trace.json").replace(run.folder / "trace.json")  # whole or not at all, as every file of a run

    report("the ceiling, the three ways backward, the naive loop")
    events = profiler.key_averages()
    on_gpu = device.type == "cuda"
    total = {event.key: (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6 for event in events}
    phases = {phase: total.get(f"phase: {phase}", 0.0) for phase in PHASES}
    ceiling = None if config.model.multiplier.is_exact else measure_ceiling(str(config.model.multiplier), device)
    layers = _layers(eager, data, total, config, ceiling)
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
        "eager_epoch_seconds": unprofiled.epoch_seconds,
        "profiled_epoch_seconds": seconds,
        "profiler_overhead": seconds / unprofiled.epoch_seconds - 1,
        "phases": {**phases, "everything else": seconds - sum(phases.values())},
        "layers": layers,
        "costliest": _costliest(events, on_gpu),
        "ceiling_macs_per_second": ceiling,
        "backward_paths": _compare_backward(eager.model, data[0], config.data.batch_size, device),
        "naive": {
            "products_per_second": naive,
            "epoch_seconds": forward_products / naive,
            "ratio": forward_products / naive / real.epoch_seconds,
        },
    }
    result["answers"] = _answers(result)
    run.write_json("profile.json", result)
    run.write("profile.png", plots.epoch_profile(result))
    return run, result


def _rates(config: Config, steps: int) -> Tensor:
    return learning_rates(config.optimizer.lr, config.optimizer.schedule, 0, steps, steps)


def _busy_seconds(trainer: Trainer, order: Tensor, rates: Tensor) -> float:
    """How long the GPU was computing in an epoch as it really runs: the sum of its kernels' times."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        trainer.epoch(order, rates)
    events = profiler.key_averages()
    return sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA) / 1e6


def _profiled_epoch(trainer: Trainer, order: Tensor, rates: Tensor, device: torch.device) -> tuple[float, profile]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with (
        _layer_ranges(trainer.model),
        # In this thread, so that a range holds the kernels of its backward pass, too.
        torch.autograd.set_multithreading_enabled(False),
        profile(activities=activities) as profiler,
    ):
        start = time.perf_counter()
        trainer.epoch(order, rates)
        seconds = time.perf_counter() - start
    return seconds, profiler


@contextmanager
def _layer_ranges(model: nn.Module) -> Iterator[None]:
    """Put a profiler range around each convolution's forward pass in training, and around its backward pass."""
    open_ranges: dict[str, record_function] = {}
    hooks = []

    def begin(name: str) -> None:
        open_ranges[name] = record_function(name)
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
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(
    trainer: Trainer, data: tuple[Split, Split], total: dict[str, float], config: Config, ceiling: float | None
) -> list[dict[str, Any]]:
    """The convolutions: their work in an image, their times in the epoch, their rate, who computes their gradients."""
    layers = []
    for layer in describe_layers(trainer.model, data[0].images.shape[1:]):
        module = trainer.model.get_submodule(layer.name)
        if not isinstance(module, MBMConv2d):
            continue
        forward, backward = total.get(f"forward: {layer.name}", 0.0), total.get(f"backward: {layer.name}", 0.0)
        rate = layer.multiplications * len(data[0]) / forward if forward else None
        x = data[0].images.new_zeros(config.data.batch_size, *layer.input_shape)
        arguments = module.stride, module.padding, module.dilation, False, (0, 0), module.groups
        library = torch._C._select_conv_backend(x, module.weight, module.bias, *arguments)
        layers.append(
            {
                "name": layer.name,
                "multiplications": layer.multiplications,
                "forward_seconds": forward,
                "backward_seconds": backward,
                "macs_per_second": rate,
                "share_of_ceiling": rate / ceiling if rate and ceiling else None,
                "backward_library": str(library).rpartition(".")[2],
            }
        )
    return layers


def _costliest(events: Any, on_gpu: bool) -> list[dict[str, Any]]:
    """The operators (on a GPU the kernels) that took the most time themselves."""
    rows = []
    for event in events:
        if event.key.startswith(("phase: ", "forward: ", "backward: ")):
            continue
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        rows.append({"name": event.key, "calls": event.count, "seconds": seconds})
    everything = sum(row["seconds"] for row in rows)
    rows.sort(key=lambda row: -row["seconds"])
    return [{**row, "share": row["seconds"] / everything} for row in rows[:COSTLIEST]]


def _compare_backward(model: nn.Module, train: Split, batch: int, device: torch.device) -> dict[str, float]:
    """Seconds of the three ways to both gradients, for the model's second convolution."""
    layers = [layer for layer in describe_layers(model, train.images.shape[1:]) if layer.kind == "Conv2d"]
    layer = layers[1]
    module = model.get_submodule(layer.name)
    x = torch.randn(batch, *layer.input_shape, device=device)
    grad = torch.randn(batch, *layer.output_shape, device=device)
    with torch.no_grad():
        paths = backward_paths(x, module.weight.detach(), grad, module.padding[0])
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
