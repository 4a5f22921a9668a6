"""The networks: their shapes, their parameters, and the multiplications of their layers."""

import pytest
import torch
from torch import nn

from mbm_cli.config import NETWORKS
from mbm_cli.data import DATASETS
from mbm_cli.models import MODELS, build, describe_layers, try_out
from mbm_cli.nn import ApproxConv2d, ApproxLinear

IMAGE, CLASSES = DATASETS["mnist"].shape, DATASETS["mnist"].classes
# name, kind, input and output shape, parameters, multiplications, whether the multiplier computes them
EVERYTHING = {"linear": "mbm"}  # every network has dense layers
LAYERS = {
    "lenet": [
        ("conv1", "Conv2d", (1, 28, 28), (6, 28, 28), 156, 117_600, True),
        ("conv2", "Conv2d", (6, 14, 14), (16, 10, 10), 2_416, 240_000, True),
        ("fc1", "Linear", (400,), (120,), 48_120, 48_000, False),
        ("fc2", "Linear", (120,), (84,), 10_164, 10_080, False),
        ("fc3", "Linear", (84,), (10,), 850, 840, False),
    ],
    "cnn3": [  # a batch norm multiplies each of its outputs once, by its scale
        ("conv1", "Conv2d", (1, 28, 28), (32, 28, 28), 320, 225_792, True),
        ("bn1", "BatchNorm2d", (32, 28, 28), (32, 28, 28), 64, 25_088, False),
        ("conv2", "Conv2d", (32, 28, 28), (64, 28, 28), 18_496, 14_450_688, True),
        ("bn2", "BatchNorm2d", (64, 28, 28), (64, 28, 28), 128, 50_176, False),
        ("conv3", "Conv2d", (64, 14, 14), (128, 14, 14), 73_856, 14_450_688, True),
        ("bn3", "BatchNorm2d", (128, 14, 14), (128, 14, 14), 256, 25_088, False),
        ("fc1", "Linear", (6272,), (128,), 802_944, 802_816, False),
        ("bn4", "BatchNorm1d", (128,), (128,), 256, 128, False),
        ("fc2", "Linear", (128,), (64,), 8_256, 8_192, False),
        ("bn5", "BatchNorm1d", (64,), (64,), 128, 64, False),
        ("fc3", "Linear", (64,), (10,), 650, 640, False),
    ],
}


@pytest.mark.parametrize("multiplier", ["exact", "exact-t8", "mbm-t16-r7"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_described(name, multiplier):
    rows = [tuple(vars(layer).values()) for layer in describe_layers(build(name, IMAGE, CLASSES, multiplier), IMAGE)]
    assert rows == [(*row, multiplier if approximate else "exact", "exact") for *row, approximate in LAYERS[name]]


@pytest.mark.parametrize(
    ("name", "parameters"), [("lenet", 61_706), ("cnn3", 905_354), ("mlp", 266_610), ("resnet20", 269_434)]
)
def test_parameters_and_logits(name, parameters):
    model = build(name, IMAGE, CLASSES, EVERYTHING)
    assert sum(p.numel() for p in model.parameters()) == parameters
    logits = model(torch.randn(3, *IMAGE))
    assert (logits.shape, logits.dtype) == ((3, CLASSES), torch.float32)
    assert logits.isfinite().all()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert {type(module) for module in layers} <= {ApproxConv2d, ApproxLinear}


@pytest.mark.parametrize("name", MODELS)
def test_every_network_takes_other_images_and_classes(name):
    for shape, classes, width in (((3, 32, 32), 100, 1), ((2, 20, 24), 3, 0.5)):
        try_out(name, shape, classes, width)
        one = build(name, shape, classes, EVERYTHING, width=width)
        wider = build(name, shape, classes, EVERYTHING, width=4 * width)
        assert sum(p.numel() for p in wider.parameters()) > 3 * sum(p.numel() for p in one.parameters())


@pytest.mark.parametrize(
    ("size", "fault"), [(11, r"fails for two images \(1, 11, 28\)"), (6, r"cannot be built for images \(1, 6, 28\)")]
)
def test_too_small_images_are_refused_in_one_line(size, fault):
    with pytest.raises(ValueError, match=f"^lenet {fault}: RuntimeError: ") as error:
        try_out("lenet", (1, size, 28), 10)
    assert "\n" not in str(error.value)


def test_resnet20_has_the_published_size_for_cifar():
    model = build("resnet20", (3, 32, 32), 10, "exact")
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 M in He et al., table 6
    convolutions = [layer for layer in describe_layers(model, (3, 32, 32)) if layer.kind == "Conv2d"]
    assert len(convolutions) == 19
    assert [layer.output_shape for layer in convolutions[::6]] == [
        *((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)),
    ]


def test_calls_of_a_shared_layer_are_one_row():
    layer = nn.Conv2d(2, 2, 3, padding=1)
    (row,) = describe_layers(nn.Sequential(layer, nn.ReLU(), layer), (2, 4, 4))
    assert (row.parameters, row.multiplications) == (38, 2 * 16 * 36)


def test_configs_know_every_network():
    assert tuple(MODELS) == NETWORKS


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_depend_on_the_seed_alone(name):
    def weights(seed: int, multiplier: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build(name, IMAGE, CLASSES, multiplier).state_dict()

    first, same, other = weights(0, EVERYTHING), weights(0, "exact"), weights(1, EVERYTHING)
    assert first.keys() == same.keys()
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in ("conv1.weight", "fc1.weight") if key in first)


@pytest.mark.parametrize("training", [True, False])
def test_describing_layers_changes_nothing(training):
    model = build("cnn3", IMAGE, CLASSES, "exact").train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    described = describe_layers(model, IMAGE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training is training for module in model.modules())
    assert describe_layers(model, IMAGE) == described  # no hook is left behind


def test_layers_are_described_with_both_multipliers():
    model = build("lenet", IMAGE, CLASSES, {"conv2d": "mbm", "linear": "mbm-t8", "fc3": "exact"}, {"weight": "drum-k4"})
    gradients = "{input: exact, weight: drum-k4}"
    assert [(layer.name, layer.multiplier, layer.backward) for layer in describe_layers(model, IMAGE)] == [
        ("conv1", "mbm", gradients),
        ("conv2", "mbm", gradients),
        ("fc1", "mbm-t8", gradients),
        ("fc2", "mbm-t8", gradients),
        ("fc3", "exact", "exact"),
    ]
