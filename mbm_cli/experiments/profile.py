"""Where the time goes: `mbm profile conv` times single convolutions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mbm_cli import config as configs
from mbm_cli.backends import cpu, cuda
from mbm_cli.config import Config
from mbm_cli.environment import environment
from mbm_cli.errors import Interrupted, RequestError
from mbm_cli.experiments.setup import build_model, prepare
from mbm_cli.layer_multipliers import LayerMultipliers
from mbm_cli.models import describe_layers
from mbm_cli.multipliers import Multiplier
from mbm_cli.nn import MBMConv2d
from mbm_cli.ops import conv2d
from mbm_cli.runs import Run
from mbm_cli.timing import median_eager_seconds, median_seconds

# Multiplications of the largest reference shape that is timed: a tenth of a second a call on two cores, 2 ms on a GPU.
LIMITS = {"cpu": 1 << 30, "cuda": 1 << 33}
CEILING_ROUNDS = 2_000_000  # about ten milliseconds a call, as long as a convolution: disturbances hit both alike


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


def profile_conv(
    config: Config,
    output: Path,
    threads: int | None = None,
    report: Callable[[str], None] = lambda doing: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Run, dict[str, Any]]:
    """Time the convolutions of the config's model, then the reference shapes that the device can bear.

    Every figure of the result comes from this one call: medians over repeats after a warm-up, in seconds. On a GPU the
    forward passes are replayed in a CUDA graph; backward passes run as a training without graphs calls them.

    Args:
        config: its model, multiplier, batch size, device and seed are used.
        output: where the run folder with ``profile.json`` is made.
        threads: CPU threads.
        report: told, in words, what is being timed.
        stopped: asked before each shape.

    Raises:
        RequestError: the multiplier is the exact one, or the device is not there.
        Interrupted: ``stopped`` said so; nothing is kept then.
    """
    multiplier = config.model.multiplier
    if multiplier.is_exact:
        raise RequestError("the multiplier is exact, so there is nothing to time against: name one, --multiplier mbm")
    if isinstance(multiplier, LayerMultipliers):
        raise RequestError("profile conv times one multiplier: name it, --multiplier mbm")
    device = prepare(config, threads)
    shapes = dict.fromkeys((*(shape for shape, _ in _model_layers(config, device)), *REFERENCE_SHAPES))
    run = Run.create(output, f"{config.name}-profile-conv")
    with run.kept_if_complete():
        run.write("config.yaml", configs.dump(config))
        run.write_json("environment.json", environment(device))
        result = _measure(config, multiplier, shapes, device, report, stopped)
        run.write_json("profile.json", result)
    return run, result


def _measure(
    config: Config,
    multiplier: Multiplier,
    shapes: Iterable[ConvShape],
    device: torch.device,
    report: Callable[[str], None],
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "multiplier": str(multiplier),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "ceiling_macs_per_second": measure_ceiling(multiplier, device),
        "convolutions": [],
    }
    generator = torch.Generator().manual_seed(config.seed)
    for shape in shapes:
        if stopped():
            raise Interrupted("interrupted")
        if shape.multiplications <= LIMITS[device.type]:
            report(f"timing {shape.describe()}, batch {shape.batch}")
            timed = _time_shape(shape, multiplier, generator, device)
            timed["share_of_ceiling"] = timed["macs_per_second"] / result["ceiling_macs_per_second"]
            result["convolutions"].append(timed)
    return result


def convolution_seconds(config: Config, device: torch.device) -> float:
    """The forward convolutions of one training step of the config's model, each timed alone, in seconds."""
    generator, total = torch.Generator().manual_seed(config.seed), 0.0
    for shape, multiplier in _model_layers(config, device):
        x, weight = _operands(shape, generator, device)
        with torch.no_grad():
            total += median_seconds(partial(conv2d, x, weight, padding=shape.padding, multiplier=multiplier), device)
    return total


def _operands(shape: ConvShape, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator).to(device)
    weight = torch.randn(shape.out_channels, shape.channels, shape.kernel, shape.kernel, generator=generator).to(device)
    return x, weight


def measure_ceiling(multiplier: Multiplier, device: torch.device) -> float:
    """Multiply-accumulates a second of the kernels' arithmetic on registers alone, on the whole device."""
    if device.type == "cuda":
        return cuda.ceiling(multiplier.key, device)
    threads = torch.get_num_threads()
    # A user's function is slower by an order of magnitude and more.
    rounds = CEILING_ROUNDS if multiplier.code is None else CEILING_ROUNDS // 50
    products = cpu.ceiling(multiplier.key, rounds, threads)
    return products / median_seconds(lambda: cpu.ceiling(multiplier.key, rounds, threads), device)


def _model_layers(config: Config, device: torch.device) -> list[tuple[ConvShape, Multiplier]]:
    """The convolutions of the config's model, each with its multiplier."""
    model = build_model(config, device)
    layers = []
    for layer in describe_layers(model, (1, 28, 28)):
        module = model.get_submodule(layer.name)
        if isinstance(module, MBMConv2d):
            channels, size, _ = layer.input_shape
            kernel, padding = module.kernel_size[0], int(module.padding[0])
            name, batch = f"{config.model.name} {layer.name}", config.data.batch_size
            shape = ConvShape(name, batch, channels, module.out_channels, kernel, padding, size)
            layers.append((shape, module.multiplier))
    return layers


def _time_shape(
    shape: ConvShape, multiplier: Multiplier, generator: torch.Generator, device: torch.device
) -> dict[str, Any]:
    x, weight = _operands(shape, generator, device)
    padding = shape.padding
    with torch.no_grad():
        forward = median_seconds(lambda: conv2d(x, weight, padding=padding, multiplier=multiplier), device)
        exact = median_seconds(lambda: F.conv2d(x, weight, padding=padding), device)
        backward = {
            name: median_eager_seconds(call, device)
            for name, call in backward_paths(x, weight, torch.randn_like(F.conv2d(x, weight, padding=padding)), padding)
        }
    return {
        "name": shape.name,
        "shape": shape.describe(),
        "batch": shape.batch,
        "multiplications": shape.multiplications,
        "forward_seconds": forward,
        "exact_forward_seconds": exact,
        "backward_seconds": backward,
        "macs_per_second": shape.multiplications / forward,
    }


def backward_paths(
    x: Tensor, weight: Tensor, grad: Tensor, padding: int
) -> tuple[tuple[str, Callable[[], object]], ...]:
    """Three ways to both gradients; the last is the one that training takes."""

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
