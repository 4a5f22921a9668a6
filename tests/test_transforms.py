"""Operators and layers under PyTorch's transforms: torch.func, FX, autocast, FLOP counting; and layers of all kinds."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import mbm_cli


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def conv(x: Tensor) -> Tensor:
    return mbm_cli.conv2d(x, torch.full((1, 1, 1, 1), 3.0))


def test_forward_derivatives_are_the_exact_convolutions(generator):
    x = torch.rand(1, 1, 2, 2, generator=generator)
    output, tangent = jvp(conv, (x,), (torch.ones_like(x),))
    assert torch.equal(output, conv(x))
    assert torch.equal(tangent, torch.full_like(x, 3.0))
    assert torch.equal(jacfwd(conv)(x).reshape(4, 4), 3 * torch.eye(4))
    assert torch.equal(jacrev(conv)(x).reshape(4, 4), 3 * torch.eye(4))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.equal(forward_ad.unpack_dual(conv(dual)).tangent, tangent)


def test_tangents_of_every_operand_are_added(generator):
    shapes = (2, 4, 6, 6), (6, 2, 3, 3), (6,)
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    tangents = [torch.randn(shape, generator=generator) for shape in shapes]
    arguments = {"stride": 2, "padding": 1, "groups": 2}
    _, found = jvp(lambda *o: mbm_cli.conv2d(*o, **arguments), tuple(operands), tuple(tangents))
    _, wanted = jvp(lambda *o: F.conv2d(*o, **arguments), tuple(operands), tuple(tangents))
    torch.testing.assert_close(found, wanted)
    _, found = jvp(mbm_cli.multiply, tuple(operands[:1] * 2), tuple(tangents[:1] * 2))
    torch.testing.assert_close(found, 2 * operands[0] * tangents[0])


def test_reverse_derivatives_equal_autograds(generator):
    x, w = torch.randn(2, 3, 6, 6, generator=generator), torch.randn(4, 3, 3, 3, generator=generator)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return mbm_cli.conv2d(x, w, padding="same").square().sum()

    wanted = torch.autograd.grad(loss(*(tensors := [x.requires_grad_(), w.requires_grad_()])), tensors)
    x, w = x.detach(), w.detach()
    for found, one in zip(grad(loss, (0, 1))(x, w), wanted, strict=True):
        torch.testing.assert_close(found, one)
    output, pull = vjp(loss, x, w)
    torch.testing.assert_close(pull(torch.ones_like(output))[1], wanted[1])


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (1, 0, 0), (0, None, 0), (2, 3, None)])
def test_a_mapped_convolution_equals_single_ones(in_dims, generator):
    shapes = [[2, 4, 6, 5], [6, 2, 3, 3], [6]]
    for shape, dim in zip(shapes, in_dims, strict=True):
        if dim is not None:
            shape.insert(dim, 3)
    operands = [torch.randn(shape, generator=generator) for shape in shapes]

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return mbm_cli.conv2d(x, w, b, padding=1, groups=2, multiplier="mbm-t16-r7")

    single = [[o if d is None else o.select(d, i) for o, d in zip(operands, in_dims, strict=True)] for i in range(3)]
    torch.testing.assert_close(vmap(call, in_dims)(*operands), torch.stack([call(*one) for one in single]))


def test_per_sample_gradients_of_a_layer(generator):
    layer = mbm_cli.ApproxConv2d(2, 3, 3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    images = torch.randn(4, 1, 2, 5, 5, generator=generator)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        wanted = grad(loss)(parameters, image)
        torch.testing.assert_close(found["weight"][i], wanted["weight"])


@pytest.mark.parametrize(("in_dims", "shapes"), [((0, 1), ((5, 3), (3, 5))), ((0, None), ((5, 3), (2, 3)))])
def test_a_mapped_product_equals_single_ones(in_dims, shapes, generator):
    a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    single = [mbm_cli.multiply(a[i], b if in_dims[1] is None else b[:, i]) for i in range(5)]
    assert torch.equal(vmap(mbm_cli.multiply, in_dims)(a, b), torch.stack(single))


def network() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return mbm_cli.convert(layers, {"0": "exact", "default": "mbm"})


def test_symbolic_tracing_keeps_the_values(generator):
    model, x = network(), torch.randn(2, 1, 8, 8, generator=generator)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x), model(x))


def test_autocast_computes_the_layer_in_float32(generator):
    model, x = network(), torch.randn(2, 1, 8, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        product = mbm_cli.multiply(x.bfloat16(), x, "mbm")
    assert output.dtype == product.dtype == torch.float32
    output.sum().backward()
    assert model[2].weight.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match=r"cast it with input\.float\(\)"):
        model[2](torch.randn(1, 4, 8, 8, dtype=torch.bfloat16))


def test_flops_are_counted_as_for_exact_layers(generator):
    model, x = network(), torch.randn(2, 1, 8, 8, generator=generator)
    counts = []
    for one in (model, mbm_cli.convert(copy.deepcopy(model), "exact")):
        with FlopCounterMode(display=False) as counter:
            one(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- Layers that convert meets


class Other(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.Linear(1, 1), ValueError, r"no convolutions; for its dense layers write .* as \{linear: mbm\}"),
        (nn.ReLU(), ValueError, r"the model, a ReLU, has no torch\.nn\.Conv2d or torch\.nn\.Linear"),
        (nn.Sequential(Other(1, 1, 1)), TypeError, r"0 is a \S*test_transforms\.Other; only torch\.nn\.Conv2d"),
    ],
)
def test_what_cannot_be_converted_is_named(model, error, words):
    with pytest.raises(error, match=words):
        mbm_cli.convert(model, "mbm")


def test_a_shared_layer_goes_by_each_of_its_names():
    shared = nn.Conv2d(1, 1, 3)
    model = nn.ModuleDict({"a": shared, "b": shared})
    mbm_cli.convert(model, {"b": "mbm-t8", "default": "exact"})
    assert model["a"] is model["b"]
    assert str(model["a"].multiplier) == "mbm-t8"
    with pytest.raises(ValueError, match="a and b are one shared layer"):
        mbm_cli.convert(model, {"a": "mbm", "b": "exact", "default": "mbm"})


def test_a_parametrized_layer_is_converted_again_and_again(generator):
    layer = parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    x = torch.randn(1, 2, 5, 5, generator=generator)
    exact = layer(x)
    for name in ("mbm", "drum-k4"):
        mbm_cli.convert(layer, name)
        assert torch.equal(layer(x), mbm_cli.conv2d(x, layer.weight, layer.bias, multiplier=name))
    mbm_cli.convert(layer, "exact")
    torch.testing.assert_close(layer(x), exact)
