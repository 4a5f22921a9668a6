"""Quantised layers on a GPU: their bits are the CPU's, and their training can be captured."""

import pytest
import torch
import torch.nn.functional as F
from commands import made, mbm

from mbm_cli import ApproxConv2d, ApproxLinear, calibrate, integer_conv2d, integer_linear, resolve
from mbm_cli.quantize import Quantization

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMATS = [(bits, signed) for bits in (3, 8) for signed in (True, False)]
EPOCH = ["--device", "cuda", "--epochs", "1", "--set", "data.train_limit=2000", "--set", "data.test_limit=500"]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (6, 35), (64, 3, 31, 17), (300, 1000)], ids=str)
def test_quantisation_has_the_bits_of_the_cpu(shape, bits, signed):
    torch.manual_seed(0)
    x, grad = torch.randn(shape) * 3, torch.randn(shape)
    x.view(-1)[::7] = torch.arange(-40, 41).repeat(x.numel())[: len(x.view(-1)[::7])] * 0.5  # ties
    ops = torch.ops.mbm
    for scale in (torch.ones(1), torch.rand(1) + 0.01, torch.rand(shape[0]) + 0.01):
        zero = torch.full_like(scale, 0.0 if signed else 3.0)
        arguments, on_gpu = (scale, zero, bits, signed), (scale.cuda(), zero.cuda(), bits, signed)
        assert same_bits(ops.quantize(x.cuda(), *on_gpu), ops.quantize(x, *arguments))
        assert same_bits(ops.fake_quantize(x.cuda(), *on_gpu), ops.fake_quantize(x, *arguments))
        masked = ops.quantize_grad(grad.cuda(), x.cuda(), *on_gpu)
        assert same_bits(masked, ops.quantize_grad(grad, x, *arguments))
    assert same_bits(ops.row_scales(x.cuda(), bits, signed), ops.row_scales(x, bits, signed))
    ranges = torch.tensor([-1.5, 2.5]), torch.tensor([-1.5, 2.5]).cuda()
    scales = [ops.update_range(t, r, 0.01, bits, signed) for t, r in zip((x, x.cuda()), ranges, strict=True)]
    assert same_bits(*scales)
    assert same_bits(*ranges)


@pytest.mark.parametrize("shape", [(37, 50, 1, 1), (5, 12, 13, 12), (64, 512, 7, 7), (64, 24, 112, 96)], ids=str)
@pytest.mark.parametrize(("groups", "padding"), [(1, (0, 0)), (2, (1, 3))])
def test_unsigned_codes_and_their_sums_have_the_bits_of_the_cpu(shape, groups, padding):
    torch.manual_seed(4)
    x, scale, zero = torch.randn(shape), torch.tensor([0.013]), torch.tensor([101.0])
    found = torch.ops.mbm.quantize_and_sum(x.cuda(), scale.cuda(), zero.cuda(), 8, groups, padding)
    assert all(map(same_bits, found, torch.ops.mbm.quantize_and_sum(x, scale, zero, 8, groups, padding)))


@pytest.mark.parametrize("name", ["drum-int8-k3", "exact-uint8", "mbm-uint8", "exact-int4"])
@pytest.mark.parametrize(
    "arguments", [{}, {"padding": 2, "stride": 2}, {"groups": 4, "padding": 1, "dilation": 2}], ids=str
)
def test_layers_have_the_bits_of_the_cpu(name, arguments):
    torch.manual_seed(1)
    x, layer = torch.randn(5, 4, 13, 12), ApproxConv2d(4, 8, 3, multiplier=name, **arguments)
    calibrate(layer, x)
    expected = layer.eval()(x)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        assert same_bits(layer.cuda()(images.cuda()), expected)
    assert same_bits(layer(images[:0].cuda()), expected[:0])
    dense = ApproxLinear(50, 21, multiplier=name)
    rows = torch.randn(37, 50)
    calibrate(dense, rows)
    expected = dense.eval()(rows)
    assert same_bits(dense.cuda()(rows.cuda()), expected)


@pytest.mark.parametrize("path", ["auto", "terms", "rows", "direct"])
def test_sums_are_the_tables_by_each_path(path):
    torch.manual_seed(2)
    for name, dtype in (("mbm-int8", torch.int8), ("drum-uint8-k4", torch.uint8)):
        low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
        a, w = (torch.randint(low, high, s, dtype=dtype) for s in ((3, 6, 9, 11), (8, 3, 3, 2)))
        arguments = {"padding": (1, 0), "stride": (2, 1), "groups": 2, "padding_code": 5, "multiplier": name}
        sums = integer_conv2d(a.cuda(), w.cuda(), path=path, **arguments)
        assert torch.equal(sums.cpu(), integer_conv2d(a, w, **arguments))
        codes = torch.arange(256, dtype=torch.uint8).view(dtype)[:, None].cuda()
        assert torch.equal(integer_linear(codes, codes, name, path).cpu(), resolve(name).content.tensor())


@pytest.mark.parametrize("format", ["int8", "uint8"])
def test_not_finite_input_makes_the_output_nan(format):
    layer = ApproxLinear(4, 2, multiplier=f"exact-{format}").cuda().train()
    layer(torch.ones(3, 4, device="cuda"))
    assert layer(torch.tensor([[1.0, 2.0, float("nan"), 3.0]], device="cuda")).isnan().all()
    assert layer.eval()(torch.tensor([[1.0, float("inf"), 1.0, 3.0]], device="cuda")).isnan().all()


@pytest.mark.parametrize(
    "scales", [Quantization(), Quantization("percentile", "mse"), Quantization("lsq", "lsq")], ids=str
)
@pytest.mark.parametrize("format", ["int8", "uint8"])
def test_captured_steps_have_the_bits_of_eager_ones(format, scales, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{{conv2d: drum-{format}-k5, linear: exact-{format}}}"
    settings = ["--set", f"quantize.activations={scales.activations}", "--set", f"quantize.weights={scales.weights}"]
    states = []
    for graph in ("auto", "off"):
        command = ["train", *EPOCH, "--multiplier", name, *settings, "--set", f"train.cuda_graph={graph}"]
        answer = mbm(*command, "--output", graph)
        assert answer.code == 0, answer.err
        states.append(torch.load(made(graph).folder / "checkpoint.pt", weights_only=True)["model"])
    assert all(same_bits(states[0][key], states[1][key]) for key in states[0])
    assert made("auto").metrics()[-1]["test_loss"] == made("off").metrics()[-1]["test_loss"]


def test_gradients_equal_those_of_dequantised_operands():
    torch.manual_seed(3)
    x, layer = torch.randn(8, 4, 10, 10), ApproxConv2d(4, 6, 3, padding=1, multiplier="exact-int8")
    calibrate(layer, x)
    layer, x = layer.cuda(), x.cuda().requires_grad_()
    scale, _, weight_scale, _ = (one.detach() for one in layer.eval().quantizer(x, layer.weight))
    layer(x).square().sum().backward()
    rows = weight_scale[:, None, None, None]
    values = (x.detach() / scale).round() * scale, (layer.weight.detach() / rows).round() * rows
    values = [one.requires_grad_() for one in values]
    F.conv2d(*values, layer.bias.detach(), padding=1).square().sum().backward()
    torch.testing.assert_close(x.grad, values[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, values[1].grad, rtol=1e-4, atol=1e-3)
