"""Quantised layers: codes, scales, zero points, straight-through gradients, calibration, and their state."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mbm_cli
from mbm_cli import ApproxConv2d, ApproxLinear, calibrate, convert, integer_conv2d, integer_linear
from mbm_cli.quantize import Quantization

FORMATS = [(bits, signed) for bits in (2, 4, 8) for signed in (True, False)]


def name_of(bits: int, signed: bool) -> str:
    return f"exact-{'int' if signed else 'uint'}{bits}"


def codes_on_paper(x: np.ndarray, scale: float, zero: float, bits: int, signed: bool) -> np.ndarray:
    """Quantise as design notes define it, with NumPy's float32 division and its rounding to even."""
    least, most = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.clip(np.rint(x / np.float32(scale)) + zero, least, most)


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
def test_codes_round_half_to_even_and_saturate(bits, signed):
    x = np.concatenate([np.arange(-40, 41) * 0.5, np.random.default_rng(0).normal(0, 20, 500)]).astype(np.float32)
    for scale, zero in ((1.0, 0.0), (0.3, 0.0), (1.0, 0.0 if signed else 2.0)):
        arguments = torch.tensor([scale]), torch.tensor([zero]), bits, signed
        codes = torch.ops.mbm.quantize(torch.from_numpy(x), *arguments)
        expected = codes_on_paper(x, scale, zero, bits, signed)
        assert codes.dtype == (torch.int8 if signed else torch.uint8)
        assert codes.tolist() == expected.tolist()
        values = torch.ops.mbm.fake_quantize(torch.from_numpy(x), *arguments)
        assert values.tolist() == ((expected - zero).astype(np.float32) * np.float32(scale)).tolist()


@pytest.mark.parametrize(("groups", "padding"), [(1, (0, 0)), (2, (1, 3))])
def test_unsigned_codes_have_a_border_of_zero_and_sums(groups, padding):
    x, poison = np.random.default_rng(1).normal(0, 9, (2, 6, 5, 4)).astype(np.float32), torch.ones(1)
    arguments = torch.tensor([0.3]), torch.tensor([37.0]), 8, groups, padding, poison
    codes, sums = torch.ops.mbm.quantize_and_sum(torch.from_numpy(x), *arguments)
    border = [(0, 0), (0, 0), *((n, n) for n in padding)]
    expected = np.pad(codes_on_paper(x, 0.3, 37.0, 8, False), border, constant_values=37)
    assert (codes.dtype, codes.tolist()) == (torch.uint8, expected.tolist())
    assert sums.tolist() == expected.reshape(2, groups, -1, *expected.shape[2:]).sum(2).tolist()
    assert poison.item() == 1.0


def calibrated(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    calibrate(layer, x)
    return layer.eval()


@pytest.mark.parametrize(("bits", "signed"), FORMATS)
def test_scales_are_of_the_tensor_and_of_each_output_channel(bits, signed):
    torch.manual_seed(0)
    x, layer = torch.randn(3, 4, 7, 7) + 0.3, ApproxConv2d(4, 6, 3, multiplier=name_of(bits, signed))
    calibrated(layer, x)
    input_scale, input_zero, weight_scale, weight_zero = layer.quantizer(x, layer.weight)
    rows = layer.weight.detach().flatten(1)
    most = 2 ** (bits - signed) - 1
    if signed:
        assert input_scale.item() == (x.abs().max() / most).item()
        assert weight_scale.tolist() == (rows.abs().amax(1) / most).tolist()
        assert not torch.cat([input_zero, weight_zero]).any()
    else:
        scale = (x.max() - x.min()) / most
        assert input_scale.item() == scale.item()
        assert input_zero.item() == (-x.min() / scale).round().item()
        assert weight_scale.tolist() == ((rows.amax(1) - rows.amin(1)) / most).tolist()


def test_ranges_include_zero_and_empty_ones_have_scale_one():
    layer = calibrated(ApproxLinear(3, 2, multiplier="exact-uint8"), torch.full((1, 3), 2.0))
    scale, zero, *_ = layer.quantizer(torch.zeros(1, 3), layer.weight)
    assert (scale.item(), zero.item()) == ((torch.tensor(2.0) / 255).item(), 0.0)
    layer = calibrated(ApproxLinear(3, 2, multiplier="exact-uint8"), torch.zeros(1, 3))
    scale, zero, *_ = layer.quantizer(torch.zeros(1, 3), layer.weight)
    assert (scale.item(), zero.item()) == (1.0, 0.0)


CONVOLUTIONS = [
    {"padding": 1},
    {"stride": 2, "padding": (2, 1)},
    {"groups": 2, "dilation": (1, 2), "stride": (2, 1), "padding": (3, 1)},
    {"groups": 4},
]


@pytest.mark.parametrize("arguments", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("bits", "signed"), FORMATS)
def test_exact_table_gives_sums_without_zero_points(bits, signed, arguments):
    torch.manual_seed(1)
    x, layer = torch.randn(2, 4, 9, 8) + 0.4, ApproxConv2d(4, 8, 3, multiplier=name_of(bits, signed), **arguments)
    calibrated(layer, x)
    scales = layer.quantizer(x, layer.weight)
    codes = [torch.ops.mbm.quantize(t, *s, bits, signed) for t, s in ((x, scales[:2]), (layer.weight, scales[2:]))]
    numbers = [c.double() - z.double().reshape(-1, 1, 1, 1) for c, z in zip(codes, scales[1::2], strict=True)]
    sums = F.conv2d(*numbers, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    expected = sums.float() * (scales[0] * scales[2]).reshape(-1, 1, 1) + layer.bias.reshape(-1, 1, 1)
    assert torch.equal(layer(x), expected)


def test_zeros_of_padding_are_multiplied_by_the_table(tmp_path):
    table = np.zeros((256, 256), np.int32)
    table[0, 5] = 7  # zero times 5 is 7
    np.save(tmp_path / "odd.npy", table)
    name = f"int8:{tmp_path / 'odd.npy'}@codes"
    ones, fives = torch.ones(1, 1, 2, 2, dtype=torch.int8), torch.full((1, 1, 3, 3), 5, dtype=torch.int8)
    assert integer_conv2d(ones, fives, padding=1, multiplier=name).flatten().tolist() == [35] * 4
    assert integer_conv2d(ones, fives, padding=1, padding_code=1, multiplier=name).flatten().tolist() == [0] * 4


@pytest.mark.parametrize("backward", ["exact", "mbm"])
@pytest.mark.parametrize(("bits", "signed"), [(8, True), (4, False)])
def test_gradients_are_straight_through(bits, signed, backward):
    torch.manual_seed(2)
    x, layer = torch.randn(2, 3, 6, 6), ApproxConv2d(3, 4, 3, multiplier=name_of(bits, signed), backward=backward)
    calibrated(layer, x * 0.6)  # so that some numbers are clipped
    x.requires_grad_()
    scales = [one.detach() for one in layer.quantizer(x, layer.weight)]
    output = layer(x)
    grad = torch.randn_like(output)
    output.backward(grad)

    values, clipped = [], []
    for tensor, (scale, zero) in ((x, scales[:2]), (layer.weight, scales[2:])):
        s, z = scale.reshape(-1, 1, 1, 1), zero.reshape(-1, 1, 1, 1)
        least, most = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        codes = (tensor.detach() / s).round() + z
        values.append(((codes.clamp(least, most) - z) * s).requires_grad_())
        clipped.append((codes < least) | (codes > most))
    assert clipped[0].any()
    mbm_cli.conv2d(*values, layer.bias, multiplier="exact", backward=backward).backward(grad)
    assert torch.equal(x.grad, values[0].grad.masked_fill(clipped[0], 0.0))
    assert torch.equal(layer.weight.grad, values[1].grad.masked_fill(clipped[1], 0.0))


def test_gradients_of_dense_layers_are_straight_through():
    torch.manual_seed(3)
    x, layer = torch.randn(5, 7), ApproxLinear(7, 4, multiplier="exact-int8")
    calibrated(layer, x)
    x.requires_grad_()
    output = layer(x[None])
    output.square().sum().backward()
    scale, _, weight_scale, _ = layer.quantizer(x, layer.weight)
    weight = (layer.weight.detach() / weight_scale[:, None]).round() * weight_scale[:, None]
    codes = (x.detach() / scale).round() * scale
    torch.testing.assert_close(x.grad, 2 * output[0].detach() @ weight)
    torch.testing.assert_close(layer.weight.grad, 2 * output[0].detach().t() @ codes)


@pytest.mark.parametrize(("bits", "signed"), [(4, True), (4, False)])
def test_learned_scales_get_the_gradient_of_the_paper(bits, signed):
    """Compare with straight-through rounding, written with autograd."""
    torch.manual_seed(4)
    x, quantization = torch.randn(6, 5), Quantization("lsq", "lsq")
    layer = ApproxLinear(5, 3, multiplier=name_of(bits, signed), quantization=quantization)
    calibrated(layer, x)
    layer(x).square().sum().backward()
    most = 2 ** (bits - signed) - 1
    least = -most if signed else 0

    def quantized(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, count: int) -> torch.Tensor:
        factor = (count * most) ** -0.5
        scale = scale.detach() + factor * (scale - scale.detach())
        ratio = values / scale
        rounded = ratio.detach().round() + zero
        inside = (rounded >= least) & (rounded <= most)
        codes = torch.where(inside, ratio + (rounded - ratio).detach(), rounded.clamp(least, most))
        return (codes - zero) * scale

    learned = layer.quantizer.log_input_scale, layer.quantizer.log_weight_scale
    scales = [(10 * one.detach()).exp().requires_grad_() for one in learned]  # parameters are logarithms
    _, zero, _, weight_zero = layer.quantizer(x, layer.weight)
    weight = quantized(layer.weight.detach(), scales[1][:, None], weight_zero[:, None], 5)
    F.linear(quantized(x, scales[0], zero, 5), weight, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(layer.quantizer.log_input_scale.grad, 10 * scales[0].grad * scales[0].detach())
    torch.testing.assert_close(layer.quantizer.log_weight_scale.grad, 10 * scales[1].grad * scales[1].detach())


@pytest.mark.parametrize("activations", ["max", "percentile", "mse"])
def test_training_keeps_a_running_mean_of_ranges(activations):
    torch.manual_seed(5)
    layer = ApproxLinear(4, 2, multiplier="exact-int8", quantization=Quantization(activations)).train()
    first, second = torch.randn(800, 4), 3 * torch.randn(800, 4)
    layer(first)
    known = layer.quantizer.input_range.clone()
    layer(second)
    alone = ApproxLinear(4, 2, multiplier="exact-int8", quantization=Quantization(activations)).train()
    alone(second)
    torch.testing.assert_close(layer.quantizer.input_range, 0.99 * known + 0.01 * alone.quantizer.input_range)
    after = layer.quantizer.input_range.clone()
    layer.eval()(first)
    assert torch.equal(layer.quantizer.input_range, after)


def test_percentile_and_mse_clip_outliers():
    torch.manual_seed(6)
    x = torch.randn(1000, 10)
    x[0, 0] = 20.0
    ranges = {}
    for activations in ("max", "percentile", "mse"):
        layer = ApproxLinear(10, 2, multiplier="exact-int4", quantization=Quantization(activations))
        ranges[activations] = calibrated(layer, x).quantizer.input_range[1].item()
    assert ranges["max"] == 20.0
    assert 2.5 < ranges["percentile"] < 4.0
    assert ranges["mse"] < 12.0


def test_calibration_sees_a_float_forward_in_evaluation_mode():
    torch.manual_seed(7)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(3 * 36, 2)
    model, x = nn.Sequential(*layers), torch.randn(4, 1, 8, 8)
    model.eval()
    inputs = x, model[:5](x)
    model.train()
    mean = model[1].running_mean.clone()
    convert(model, {"conv2d": "drum-int8-k3", "linear": "exact-uint8"})
    calibrate(model, x.split(2))
    for layer, seen in zip((model[0], model[5]), inputs, strict=True):
        assert layer.quantizer.input_range.tolist() == [seen.min().item(), seen.max().item()]
    assert model.training
    assert torch.equal(model[1].running_mean, mean)


def test_scales_must_be_known_and_finite():
    layer = ApproxLinear(2, 1, multiplier="exact-int8").eval()
    with pytest.raises(RuntimeError, match="scales of a quantised layer are unknown: calibrate it"):
        layer(torch.ones(1, 2))
    with pytest.raises(ValueError, match="at least one image"):
        calibrate(layer, torch.ones(0, 2))
    with pytest.raises(ValueError, match="not finite"):
        calibrate(layer, torch.tensor([[1.0, float("nan")]]))
    calibrate(layer, torch.ones(1, 2))
    with pytest.raises(ValueError, match="not finite"):
        layer(torch.tensor([[1.0, float("inf")]]))


def test_scales_are_state_for_their_format():
    x = torch.randn(3, 4)
    layer = calibrated(ApproxLinear(4, 2, multiplier="exact-int8"), x)
    same = ApproxLinear(4, 2, multiplier="drum-int8-k4").eval()
    same.load_state_dict(layer.state_dict())
    assert torch.equal(same.quantizer.input_range, layer.quantizer.input_range)
    same(x)
    learns = Quantization("lsq", "lsq")
    others = [{"multiplier": "exact-int4"}, {"multiplier": "exact-int8", "quantization": Quantization("mse")}]
    for arguments in (*others, {"multiplier": "exact-int8", "quantization": learns}):
        other = ApproxLinear(4, 2, **arguments).eval()
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other.weight, layer.weight)
        with pytest.raises(RuntimeError, match="unknown"):
            other(x)
        calibrated(other, x)(x)


def test_states_go_between_float_and_quantised_layers():
    x = torch.randn(3, 4)
    layer = calibrated(ApproxLinear(4, 2, multiplier="exact-int8"), x)
    known = layer.quantizer.input_range.clone()
    layer.load_state_dict(nn.Linear(4, 2).state_dict())
    assert torch.equal(layer.quantizer.input_range, known)
    ApproxLinear(4, 2, multiplier="mbm").load_state_dict(layer.state_dict())
    uncalibrated = ApproxLinear(4, 2, multiplier="exact-int8")
    layer.load_state_dict(uncalibrated.state_dict())
    with pytest.raises(RuntimeError, match="unknown"):
        layer(x)
    averaged = torch.optim.swa_utils.AveragedModel(uncalibrated)
    calibrated(uncalibrated, x)
    averaged.update_parameters(uncalibrated)
    assert torch.equal(averaged.eval()(x), uncalibrated(x))


def test_casts_keep_the_scales():
    layer = calibrated(ApproxLinear(4, 2, multiplier="exact-int8"), torch.randn(3, 4))
    known = layer.quantizer.input_range.clone()
    assert torch.equal(layer.half().float().quantizer.input_range, known)


def test_refused_batches_leave_the_scales():
    layer = ApproxLinear(4, 2, multiplier="exact-int8").train()
    for wrong in (torch.randn(3, 5) * 1e3, torch.randn(3, 4).double(), torch.full((3, 4), torch.nan)):
        with pytest.raises((RuntimeError, ValueError)):
            layer(wrong)
        assert not layer.quantizer.is_calibrated
    layer(torch.randn(3, 4))
    known = layer.quantizer.input_range.clone()
    assert layer(torch.zeros(0, 4)).shape == (0, 2)
    assert torch.equal(layer.quantizer.input_range, known)


def test_calibration_keeps_modes_and_takes_loaders():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    convert(model, {"linear": "exact-int8"})
    model[1].eval()
    calibrate(model, torch.utils.data.DataLoader([(torch.randn(4), 0) for _ in range(6)], 2))
    assert (model[0].training, model[1].training) == (True, False)


def test_convert_keeps_scales_of_the_same_format():
    x = torch.randn(3, 4)
    layer = calibrated(convert(nn.Linear(4, 2), {"linear": "exact-int8"}), x)
    known = layer.quantizer.input_range.clone()
    convert(layer, {"linear": "drum-int8-k4"})
    assert torch.equal(layer.quantizer.input_range, known)
    convert(layer, {"linear": "exact-uint8"})
    assert not layer.quantizer.is_calibrated
    convert(layer, "exact")
    assert layer.quantizer is None
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_layers_survive_copies_and_pickles():
    x = torch.randn(2, 1, 6, 6)
    layer = calibrated(ApproxConv2d(1, 2, 3, multiplier="drum-uint8-k4"), x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


def test_layers_compile_and_trace():
    x = torch.randn(2, 1, 6, 6)
    model = nn.Sequential(ApproxConv2d(1, 2, 3, multiplier="exact-int8"), nn.Flatten(), nn.Linear(32, 3))
    convert(model, {"0": "exact-int8", "2": "exact-uint8"})
    calibrated(model, x)
    expected = model(x)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_compiled_layers_refuse_what_eager_ones_do():
    layer = ApproxLinear(4, 2, multiplier="exact-int8")
    calibrated(layer, torch.ones(1, 4))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(torch.ones(3, 4))
    with pytest.raises(ValueError, match="not finite"):
        compiled(torch.full((3, 4), torch.nan))
    long, x = ApproxLinear(60_000, 2, bias=False, multiplier="exact-uint8"), torch.rand(1, 60_000)
    torch.nn.init.uniform_(long.weight)
    calibrated(long, x)
    with pytest.raises(ValueError, match="can leave 32 bits"):
        torch.compile(long, backend="aot_eager")(x)


def test_transforms_have_derivatives_or_raise():
    torch.manual_seed(8)
    layer, x = ApproxLinear(6, 5, multiplier="exact-int8"), torch.randn(4, 6)
    calibrated(layer, x)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return layer(x).square().sum()

    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(z), z, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(x), grad)
    of_samples = torch.func.vmap(torch.func.grad(lambda one: loss(one[None])))(x)
    torch.testing.assert_close(of_samples, grad)
    (second,) = torch.autograd.grad(grad.sum(), layer.weight)
    assert second.abs().max() > 0.1
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(layer, (x,), (torch.ones_like(x),))


def test_flops_are_counted():
    layer = calibrated(ApproxConv2d(1, 4, 3, multiplier="exact-int8"), torch.randn(2, 1, 8, 8))
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 1, 8, 8))
    assert counter.get_total_flops() == 2 * 2 * 4 * 36 * 9


def test_operators_pass_opcheck():
    x, w = torch.randn(2, 2, 5, 5, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    table = mbm_cli.resolve("drum-int8-k3").content.tensor()
    scales = torch.tensor([0.03]), torch.zeros(1), torch.full((4,), 0.02), torch.zeros(4)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = [1, 1], [1, 1], [1, 1], 1
    codes = [torch.ops.mbm.quantize(t.detach(), *s, 8, True) for t, s in ((x, scales[:2]), (w, scales[2:]))]
    torch.library.opcheck(torch.ops.mbm.integer_conv2d, (*codes, *arguments, 0, table), test_utils=tests)
    quantized = torch.ops.mbm.quantized_conv2d
    torch.library.opcheck(quantized, (x, w, None, *scales, *arguments, 8, True, table), test_utils=tests)
    for operator in (torch.ops.mbm.quantize, torch.ops.mbm.fake_quantize):
        torch.library.opcheck(operator, (x.detach(), *scales[:2], 8, True), test_utils=tests)
    unsigned = x.detach(), *scales[:2], 8, 2, [1, 0], torch.ones(1)
    torch.library.opcheck(torch.ops.mbm.quantize_and_sum, unsigned, test_utils=tests)
    _, of_positions = torch.ops.mbm.quantize_and_sum(*unsigned)
    sums, of_rows = (torch.ones(shape, dtype=torch.int32) for shape in ((2, 4, 2, 1), (4,)))
    operands = sums, of_positions, of_rows, [4, 1, 3, 3], [3, 1], [1, 2], scales[1], scales[3], scales[2], None
    torch.library.opcheck(torch.ops.mbm.scale_sums, operands, test_utils=tests)


def test_sums_that_leave_32_bits_are_refused():
    def sums(steps: int) -> torch.Tensor:
        codes = torch.full((1, steps), -128, dtype=torch.int8)
        return integer_linear(codes, codes, "exact-int8")

    assert sums(131_071).item() == 131_071 * 16_384
    with pytest.raises(ValueError, match=r"a sum of 131,072 products of up to 16,384 .* 131,071 products fit"):
        sums(131_072)


def test_sums_without_zero_points_that_leave_32_bits_are_refused():
    layer = ApproxLinear(70_000, 1, multiplier="exact-uint8", bias=False)
    x = torch.rand(1, 70_000) - 0.5
    calibrated(layer, x)(x)  # with zero points in the middle, products are small
    with torch.no_grad():
        layer.weight.abs_()
    with pytest.raises(ValueError, match=r"a sum of 70,000 products of up to 65,025|up to 3\d,\d{3}"):
        calibrated(layer, x.abs())(x.abs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: integer_conv2d(c.float(), c), "input is torch.float32, but exact-int8 takes codes as torch.int8"),
        (lambda c: integer_conv2d(c, c, multiplier="exact-uint8"), "takes codes as torch.uint8"),
        (lambda c: integer_conv2d(c, c, multiplier="exact-int4"), r"input has the code 9, but int4 has -8 to 7"),
        (lambda c: integer_conv2d(c, c, multiplier="mbm"), "mbm multiplies floats; codes take an integer multiplier"),
        (lambda c: integer_conv2d(c, c, padding_code=200), "padding_code is 200, but int8 has -128 to 127"),
        (
            lambda c: mbm_cli.conv2d(c.float(), c.float(), multiplier="exact-int8"),
            "which these floats have no scales for",
        ),
        (
            lambda c: mbm_cli.linear(c.float(), c.float(), multiplier="exact-int8"),
            "which these floats have no scales for",
        ),
        (lambda c: ApproxConv2d(1, 1, 1, multiplier="exact-int8", backward="same"), "same: gradients take a float"),
        (lambda c: ApproxConv2d(1, 1, 1, backward="exact-int8"), "exact-int8: gradients take a float multiplier"),
        (lambda c: mbm_cli.resolve("mbm-uint16"), "networks take operands of up to 8 bits"),
        (
            lambda c: ApproxConv2d(1, 1, 1, multiplier="exact-int8", quantization=Quantization("maxx")),
            "did you mean max",
        ),
    ],
)
def test_wrong_use_is_refused(call, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(torch.full((1, 1, 3, 3), 9, dtype=torch.int8))


def test_products_of_codes():
    a, b = torch.tensor([-128, 3, 100], dtype=torch.int8), torch.tensor([[5], [-1]], dtype=torch.int8)
    assert mbm_cli.multiply(a, b, "exact-int8").tolist() == [[-640, 15, 500], [128, -3, -100]]
