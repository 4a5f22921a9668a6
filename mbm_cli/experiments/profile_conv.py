"""`mbm profile conv`: time single convolutions and dense layers, and their gradients, beside exact ones."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Self

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mbm_cli import config as configs
from mbm_cli.backends import cpu, cpu_integers, cuda, cuda_integers, cuda_matrix, cuda_programs, cuda_terms
from mbm_cli.backends.integers import forward_geometry
from mbm_cli.config import Config
from mbm_cli.data import dataset_of
from mbm_cli.device import environment
from mbm_cli.errors import Interrupted, RequestError
from mbm_cli.experiments import lifecycle
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.models import describe_layers
from mbm_cli.multipliers.content import integer_table, operands
from mbm_cli.multipliers.names import EXACT, Multiplier
from mbm_cli.nn import ApproxConv2d, ApproxLinear
from mbm_cli.runs import Run

# Multiplications of the largest reference shape that is timed: a tenth of a second a call on two cores, 13 ms on a GPU.
LIMITS = {"cpu": 1 << 30, "cuda": 1 << 36}
CEILING_ROUNDS = 2_000_000  # about ten milliseconds a call, as long as a convolution: disturbances hit both alike
# A time is a median over blocks of calls: so long that waiting for the GPU does not count, and so many of them.
BLOCK_SECONDS, LEAST_BLOCKS, LEAST_SECONDS = 0.005, 5, 0.1
GRAPHED_CALLS = 50  # in one CUDA graph, so that its launch does not count


@dataclass(frozen=True)
class ConvShape:
    """A convolution to time: ``batch`` images of (channels, *size); without a size it is a dense layer."""

    name: str
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @classmethod
    def square(
        cls, name: str, batch: int, channels: int, out_channels: int, kernel: int, padding: int, size: int
    ) -> Self:
        return cls(name, batch, channels, out_channels, (size, size), (kernel, kernel), padding=(padding, padding))

    @property
    def is_dense(self) -> bool:
        return not self.size

    @property
    def weight_size(self) -> tuple[int, ...]:
        return self.out_channels, self.channels // self.groups, *self.kernel

    @property
    def out_size(self) -> tuple[int, ...]:
        sizes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=False)
        return tuple(
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, pad, dilation in sizes
        )

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of one image's output."""
        return self.out_channels, *self.out_size

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as operators take them."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    @property
    def multiplications(self) -> int:
        return self.batch * math.prod(self.out_size) * math.prod(self.weight_size)

    def describe(self) -> str:
        if self.is_dense:
            return f"{self.channels}->{self.out_channels} dense"
        marks = {"s": self.stride, "p": self.padding, "d": self.dilation}
        plain = {"s": (1, 1), "p": (0, 0), "d": (1, 1)}
        extra = "".join(f" {mark}{_by(value)}" for mark, value in marks.items() if value != plain[mark])
        extra += f" g{self.groups}" if self.groups > 1 else ""
        size, kernel = ("x".join(map(str, pair)) for pair in (self.size, self.kernel))
        return f"{self.channels}->{self.out_channels} {kernel}{extra} {size}"


def _by(pair: tuple[int, ...]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else "x".join(map(str, pair))


# Layers of LeNet, which are timed with it alone, and shapes as they occur in larger networks.
REFERENCE_SHAPES = (
    ConvShape.square("lenet conv1", 64, 1, 6, 5, 2, 28),
    ConvShape.square("lenet conv2", 64, 6, 16, 5, 0, 14),
    ConvShape("lenet fc1", 64, 400, 120),
    ConvShape("lenet fc2", 64, 120, 84),
    ConvShape("lenet fc3", 64, 84, 10),
    ConvShape.square("lenet conv1", 256, 1, 6, 5, 2, 28),
    ConvShape.square("lenet conv2", 256, 6, 16, 5, 0, 14),
    ConvShape.square("", 64, 32, 64, 3, 1, 28),
    ConvShape.square("", 64, 64, 128, 3, 1, 14),
    ConvShape.square("", 256, 32, 64, 3, 1, 28),
    ConvShape.square("", 256, 64, 128, 3, 1, 14),
    ConvShape.square("", 64, 64, 64, 3, 1, 56),
    ConvShape("", 1024, 1024, 1024),
    ConvShape("", 4096, 4096, 4096),
)
PASSES = ("forward", "input", "weight")  # the latter two are the gradients


@dataclass(frozen=True)
class TimedConv:
    """The times of a convolution or a dense layer, in seconds.

    Attributes:
        backward_seconds: by the way to both exact gradients of a convolution.
        gradient_seconds, exact_gradient_seconds: of ``input`` and of ``weight``, with the multiplier and exact; none
            with an integer multiplier, whose gradients have other products.
        quantized_seconds: with an integer multiplier, of quantising both operands, the sums, and scaling them;
            ``forward_seconds`` are of the sums alone.
        path: how the sums are computed, with an integer multiplier or where matrix units are allowed.
        share_of_ceiling: of the matrix units' where they are used; with an integer multiplier ``None`` otherwise.
        layers: how many layers of the model have this shape; ``name`` is the first one's.
    """

    name: str
    shape: str
    batch: int
    multiplications: int
    forward_seconds: float
    exact_forward_seconds: float
    backward_seconds: dict[str, float]
    gradient_seconds: dict[str, float]
    exact_gradient_seconds: dict[str, float]
    macs_per_second: float
    share_of_ceiling: float | None
    quantized_seconds: float | None = None
    path: str | None = None
    layers: int = 0


@dataclass(frozen=True)
class ConvProfile:
    """``profile.json`` of `mbm profile conv`.

    Attributes:
        ceiling_macs_per_second: of the kernels' arithmetic on registers alone; with an integer multiplier, of int8
            matrix units, where the device has them, otherwise ``None``.
        matrix_ceiling_macs_per_second: of a float multiplier's products on matrix units alone, where these are allowed.
        model: its layers' names begin with it.
    """

    multiplier: str
    device: str
    device_name: str
    threads: int
    ceiling_macs_per_second: float | None
    convolutions: list[TimedConv]
    matrix_ceiling_macs_per_second: float | None = None
    model: str = ""


def profile_conv(
    config: Config, output: Path, watch: Watch | None = None, stopped: Stopped = never
) -> Finished[ConvProfile]:
    """Time the layers of the config's model, equal ones once, then the reference shapes that suit the device.

    Every figure comes from this one call: medians over repeats after a warm-up. On a GPU each pass is
    replayed in a CUDA graph; the three ways to exact gradients run as a training without graphs calls them.

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
    if len(multiplier.distinct()) > 1:
        raise RequestError("profile conv times one multiplier: name it, --multiplier mbm")
    config, device = lifecycle.begin(config)
    (multiplier,) = config.model.multiplier.distinct()
    run = Run.create(output, f"{config.name}-profile-conv")
    with run.kept_if_complete():
        run.write("config.yaml", configs.dump(config))
        run.write_json("environment.json", environment(device))
        assert isinstance(multiplier, Multiplier)
        result = _measure(config, multiplier, device, watch, stopped)
        run.write_json("profile.json", result)
    return Finished(run, result)


def _measure(
    config: Config, multiplier: Multiplier, device: torch.device, watch: Watch, stopped: Stopped
) -> ConvProfile:
    watch.status("measuring the ceiling")
    ceiling = _int8_ceiling(device) if multiplier.is_integer else measure_ceiling(multiplier, device)
    matrix_ceiling = None
    if not multiplier.is_integer and config.train.matrix_units and device.type == "cuda":
        matrix_ceiling = cuda_matrix.ceiling(*operands(multiplier, device), device.index)
    shapes = _shapes(config, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    if device.type == "cuda":
        watch.status("compiling the kernels")
        _compile(list(shapes), multiplier, matrix_ceiling is not None, generator)
    convolutions = []
    for shape, layers in shapes.items():
        if stopped():
            raise Interrupted("interrupted")
        watch.status(f"timing {shape.describe()}, batch {shape.batch}")
        timed = _time_shape(shape, multiplier, ceiling, matrix_ceiling, generator)
        convolutions.append(replace(timed, layers=layers))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.instruction_set()
    threads, model = torch.get_num_threads(), str(config.model.name)
    return ConvProfile(str(multiplier), device.type, name, threads, ceiling, convolutions, matrix_ceiling, model)


def _shapes(config: Config, device: torch.device) -> dict[ConvShape, int]:
    """Return the shapes that are timed, the model's first, each with the number of its layers that have it.

    A shape of the model has the name of the first of these layers.
    """
    layers = [shape for shape, _ in _model_layers(config, device)]
    references = [one for one in REFERENCE_SHAPES if not one.name or one.name.startswith(f"{config.model.name} ")]
    named: dict[ConvShape, ConvShape] = {}
    for shape in (*layers, *references):
        if shape.multiplications <= LIMITS[device.type]:
            named.setdefault(replace(shape, name=""), shape)
    count = Counter(replace(shape, name="") for shape in layers)
    return {shape: count[unnamed] for unnamed, shape in named.items()}


def _compile(
    shapes: Sequence[ConvShape], multiplier: Multiplier, matrix_units: bool, generator: torch.Generator
) -> None:
    """Load the kernels that these shapes need, compiling several at once."""
    with torch.no_grad(), cuda_programs.noted() as kernels:
        for shape in shapes:
            for call in _passes(shape, *_operands(shape, generator), multiplier, matrix_units).values():
                call()
    cuda_programs.load(kernels, torch.cuda.current_device())


def convolution_seconds(config: Config, device: torch.device) -> float:
    """Time the forward passes of the approximate layers in a training step, each alone; return the sum in seconds."""
    generator, total = torch.Generator(device).manual_seed(config.seed), 0.0
    for shape, multiplier in _model_layers(config, device):
        with torch.no_grad():
            passes = _passes(shape, *_operands(shape, generator), multiplier, config.train.matrix_units)
            total += _seconds(passes["quantized" if multiplier.is_integer else "forward"], device)
    return total


def _int8_ceiling(device: torch.device) -> float | None:
    """Measure the int8 products a second of a device's matrix units; ``None`` without such units."""
    has_units = device.type == "cuda" and cuda_programs.has_matrix_units(device.index or 0)
    return cuda_terms.ceiling(device) if has_units else None


def measure_ceiling(multiplier: Multiplier, device: torch.device, matrix_units: bool = False) -> float:
    """Measure the multiply-accumulates a second of the kernels' arithmetic on registers alone, on the whole device.

    Args:
        matrix_units: of a GPU's matrix units, where these can compute the multiplier's products.
    """
    handle, table = operands(multiplier, device)
    if device.type == "cuda":
        on_units = cuda_matrix.ceiling(handle, table, device.index) if matrix_units else None
        return on_units or cuda.ceiling(handle, table, device)
    threads = torch.get_num_threads()
    # A user's function is slower by an order of magnitude and more.
    rounds = CEILING_ROUNDS if multiplier.family != "c" else CEILING_ROUNDS // 50
    products = cpu.ceiling(handle, table, rounds, threads)
    # The highest of three, because a disturbed one is no ceiling.
    return max(products / _eager_seconds(lambda: cpu.ceiling(handle, table, rounds, threads), device) for _ in range(3))


def _operands(shape: ConvShape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return an input, a weight, and a gradient of the output."""
    sizes = (shape.batch, shape.channels, *shape.size), shape.weight_size, (shape.batch, *shape.out_shape)
    x, weight, grad = (torch.randn(size, generator=generator, device=generator.device) for size in sizes)
    return x, weight, grad


def _passes(
    shape: ConvShape, x: Tensor, weight: Tensor, grad: Tensor, multiplier: Multiplier, matrix_units: bool = False
) -> dict[str, Callable[[], Tensor]]:
    """Return the three passes of a layer as calls, with these products.

    With an integer multiplier, ``forward`` are the sums of quantised operands, and ``quantized`` is a layer in floats,
    its scales given.

    Args:
        matrix_units: whether the forward pass may use them.
    """
    if multiplier.is_integer:
        return _integer_passes(shape, x, weight, multiplier)
    product = operands(multiplier, x.device)
    if shape.is_dense:
        linear = partial(torch.ops.mbm.linear, bias=None, multiplier=product[0], table=product[1])
        pairs = (x, weight), (grad, weight.t()), (grad.t(), x.t())
        forward, *gradients = (partial(linear, *pair) for pair in pairs)
    else:
        arguments = *shape.arguments, *product
        forward = partial(torch.ops.mbm.conv2d, x, weight, None, *arguments)
        gradients = [
            partial(torch.ops.mbm.conv2d_input_grad, grad, weight, list(x.shape), *arguments),
            partial(torch.ops.mbm.conv2d_weight_grad, grad, x, list(weight.shape), *arguments),
        ]

    def forward_as_trained() -> Tensor:
        with cuda_matrix.allowed(matrix_units):
            return forward()

    return dict(zip(PASSES, (forward_as_trained, *gradients), strict=True))


def _integer_passes(
    shape: ConvShape, x: Tensor, weight: Tensor, multiplier: Multiplier
) -> dict[str, Callable[[], Tensor]]:
    x, weight = (one[:, :, None, None] if shape.is_dense else one for one in (x, weight))
    format, table = multiplier.operands or (), integer_table(multiplier, x.device)
    x_scale, weight_scale = (torch.ops.mbm.row_scales(one.reshape(1, -1), *format) for one in (x, weight))
    codes = torch.ops.mbm.quantize(x, *x_scale, *format), torch.ops.mbm.quantize(weight, *weight_scale, *format)
    scales = *x_scale, *torch.ops.mbm.row_scales(weight, *format)
    return {
        "forward": partial(torch.ops.mbm.integer_conv2d, *codes, *shape.arguments, 0, table),
        "quantized": partial(
            torch.ops.mbm.quantized_conv2d, x, weight, None, *scales, *shape.arguments, *format, table
        ),
    }


def _path(shape: ConvShape, x: Tensor, weight: Tensor, multiplier: Multiplier) -> tuple[str, int]:
    """Return the way in which the sums are computed, and the int8 products that each product takes, or 0."""
    x, weight = (one[:, :, None, None] if shape.is_dense else one for one in (x, weight))
    size = [x.shape[0], len(weight), *(shape.out_size or (1, 1))]
    geometry = forward_geometry(x, weight, size, shape.stride, shape.padding, shape.dilation, shape.groups)
    if not multiplier.is_integer:
        return cuda_matrix.chosen_path(geometry, *operands(multiplier, x.device), x.device.index), 0
    table = integer_table(multiplier, x.device)
    return cuda_integers.chosen_path(geometry, table) if x.is_cuda else (cpu_integers.chosen_path(geometry, table), 0)


def _model_layers(config: Config, device: torch.device) -> list[tuple[ConvShape, Multiplier]]:
    """List the approximate layers of the config's model, each with its multiplier."""
    model = lifecycle.build_model(config, device)
    layers = []
    for layer in describe_layers(model, dataset_of(config.data.dataset).shape):
        module = model.get_submodule(layer.name)
        name, batch = f"{config.model.name} {layer.name}", config.data.batch_size
        if isinstance(module, ApproxLinear):
            shape = ConvShape(name, batch, module.in_features, module.out_features)
            layers.append((shape, module.multiplier))
        if isinstance(module, ApproxConv2d):
            channels, *size = layer.input_shape
            window = module.kernel_size, module.stride, padding_of(module), module.dilation, module.groups
            shape = ConvShape(name, batch, channels, module.out_channels, tuple(size), *window)
            layers.append((shape, module.multiplier))
    return layers


def padding_of(module: ApproxConv2d) -> tuple[int, ...]:
    """Return a convolution's padding in pixels; ``same`` may need one more on one side."""
    if not isinstance(module.padding, str):
        return module.padding
    spans = zip(module.kernel_size, module.dilation, strict=True)
    return tuple(dilation * (kernel - 1) // 2 * (module.padding == "same") for kernel, dilation in spans)


def _time_shape(
    shape: ConvShape,
    multiplier: Multiplier,
    ceiling: float | None,
    matrix_ceiling: float | None,
    generator: torch.Generator,
) -> TimedConv:
    device, layer = generator.device, _operands(shape, generator)
    x, weight, grad = layer
    path, products, backward = None, 0 if multiplier.is_integer else 1, {}
    with torch.no_grad():
        passes = _passes(shape, *layer, multiplier, matrix_ceiling is not None)
        times = {name: _seconds(call, device) for name, call in passes.items()}
        exact = {name: _seconds(call, device) for name, call in _passes(shape, *layer, EXACT).items() if name in passes}
        if multiplier.is_integer:
            path, products = _path(shape, x, weight, multiplier)
        elif not shape.is_dense:
            backward = {name: _eager_seconds(call, device) for name, call in _backward_paths(x, weight, grad, shape)}
        if matrix_ceiling is not None:
            path, _ = _path(shape, x, weight, multiplier)
            ceiling = matrix_ceiling if path == "matrix units" else ceiling
    forward, quantized = times.pop("forward"), times.pop("quantized", None)
    rate = shape.multiplications / forward
    return TimedConv(
        name=shape.name,
        shape=shape.describe(),
        batch=shape.batch,
        multiplications=shape.multiplications,
        forward_seconds=forward,
        exact_forward_seconds=exact.pop("forward"),
        backward_seconds=backward,
        gradient_seconds=times,
        exact_gradient_seconds=exact,
        macs_per_second=rate,
        share_of_ceiling=rate * products / ceiling if ceiling and products else None,
        quantized_seconds=quantized,
        path=path,
    )


def _backward_paths(
    x: Tensor, weight: Tensor, grad: Tensor, shape: ConvShape
) -> tuple[tuple[str, Callable[[], object]], ...]:
    """Return three ways to both gradients; training takes the last."""

    def backward(*wanted: bool) -> object:
        *window, groups = shape.arguments
        arguments = *window, False, [0, 0], groups, [*wanted, False]
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments)

    def with_torch_nn_grad() -> object:
        grad_x = conv2d_input(x.shape, weight, grad, *shape.arguments)
        return grad_x, conv2d_weight(x, weight.shape, grad, *shape.arguments)

    return (
        ("torch_nn_grad", with_torch_nn_grad),
        ("two_calls", lambda: (backward(True, False), backward(False, True))),
        ("one_call", lambda: backward(True, True)),
    )


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call; on a GPU of its kernels, replayed in a CUDA graph."""
    if device.type != "cuda":
        return _eager_seconds(call, device)
    call()
    calls = max(1, min(GRAPHED_CALLS, int(BLOCK_SECONDS / _block_seconds(call, 1, device))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return _eager_seconds(graph.replay, device) / calls


def _eager_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call with its launches."""
    call()
    calls, times = 1, [_block_seconds(call, 1, device)]
    while times[0] < BLOCK_SECONDS:
        calls *= 2
        times = [_block_seconds(call, calls, device)]
    while len(times) < LEAST_BLOCKS or sum(times) < LEAST_SECONDS:
        times.append(_block_seconds(call, calls, device))
    return median(times) / calls


def _block_seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the time of these calls together, waiting for the GPU before and after."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    for _ in range(calls):
        call()
    return now() - start
