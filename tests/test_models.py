"""The networks: their shapes, their parameters, and what their layers compute."""

import pytest
import torch
from torch import nn

from mbm_cli.models import MODELS, cnn3, describe_layers, lenet
from mbm_cli.multipliers import Multiplier
from mbm_cli.nn import MBMConv2d

IMAGE = (1, 28, 28)


def rows(model: nn.Module) -> list[tuple[object, ...]]:
    return [
        (x.name, x.kind, x.input_shape, x.output_shape, x.parameters, x.multiplications, x.arithmetic)
        for x in describe_layers(model, IMAGE)
    ]


def test_lenet_layers():
    assert rows(lenet("mbm-t8")) == [
        ("conv1", "Conv2d", (1, 28, 28), (6, 28, 28), 156, 117_600, "mbm-t8"),
        ("conv2", "Conv2d", (6, 14, 14), (16, 10, 10), 2_416, 240_000, "mbm-t8"),
        ("fc1", "Linear", (400,), (120,), 48_120, 48_000, "exact"),
        ("fc2", "Linear", (120,), (84,), 10_164, 10_080, "exact"),
        ("fc3", "Linear", (84,), (10,), 850, 840, "exact"),
    ]


def test_cnn3_layers():
    """A batch norm multiplies each of its outputs once, by its scale."""
    assert rows(cnn3("mitchell")) == [
        ("conv1", "Conv2d", (1, 28, 28), (32, 28, 28), 320, 225_792, "mitchell"),
        ("bn1", "BatchNorm2d", (32, 28, 28), (32, 28, 28), 64, 25_088, "exact"),
        ("conv2", "Conv2d", (32, 28, 28), (64, 28, 28), 18_496, 14_450_688, "mitchell"),
        ("bn2", "BatchNorm2d", (64, 28, 28), (64, 28, 28), 128, 50_176, "exact"),
        ("conv3", "Conv2d", (64, 14, 14), (128, 14, 14), 73_856, 14_450_688, "mitchell"),
        ("bn3", "BatchNorm2d", (128, 14, 14), (128, 14, 14), 256, 25_088, "exact"),
        ("fc1", "Linear", (6272,), (128,), 802_944, 802_816, "exact"),
        ("bn4", "BatchNorm1d", (128,), (128,), 256, 128, "exact"),
        ("fc2", "Linear", (128,), (64,), 8_256, 8_192, "exact"),
        ("bn5", "BatchNorm1d", (64,), (64,), 128, 64, "exact"),
        ("fc3", "Linear", (64,), (10,), 650, 640, "exact"),
    ]


def test_the_exact_multiplier_is_named_exact():
    assert {row[-1] for row in rows(lenet("exact"))} == {"exact"}
    assert [row[-1] for row in rows(lenet("exact-t8"))][:3] == ["exact-t8", "exact-t8", "exact"]


@pytest.mark.parametrize(("name", "parameters"), [("lenet", 61_706), ("cnn3", 905_354)])
def test_parameters_and_output(name, parameters):
    model = MODELS[name]("mbm")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(layer.parameters for layer in describe_layers(model, IMAGE)) == parameters
    logits = model(torch.randn(3, *IMAGE))
    assert (logits.shape, logits.dtype) == ((3, 10), torch.float32)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_has_the_multiplier(name):
    multiplier = Multiplier("mbm", 16, 7)
    convolutions = [m for m in MODELS[name](multiplier).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == {"lenet": 2, "cnn3": 3}[name]
    assert all(isinstance(m, MBMConv2d) and m.multiplier == multiplier for m in convolutions)


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_same_initial_weights_whatever_the_multiplier(name):
    """So that two multipliers are compared from the same start."""

    def weights(seed: int, multiplier: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return MODELS[name](multiplier).state_dict()

    first, same, other = weights(0, "mbm"), weights(0, "exact"), weights(1, "mbm")
    assert first.keys() == same.keys()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("training", [True, False])
def test_describing_the_layers_leaves_the_model_as_it_was(training):
    model = cnn3("exact").train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    describe_layers(model, IMAGE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
