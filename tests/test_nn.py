"""ApproxConv2d in the place of nn.Conv2d, and convert."""

import copy
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from operands import normal
from sums import same_bits
from tables import EXAMPLES, IN_C, IN_PYTHON, exported, random_table
from torch import nn

from mbm_cli import ApproxConv2d, Multiplier, conv2d, convert, resolve

MULTIPLIERS = ["mbm-t8", Multiplier("mitchell", 16, 7), random_table(3), IN_PYTHON, IN_C]
EACH_MULTIPLIER = pytest.mark.parametrize("multiplier", MULTIPLIERS, ids=str)
ARGUMENTS = [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"groups": 2}, {"groups": 4, "padding": 1}]
ARGUMENTS += [{"padding": "valid"}, {"padding": "same"}, {"padding": "same", "dilation": 2}]
ARGUMENTS += [{"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}]
MODES = ("zeros", "reflect", "replicate", "circular")
ARGUMENTS += [{"padding": padding, "padding_mode": mode} for mode in MODES for padding in ((2, 1), "same")]
ARGUMENTS += [{"padding": 1, "padding_mode": "circular", "stride": 2, "groups": 2, "bias": False}]
(IMAGES,) = normal((3, 1, 8, 8))


def equal_states(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def network() -> nn.Sequential:
    last = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False))
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), last, nn.Flatten(), nn.Linear(6 * 6 * 6, 5))


# ApproxConv2d


@pytest.mark.parametrize("kernel", [3, 1, (2, 3), 4], ids=str)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("multiplier", ["exact", "exact-t1"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_arguments_and_states_are_those_of_conv2d(multiplier, arguments, kernel):
    """Compare outputs and gradients on small whole numbers, for which exact-t1 makes no error in any order."""
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 8, kernel, **arguments)
    torch.manual_seed(0)
    ours = ApproxConv2d(4, 8, kernel, **arguments, multiplier=multiplier)
    assert equal_states(ours, theirs)
    assert repr(ours) == f"Approx{repr(theirs)[:-1]}, multiplier={multiplier})"
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, -4, 4).data.round_()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for shape in ((2, 4, 9, 10), (4, 9, 10)):
        input = torch.randint(-4, 5, shape).float()
        outputs = ours(input), theirs(input)
        assert torch.equal(*outputs)
        grad = torch.randn_like(outputs[0])
        grads = [torch.autograd.grad(y, [*m.parameters()], grad) for y, m in zip(outputs, (ours, theirs), strict=True)]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_the_multiplier_is_given_by_name_alone():
    arguments = (4, 8, 3, 2, 1, 2, 2, False, "circular")
    assert repr(ApproxConv2d(*arguments)) == f"Approx{repr(nn.Conv2d(*arguments))[:-1]}, multiplier=mbm)"
    assert inspect.signature(ApproxConv2d).parameters["multiplier"].kind is inspect.Parameter.KEYWORD_ONLY


@EACH_MULTIPLIER
def test_layers_compute_with_their_multiplier(multiplier):
    layer, exact = ApproxConv2d(1, 4, 3, 1, 1, multiplier=multiplier), nn.Conv2d(1, 4, 3, 1, 1)
    exact.load_state_dict(layer.state_dict())
    assert equal_states(exact, layer)
    assert layer.multiplier == resolve(multiplier)
    assert same_bits(layer(IMAGES), conv2d(IMAGES, layer.weight, layer.bias, 1, 1, multiplier=multiplier))
    assert not torch.equal(layer(IMAGES), exact(IMAGES))
    for model in (layer, exact):
        model(IMAGES).sum().backward()
    assert torch.equal(layer.weight.grad, exact.weight.grad)
    assert torch.equal(layer.bias.grad, exact.bias.grad)


@EACH_MULTIPLIER
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_compute_the_same(duplicate, multiplier):
    for model in (ApproxConv2d(1, 4, 3, multiplier=multiplier), convert(network(), multiplier).eval()):
        again = duplicate(model)
        assert repr(again) == repr(model)
        assert equal_states(again, model)
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_pickles_need_no_files(tmp_path):
    """Load layers in a new process, after the files of their multipliers are gone."""
    exported("mitchell", 7, tmp_path / "table.bin")
    for example in ("four_bits.py", "mbm.h"):
        (tmp_path / example).write_text((EXAMPLES / example).read_text())
    names = [f"lut:{tmp_path}/table.bin", f"python:{tmp_path}/four_bits.py:product", f"c:{tmp_path}/mbm.h:mbm"]
    layers = [ApproxConv2d(1, 4, 3, multiplier=name) for name in names]
    for file in tmp_path.iterdir():
        file.unlink()
    torch.save((layers, IMAGES, [layer(IMAGES) for layer in layers]), tmp_path / "layers.pt")
    program = (
        f"import torch; layers, x, outputs = torch.load({str(tmp_path / 'layers.pt')!r}, weights_only=False)\n"
        "assert all(torch.equal(layer(x), y) for layer, y in zip(layers, outputs, strict=True))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@EACH_MULTIPLIER
def test_tensors_follow_the_layer_to_a_device(multiplier):
    moved = ApproxConv2d(1, 4, 3, multiplier=multiplier).to("meta")
    built = ApproxConv2d(1, 4, 3, multiplier=multiplier, device="meta")
    converted = convert(nn.Conv2d(1, 4, 3, device="meta"), multiplier)
    for layer in (moved, built, converted):
        assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
        assert layer(IMAGES.to("meta")).shape == (3, 4, 6, 6)


@pytest.mark.parametrize(
    "change",
    [lambda layer: layer.to("meta").to_empty(device="cpu"), lambda layer: layer.type(torch.float64).float()],
    ids=["emptied", "cast"],
)
def test_tables_survive_emptied_and_cast_layers(change):
    layer = ApproxConv2d(1, 4, 3, multiplier=random_table(3))
    changed = change(copy.deepcopy(layer))
    changed.load_state_dict(layer.state_dict())
    assert changed.table.dtype == layer.table.dtype
    assert same_bits(changed(IMAGES), layer(IMAGES))


def test_inputs_and_weights_must_be_float32():
    with pytest.raises(RuntimeError, match=r"cast it with input\.float\(\)"):
        ApproxConv2d(1, 4, 3)(IMAGES.double())
    with pytest.raises(RuntimeError, match=r"cast it with weight\.float\(\)"):
        ApproxConv2d(1, 4, 3).double()(IMAGES)


def test_functional_call_replaces_parameters():
    layer, other = ApproxConv2d(1, 4, 3), ApproxConv2d(1, 4, 3)
    output = torch.func.functional_call(layer, dict(other.named_parameters()), IMAGES)
    assert torch.equal(output, other(IMAGES))
    output.sum().backward()
    assert layer.weight.grad is None
    assert other.weight.grad is not None


@pytest.mark.parametrize("multiplier", ["exact", *MULTIPLIERS], ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_layers_compile_as_one_graph(padding_mode, multiplier):
    torch.compiler.reset()
    layer = ApproxConv2d(1, 4, 3, padding=1, padding_mode=padding_mode, multiplier=multiplier)
    outputs = layer(IMAGES), torch.compile(layer, fullgraph=True, backend="aot_eager")(IMAGES)
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(y.sum(), layer.weight)[0] for y in outputs))


# convert


def test_convert_keeps_everything_else():
    """Keep the objects, so that an optimizer's parameters stay valid, their modes, hooks and requires_grad."""
    model = network().eval()
    model[2][1].train()
    model[0].weight.requires_grad_(False)
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append("forward"))
    model[2][1].register_forward_pre_hook(lambda module, inputs: calls.append("before"))
    before = [*model.modules(), *model.parameters()]
    modes, names = [module.training for module in model.modules()], list(model.state_dict())

    assert convert(model, "mbm-t8") is model
    assert all(a is b for a, b in zip([*model.modules(), *model.parameters()], before, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == names
    assert not model[0].weight.requires_grad
    types = [type(module) for module in (model[0], model[1], model[2][1], model[4])]
    assert types == [ApproxConv2d, nn.BatchNorm2d, ApproxConv2d, nn.Linear]
    model(IMAGES)
    assert calls == ["forward", "before"]


def test_converted_layers_equal_new_ones():
    layer = convert(nn.Conv2d(1, 4, 3, 2, 1, padding_mode="reflect"), "mbm-t8")
    new = ApproxConv2d(1, 4, 3, 2, 1, padding_mode="reflect", multiplier="mbm-t8")
    new.load_state_dict(layer.state_dict())
    assert repr(new) == repr(layer)
    assert torch.equal(new(IMAGES), layer(IMAGES))


def test_exact_restores_the_outputs():
    model = network().eval()
    expected = model(IMAGES)
    outputs = [convert(model, multiplier)(IMAGES) for multiplier in ("mbm", random_table(3), "exact")]
    assert not torch.equal(outputs[0], expected)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], expected)
    assert "table" not in dict(model[0].named_buffers())


def test_convert_takes_multipliers_by_layer():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)))
    convert(model, {"1.*": "mbm-t8", "1.1": Multiplier("exact"), "default": "mitchell"})
    assert [str(m.multiplier) for m in model.modules() if isinstance(m, nn.Conv2d)] == ["mitchell", "mbm-t8", "exact"]


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        ("mbm", "mbm mbm exact exact"),
        ({"conv2d": "mbm", "linear": "mbm-t8", "3": "exact"}, "mbm mbm mbm-t8 exact"),
        ({"[12]": "mitchell", "linear": "mbm-t8"}, "exact mitchell mitchell mbm-t8"),
        ({"[12]": "mitchell", "1": "drum-k6", "default": "mbm"}, "mbm drum-k6 mitchell exact"),
        ({"3": "mbm"}, "exact exact exact mbm"),
        ({"default": "mbm-t8", "conv2d": "mbm"}, "mbm mbm exact exact"),
    ],
)
def test_a_name_wins_over_a_pattern_over_a_kind_over_the_default(multiplier, expected):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(2, 2), nn.Linear(2, 2))
    convert(model, multiplier)
    assert " ".join(str(getattr(layer, "multiplier", "exact")) for layer in model) == expected
    convert(model, "exact")
    assert {str(getattr(layer, "multiplier", "exact")) for layer in model} == {"exact"}


@pytest.mark.parametrize(
    ("multiplier", "message"),
    [
        ("booth", "families are exact"),
        ({"0": "mbm", "default": "lut:nowhere.bin"}, "no such file"),
        ({"conv9": "mbm", "default": "mbm"}, r"no layer is called conv9; those with a multiplier are 0, 2\.1"),
    ],
)
def test_wrong_multipliers_change_nothing(multiplier, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        convert(model, multiplier)
    assert type(model[0]) is nn.Conv2d
    if isinstance(multiplier, str):
        with pytest.raises(ValueError, match=message):
            ApproxConv2d(1, 4, 3, multiplier=multiplier)


def test_a_shared_convolution_stays_shared():
    layer = nn.Conv2d(1, 1, 3, padding=1)
    model = convert(nn.Sequential(layer, nn.ReLU(), layer), "mbm")
    assert model[0] is model[2] is layer
    assert type(layer) is ApproxConv2d


class Gated(nn.Conv2d):
    """A convolution with a computation of its own."""

    def forward(self, input):
        return super().forward(input) * input.sigmoid()


@pytest.mark.parametrize("subclass", [lambda: Gated(1, 1, 1), lambda: nn.LazyConv2d(1, 1)])
def test_subclasses_are_refused_and_nothing_changes(subclass):
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Sequential(subclass()))
    with pytest.raises(TypeError, match=r"1\.0 is a \S+\.(Gated|LazyConv2d);"):
        convert(model, "mbm")
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(TypeError, match="the model is a"):
        convert(subclass(), "mbm")


def test_other_convolutions_are_left_alone():
    model = convert(nn.Sequential(nn.Conv1d(1, 1, 3), nn.ConvTranspose2d(1, 1, 3), nn.Conv2d(1, 1, 3)), "mbm")
    assert [type(module) for module in model] == [nn.Conv1d, nn.ConvTranspose2d, ApproxConv2d]
