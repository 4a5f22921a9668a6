"""The operators: what they take, what they refuse, their shapes and gradients. (Their products are in test_cpu.py.)"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mbm_cli.backends import reference
from mbm_cli.multipliers import Multiplier, reference_product
from mbm_cli.ops import conv2d, multiply

# input, weight, stride, padding, dilation, groups
CONVOLUTIONS = [
    ((2, 3, 9, 9), (4, 3, 3, 3), 1, 0, 1, 1),
    ((2, 4, 11, 8), (6, 2, 3, 2), (2, 1), (1, 2), (1, 2), 2),
    ((3, 5, 7, 7), (5, 1, 3, 3), 3, 1, 1, 5),
    ((1, 2, 3, 3), (3, 2, 5, 5), 1, 2, 1, 1),
]


def operands(input_shape, weight_shape):
    generator = torch.Generator().manual_seed(0)
    shapes = input_shape, weight_shape, weight_shape[:1]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def whole_numbers(*shape: int) -> torch.Tensor:
    """Operands whose products and sums are exact in every order, so that only where they meet matters."""
    return torch.randint(-4, 5, shape).float()


class Recorder(TorchDispatchMode):
    """The operators that were called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def arguments_of(self, operator) -> list[tuple]:
        return [args for func, args in self.calls if func is operator]


# Gradients


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("multiplier", ["mbm", "mitchell-t16-r7"])
def test_gradients_are_those_of_the_exact_convolution(convolution, multiplier):
    """Bit for bit, and whichever are asked for; the others are not computed."""
    *shapes, stride, padding, dilation, groups = convolution
    arguments = stride, padding, dilation, groups
    tensors = operands(*shapes)
    grad = torch.randn_like(F.conv2d(*tensors, *arguments))
    for wanted in itertools.product([True, False], repeat=3):
        if not any(wanted):
            continue
        ours, theirs = ([t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)] for _ in range(2))
        F.conv2d(*theirs, *arguments).backward(grad)
        output = conv2d(*ours, *arguments, multiplier)
        with Recorder() as recorder:
            output.backward(grad)
        (call,) = recorder.arguments_of(torch.ops.aten.convolution_backward.default)
        assert call[-1] == list(wanted)
        for mine, yours, is_wanted in zip(ours, theirs, wanted, strict=True):
            assert torch.equal(mine.grad, yours.grad) if is_wanted else mine.grad is None


def test_gradients_without_a_bias():
    input, weight, _ = operands((2, 3, 9, 9), (4, 3, 3, 3))
    ours, theirs = ([t.clone().requires_grad_() for t in (input, weight)] for _ in range(2))
    conv2d(*ours).sum().backward()
    F.conv2d(*theirs).sum().backward()
    assert all(torch.equal(mine.grad, yours.grad) for mine, yours in zip(ours, theirs, strict=True))


def test_gradients_of_gradients_are_those_of_the_exact_convolution():
    penalties = []
    for function in (conv2d, F.conv2d):
        input, weight, bias = (t.requires_grad_() for t in operands((2, 3, 6, 6), (4, 3, 3, 3)))
        # Linear in the output, for the outputs themselves differ.
        grads = torch.autograd.grad(function(input, weight, bias).sum(), (input, weight), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        penalties.append((input.grad, weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*penalties, strict=True))


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((2, 3, 4), (3, 1)), ((), (5,)), ((1, 4), (3, 1))])
def test_gradients_of_multiply_are_those_of_the_exact_product(shapes):
    a, b = (torch.randn(shape) for shape in shapes)
    grad = torch.randn(torch.broadcast_shapes(*shapes))
    for wanted in ((True, True), (True, False), (False, True)):
        ours, theirs = ([t.clone().requires_grad_(w) for t, w in zip((a, b), wanted, strict=True)] for _ in range(2))
        (theirs[0] * theirs[1]).backward(grad)
        output = multiply(*ours, "mbm-t8")
        with Recorder() as recorder:
            output.backward(grad)
        assert len(recorder.arguments_of(torch.ops.aten.mul.Tensor)) == sum(wanted)
        for mine, yours, is_wanted in zip(ours, theirs, wanted, strict=True):
            assert torch.equal(mine.grad, yours.grad) if is_wanted else mine.grad is None


# PyTorch's ways of calling


@pytest.mark.parametrize(("convolution", "multiplier"), [(CONVOLUTIONS[1], "mbm"), (CONVOLUTIONS[0], "exact")])
def test_conv2d_is_a_well_behaved_operator(convolution, multiplier):
    *shapes, stride, padding, dilation, groups = convolution
    input, weight, bias = (t.requires_grad_() for t in operands(*shapes))
    pairs = [[x, x] if isinstance(x, int) else list(x) for x in (stride, padding, dilation)]
    torch.library.opcheck(torch.ops.mbm.conv2d.default, (input, weight, bias, *pairs, groups, multiplier))


def test_multiply_is_a_well_behaved_operator():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.library.opcheck(torch.ops.mbm.multiply.default, (a, b, "mbm-t8"))


def test_a_channels_last_input_is_well_behaved():
    input, weight, bias = operands((2, 3, 9, 9), (4, 3, 3, 3))
    input = input.contiguous(memory_format=torch.channels_last).requires_grad_()
    arguments = (input, weight.requires_grad_(), bias, [1, 1], [0, 0], [1, 1], 1, "mbm")
    torch.library.opcheck(torch.ops.mbm.conv2d.default, arguments)


def test_compiled_as_one_opaque_operator():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def function(input, weight, bias):
        output = conv2d(input, weight, bias, padding="same", multiplier="mbm-t8")
        return multiply(output, bias[:, None, None], Multiplier("mitchell"))

    tensors = [t.requires_grad_() for t in operands((2, 3, 9, 9), (4, 3, 3, 3))]
    expected = function(*tensors)
    expected_grads = torch.autograd.grad(expected.sum(), tensors)
    output = torch.compile(function, fullgraph=True, backend=backend)(*tensors)
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(*pair) for pair in zip(grads, expected_grads, strict=True))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if target.startswith("mbm.")] == ["mbm.conv2d", "mbm.multiply"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    input, weight, bias = (t.requires_grad_() for t in operands((2, 3, 9, 9), (4, 3, 3, 3)))
    expected = conv2d(input, weight, bias)
    with mode():
        output = conv2d(input, weight, bias)
        product = multiply(bias, bias)
    assert torch.equal(output, expected)
    assert not output.requires_grad
    assert not product.requires_grad


def test_operands_are_not_changed_and_not_returned():
    input, weight, bias = operands((2, 3, 9, 9), (4, 3, 3, 3))
    copies = [t.clone() for t in (input, weight, bias)]
    conv2d(input, weight, bias)
    product = multiply(bias, torch.ones(()), "exact")
    product.zero_()
    assert all(torch.equal(*pair) for pair in zip((input, weight, bias), copies, strict=True))


# Arguments


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("multiplier", ["exact", "exact-r23", Multiplier("exact")])
def test_exact_is_the_convolution_of_pytorch_itself(convolution, multiplier):
    *shapes, stride, padding, dilation, groups = convolution
    tensors = [t.requires_grad_() for t in operands(*shapes)]
    arguments = stride, padding, dilation, groups
    assert torch.equal(conv2d(*tensors, *arguments, multiplier), F.conv2d(*tensors, *arguments))
    doubles = [t.double() for t in tensors]
    assert torch.equal(conv2d(*doubles, *arguments, multiplier), F.conv2d(*doubles, *arguments))


@st.composite
def geometries(draw):
    """Shapes and arguments of a convolution, in all the forms that PyTorch takes."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(pair)
    groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["same", "valid"]) | st.integers(0, 3) | pair | st.tuples(st.integers(0, 3)))
    stride = 1 if padding == "same" else draw(st.integers(1, 4) | pair | pair.map(list))
    size = [dilation[i] * (kernel[i] - 1) + draw(st.integers(1, 8)) for i in range(2)]
    batch = draw(st.sampled_from([(), (0,), (1,), (3,)]))
    weight = (groups * draw(st.integers(1, 3)), channels, *kernel)
    if dilation[0] == dilation[1] and draw(st.booleans()):
        dilation = dilation[0]
    return (*batch, groups * channels, *size), weight, draw(st.booleans()), (stride, padding, dilation, groups)


@settings(max_examples=150, deadline=None)
@given(geometries())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_arguments_mean_what_they_mean_to_pytorch(geometry):
    """Unbatched and empty inputs, 'same' with even kernels, one number for two, tuples and lists."""
    input_shape, weight_shape, has_bias, arguments = geometry
    input, weight = whole_numbers(*input_shape), whole_numbers(*weight_shape)
    bias = whole_numbers(weight_shape[0]) if has_bias else None
    expected = F.conv2d(input, weight, bias, *arguments)
    output = conv2d(input, weight, bias, *arguments, "exact-t1")
    assert torch.equal(output, expected)
    on_meta = [None if t is None else t.to("meta") for t in (input, weight, bias)]
    assert conv2d(*on_meta, *arguments, "exact-t1").shape == expected.shape


def test_an_empty_batch_has_gradients():
    weight, bias = torch.ones(4, 3, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    output = conv2d(torch.ones(0, 3, 9, 9), weight, bias)
    assert output.shape == (0, 4, 7, 7)
    output.sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_multiply_broadcasts_on_the_meta_device():
    product = multiply(torch.ones(2, 1, 3, device="meta"), torch.ones(4, 1, device="meta"))
    assert product.shape == (2, 4, 3)
    assert product.device.type == "meta"


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("multiplier", ["mbm", "mitchell-r7", "mbm-t17", "exact-t8"])
def test_the_backend_of_other_devices_agrees(convolution, multiplier):
    """Its sums are of the same products, hence equal but for the rounding of the additions."""
    *shapes, stride, padding, dilation, groups = convolution
    input, weight, bias = operands(*shapes)
    pairs = [[x, x] if isinstance(x, int) else list(x) for x in (stride, padding, dilation)]
    arguments = (*pairs, groups, multiplier)
    terms = weight[0].numel() + 1
    error = terms * 2.0**-23 / (1 - terms * 2.0**-23)
    magnitude = reference.conv2d(input.abs(), weight.abs(), bias.abs(), *arguments) * (1 + error)
    difference = reference.conv2d(input, weight, bias, *arguments) - conv2d(input, weight, bias, *arguments)
    assert (difference.abs() <= 2 * error * magnitude).all()


def test_the_backend_of_other_devices_is_the_reference_for_single_products():
    input, weight = torch.randn(2, 1, 5, 6), torch.randn(3, 1, 1, 1)
    sums = reference.conv2d(input, weight, None, [1, 1], [0, 0], [1, 1], 1, "mbm-t8")
    expected = 0.0 + reference_product(input, weight.reshape(1, 3, 1, 1), Multiplier("mbm", 8))
    assert torch.equal(sums.view(torch.int32), expected.view(torch.int32))
    a, b = torch.randn(3, 1), torch.randn(4)
    assert torch.equal(reference.multiply(a, b, "mbm-t8"), reference_product(a, b, Multiplier("mbm", 8)))


def test_a_large_batch_is_computed_in_parts(monkeypatch):
    """The backend of other devices bounds the memory that it takes."""
    input, weight, bias = operands((7, 2, 5, 5), (3, 2, 3, 3))
    arguments = [1, 1], [1, 1], [1, 1], 1, "mbm"
    expected = reference.conv2d(input, weight, bias, *arguments)
    monkeypatch.setattr(reference, "_CHUNK", 200)
    assert torch.equal(reference.conv2d(input, weight, bias, *arguments), expected)


# Refusals

X, W = (2, 4, 8, 8), (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("input", "weight", "bias", "arguments"),
    [
        ((8, 8), W, None, {}),
        ((1, 2, 4, 8, 8), W, None, {}),
        (X, (6, 4, 3), None, {}),
        (X, (6, 4, 3), None, {"padding": "same"}),
        (X, (6, 4, 3, 3, 3), None, {}),
        (X, (6, 5, 3, 3), None, {}),
        ((5, 8, 8), W, None, {}),
        (X, W, (5,), {}),
        (X, W, (6, 1), {}),
        (X, W, (), {}),
        (X, W, None, {"groups": 2}),
        (X, (6, 1, 3, 3), None, {"groups": 4}),
        (X, W, None, {"groups": 0}),
        (X, W, None, {"groups": -1}),
        (X, W, None, {"stride": 0}),
        (X, W, None, {"stride": (1, -1)}),
        (X, W, None, {"stride": (1, 1, 1)}),
        (X, W, None, {"dilation": 0}),
        (X, W, None, {"dilation": (1, 1, 1)}),
        (X, W, None, {"padding": -1}),
        (X, W, None, {"padding": (0, 0, 0)}),
        (X, W, None, {"padding": "full"}),
        (X, W, None, {"padding": "same", "stride": 2}),
        (X, W, None, {"padding": "same", "stride": (1, 2)}),
        (X, W, None, {"dilation": 4}),
        ((2, 4, 2, 8), W, None, {}),
        ((2, 4, 0, 8), W, None, {}),
        (X, (0, 4, 3, 3), None, {}),
        (X, (6, 4, 0, 3), None, {}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_pytorch_refuses_is_refused(input, weight, bias, arguments, device):
    tensors = [None if shape is None else torch.ones(shape, device=device) for shape in (input, weight, bias)]
    with pytest.raises(RuntimeError):
        F.conv2d(*(None if shape is None else torch.ones(shape) for shape in (input, weight, bias)), **arguments)
    with pytest.raises(RuntimeError):
        conv2d(*tensors, **arguments, multiplier="mbm")


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((value, TypeError) for value in (None, 1.0, True, {}, range(1, 3))),
        ("1", (TypeError, RuntimeError)),
        (2**63, ValueError),
        (-(2**63) - 1, ValueError),
    ],
)
def test_arguments_of_a_wrong_type_are_refused_as_pytorch_does(name, value, kind):
    """Before anything else that is wrong, here the channels."""
    input, weight = torch.ones(1, 3, 8, 8), torch.ones(W)
    with pytest.raises(kind) as theirs:
        F.conv2d(input, weight, **{name: value})
    with pytest.raises(type(theirs.value)):
        conv2d(input, weight, **{name: value})


def test_whole_numbers_of_other_types_are_taken():
    input, weight = torch.ones(X), torch.ones(W)
    for two in (np.int64(2), torch.tensor(2), torch.Size([2]), [np.int64(2), torch.tensor(2)]):
        assert torch.equal(conv2d(input, weight, stride=two), conv2d(input, weight, stride=2))


@pytest.mark.parametrize("wrong", range(3))
def test_what_is_no_dense_tensor_is_refused(wrong):
    operands = [torch.ones(X), torch.ones(W), torch.ones(6)]
    name = ("input", "weight", "bias")[wrong]
    for value in ([1.0], 1.0, "tensor", np.ones(X, np.float32)):
        with pytest.raises(TypeError, match=f"{name} is a tensor, not {type(value).__name__}"):
            conv2d(*[value if i == wrong else x for i, x in enumerate(operands)])
    with pytest.raises(RuntimeError, match=rf"use {name}\.to_dense\(\)"):
        conv2d(*[x.to_sparse() if i == wrong else x for i, x in enumerate(operands)])
    with pytest.raises(TypeError, match="b is a tensor, not float"):
        multiply(operands[0], 2.0)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_numbers_that_the_kernels_cannot_compute_with_are_refused(name):
    input, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    for compute in (conv2d, partial(torch.ops.mbm.conv2d, bias=None, groups=1, multiplier="mbm")):
        arguments = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], name: [1, 2**31]}
        with pytest.raises(RuntimeError, match="at most 2147483647"):
            compute(input, weight, **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_other_types_are_refused_with_what_to_cast(dtype):
    input, weight, bias = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), torch.ones(1)
    for wrong in range(3):
        tensors = [t.to(dtype) if i == wrong else t for i, t in enumerate((input, weight, bias))]
        name = ("input", "weight", "bias")[wrong]
        with pytest.raises(RuntimeError, match=rf"{name} is {dtype}, .* cast it with {name}\.float\(\)"):
            conv2d(*tensors)
    with pytest.raises(RuntimeError, match=rf"b is {dtype}, .* cast it with b\.float\(\)"):
        multiply(input, input.to(dtype))


def test_operands_on_two_devices_are_refused():
    input, weight, bias = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), torch.ones(1)
    with pytest.raises(RuntimeError, match="input is on cpu and weight on meta: move them to one device"):
        conv2d(input, weight.to("meta"), bias)
    with pytest.raises(RuntimeError, match="weight is on cpu and bias on meta"):
        conv2d(input, weight, bias.to("meta"))
    with pytest.raises(RuntimeError, match="a is on meta and b on cpu"):
        multiply(input.to("meta"), input)


def test_operands_that_do_not_broadcast_are_refused():
    with pytest.raises(RuntimeError):
        multiply(torch.ones(3), torch.ones(4))


@pytest.mark.parametrize("multiplier", ["booth", "mbm-t23", "mbm-r0", ""])
def test_unknown_multipliers_are_refused(multiplier):
    with pytest.raises(ValueError, match=r"multiplier|truncate|result_bits"):
        conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), multiplier=multiplier)
    with pytest.raises(ValueError, match=r"multiplier|truncate|result_bits"):
        multiply(torch.ones(1), torch.ones(1), multiplier)
