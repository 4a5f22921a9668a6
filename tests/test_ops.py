"""The operators: arguments, shapes, gradients, and PyTorch's ways of calling. (Products are in test_cpu.py.)"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operands import in_pairs, normal
from sums import assert_sums_of_products, same_bits
from tables import IN_C, random_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mbm_cli import Multiplier, conv2d, multiply, resolve
from mbm_cli.backends import reference
from mbm_cli.multipliers.float32 import reference_product
from mbm_cli.multipliers.tables import Table

CONVOLUTIONS = [  # input, weight and bias; stride, padding, dilation and groups
    (((2, 3, 9, 9), (4, 3, 3, 3), (4,)), (1, 0, 1, 1)),
    (((2, 4, 11, 8), (6, 2, 3, 2), (6,)), ((2, 1), (1, 2), (1, 2), 2)),
    (((3, 5, 7, 7), (5, 1, 3, 3), (5,)), (3, 1, 1, 5)),
    (((1, 2, 3, 3), (3, 2, 5, 5), (3,)), (1, 2, 1, 1)),
]
EACH_CONVOLUTION = pytest.mark.parametrize(("shapes", "arguments"), CONVOLUTIONS)
TABLE = random_table(5)
MULTIPLIERS = {  # with the handle and the table that the operators take
    "built-in": (Multiplier("mbm", 8, 9), ("mbm-t8-r9", None)),
    "table": (TABLE, ("table", TABLE.content.tensor())),
    "C": (resolve(IN_C), (resolve(IN_C).content.handle, None)),
}
DIRECT = [direct for _, direct in MULTIPLIERS.values()]
EACH_KIND = pytest.mark.parametrize(("multiplier", "direct"), MULTIPLIERS.values(), ids=MULTIPLIERS)


class Recorder(TorchDispatchMode):
    """Records the arguments of each call of an operator."""

    def __init__(self, operator) -> None:
        super().__init__()
        self.operator, self.calls = operator, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is self.operator:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


# Gradients


def assert_exact_gradients(function, exact, tensors, wanted, operator) -> list[tuple]:
    """Compare the wanted gradients bit for bit; return the arguments of the operator's calls."""
    ours, theirs = ([t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)] for _ in range(2))
    expected, output = exact(*theirs), function(*ours)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    with Recorder(operator) as recorder:
        output.backward(grad)
    for mine, yours, is_wanted in zip(ours, theirs, wanted, strict=True):
        assert torch.equal(mine.grad, yours.grad) if is_wanted else mine.grad is None
    return recorder.calls


@EACH_CONVOLUTION
@pytest.mark.parametrize("multiplier", ["mbm", "mitchell-t16-r7", TABLE], ids=str)
def test_gradients_are_those_of_the_exact_convolution(shapes, arguments, multiplier):
    """Check that gradients that nobody wants are not computed, and that a bias may be missing."""
    tensors = normal(*shapes)
    named = dict(zip(("stride", "padding", "dilation", "groups"), arguments, strict=True))
    functions = partial(conv2d, **named, multiplier=multiplier), partial(F.conv2d, **named)
    for count in (2, 3):
        for wanted in itertools.product([True, False], repeat=count):
            if any(wanted):
                operator = torch.ops.aten.convolution_backward.default
                (call,) = assert_exact_gradients(*functions, tensors[:count], wanted, operator)
                assert call[-1] == [*wanted, False][:3]


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((2, 3, 4), (3, 1)), ((), (5,)), ((1, 4), (3, 1))])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_of_multiply_are_those_of_exact_products(shapes, wanted):
    functions = partial(multiply, multiplier="mbm-t8"), torch.mul
    calls = assert_exact_gradients(*functions, normal(*shapes), wanted, torch.ops.aten.mul.Tensor)
    assert len(calls) == sum(wanted)


def test_second_gradients_are_those_of_the_exact_convolution():
    penalties = []
    for function in (conv2d, F.conv2d):
        input, weight, bias = (t.requires_grad_() for t in normal(*CONVOLUTIONS[0][0]))
        # The loss is linear in the outputs, which differ.
        grads = torch.autograd.grad(function(input, weight, bias).sum(), (input, weight), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        penalties.append((input.grad, weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*penalties, strict=True))


def test_an_empty_batch_has_zero_gradients():
    weight, bias = torch.ones(4, 3, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    output = conv2d(torch.ones(0, 3, 9, 9), weight, bias)
    assert output.shape == (0, 4, 7, 7)
    output.sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


# PyTorch's ways of calling


LAYOUTS = itertools.product(DIRECT, (torch.contiguous_format, torch.channels_last))


@pytest.mark.parametrize(("direct", "memory_format"), [(("exact", None), torch.contiguous_format), *LAYOUTS])
def test_operators_pass_opcheck(direct, memory_format):
    shapes, (*arguments, groups) = CONVOLUTIONS[1]
    input, weight, bias = normal(*shapes)
    tensors = [t.requires_grad_() for t in (input.contiguous(memory_format=memory_format), weight, bias)]
    torch.library.opcheck(torch.ops.mbm.conv2d.default, (*tensors, *in_pairs(*arguments), groups, *direct))
    torch.library.opcheck(torch.ops.mbm.multiply.default, (bias, weight[..., :1, 0].detach(), *direct))


@EACH_KIND
@EACH_CONVOLUTION
def test_operators_take_a_handle_and_a_table(multiplier, direct, shapes, arguments):
    tensors, (*pairs, groups) = normal(*shapes), arguments
    expected = conv2d(*tensors, *arguments, multiplier)
    assert same_bits(torch.ops.mbm.conv2d(*tensors, *in_pairs(*pairs), groups, *direct), expected)
    a, b = normal((3, 1), (4,))
    assert same_bits(torch.ops.mbm.multiply(a, b, *direct), multiply(a, b, multiplier))


def test_tables_of_one_size_are_kept_apart():
    other = Multiplier("lut", content=Table(5, TABLE.content.entries ^ 1))
    (a,) = normal((1000,))
    for multiplier in (TABLE, other, TABLE):
        assert same_bits(multiply(a, a, multiplier), reference_product(a, a, multiplier))


@EACH_KIND
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_operators_are_opaque_to_torch_compile(multiplier, direct):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def function(input, weight, bias):
        output = conv2d(input, weight, bias, padding="same", multiplier=multiplier)
        return multiply(output, bias[:, None, None], multiplier)

    tensors = [t.requires_grad_() for t in normal(*CONVOLUTIONS[0][0])]
    outputs = function(*tensors), torch.compile(function, fullgraph=True, backend=backend)(*tensors)
    assert torch.equal(*outputs)
    grads = (torch.autograd.grad(output.sum(), tensors) for output in outputs)
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if target.startswith("mbm.")] == ["mbm.conv2d", "mbm.multiply"]


def test_tracing_with_fake_tensors_leaves_no_trace():
    (a,), table = normal((5,)), random_table(6)
    make_fx(lambda a: multiply(a, a, table), tracing_mode="fake")(a)
    assert same_bits(multiply(a, a, table), reference_product(a, a, table))


@pytest.mark.parametrize("multiplier", ["mbm", random_table(4)], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode, multiplier):
    input, weight, bias = (t.requires_grad_() for t in normal(*CONVOLUTIONS[0][0]))
    with mode():
        output, product = conv2d(input, weight, bias, multiplier=multiplier), multiply(bias, bias, multiplier)
    assert not output.requires_grad
    assert not product.requires_grad
    after = conv2d(input, weight, bias, multiplier=multiplier)
    assert torch.equal(output, after)
    after.sum().backward()
    assert weight.grad is not None


def test_operands_are_neither_changed_nor_returned():
    tensors = normal(*CONVOLUTIONS[0][0])
    conv2d(*tensors)
    multiply(tensors[2], torch.ones(()), "exact").zero_()
    assert all(torch.equal(*pair) for pair in zip(tensors, normal(*CONVOLUTIONS[0][0]), strict=True))


# Arguments


@EACH_CONVOLUTION
@pytest.mark.parametrize("multiplier", ["exact", "exact-r23", Multiplier("exact")])
def test_exact_is_the_convolution_of_pytorch(shapes, arguments, multiplier):
    for tensors in (normal(*shapes), [t.double() for t in normal(*shapes)]):
        assert torch.equal(conv2d(*tensors, *arguments, multiplier), F.conv2d(*tensors, *arguments))


@st.composite
def geometries(draw):
    """Draw shapes and arguments of a convolution, in all the forms that PyTorch takes."""
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
@example(((3, 1, 1, 1), (1, 1, 1, 1), False, (2, "valid", (1, 2), 1)))  # images of one element, and a stride
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_arguments_mean_what_they_mean_to_pytorch(geometry):
    """Compare convolutions of small whole numbers, exact in any order, so that only the geometry matters."""
    input_shape, weight_shape, has_bias, arguments = geometry
    input, weight, bias = (torch.randint(-4, 5, s).float() for s in (input_shape, weight_shape, weight_shape[:1]))
    tensors = input, weight, bias if has_bias else None
    expected = F.conv2d(*tensors, *arguments)
    assert torch.equal(conv2d(*tensors, *arguments, "exact-t1"), expected)
    on_meta = [None if t is None else t.to("meta") for t in tensors]
    assert conv2d(*on_meta, *arguments, "exact-t1").shape == expected.shape


def test_multiply_broadcasts_on_the_meta_device():
    product = multiply(torch.ones(2, 1, 3, device="meta"), torch.ones(4, 1, device="meta"), TABLE)
    assert product.shape == (2, 4, 3)
    assert product.device.type == "meta"


def test_integers_of_any_type_are_taken():
    input, weight, _ = normal(*CONVOLUTIONS[0][0])
    for two in (np.int64(2), torch.tensor(2), torch.Size([2]), [np.int64(2), torch.tensor(2)]):
        assert torch.equal(conv2d(input, weight, stride=two), conv2d(input, weight, stride=2))


# The backend of devices without kernels


@EACH_CONVOLUTION
@pytest.mark.parametrize("multiplier", ["mbm", "mitchell-r7", "mbm-t17", "exact-t8", TABLE], ids=str)
def test_the_reference_backend_adds_up_the_products(shapes, arguments, multiplier, monkeypatch):
    """Check that the batch may be computed in parts."""
    tensors, (*pairs, groups) = normal(*shapes), arguments
    direct = MULTIPLIERS["table"][1] if multiplier is TABLE else (multiplier, None)
    output = reference.OPERATORS.conv2d(*tensors, *in_pairs(*pairs), groups, *direct)
    assert_sums_of_products(output, *tensors, *arguments, resolve(multiplier))
    monkeypatch.setattr(reference, "_CHUNK", 200)
    assert same_bits(reference.OPERATORS.conv2d(*tensors, *in_pairs(*pairs), groups, *direct), output)


@pytest.mark.parametrize("kind", ["built-in", "table"])
def test_the_reference_backend_multiplies_bit_for_bit(kind):
    multiplier, direct = MULTIPLIERS[kind]
    input, weight = normal((2, 1, 5, 6), (3, 1, 1, 1))
    sums = reference.OPERATORS.conv2d(input, weight, None, [1, 1], [0, 0], [1, 1], 1, *direct)
    expected = reference_product(input, weight.reshape(1, 3, 1, 1), multiplier)
    assert same_bits(sums, 0.0 + expected)
    assert same_bits(reference.multiply(input, weight.reshape(1, 3, 1, 1), *direct), expected)


# Refusals

X, W = (2, 4, 8, 8), (6, 4, 3, 3)


@pytest.mark.parametrize(
    ("input", "weight", "bias", "arguments"),
    [
        *[(shape, W, None, {}) for shape in ((8, 8), (1, 2, 4, 8, 8), (5, 8, 8), (2, 4, 2, 8), (2, 4, 0, 8))],
        *[(X, shape, None, {}) for shape in ((6, 4, 3), (6, 4, 3, 3, 3), (6, 5, 3, 3), (0, 4, 3, 3), (6, 4, 0, 3))],
        *[(X, W, shape, {}) for shape in ((5,), (6, 1), ())],
        *[(X, W, None, {"groups": groups}) for groups in (2, 0, -1)],
        (X, (6, 1, 3, 3), None, {"groups": 4}),
        *[(X, W, None, {"stride": stride}) for stride in (0, (1, -1), (1, 1, 1))],
        *[(X, W, None, {"dilation": dilation}) for dilation in (0, 4, (1, 1, 1))],
        *[(X, W, None, {"padding": padding}) for padding in (-1, (0, 0, 0), "full")],
        *[(X, W, None, {"padding": "same", "stride": stride}) for stride in (2, (1, 2))],
        (X, (6, 4, 3), None, {"padding": "same"}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_pytorch_refuses_is_refused(input, weight, bias, arguments, device):
    for function, where in ((F.conv2d, "cpu"), (conv2d, device)):
        tensors = [None if shape is None else torch.ones(shape, device=where) for shape in (input, weight, bias)]
        with pytest.raises(RuntimeError):
            function(*tensors, **arguments)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize("value", [None, 1.0, True, {}, range(1, 3), "1", 2**63, -(2**63) - 1], ids=repr)
def test_wrong_argument_types_raise_as_in_pytorch(name, value):
    """Types come first: the channels, too, are wrong."""
    input, weight = torch.ones(1, 3, 8, 8), torch.ones(W)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        F.conv2d(input, weight, **{name: value})
    with pytest.raises(type(theirs.value)):
        conv2d(input, weight, **{name: value})


OPERANDS = ((conv2d, {"input": X, "weight": W, "bias": W[:1]}), (multiply, {"a": X, "b": X}))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        *[(lambda x, v=v: v, TypeError, "{0} must be a tensor, not " + type(v).__name__) for v in ([1.0], 1.0, "x")],
        (torch.Tensor.numpy, TypeError, "{0} must be a tensor, not ndarray"),
        (torch.Tensor.to_sparse, RuntimeError, r"use {0}\.to_dense\(\)"),
        *[
            (lambda x, t=t: x.to(t), RuntimeError, rf"{{0}} is {t}, .* cast it with {{0}}\.float\(\)")
            for t in (torch.float64, torch.float16, torch.bfloat16, torch.int64)
        ],
        (lambda x: x.to("meta"), RuntimeError, "(?=.*{0}).* is on .* and .* on .*: move them to one device"),
    ],
)
@pytest.mark.parametrize(("function", "shapes"), OPERANDS)
def test_other_operands_are_refused(function, shapes, change, kind, message):
    for name in shapes:
        tensors = {other: torch.ones(shape) for other, shape in shapes.items()}
        with pytest.raises(kind, match=message.format(name)):
            function(**tensors | {name: change(tensors[name])})


def test_operands_that_do_not_broadcast_are_refused():
    with pytest.raises(RuntimeError, match="must match the size"):
        multiply(torch.ones(3), torch.ones(4))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_numbers_above_31_bits_are_refused(name):
    arguments = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], name: [1, 2**31]}
    for compute in (conv2d, partial(torch.ops.mbm.conv2d, bias=None, groups=1, multiplier="mbm")):
        with pytest.raises(RuntimeError, match="at most 2147483647"):
            compute(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1), **arguments)
