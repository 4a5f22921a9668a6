"""LeNet and the other networks, those of users, their multipliers, and a description of their layers."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_cli.data_arrays import Shape
from mbm_cli.errors import first_line
from mbm_cli.multipliers.code.python import UsersNetwork
from mbm_cli.multipliers.names import Backward, LayerMultipliers, Multiplier
from mbm_cli.nn import convert
from mbm_cli.ops import BackwardLike
from mbm_cli.pooling import ReLUMaxPool2d
from mbm_cli.quantize import Quantization, observing

Builder = Callable[[Shape, int, float], nn.Module]


def lenet(shape: Shape, classes: int, width: float = 1) -> nn.Module:
    """Build LeNet-5's layout with ReLU and max-pooling.

    As all networks here it maps images (N, C, H, W) in float32 to logits (N, classes). ``width`` times as many channels
    and hidden units as published are built.
    """
    channels, rows, columns = shape
    first, second, third, fourth = (_times(n, width) for n in (6, 16, 120, 84))
    layers = {
        "conv1": nn.Conv2d(channels, first, 5, padding=2),
        "pool1": ReLUMaxPool2d(2),
        "conv2": nn.Conv2d(first, second, 5),
        "pool2": ReLUMaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(second * ((rows // 2 - 4) // 2) * ((columns // 2 - 4) // 2), third),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(third, fourth),
        "relu4": nn.ReLU(),
        "fc3": nn.Linear(fourth, classes),
    }
    return nn.Sequential(OrderedDict(layers))


def cnn3(shape: Shape, classes: int, width: float = 1) -> nn.Module:
    """Build three 3x3 convolutions with batch norm and three dense layers."""
    channels, rows, columns = shape
    first, second, third, fourth, fifth = (_times(n, width) for n in (32, 64, 128, 128, 64))
    layers = {
        "conv1": nn.Conv2d(channels, first, 3, padding=1),
        "bn1": nn.BatchNorm2d(first),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(first, second, 3, padding=1),
        "bn2": nn.BatchNorm2d(second),
        "pool2": ReLUMaxPool2d(2),
        "conv3": nn.Conv2d(second, third, 3, padding=1),
        "bn3": nn.BatchNorm2d(third),
        "pool3": ReLUMaxPool2d(2),
        "dropout3": nn.Dropout(0.5),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(third * (rows // 4) * (columns // 4), fourth),
        "bn4": nn.BatchNorm1d(fourth),
        "relu4": nn.ReLU(),
        "dropout4": nn.Dropout(0.5),
        "fc2": nn.Linear(fourth, fifth),
        "bn5": nn.BatchNorm1d(fifth),
        "relu5": nn.ReLU(),
        "dropout5": nn.Dropout(0.5),
        "fc3": nn.Linear(fifth, classes),
    }
    return nn.Sequential(OrderedDict(layers))


def mlp(shape: Shape, classes: int, width: float = 1) -> nn.Module:
    """Build LeNet-300-100, three dense layers with ReLU."""
    first, second = (_times(n, width) for n in (300, 100))
    layers = {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(math.prod(shape), first),
        "relu1": nn.ReLU(),
        "fc2": nn.Linear(first, second),
        "relu2": nn.ReLU(),
        "fc3": nn.Linear(second, classes),
    }
    return nn.Sequential(OrderedDict(layers))


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them without parameters (He et al., option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:  # every other pixel, and channels of zeros on both sides
            before = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added - before))
        return F.relu(out + x)


def resnet20(shape: Shape, classes: int, width: float = 1) -> nn.Module:
    """Build the residual network of 20 layers for CIFAR (He et al., CVPR 2016), with its initial weights."""
    first, second, third = (_times(n, width) for n in (16, 32, 64))
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(shape[0], first, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(first),
        "relu1": nn.ReLU(),
    }
    for stage, (inputs, outputs) in enumerate(((first, first), (first, second), (second, third)), 1):
        blocks = [_Block(inputs, outputs, min(stage, 2)), *(_Block(outputs, outputs, 1) for _ in range(2))]
        layers[f"stage{stage}"] = nn.Sequential(*blocks)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(third, classes)}
    model = nn.Sequential(OrderedDict(layers))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def _times(count: int, width: float) -> int:
    return max(1, round(count * width))


# A new network gets an entry here, and its name in config.py.
MODELS: dict[str, Builder] = {"lenet": lenet, "cnn3": cnn3, "mlp": mlp, "resnet20": resnet20}


def create(network: str | UsersNetwork, shape: Shape, classes: int, width: float = 1) -> nn.Module:
    """Build a network of `MODELS`, or a user's, with ``torch.nn``'s own layers.

    Raises:
        ValueError: a user's function raises, or returns something else than a module.
    """
    return MODELS[network](shape, classes, width) if isinstance(network, str) else network(shape, classes)


def try_out(network: str | UsersNetwork, shape: Shape, classes: int, width: float = 1) -> None:
    """Build a network and run two black images through it, as in training and as in evaluation.

    Raises:
        ValueError: as `create`, or it does not map images of this shape to this many logits.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            model = create(network, shape, classes, width)
        except RuntimeError as error:  # PyTorch's: no layer has such a size
            where = network if isinstance(network, str) else network.where(error)
            raise ValueError(f"{where} cannot be built for images {shape}: {first_line(error)}") from None
        for training in (True, False):
            try:
                logits = model.train(training)(torch.zeros(2, *shape))
            except Exception as error:  # whatever a user's module does
                where = network if isinstance(network, str) else network.where(error)
                raise ValueError(f"{where} fails for two images {shape}: {first_line(error)}") from None
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            if found != (2, classes) or logits.dtype != torch.float32:
                where = network if isinstance(network, str) else network.where()
                kind = f"{logits.dtype} " if isinstance(logits, Tensor) else ""
                raise ValueError(f"{where} maps two images to {kind}{found}, not to float32 logits (2, {classes})")


def build(
    network: str | UsersNetwork,
    shape: Shape,
    classes: int,
    multiplier: Multiplier | LayerMultipliers | Mapping[str, Multiplier | str] | str,
    backward: BackwardLike = "exact",
    quantization: Quantization | None = None,
    width: float = 1,
) -> nn.Module:
    """Build a network with these multipliers. Raises as `create` and `convert`."""
    return convert(create(network, shape, classes, width), multiplier, backward, quantization)


@dataclass(frozen=True)
class Layer:
    """One layer: its shapes, parameters, multiplications for an image, and the multipliers that compute them.

    Where a layer is called several times, the shapes are those of the first one, the multiplications those of all.

    Attributes:
        backward: of the gradients: one for both, or those of input and weight.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    multiplications: int
    multiplier: str
    backward: str = "exact"


def describe_layers(model: nn.Module, input_shape: tuple[int, ...]) -> list[Layer]:
    """Run one image of zeros, (C, H, W), through the model; list the layers that have parameters, in order."""
    layers: dict[str, Layer] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not isinstance(output, Tensor):  # of a recurrent layer, for example, the output comes first
                output = output[0]
            parameters = sum(p.numel() for p in module.parameters())
            multiplications = 0
            multiplier = str(getattr(module, "multiplier", "exact"))
            backward = str(Backward(*getattr(module, "backward", ())))
            if isinstance(module, nn.Conv2d):
                multiplications = output[0].numel() * module.weight[0].numel()
            elif isinstance(module, nn.Linear):
                multiplications = output[0].numel() * module.in_features
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                multiplications = output[0].numel()  # by the scale that training and evaluation share
            kind = type(module).__name__.removeprefix("Approx")
            shapes = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            if name in layers:  # called again
                layers[name] = replace(layers[name], multiplications=layers[name].multiplications + multiplications)
            else:
                layers[name] = Layer(name, kind, *shapes, parameters, multiplications, multiplier, backward)

        return hook

    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if list(module.parameters()) and (hasattr(module, "multiplier") or not list(module.children()))
    ]
    hooks = [module.register_forward_hook(record(name)) for name, module in leaves]
    training = model.training
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), observing(model):  # in floats: scales may be unknown
            model.eval()(torch.zeros(1, *input_shape, device=parameter.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return list(layers.values())
