"""Approximate gradients and dense layers: every product of a network, on the CPU and on a GPU."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from operands import in_pairs, in_range, normal, wild
from sums import assert_within_bound, same_bits, same_sums
from tables import IN_C, random_table
from torch import Tensor, nn

from mbm_cli import ApproxConv2d, ApproxLinear, Multiplier, conv2d, convert, linear, resolve
from mbm_cli.multipliers.float32 import reference_product
from mbm_cli.multipliers.names import Backward

FORMS = ["mbm", "mbm-t16-r7", "mbm-t17-r3", "mitchell-r5", "drum-k4", "drum-k20", "exact-t8"]
MULTIPLIERS = [*map(Multiplier.parse, FORMS), random_table(5), random_table(7), random_table(9)]
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
EACH_MULTIPLIER = pytest.mark.parametrize("multiplier", MULTIPLIERS, ids=str)


CALLS = {
    "conv2d": (conv2d, ((2, 3, 9, 9), (4, 3, 3, 3), (4,))),
    "linear": (linear, ((3, 5), (4, 5), (4,))),
}
EACH_CALL = pytest.mark.parametrize(("function", "shapes"), CALLS.values(), ids=CALLS)


def gradients(function, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad)


def assert_sums(output: Tensor, products: Tensor, dims: int | tuple[int, ...], terms: int) -> None:
    """Check float32 sums against the float64 sums of these products."""
    products = products.double()
    terms = max(terms, 1)
    bound = terms * 2.0**-23 / (1 - terms * 2.0**-23) * products.abs().sum(dims)
    assert_within_bound(output.cpu(), products.sum(dims), bound)


def columns(x: Tensor, kernel, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """Return the elements under a kernel, (N, C, elements, positions), and which of them are no padding."""
    arguments = (kernel, dilation, padding, stride)
    shape = x.shape[0], x.shape[1], kernel[0] * kernel[1], -1
    inside = F.unfold(torch.ones_like(x), *arguments).reshape(shape) > 0
    return F.unfold(x.double(), *arguments).reshape(shape).float(), inside


def assert_gradients(x, w, grad, stride, padding, dilation, groups, multiplier, found) -> None:
    """Check both gradients of a convolution against the bit-exact products, the gradient as their first operand."""
    x, w, grad = (tensor.detach().cpu() for tensor in (x, w, grad))
    kernel, size = tuple(w.shape[2:]), tuple(x.shape[2:])
    rows = len(w) // groups
    for group in range(groups):
        of_x, of_w = (slice(group * n, (group + 1) * n) for n in (w.shape[1], rows))
        elements, inside = columns(x[:, of_x], kernel, stride, padding, dilation)
        of_grad = grad[:, of_w].flatten(2)  # (N, O, positions)
        products = reference_product(of_grad[:, :, None, None], elements[:, None], multiplier) * inside[:, None]
        assert_sums(found[1][of_w].flatten(2), products, (0, 4), of_grad[:, 0].numel())
        weights = w[of_w].flatten(2)[None, :, :, :, None]
        products = reference_product(of_grad[:, :, None, None], weights, multiplier).double()
        sums, magnitudes = (
            F.fold(p.sum(1).flatten(1, 2), size, kernel, dilation, padding, stride) for p in (products, products.abs())
        )
        terms = rows * kernel[0] * kernel[1]
        bound = terms * 2.0**-23 / (1 - terms * 2.0**-23) * magnitudes
        assert_within_bound(found[0][:, of_x].cpu(), sums, bound)


def random_convolution(generator: torch.Generator) -> tuple:
    """Return shapes of input and weight, and stride, padding, dilation and groups, of every kind."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    groups = draw(1, 3)
    channels, rows = (1, 1) if draw(0, 4) == 0 else (draw(1, 5), draw(1, 20))
    ranges = (1, 4), (1, 3), (1, 3), (0, 3)
    kernel, stride, dilation, padding = ([draw(low, high) for _ in range(2)] for low, high in ranges)
    least = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in range(2)]
    size = [max(draw(1, 12), least[i]) for i in range(2)]
    shapes = (draw(1, 4), groups * channels, *size), (groups * rows, channels, *kernel)
    return shapes, (stride, padding, dilation, groups)


def check_random_convolution(seed: int, device: str) -> None:
    """Check both gradients of a random convolution, in two memory formats, and that a repeat has the same bits."""
    shapes, arguments = random_convolution(torch.Generator().manual_seed(seed))
    multiplier = MULTIPLIERS[seed % len(MULTIPLIERS)]
    x, w = (tensor.to(device) for tensor in normal(*shapes))
    named = dict(zip(("stride", "padding", "dilation", "groups"), arguments, strict=True))
    grad = torch.randn_like(F.conv2d(x, w, None, **named))
    if seed % 2:
        x, grad = (tensor.to(memory_format=torch.channels_last) for tensor in (x, grad))
    function = partial(conv2d, **named, multiplier=multiplier, backward="same")
    found, again = (gradients(function, [x, w], grad) for _ in range(2))
    assert all(same_bits(*pair) for pair in zip(found, again, strict=True))
    assert_gradients(x, w, grad, *arguments, multiplier, found)


@DEVICES
@pytest.mark.parametrize("seed", range(30))
def test_gradients_of_convolutions_are_sums_of_the_products(device, seed):
    check_random_convolution(seed, device)


def check_dense(shape: tuple[int, int, int], multiplier: Multiplier, device: str) -> None:
    """Check a dense layer with a bias and its gradients, and that a repeat has the same bits."""
    batch, inputs, outputs = shape
    x, w, bias, grad = (t.to(device) for t in normal((batch, inputs), (outputs, inputs), (outputs,), (batch, outputs)))
    function = partial(linear, multiplier=multiplier, backward="same")
    found, again = (gradients(function, [x, w, bias], grad) for _ in range(2))
    assert all(same_bits(*pair) for pair in zip(found, again, strict=True))
    model = Multiplier("mbm") if multiplier.family == "c" else multiplier  # what the function in C computes

    def products(a: Tensor, b: Tensor) -> Tensor:
        return reference_product(a.cpu()[:, None].contiguous(), b.cpu()[None].contiguous(), model)

    with_bias = torch.cat([products(x, w), bias.cpu().expand(batch, outputs)[..., None]], 2)
    assert_sums(function(x, w, bias), with_bias, 2, inputs + 1)
    assert_sums(found[0], products(grad, w.t()), 2, outputs)
    assert_sums(found[1], products(grad.t(), x.t()), 2, batch)
    assert torch.equal(found[2], grad.sum(0))


@DEVICES
@pytest.mark.parametrize("multiplier", [*MULTIPLIERS, resolve(IN_C)], ids=str)
@pytest.mark.parametrize("shape", [(64, 30, 20), (1, 1, 1), (33, 100, 9), (5, 3, 70), (130, 257, 40)])
def test_dense_layers_and_their_gradients_are_sums_of_the_products(device, multiplier, shape):
    check_dense(shape, multiplier, device)


@DEVICES
@EACH_MULTIPLIER
@pytest.mark.parametrize("kind", [wild, in_range])
def test_single_products_are_bit_for_bit_in_every_pass(device, multiplier, kind):
    """Check sums of one product, the gradient as the first operand."""
    generator, count = torch.Generator().manual_seed(0), 500
    a, b = (kind(count, generator).to(device) for _ in range(2))
    expected = 0.0 + reference_product(a[:, None].cpu(), b[None].cpu(), multiplier)
    arguments = {"multiplier": multiplier, "backward": "same"}
    column, row = a[:, None], b[:, None]
    # Of dense layers: (N, 1) by (O, 1), then with one output, then with one image.
    assert same_sums(linear(column, row, **arguments).cpu(), expected)
    zeros = torch.zeros(1, count, device=device)
    (of_input,) = gradients(lambda x: linear(x, b[None], **arguments), [zeros.t().expand(count, count)], column)
    (of_weight,) = gradients(lambda w: linear(b[None], w, **arguments), [zeros.t().expand(count, count)], a[None])
    assert same_sums(of_input.cpu(), expected)
    assert same_sums(of_weight.cpu(), expected)
    # Of convolutions with 1x1 kernels and 1x1 images.
    image, kernel = a.reshape(count, 1, 1, 1), b.reshape(1, count, 1, 1)
    zeros = torch.zeros(count, count, 1, 1, device=device)
    (of_input,) = gradients(lambda x: conv2d(x, kernel, **arguments), [zeros], image)
    (of_weight,) = gradients(lambda w: conv2d(kernel, w, **arguments), [zeros], image.reshape(1, count, 1, 1))
    assert same_sums(of_input.cpu()[..., 0, 0], expected)
    assert same_sums(of_weight.cpu()[..., 0, 0], expected)


@pytest.mark.parametrize("backward", ["exact", "mbm-t8", {"input": "mbm-t8"}, {"weight": "mbm-t8"}, "same"])
@pytest.mark.parametrize("multiplier", ["mitchell", "exact"])
def test_each_gradient_has_its_own_multiplier(multiplier, backward):
    chosen = [str(one) for one in Backward.of(backward).of_layer(Multiplier.parse(multiplier))]
    x, w, bias, grad = normal((3, 4, 9, 9), (6, 4, 3, 3), (6,), (3, 6, 7, 7))
    found = gradients(partial(conv2d, multiplier=multiplier, backward=backward), [x, w, bias], grad)
    alone = [gradients(partial(conv2d, multiplier=one, backward="same"), [x, w, bias], grad) for one in chosen]
    assert same_bits(found[0], alone[0][0])
    assert same_bits(found[1], alone[1][1])
    exact = gradients(F.conv2d, [x, w, bias], grad)
    assert torch.allclose(found[2], exact[2])
    for one, mine, theirs in zip(chosen, found, exact, strict=False):
        assert torch.equal(mine, theirs) == (one == "exact")


@pytest.mark.parametrize(
    "wanted", [(True, True, False), (False, True, True), (True, False, True), (False, False, True)]
)
def test_exact_gradients_of_dense_layers_are_pytorchs(wanted):
    grad, *tensors = normal((2, 5, 7), (2, 5, 11), (7, 11), (7,))
    ours, theirs = ([t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)] for _ in range(2))
    linear(*ours, multiplier="mbm").backward(grad)
    F.linear(*theirs).backward(grad)
    for mine, yours, is_wanted in zip(ours, theirs, wanted, strict=True):
        assert torch.allclose(mine.grad, yours.grad, rtol=1e-6, atol=1e-6) if is_wanted else mine.grad is None


def test_dense_layers_without_inputs_give_the_bias():
    x, w, bias = torch.ones(2, 3, 0), torch.ones(4, 0), torch.arange(4.0)
    assert torch.equal(linear(x, w, bias), bias.expand(2, 3, 4))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_dense_layers_take_any_leading_dimensions(shape):
    x, w, bias = normal((*shape, 5), (4, 5), (4,))
    output = linear(x.requires_grad_(), w.requires_grad_(), bias, multiplier="mbm", backward="same")
    assert output.shape == F.linear(x, w, bias).shape
    output.sum().backward()
    assert (x.grad.shape, w.grad.shape) == (x.shape, w.shape)
    assert w.grad.any() == (x.numel() > 0)


@DEVICES
def test_convolutions_of_single_elements_are_dense_layers(device):
    """Check shapes so large that a GPU transposes the input of a dense layer."""
    x, w, grad = (t.to(device) for t in normal((4096, 256), (512, 256), (4096, 512)))
    as_images = [t[..., None, None] for t in (x, w)]
    assert torch.allclose(conv2d(*as_images, backward="same").flatten(1), linear(x, w), rtol=1e-4, atol=1e-4)
    ours = gradients(partial(conv2d, backward="same"), as_images, grad[..., None, None])
    for mine, theirs in zip(ours, gradients(partial(linear, backward="same"), [x, w], grad), strict=True):
        assert torch.allclose(mine.flatten(1), theirs, rtol=1e-4, atol=1e-3)


@DEVICES
def test_an_empty_batch_has_zero_gradients(device):
    w = torch.ones(4, 3, 3, 3, device=device, requires_grad=True)
    x = torch.ones(0, 3, 9, 9, device=device, requires_grad=True)
    conv2d(x, w, stride=2, backward="same").sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any()


@EACH_CALL
def test_exact_products_stay_in_float32_under_autocast(function, shapes):
    """Check that gradients with a multiplier get what they read."""
    tensors = normal(*shapes)
    call = partial(function, multiplier="exact", backward="mbm")
    expected = gradients(call, tensors, torch.ones_like(call(*tensors)))
    with torch.autocast("cpu", torch.bfloat16):
        output = call(*(t.requires_grad_() for t in tensors))
    assert output.dtype == torch.float32
    found = torch.autograd.grad(output.sum(), tensors)
    assert all(same_bits(*pair) for pair in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="takes float32"):
        torch.ops.mbm.linear(torch.ones(2, 3).bfloat16(), torch.ones(4, 3), None, "mbm")


def test_unused_elements_of_the_input_have_zero_gradients():
    x, w = torch.ones(1, 1, 8, 8, requires_grad=True), torch.ones(1, 1, 2, 1)
    conv2d(x, w, stride=3, backward="same").sum().backward()
    assert (x.grad != 0).sum() == 18
    assert not x.grad[..., 2::3, :].any()


@EACH_CALL
def test_derivatives_of_gradients_are_exact(function, shapes):
    exact = {conv2d: F.conv2d, linear: F.linear}[function]
    penalties = []
    for one in (partial(function, multiplier="exact", backward="mbm"), exact):
        x, w, _ = (t.requires_grad_() for t in normal(*shapes))
        # The gradients differ, and a loss that is linear in them does not see it.
        grads = torch.autograd.grad(one(x, w).sum(), (x, w), create_graph=True)
        penalties.append(torch.autograd.grad(sum(grad.sum() for grad in grads), (x, w)))
    assert all(torch.allclose(*pair, rtol=1e-5) for pair in zip(*penalties, strict=True))


@EACH_CALL
@pytest.mark.parametrize("multiplier", ["mbm", random_table(5)], ids=str)
def test_torch_func_gives_the_approximate_gradients(function, shapes, multiplier):
    tensors = normal(*shapes)
    call = partial(function, multiplier=multiplier, backward="same")
    expected = gradients(call, tensors, torch.ones_like(call(*tensors)))
    found = torch.func.grad(lambda *t: call(*t).sum(), argnums=(0, 1, 2))(*tensors)
    assert all(same_bits(*pair) for pair in zip(found, expected, strict=True))
    several = [torch.stack([t, 2 * t]) for t in tensors]
    mapped = torch.vmap(torch.func.grad(lambda *t: call(*t).sum(), argnums=(0, 1, 2)))(*several)
    for index in range(2):
        alone = gradients(call, [t[index] for t in several], torch.ones_like(call(*tensors)))
        assert all(torch.allclose(one[index], two, rtol=1e-5) for one, two in zip(mapped, alone, strict=True))


@EACH_CALL
def test_forward_derivatives_are_the_exact_ones(function, shapes):
    exact = {conv2d: F.conv2d, linear: F.linear}[function]
    tensors, tangents = normal(*shapes), normal(*shapes)
    call = partial(function, multiplier="mbm", backward="same")
    _, found = torch.func.jvp(call, tuple(tensors), tuple(tangents))
    _, expected = torch.func.jvp(exact, tuple(tensors), tuple(tangents))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_operators_of_gradients_pass_opcheck():
    shapes, (*arguments, groups) = ((2, 4, 11, 8), (6, 2, 3, 2)), ((2, 1), (1, 2), (1, 2), 2)
    x, w = normal(*shapes)
    arguments = [*in_pairs(*arguments), groups, "mbm-t8"]
    grad = torch.randn_like(F.conv2d(x, w, None, *arguments[:4]))
    ops = torch.ops.mbm
    torch.library.opcheck(ops.conv2d_input_grad.default, (grad.requires_grad_(), w, list(x.shape), *arguments))
    torch.library.opcheck(ops.conv2d_weight_grad.default, (grad, x.requires_grad_(), list(w.shape), *arguments))
    a, b, bias = (t.requires_grad_() for t in normal((3, 5), (4, 5), (4,)))
    torch.library.opcheck(ops.linear.default, (a, b, bias, "mbm", None, "mbm-t8", None, "exact", None))


# Layers


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


EVERYTHING = {"conv2d": "mbm-t16-r7", "linear": "mbm-t16-r7"}


def test_layers_compute_what_the_functions_do():
    image, x = normal((2, 3, 8, 8), (2, 5))
    for layer, function, input in (
        (ApproxConv2d(3, 4, 3, multiplier="mbm", backward="mbm-t8"), conv2d, image),
        (ApproxLinear(5, 4, multiplier="mbm", backward="mbm-t8"), linear, x),
    ):
        call = partial(function, multiplier="mbm", backward="mbm-t8")
        tensors = [input, layer.weight.detach(), layer.bias.detach()]
        output = layer(input.requires_grad_())
        assert same_bits(output, call(*tensors))
        grads = torch.autograd.grad(output.sum(), (input, layer.weight, layer.bias))
        expected = gradients(call, tensors, torch.ones_like(output))
        assert all(same_bits(*pair) for pair in zip(grads, expected, strict=True))
        assert "multiplier=mbm, backward=mbm-t8" in repr(layer)


@pytest.mark.parametrize("backward", ["exact", "same", {"weight": random_table(5)}], ids=str)
def test_converted_models_survive_what_layers_survive(backward):
    x = torch.randn(2, 1, 8, 8)
    model = convert(network(), {**EVERYTHING, "5": random_table(3)}, backward)
    assert model.state_dict().keys() == network().state_dict().keys()
    expected = gradients(model, [x], torch.ones(2, 3))[0]
    for one in (copy.deepcopy(model), torch.fx.symbolic_trace(model), torch.compile(model, backend="aot_eager")):
        assert same_bits(gradients(one, [x], torch.ones(2, 3))[0], expected)
    restored = convert(model, "exact")
    assert torch.equal(restored(x), network()(x))


def test_training_with_every_product_approximate_learns():
    """Check that a small network fits a batch of random labels as its exact counterpart does."""
    x, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 3
    losses = []
    for multiplier in ("exact", EVERYTHING):
        model = convert(network(), multiplier, "same")
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 0.2


def test_gradients_of_exact_layers_stay_exact():
    model = convert(network(), {"0": "mbm", "3": "mbm"}, "mbm")
    assert [str(one) for one in model[0].backward] == [str(one) for one in model[3].backward] == ["mbm", "mbm"]
    assert type(model[5]) is nn.Linear
    convert(model, {"0": "exact", "3": "mbm-t8"}, "same")
    assert [str(one) for one in model[0].backward] == ["exact", "exact"]
    assert [str(one) for one in model[3].backward] == ["mbm-t8", "mbm-t8"]


class Other(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: linear(torch.ones(2, 3), torch.ones(4, 5)), "does not fit"),
        (lambda: linear(torch.ones(2, 3).double(), torch.ones(4, 3)), r"cast it with input\.float"),
        (lambda: linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), "bias"),
        (lambda: linear([1.0], torch.ones(4, 3)), "input must be a tensor"),
        (lambda: linear(torch.ones(2, 3), torch.ones(4, 3), backward="mbn"), "mbn"),
        (lambda: linear(torch.ones(2, 3), torch.ones(4, 3), backward={"bias": "mbm"}), "a layer has two"),
        (lambda: convert(nn.Sequential(Other(1, 1)), {"linear": "mbm"}), r"0 is a \S+Other; only torch\.nn\.Linear"),
        (lambda: convert(nn.Linear(1, 1), {"fc1": "mbm"}), "no layer is called fc1"),
        (lambda: convert(nn.Conv2d(1, 1, 1), {"linear": "mbm"}), "no layer is called linear"),
    ],
)
def test_what_cannot_be_computed_is_named(function, message):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        function()
