"""The operators: arguments, shapes, gradients, and PyTorch's ways of calling. (Products are in test_cpu.py.)"""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sums import assert_sums_of_products, same_bits
from tables import random_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mbm_cli import Multiplier, conv2d, multiply, resolve
from mbm_cli.backends import reference
from mbm_cli.multipliers.float32 import reference_product
from mbm_cli.multipliers.tables import Table

# input, weight, stride, padding, dilation, groups
CONVOLUTIONS = [
    ((2, 3, 9, 9), (4, 3, 3, 3), 1, 0, 1, 1),
    ((2, 4, 11, 8), (6, 2, 3, 2), (2, 1), (1, 2), (1, 2), 2),
    ((3, 5, 7, 7), (5, 1, 3, 3), 3, 1, 1, 5),
    ((1, 2, 3, 3), (3, 2, 5, 5), 1, 2, 1, 1),
]
TABLE = random_table(5)
TABLE_OPERANDS = ("table", TABLE.content.tensor())
IN_C = resolve(f"c:{Path(__file__).parent.parent / 'examples' / 'mbm.h'}:mbm")


def operands(input_shape=(2, 3, 9, 9), weight_shape=(4, 3, 3, 3), requires_grad=False):
    """Return an input, a weight and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = input_shape, weight_shape, weight_shape[:1]
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


def in_pairs(*arguments) -> list[list[int]]:
    return [[x, x] if isinstance(x, int) else list(x) for x in arguments]


def leaves(tensors, wanted=(True, True, True)):
    """Return copies of tensors, of which the wanted ones need gradients."""
    return [t.detach().clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=False)]


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


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("multiplier", ["mbm", "mitchell-t16-r7", TABLE], ids=str)
def test_gradients_are_those_of_the_exact_convolution(convolution, multiplier):
    """Compare bit for bit, for each choice of gradients; check that no others are computed."""
    *shapes, stride, padding, dilation, groups = convolution
    arguments = stride, padding, dilation, groups
    tensors = operands(*shapes)
    grad = torch.randn_like(F.conv2d(*tensors, *arguments))
    for wanted in itertools.product([True, False], repeat=3):
        if not any(wanted):
            continue
        ours, theirs = leaves(tensors, wanted), leaves(tensors, wanted)
        F.conv2d(*theirs, *arguments).backward(grad)
        output = conv2d(*ours, *arguments, multiplier)
        with Recorder(torch.ops.aten.convolution_backward.default) as recorder:
            output.backward(grad)
        assert [call[-1] for call in recorder.calls] == [list(wanted)]
        for mine, yours, is_wanted in zip(ours, theirs, wanted, strict=True):
            assert torch.equal(mine.grad, yours.grad) if is_wanted else mine.grad is None


def test_gradients_without_a_bias():
    ours, theirs = (leaves(operands()[:2]) for _ in range(2))
    conv2d(*ours).sum().backward()
    F.conv2d(*theirs).sum().backward()
    assert all(torch.equal(mine.grad, yours.grad) for mine, yours in zip(ours, theirs, strict=True))


def test_second_gradients_are_those_of_the_exact_convolution():
    penalties = []
    for function in (conv2d, F.conv2d):
        input, weight, bias = operands(requires_grad=True)
        # The loss is linear in the outputs, which differ.
        grads = torch.autograd.grad(function(input, weight, bias).sum(), (input, weight), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        penalties.append((input.grad, weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*penalties, strict=True))


@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((2, 3, 4), (3, 1)), ((), (5,)), ((1, 4), (3, 1))])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_of_multiply_are_those_of_exact_products(shapes, wanted):
    tensors = [torch.randn(shape) for shape in shapes]
    grad = torch.randn(torch.broadcast_shapes(*shapes))
    ours, theirs = leaves(tensors, wanted), leaves(tensors, wanted)
    (theirs[0] * theirs[1]).backward(grad)
    output = multiply(*ours, "mbm-t8")
    with Recorder(torch.ops.aten.mul.Tensor) as recorder:
        output.backward(grad)
    assert len(recorder.calls) == sum(wanted)
    for mine, yours, is_wanted in zip(ours, theirs, wanted, strict=True):
        assert torch.equal(mine.grad, yours.grad) if is_wanted else mine.grad is None


# PyTorch's ways of calling


@pytest.mark.parametrize(
    ("convolution", "multiplier", "memory_format"),
    [
        (CONVOLUTIONS[1], ("mbm",), torch.contiguous_format),
        (CONVOLUTIONS[0], ("mbm",), torch.channels_last),
        (CONVOLUTIONS[0], ("exact",), torch.contiguous_format),
        (CONVOLUTIONS[1], TABLE_OPERANDS, torch.contiguous_format),
        (CONVOLUTIONS[0], (IN_C.content.handle,), torch.contiguous_format),
    ],
    ids=["mbm", "channels last", "exact", "table", "C"],
)
def test_conv2d_passes_opcheck(convolution, multiplier, memory_format):
    *shapes, stride, padding, dilation, groups = convolution
    input, weight, bias = operands(*shapes)
    input = input.contiguous(memory_format=memory_format)
    tensors = [t.requires_grad_() for t in (input, weight, bias)]
    pairs = in_pairs(stride, padding, dilation)
    torch.library.opcheck(torch.ops.mbm.conv2d.default, (*tensors, *pairs, groups, *multiplier))


@pytest.mark.parametrize("multiplier", [("mbm-t8",), TABLE_OPERANDS, (IN_C.content.handle,)], ids=["mbm", "table", "C"])
def test_multiply_passes_opcheck(multiplier):
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    torch.library.opcheck(torch.ops.mbm.multiply.default, (a, b, *multiplier))


@pytest.mark.parametrize(
    ("multiplier", "direct"),
    [("mbm-t8-r9", ("mbm-t8-r9",)), (TABLE, TABLE_OPERANDS), (IN_C, (IN_C.content.handle,))],
    ids=["built-in", "table", "C"],
)
@pytest.mark.parametrize("convolution", CONVOLUTIONS[:2])
def test_operators_take_a_handle_and_a_table(multiplier, direct, convolution):
    *shapes, stride, padding, dilation, groups = convolution
    tensors, pairs = operands(*shapes), in_pairs(stride, padding, dilation)
    expected = conv2d(*tensors, stride, padding, dilation, groups, multiplier)
    assert same_bits(torch.ops.mbm.conv2d(*tensors, *pairs, groups, *direct), expected)
    a, b = torch.randn(3, 1), torch.randn(4)
    assert same_bits(torch.ops.mbm.multiply(a, b, *direct), multiply(a, b, multiplier))


def test_tables_of_one_size_are_kept_apart():
    """Two tables share the operator's handle; each call uses the table that it is given."""
    other = Multiplier("lut", content=Table(5, TABLE.content.entries ^ 1))
    a = torch.randn(1000)
    for multiplier in (TABLE, other, TABLE):
        assert same_bits(multiply(a, a, multiplier), reference_product(a, a, multiplier))


@pytest.mark.parametrize("multiplier", [Multiplier("mitchell"), TABLE, IN_C], ids=str)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_operators_are_opaque_to_torch_compile(multiplier):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def function(input, weight, bias):
        output = conv2d(input, weight, bias, padding="same", multiplier=multiplier)
        return multiply(output, bias[:, None, None], multiplier)

    tensors = operands(requires_grad=True)
    expected = function(*tensors)
    expected_grads = torch.autograd.grad(expected.sum(), tensors)
    output = torch.compile(function, fullgraph=True, backend=backend)(*tensors)
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.equal(*pair) for pair in zip(grads, expected_grads, strict=True))
    (graph,) = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if target.startswith("mbm.")] == ["mbm.conv2d", "mbm.multiply"]


@pytest.mark.parametrize("multiplier", ["mbm", random_table(4)], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode, multiplier):
    input, weight, bias = operands(requires_grad=True)
    with mode():
        output, product = conv2d(input, weight, bias, multiplier=multiplier), multiply(bias, bias, multiplier)
    assert not output.requires_grad
    assert not product.requires_grad
    after = conv2d(input, weight, bias, multiplier=multiplier)
    assert torch.equal(output, after)
    after.sum().backward()
    assert weight.grad is not None


def test_operands_are_neither_changed_nor_returned():
    input, weight, bias = operands()
    copies = [t.clone() for t in (input, weight, bias)]
    conv2d(input, weight, bias)
    multiply(bias, torch.ones(()), "exact").zero_()
    assert all(torch.equal(*pair) for pair in zip((input, weight, bias), copies, strict=True))


# Arguments


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("multiplier", ["exact", "exact-r23", Multiplier("exact")])
def test_exact_is_the_convolution_of_pytorch(convolution, multiplier):
    *shapes, stride, padding, dilation, groups = convolution
    for tensors in (operands(*shapes), [t.double() for t in operands(*shapes)]):
        arguments = stride, padding, dilation, groups
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


def test_an_empty_batch_has_zero_gradients():
    weight, bias = torch.ones(4, 3, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    output = conv2d(torch.ones(0, 3, 9, 9), weight, bias)
    assert output.shape == (0, 4, 7, 7)
    output.sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_multiply_broadcasts_on_the_meta_device():
    product = multiply(torch.ones(2, 1, 3, device="meta"), torch.ones(4, 1, device="meta"), TABLE)
    assert product.shape == (2, 4, 3)
    assert product.device.type == "meta"


# The backend of devices without kernels


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("multiplier", ["mbm", "mitchell-r7", "mbm-t17", "exact-t8", TABLE], ids=str)
def test_the_reference_backend_adds_up_the_products(convolution, multiplier):
    *shapes, stride, padding, dilation, groups = convolution
    input, weight, bias = operands(*shapes)
    pairs, multiplier = in_pairs(stride, padding, dilation), resolve(multiplier)
    direct = TABLE_OPERANDS if multiplier is TABLE else (str(multiplier),)
    output = reference.conv2d(input, weight, bias, *pairs, groups, *direct)
    assert_sums_of_products(output, input, weight, bias, stride, padding, dilation, groups, multiplier)


@pytest.mark.parametrize(("multiplier", "direct"), [(Multiplier("mbm", 8), ("mbm-t8",)), (TABLE, TABLE_OPERANDS)])
def test_the_reference_backend_multiplies_bit_for_bit(multiplier, direct):
    input, weight = torch.randn(2, 1, 5, 6), torch.randn(3, 1, 1, 1)
    sums = reference.conv2d(input, weight, None, [1, 1], [0, 0], [1, 1], 1, *direct)
    assert same_bits(sums, 0.0 + reference_product(input, weight.reshape(1, 3, 1, 1), multiplier))
    a, b = torch.randn(3, 1), torch.randn(4)
    assert same_bits(reference.multiply(a, b, *direct), reference_product(a, b, multiplier))


def test_the_reference_backend_splits_large_batches(monkeypatch):
    arguments = *operands((7, 2, 5, 5), (3, 2, 3, 3)), [1, 1], [1, 1], [1, 1], 1, "mbm"
    expected = reference.conv2d(*arguments)
    monkeypatch.setattr(reference, "_CHUNK", 200)
    assert torch.equal(reference.conv2d(*arguments), expected)


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
    def tensors(device: str):
        return [None if shape is None else torch.ones(shape, device=device) for shape in (input, weight, bias)]

    with pytest.raises(RuntimeError):
        F.conv2d(*tensors("cpu"), **arguments)
    with pytest.raises(RuntimeError):
        conv2d(*tensors(device), **arguments)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize("value", [None, 1.0, True, {}, range(1, 3), "1", 2**63, -(2**63) - 1], ids=repr)
def test_wrong_argument_types_raise_as_in_pytorch(name, value):
    """Types come first: the channels, too, are wrong."""
    input, weight = torch.ones(1, 3, 8, 8), torch.ones(W)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        F.conv2d(input, weight, **{name: value})
    with pytest.raises(type(theirs.value)):
        conv2d(input, weight, **{name: value})


def test_integers_of_any_type_are_taken():
    input, weight = torch.ones(X), torch.ones(W)
    for two in (np.int64(2), torch.tensor(2), torch.Size([2]), [np.int64(2), torch.tensor(2)]):
        assert torch.equal(conv2d(input, weight, stride=two), conv2d(input, weight, stride=2))


@pytest.mark.parametrize(("wrong", "name"), [(0, "input"), (1, "weight"), (2, "bias")])
def test_operands_must_be_dense_float32_tensors(wrong, name):
    def replaced(value) -> list:
        tensors = [torch.ones(X), torch.ones(W), torch.ones(6)]
        return [value(x) if i == wrong else x for i, x in enumerate(tensors)]

    for value in ([1.0], 1.0, "tensor", np.ones(X, np.float32)):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, not {type(value).__name__}"):
            conv2d(*replaced(lambda x, value=value: value))
    with pytest.raises(RuntimeError, match=rf"use {name}\.to_dense\(\)"):
        conv2d(*replaced(Tensor.to_sparse))
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64):
        with pytest.raises(RuntimeError, match=rf"{name} is {dtype}, .* cast it with {name}\.float\(\)"):
            conv2d(*replaced(lambda x, dtype=dtype: x.to(dtype)))


def test_multiply_refuses_other_operands():
    a = torch.ones(3)
    with pytest.raises(TypeError, match="b must be a tensor, not float"):
        multiply(a, 2.0)
    with pytest.raises(RuntimeError, match=r"b is torch.float64, .* cast it with b\.float\(\)"):
        multiply(a, a.double())
    with pytest.raises(RuntimeError, match="must match the size"):
        multiply(a, torch.ones(4))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_numbers_above_31_bits_are_refused(name):
    input, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)
    for compute in (conv2d, partial(torch.ops.mbm.conv2d, bias=None, groups=1, multiplier="mbm")):
        arguments = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], name: [1, 2**31]}
        with pytest.raises(RuntimeError, match="at most 2147483647"):
            compute(input, weight, **arguments)


def test_operands_on_two_devices_are_refused():
    input, weight, bias = operands()
    with pytest.raises(RuntimeError, match="input is on cpu and weight on meta: move them to one device"):
        conv2d(input, weight.to("meta"), bias)
    with pytest.raises(RuntimeError, match="weight is on cpu and bias on meta"):
        conv2d(input, weight, bias.to("meta"))
    with pytest.raises(RuntimeError, match="a is on meta and b on cpu"):
        multiply(input.to("meta"), input)


@pytest.mark.parametrize("multiplier", ["booth", "mbm-t23", "mbm-r0", ""])
def test_unknown_multipliers_are_refused(multiplier):
    with pytest.raises(ValueError, match=r"multiplier|truncate|result_bits"):
        conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 2), multiplier=multiplier)
    with pytest.raises(ValueError, match=r"multiplier|truncate|result_bits"):
        multiply(torch.ones(1), torch.ones(1), multiplier)
