"""MBMConv2d in nn.Conv2d's place, and convert."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mbm_cli
from mbm_cli.multipliers import Multiplier
from mbm_cli.nn import MBMConv2d, convert
from mbm_cli.ops import conv2d

ARGUMENTS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"groups": 2},
    {"groups": 4, "padding": 1},
    {"padding": "valid"},
    {"padding": "same"},
    {"padding": "same", "dilation": 2},
    *[{"padding": (2, 1), "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")],
    *[{"padding": "same", "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")],
    {"padding": 1, "padding_mode": "circular", "stride": 2, "groups": 2, "bias": False},
]
KERNELS = [3, 1, (2, 3), 4]


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False)),
        nn.Flatten(),
        nn.Linear(6 * 6 * 6, 5),
    )


IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# MBMConv2d


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_drop_in_for_conv2d(arguments, kernel):
    """Same arguments, same state_dict, either way; the exact one computes the same bits, gradients included."""
    theirs = nn.Conv2d(4, 8, kernel, **arguments)
    ours = MBMConv2d(4, 8, kernel, **arguments, multiplier="exact")
    ours.load_state_dict(theirs.state_dict())
    assert equal_states(ours, theirs)
    theirs.load_state_dict(ours.state_dict())
    for shape in ((2, 4, 9, 10), (4, 9, 10)):
        input = torch.randn(shape)
        expected = theirs(input)
        output = ours(input)
        assert torch.equal(output, expected)
        grad = torch.randn_like(output)
        grads = [torch.autograd.grad(y, list(m.parameters()), grad) for y, m in ((output, ours), (expected, theirs))]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_every_argument_reaches_the_approximate_convolution(arguments, kernel):
    """Small whole numbers, of which exact-t1 makes no error, in any order: equal to nn.Conv2d."""
    theirs, ours = nn.Conv2d(4, 8, kernel, **arguments), MBMConv2d(4, 8, kernel, **arguments, multiplier="exact-t1")
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, -4, 4).data.round_()
    ours.load_state_dict(theirs.state_dict())
    input = torch.randint(-4, 5, (2, 4, 9, 10)).float()
    assert torch.equal(ours(input), theirs(input))


def test_arguments_by_position():
    """In nn.Conv2d's order; the multiplier by name alone."""
    arguments = (4, 8, 3, 2, 1, 2, 2, False, "circular")
    ours, theirs = MBMConv2d(*arguments), nn.Conv2d(*arguments)
    assert repr(ours) == f"MBM{repr(theirs)[:-1]}, multiplier=mbm)"
    assert inspect.signature(MBMConv2d).parameters["multiplier"].kind is inspect.Parameter.KEYWORD_ONLY


def test_initial_weights_are_those_of_conv2d():
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 8, 3)
    torch.manual_seed(0)
    assert equal_states(MBMConv2d(4, 8, 3), theirs)


@pytest.mark.parametrize("multiplier", ["mbm", "mbm-t8", "mitchell-t16-r7", Multiplier("mbm", 8)])
def test_its_products_come_from_the_multiplier(multiplier):
    layer = MBMConv2d(1, 4, 3, 1, 1, multiplier=multiplier)
    assert layer.multiplier == (Multiplier.parse(multiplier) if isinstance(multiplier, str) else multiplier)
    assert f"multiplier={layer.multiplier}" in repr(layer)
    output = layer(IMAGES)
    assert torch.equal(output, conv2d(IMAGES, layer.weight, layer.bias, 1, 1, multiplier=multiplier))
    assert not torch.equal(output, F.conv2d(IMAGES, layer.weight, layer.bias, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_inputs_that_are_not_float32_are_refused_with_what_to_cast(dtype):
    with pytest.raises(RuntimeError, match=r"cast it with input\.float\(\)"):
        MBMConv2d(1, 4, 3)(IMAGES.to(dtype))
    with pytest.raises(RuntimeError, match=r"cast it with weight\.float\(\)"):
        MBMConv2d(1, 4, 3, dtype=torch.float64)(IMAGES)


def test_not_a_multiplier():
    with pytest.raises(ValueError, match="booth"):
        MBMConv2d(1, 4, 3, multiplier="booth")
    with pytest.raises(ValueError, match="booth"):
        convert(network(), "booth")


def test_on_the_meta_device():
    layer = MBMConv2d(1, 4, 3, padding="same", device="meta")
    assert layer(IMAGES.to("meta")).shape == (3, 4, 8, 8)


def test_functional_call():
    layer, other = MBMConv2d(1, 4, 3), MBMConv2d(1, 4, 3)
    output = torch.func.functional_call(layer, dict(other.named_parameters()), IMAGES)
    assert torch.equal(output, other(IMAGES))
    output.sum().backward()
    assert layer.weight.grad is None
    assert other.weight.grad is not None


@pytest.mark.parametrize("arguments", [{}, {"multiplier": "exact"}, {"padding": 1, "padding_mode": "reflect"}], ids=str)
def test_a_compiled_layer(arguments):
    layer = MBMConv2d(1, 4, 3, **arguments)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output = compiled(IMAGES)
    assert torch.equal(output, layer(IMAGES))
    (grad,) = torch.autograd.grad(output.sum(), layer.weight)
    assert torch.equal(grad, torch.autograd.grad(layer(IMAGES).sum(), layer.weight)[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles(duplicate):
    for model in (MBMConv2d(1, 4, 3, multiplier="mbm-t8"), convert(network(), "mitchell-r7").eval()):
        again = duplicate(model)
        assert repr(again) == repr(model)
        assert equal_states(again, model)
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_the_package_offers_them():
    assert mbm_cli.MBMConv2d is MBMConv2d
    assert mbm_cli.convert is convert


# convert


def test_convert_keeps_everything_else():
    """Parameters are the same objects (an optimizer goes on), modes, hooks, requires_grad and other layers stay."""
    model = network().eval()
    model[2][1].train()
    model[0].weight.requires_grad_(False)
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append("forward"))
    model[2][1].register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    modules, parameters, state = list(model.modules()), list(model.parameters()), model.state_dict()
    modes = [module.training for module in modules]

    assert convert(model, "mbm-t8") is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    assert [module.training for module in model.modules()] == modes
    assert not model[0].weight.requires_grad
    assert [type(m) for m in (model[0], model[1], model[2][1], model[4])] == [
        MBMConv2d,
        nn.BatchNorm2d,
        MBMConv2d,
        nn.Linear,
    ]
    model(IMAGES)
    assert calls == ["forward", "before"]


def test_a_converted_convolution_is_an_mbm_convolution():
    theirs = nn.Conv2d(1, 4, 3, 2, 1, padding_mode="reflect")
    ours = MBMConv2d(1, 4, 3, 2, 1, padding_mode="reflect", multiplier="mbm-t8")
    ours.load_state_dict(theirs.state_dict())
    converted = convert(theirs, Multiplier("mbm", 8))
    assert converted is theirs
    assert repr(converted) == repr(ours)
    assert torch.equal(converted(IMAGES), ours(IMAGES))


def test_convert_again_and_back_to_exact():
    model = network().eval()
    expected = model(IMAGES)
    outputs = [convert(model, multiplier)(IMAGES) for multiplier in ("mbm", "mitchell", "exact")]
    assert not torch.equal(outputs[0], expected)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], expected)


def test_a_shared_convolution_stays_shared():
    layer = nn.Conv2d(1, 1, 3, padding=1)
    model = convert(nn.Sequential(layer, nn.ReLU(), layer), "mbm")
    assert model[0] is model[2] is layer
    assert type(layer) is MBMConv2d


class Gated(nn.Conv2d):
    """A convolution that computes something of its own."""

    def forward(self, input):
        return super().forward(input) * input.sigmoid()


@pytest.mark.parametrize("subclass", [lambda: Gated(1, 1, 1), lambda: nn.LazyConv2d(1, 1)])
def test_a_subclass_is_refused_and_nothing_is_changed(subclass):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Sequential(subclass()))
    with pytest.raises(TypeError, match=r"1\.0 is a (Gated|LazyConv2d)"):
        convert(model, "mbm")
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(TypeError, match="the model is a"):
        convert(subclass(), "mbm")


def test_other_convolutions_are_left_alone():
    model = nn.Sequential(nn.Conv1d(1, 1, 3), nn.ConvTranspose2d(1, 1, 3))
    convert(model, "mbm")
    assert [type(module) for module in model] == [nn.Conv1d, nn.ConvTranspose2d]


def test_training_steps_follow_the_exact_gradients():
    """One step of a converted model: what backpropagation passes on at each convolution is the exact gradient."""
    layer = convert(nn.Conv2d(1, 4, 3), "mbm")
    layer(IMAGES).sum().backward()
    exact = nn.Conv2d(1, 4, 3)
    exact.load_state_dict(layer.state_dict())
    exact(IMAGES).sum().backward()
    assert torch.equal(layer.weight.grad, exact.weight.grad)
    assert torch.equal(layer.bias.grad, exact.bias.grad)
