"""`mbm profile conv`: time single convolutions beside exact ones."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mbm_cli import config as configs
from mbm_cli.backends import cpu, cuda
from mbm_cli.config import Config
from mbm_cli.data import DATASETS
from mbm_cli.device import environment
from mbm_cli.errors import Interrupted, RequestError
from mbm_cli.experiments import lifecycle
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.models import describe_layers
from mbm_cli.multipliers.content import operands
from mbm_cli.multipliers.names import LayerMultipliers, Multiplier
from mbm_cli.nn import ApproxConv2d
from mbm_cli.ops import conv2d
from mbm_cli.runs import Run

# Multiplications of the largest reference shape that is timed: a tenth of a second a call on two cores, 2 ms on a GPU.
LIMITS = {"cpu": 1 << 30, "cuda": 1 << 33}
CEILING_ROUNDS = 2_000_000  # about ten milliseconds a call, as long as a convolution: disturbances hit both alike
LEAST_SECONDS = 0.3
GRAPHED_CALLS = 50  # in one CUDA graph, so that its launch does not count


@dataclass(frozen=True)
class ConvShape:
    """A convolution to time: ``batch`` images of (channels, size, size), square kernel and padding."""

    name: str
    batch: int
    channels: int
    out_channels: int
    kernel: int
    padding: int
    size: int

    @property
    def multiplications(self) -> int:
        out_size = self.size + 2 * self.padding - self.kernel + 1
        return self.batch * self.out_channels * out_size**2 * self.channels * self.kernel**2

    def describe(self) -> str:
        padding = f" p{self.padding}" if self.padding else ""
        return f"{self.channels}->{self.out_channels} {self.kernel}x{self.kernel}{padding} {self.size}x{self.size}"


# LeNet's two convolutions, and shapes as they occur in larger networks.
REFERENCE_SHAPES = (
    ConvShape("lenet conv1", 64, 1, 6, 5, 2, 28),
    ConvShape("lenet conv2", 64, 6, 16, 5, 0, 14),
    ConvShape("lenet conv1", 256, 1, 6, 5, 2, 28),
    ConvShape("lenet conv2", 256, 6, 16, 5, 0, 14),
    ConvShape("", 64, 32, 64, 3, 1, 28),
    ConvShape("", 64, 64, 128, 3, 1, 14),
    ConvShape("", 256, 32, 64, 3, 1, 28),
    ConvShape("", 256, 64, 128, 3, 1, 14),
    ConvShape("", 64, 64, 64, 3, 1, 56),
)


@dataclass(frozen=True)
class TimedConv:
    """The times of a convolution, in seconds; ``backward_seconds`` by the way to both exact gradients."""

    name: str
    shape: str
    batch: int
    multiplications: int
    forward_seconds: float
    exact_forward_seconds: float
    backward_seconds: dict[str, float]
    macs_per_second: float
    share_of_ceiling: float


@dataclass(frozen=True)
class ConvProfile:
    """``profile.json`` of `mbm profile conv`. The ceiling is the kernels' arithmetic on registers alone."""

    multiplier: str
    device: str
    device_name: str
    threads: int
    ceiling_macs_per_second: float
    convolutions: list[TimedConv]


def profile_conv(
    config: Config, output: Path, watch: Watch | None = None, stopped: Stopped = never
) -> Finished[ConvProfile]:
    """Time the convolutions of the config's model, then the reference shapes that suit the device.

    Every figure comes from this one call: medians over repeats after a warm-up. On a GPU the forward passes are
    replayed in a CUDA graph; backward passes run as a training without graphs calls them.

    Args:
        config: its model, multiplier, batch size, device, threads and seed are used.
        output: where the run folder with ``profile.json`` is created.
        stopped: called before each shape.

    Raises:
        RequestError: the multiplier is exact or several, or the device is not there.
        Interrupted: ``stopped`` returned true; nothing is kept.
    """
    watch = watch or Watch()
    multiplier = config.model.multiplier
    if multiplier.is_exact:
        raise RequestError("the multiplier is exact, so there is nothing to compare: name another, --multiplier mbm")
    if isinstance(multiplier, LayerMultipliers):
        raise RequestError("profile conv times one multiplier: name it, --multiplier mbm")
    config, device = lifecycle.begin(config)
    multiplier = config.model.multiplier
    shapes = dict.fromkeys((*(shape for shape, _ in _model_layers(config, device)), *REFERENCE_SHAPES))
    run = Run.create(output, f"{config.name}-profile-conv")
    with run.kept_if_complete():
        run.write("config.yaml", configs.dump(config))
        run.write_json("environment.json", environment(device))
        assert isinstance(multiplier, Multiplier)
        result = _measure(config, multiplier, shapes, device, watch, stopped)
        run.write_json("profile.json", result)
    return Finished(run, result)


def _measure(
    config: Config,
    multiplier: Multiplier,
    shapes: Iterable[ConvShape],
    device: torch.device,
    watch: Watch,
    stopped: Stopped,
) -> ConvProfile:
    watch.status("measuring the ceiling")
    ceiling, convolutions = measure_ceiling(multiplier, device), []
    generator = torch.Generator().manual_seed(config.seed)
    for shape in shapes:
        if stopped():
            raise Interrupted("interrupted")
        if shape.multiplications <= LIMITS[device.type]:
            watch.status(f"timing {shape.describe()}, batch {shape.batch}")
            convolutions.append(_time_shape(shape, multiplier, ceiling, generator, device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.instruction_set()
    return ConvProfile(str(multiplier), device.type, name, torch.get_num_threads(), ceiling, convolutions)


def convolution_seconds(config: Config, device: torch.device) -> float:
    """Time the forward convolutions of a training step of the config's model, each alone; return the sum in seconds."""
    generator, total = torch.Generator().manual_seed(config.seed), 0.0
    for shape, multiplier in _model_layers(config, device):
        x, weight = _operands(shape, generator, device)
        with torch.no_grad():
            total += _seconds(partial(conv2d, x, weight, padding=shape.padding, multiplier=multiplier), device)
    return total


def measure_ceiling(multiplier: Multiplier, device: torch.device) -> float:
    """Measure the multiply-accumulates a second of the kernels' arithmetic on registers alone, on the whole device."""
    handle, table = operands(multiplier, device)
    if device.type == "cuda":
        return cuda.ceiling(handle, table, device)
    threads = torch.get_num_threads()
    # A user's function is slower by an order of magnitude and more.
    rounds = CEILING_ROUNDS if multiplier.family != "c" else CEILING_ROUNDS // 50
    products = cpu.ceiling(handle, table, rounds, threads)
    return products / _seconds(lambda: cpu.ceiling(handle, table, rounds, threads), device)


def _operands(shape: ConvShape, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator).to(device)
    weight = torch.randn(shape.out_channels, shape.channels, shape.kernel, shape.kernel, generator=generator).to(device)
    return x, weight


def _model_layers(config: Config, device: torch.device) -> list[tuple[ConvShape, Multiplier]]:
    """List the convolutions of the config's model, each with its multiplier."""
    model = lifecycle.build_model(config, device)
    layers = []
    for layer in describe_layers(model, DATASETS[config.data.dataset].shape):
        module = model.get_submodule(layer.name)
        if isinstance(module, ApproxConv2d):
            channels, size, _ = layer.input_shape
            kernel, padding = module.kernel_size[0], int(module.padding[0])
            name, batch = f"{config.model.name} {layer.name}", config.data.batch_size
            shape = ConvShape(name, batch, channels, module.out_channels, kernel, padding, size)
            layers.append((shape, module.multiplier))
    return layers


def _time_shape(
    shape: ConvShape, multiplier: Multiplier, ceiling: float, generator: torch.Generator, device: torch.device
) -> TimedConv:
    x, weight = _operands(shape, generator, device)
    padding = shape.padding
    with torch.no_grad():
        forward = _seconds(lambda: conv2d(x, weight, padding=padding, multiplier=multiplier), device)
        exact = _seconds(lambda: F.conv2d(x, weight, padding=padding), device)
        grad = torch.randn_like(F.conv2d(x, weight, padding=padding))
        backward = {name: _eager_seconds(call) for name, call in _backward_paths(x, weight, grad, padding)}
    rate = shape.multiplications / forward
    return TimedConv(
        name=shape.name,
        shape=shape.describe(),
        batch=shape.batch,
        multiplications=shape.multiplications,
        forward_seconds=forward,
        exact_forward_seconds=exact,
        backward_seconds=backward,
        macs_per_second=rate,
        share_of_ceiling=rate / ceiling,
    )


def _backward_paths(
    x: Tensor, weight: Tensor, grad: Tensor, padding: int
) -> tuple[tuple[str, Callable[[], object]], ...]:
    """Return three ways to both gradients; training takes the last."""

    def backward(*wanted: bool) -> object:
        arguments = [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [*wanted, False]
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments)

    def with_torch_nn_grad() -> object:
        grad_x = conv2d_input(x.shape, weight, grad, padding=padding)
        return grad_x, conv2d_weight(x, weight.shape, grad, padding=padding)

    return (
        ("torch_nn_grad", with_torch_nn_grad),
        ("two_calls", lambda: (backward(True, False), backward(False, True))),
        ("one_call", lambda: backward(True, True)),
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call; on a GPU of its kernels, replayed in a CUDA graph."""
    if device.type != "cuda":
        return _eager_seconds(call)
    call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPHED_CALLS):
            call()
    return _eager_seconds(graph.replay) / GRAPHED_CALLS


def _eager_seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call with its launches; the timer waits for the GPU."""
    # The module looks for a compiler, and warns of nvcc without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer

    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=LEAST_SECONDS).median
