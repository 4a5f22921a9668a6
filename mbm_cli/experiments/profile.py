"""Where the time goes: `mbm profile conv` times single convolutions."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mbm_cli import config as configs
from mbm_cli import render
from mbm_cli.backends import cpu
from mbm_cli.config import Config
from mbm_cli.environment import environment
from mbm_cli.errors import RequestError
from mbm_cli.experiments.train import build_model, prepare
from mbm_cli.models import describe_layers
from mbm_cli.ops import conv2d
from mbm_cli.runs import Run

# Multiplications of the largest reference shape that is timed: about a tenth of a second a call on two cores.
CPU_LIMIT = 1 << 30


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
        padding = f" pad {self.padding}" if self.padding else ""
        kernel = f"{self.kernel}x{self.kernel}{padding}"
        return f"{self.channels}->{self.out_channels}, {kernel}, {self.size}x{self.size}, batch {self.batch}"


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
    report: Callable[[object], None] | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Time the convolutions of the config's model, then the reference shapes that the device can bear.

    Every figure of the result comes from this one call: medians over repeats after a warm-up, in seconds.

    Args:
        config: its model, multiplier, batch size, device and seed are used.
        output: where the run folder with ``profile.json`` is made.
        threads: CPU threads.
        report: gets the table.

    Raises:
        RequestError: the multiplier is the exact one, or the device is not there.
    """
    multiplier = config.model.multiplier
    if multiplier.is_exact:
        raise RequestError("the multiplier is exact, so there is nothing to time against: name one, --multiplier mbm")
    device = prepare(config, threads)
    shapes = [*_model_shapes(config, device), *REFERENCE_SHAPES]
    shapes = list(dict.fromkeys(s for s in shapes if s.multiplications <= CPU_LIMIT))
    ceiling = measure_ceiling(str(multiplier))
    generator = torch.Generator().manual_seed(config.seed)
    result = {
        "multiplier": str(multiplier),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "ceiling_macs_per_second": ceiling,
        "convolutions": [_time_shape(shape, str(multiplier), ceiling, generator, device) for shape in shapes],
    }
    run = Run.create(output, f"{config.name}-profile-conv")
    run.write("config.yaml", configs.dump(config))
    run.write_json("environment.json", environment(device))
    run.write_json("profile.json", result)
    if report is not None:
        report(conv_table(result))
        report(f"run: {run.folder}")
    return run, result


def measure_ceiling(multiplier: str) -> float:
    """Multiply-accumulates a second of the kernel's arithmetic on registers alone, on all threads of this process."""
    # About ten milliseconds a call, as long as a convolution: what else the machine does disturbs both alike.
    threads, rounds = torch.get_num_threads(), 2_000_000
    products = cpu.ceiling(multiplier, rounds, threads)
    return products / median_seconds(lambda: cpu.ceiling(multiplier, rounds, threads))


def median_seconds(call: Callable[[], object], least: float = 0.3, repeats: int = 7) -> float:
    """The median time of a call, over at least so many repeats and seconds, after a warm-up of two."""
    call()
    call()
    times: list[float] = []
    while len(times) < repeats or sum(times) < least:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _model_shapes(config: Config, device: torch.device) -> list[ConvShape]:
    model = build_model(config, device)
    modules = dict(model.named_modules())
    shapes = []
    for layer in describe_layers(model, (1, 28, 28)):
        module = modules[layer.name]
        if isinstance(module, nn.Conv2d):
            channels, size, _ = layer.input_shape
            name = f"{config.model.name} {layer.name}"
            shapes.append(
                ConvShape(
                    name,
                    config.data.batch_size,
                    channels,
                    module.out_channels,
                    module.kernel_size[0],
                    module.padding[0],
                    size,
                )
            )
    return shapes


def _time_shape(
    shape: ConvShape, multiplier: str, ceiling: float, generator: torch.Generator, device: torch.device
) -> dict[str, Any]:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator).to(device)
    weight = torch.randn(shape.out_channels, shape.channels, shape.kernel, shape.kernel, generator=generator).to(device)
    grad = torch.randn_like(F.conv2d(x, weight, padding=shape.padding))
    pair = [shape.padding] * 2
    backward = torch.ops.aten.convolution_backward
    mask = [True, True, False]
    with torch.no_grad():
        forward = median_seconds(lambda: conv2d(x, weight, padding=shape.padding, multiplier=multiplier))
        exact = median_seconds(lambda: F.conv2d(x, weight, padding=shape.padding))
        both = median_seconds(lambda: backward(grad, x, weight, None, [1, 1], pair, [1, 1], False, [0, 0], 1, mask))
    rate = shape.multiplications / forward
    return {
        "name": shape.name,
        "shape": shape.describe(),
        "multiplications": shape.multiplications,
        "forward_seconds": forward,
        "exact_forward_seconds": exact,
        "backward_seconds": both,
        "macs_per_second": rate,
        "share_of_ceiling": rate / ceiling,
    }


def conv_table(result: dict[str, Any]) -> object:
    name = result["multiplier"]
    rows = [
        (
            row["name"],
            row["shape"],
            f"{row['multiplications'] / 1e6:,.1f}",
            f"{1e3 * row['forward_seconds']:.2f}",
            f"{1e3 * row['exact_forward_seconds']:.2f}",
            f"{1e3 * row['backward_seconds']:.2f}",
            f"{row['macs_per_second'] / 1e9:.2f}",
            f"{100 * row['share_of_ceiling']:.0f} %",
        )
        for row in result["convolutions"]
    ]
    title = (
        f"{name} on the CPU ({result['instruction_set']}, threads: {result['threads']}); "
        f"ceiling on registers alone {result['ceiling_macs_per_second'] / 1e9:.1f} GMAC/s"
    )
    columns = ("layer", "convolution", "M mults", f"{name} ms", "exact ms", "backward ms", "GMAC/s", "of ceiling")
    return render.table(title, columns, rows, left=2)
