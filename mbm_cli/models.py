"""LeNet and the other networks, their multipliers, and a description of their layers."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbm_cli.multipliers.names import Backward, LayerMultipliers, Multiplier
from mbm_cli.nn import convert
from mbm_cli.quantize import Quantization, observing


def lenet() -> nn.Module:
    """Build LeNet-5's layout with ReLU and max-pooling: (N, 1, 28, 28) float32 to (N, 10) logits."""
    layers = {
        "conv1": nn.Conv2d(1, 6, 5, padding=2),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(6, 16, 5),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(16 * 5 * 5, 120),
        "relu3": nn.ReLU(),
        "fc2": nn.Linear(120, 84),
        "relu4": nn.ReLU(),
        "fc3": nn.Linear(84, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def cnn3() -> nn.Module:
    """Build three 3x3 convolutions with batch norm and three dense layers: (N, 1, 28, 28) float32 to (N, 10) logits."""
    layers = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1),
        "bn1": nn.BatchNorm2d(32),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(32, 64, 3, padding=1),
        "bn2": nn.BatchNorm2d(64),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": nn.Conv2d(64, 128, 3, padding=1),
        "bn3": nn.BatchNorm2d(128),
        "relu3": nn.ReLU(),
        "pool3": nn.MaxPool2d(2),
        "dropout3": nn.Dropout(0.5),
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(128 * 7 * 7, 128),
        "bn4": nn.BatchNorm1d(128),
        "relu4": nn.ReLU(),
        "dropout4": nn.Dropout(0.5),
        "fc2": nn.Linear(128, 64),
        "bn5": nn.BatchNorm1d(64),
        "relu5": nn.ReLU(),
        "dropout5": nn.Dropout(0.5),
        "fc3": nn.Linear(64, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def mlp() -> nn.Module:
    """Build LeNet-300-100, three dense layers with ReLU: (N, 1, 28, 28) float32 to (N, 10) logits."""
    layers = {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(28 * 28, 300),
        "relu1": nn.ReLU(),
        "fc2": nn.Linear(300, 100),
        "relu2": nn.ReLU(),
        "fc3": nn.Linear(100, 10),
    }
    return nn.Sequential(OrderedDict(layers))


# A new network gets an entry here, and its name in config.py.
MODELS: dict[str, Callable[[], nn.Module]] = {"lenet": lenet, "cnn3": cnn3, "mlp": mlp}


def build(
    name: str,
    multiplier: Multiplier | LayerMultipliers | str,
    backward: Backward | str = "exact",
    quantization: Quantization | None = None,
) -> nn.Module:
    """Build a network of `MODELS` with these multipliers. Raises as `convert`."""
    return convert(MODELS[name](), multiplier, backward, quantization)


@dataclass(frozen=True)
class Layer:
    """One layer: its shapes, parameters, multiplications for an image, and the multipliers that compute them.

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
    layers: list[Layer] = []

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            parameters = sum(p.numel() for p in module.parameters())
            multiplications = 0
            multiplier = str(getattr(module, "multiplier", "exact"))
            backward = str(Backward(*getattr(module, "backward", ())))
            if isinstance(module, nn.Conv2d):
                multiplications = output[0].numel() * module.weight[0].numel()
            elif isinstance(module, nn.Linear):
                multiplications = module.weight.numel()
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                multiplications = output[0].numel()  # by the scale that training and evaluation share
            kind = type(module).__name__.removeprefix("Approx")
            shapes = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            layers.append(Layer(name, kind, *shapes, parameters, multiplications, multiplier, backward))

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
    return layers
