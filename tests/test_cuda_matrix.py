"""Float multipliers on matrix units: which ones qualify and that the kernels compile; on a GPU, the bound of sums."""

import random

import numpy as np
import pytest
import torch
from commands import EPOCH, made, mbm
from nvrtc import local_memory
from sums import float64_sums, same_bits
from test_cuda_integers import forward, on_gpu
from torch import Tensor

from mbm_cli import ops
from mbm_cli.backends import cuda_matrix, geometry
from mbm_cli.multipliers.content import operands
from mbm_cli.multipliers.float32 import reference_product
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.multipliers.tables import Table

SLOTS = {
    **{"drum-k6": 1, "drum-k8": 1, "exact-t16": 1, "mbm-t22-r1": 1, "mbm-t20-r3": 4, "mitchell-t20": 8},
    **{"mbm-t18-r5": 16, "mbm-t18": 16, "drum-k6-r5": 16, "mitchell-t18": 32},
}
SHARED = 233_472  # bytes of an H100's multiprocessor
OTHERS = ("mbm", "mbm-t16-r7", "drum-k9", "exact-t15", "exact-t18-r5", "mitchell-t17")


def random_table(bits: int, rows: int) -> Multiplier:
    """Return a multiplier whose table has so many distinct rows, each by chance."""
    rng = np.random.default_rng(bits)
    distinct = rng.integers(0, 2 << bits, (rows, 1 << bits)).astype(np.uint16)
    return Multiplier("lut", file="random.npy", content=Table(bits, distinct[rng.integers(0, rows, 1 << bits)]))


@pytest.mark.parametrize("name", SLOTS)
def test_factors_make_the_products(name):
    factors = cuda_matrix.factorize(name)
    assert factors is not None
    assert factors.slots == SLOTS[name]
    a, b = 1 + torch.rand(2, 10_000, generator=torch.Generator().manual_seed(0))
    x, y = ((one.view(torch.int32) & 0x7FFFFF) >> 23 - factors.bits for one in (a, b))
    products = factors.u[x] * factors.v[factors.slot[x], y]
    assert same_bits(torch.from_numpy(products), reference_product(a, b, Multiplier.parse(name)))
    for values in (factors.u, factors.v):
        assert same_bits(torch.from_numpy(values).bfloat16().float(), torch.from_numpy(values))


@pytest.mark.parametrize("name", OTHERS)
def test_other_multipliers_have_no_factors(name):
    assert cuda_matrix.factorize(name) is None


def test_tables_have_factors_where_few_rows_are_distinct():
    found = {
        (bits, rows): cuda_matrix.factorize(*operands(random_table(bits, rows), torch.device("cpu")))
        for bits, rows in ((5, 32), (5, 5), (7, 3), (6, 64))
    }
    assert {key: factors and factors.slots for key, factors in found.items()} == {
        (5, 32): 32,
        (5, 5): 8,
        (7, 3): 4,
        (6, 64): None,
    }


@pytest.mark.parametrize("slots", [1, 16])  # others differ in constants
def test_every_kernel_compiles_without_spills(slots):
    layouts = {"Operands": cuda_matrix._OPERANDS, "Layer": cuda_matrix._LAYER}
    checks = (f"static_assert(sizeof(matrix::{name}) == {layout.itemsize});" for name, layout in layouts.items())
    found = local_memory(cuda_matrix.program(slots), "sm_80", "\n".join(checks))
    assert {tile.kernel for tile in cuda_matrix._TILES} < set(found)
    assert not any(found.values())


@pytest.mark.parametrize(
    ("slots", "layer", "kernel"),
    [
        (1, forward((64, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1)), "positions_64x256"),
        (1, forward((256, 64, 14, 14), (128, 64, 3, 3), padding=(1, 1)), "positions_64x128"),
        (16, forward((256, 64, 14, 14), (128, 64, 3, 3), padding=(1, 1)), "positions_64x256"),
        (16, forward((64, 32, 28, 28), (64, 32, 3, 3), padding=(1, 1)), "layer_64x128"),
        (1, forward((128, 16, 32, 32), (16, 16, 3, 3), padding=(1, 1)), "layer_32x128"),
        (1, forward((64, 6, 14, 14), (16, 6, 5, 5)), None),
        (1, geometry.linear((64, 400), (400, 1), 120, (400, 1)), None),
        (4, forward((64, 64, 56, 56), (64, 1, 3, 3), padding=(1, 1), groups=64), None),
        (1, forward((1, 1, 1 << 16, 1 << 15), (8, 1, 1, 1)), None),
        (1, geometry.linear((64, 0), (0, 1), 120, (0, 1)), None),
    ],
)
def test_the_kernel_suits_the_layer(slots, layer, kernel):
    launch = cuda_matrix.plan(layer, slots, 132, SHARED)
    assert (launch and launch.tile.kernel) == kernel


@pytest.mark.parametrize("slots", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, SHARED])
def test_blocks_fit_into_the_shared_memory(slots, shared):
    wide = forward((64, 64, 200, 200), (64, 64, 3, 3), padding=(1, 1))
    for layer in (forward((64, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1)), wide):
        launch = cuda_matrix.plan(layer, slots, 132, shared)
        assert launch is None or launch.shared_bytes < shared - 1024


@pytest.mark.parametrize("slots", [1, 4, 16])
def test_small_layers_have_room_for_their_outputs(slots, monkeypatch):
    monkeypatch.setattr(cuda_matrix, "_pays", lambda *_: True)
    of_warps = 4 * 16 * 72 * 4  # Products::write of matrix.cu
    for tile in cuda_matrix._TILES:
        monkeypatch.setattr(cuda_matrix, "_TILES", (tile,))
        for layer in (geometry.linear((1, 1), (1, 1), 1, (1, 1)), forward((2, 3, 4, 4), (5, 3, 3, 3))):
            cuda_matrix.plan.cache_clear()
            launch = cuda_matrix.plan(layer, slots, 132, SHARED)
            assert launch is None or launch.shared_bytes >= of_warps, tile
    cuda_matrix.plan.cache_clear()


def test_runs_on_the_cpu_say_that_nothing_changes(tmp_path):
    found = []
    for on in ("false", "true"):
        command = ["train", *EPOCH, "--multiplier", "drum-k6", "--set", f"train.matrix_units={on}"]
        answer = mbm(*command, "--output", tmp_path / on)
        assert answer.code == 0
        assert ("train.matrix_units has no effect here: it needs an NVIDIA GPU" in answer.err) == (on == "true")
        found.append(made(tmp_path / on).checkpoint()["model"])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# On a GPU

MULTIPLIERS = [*map(Multiplier.parse, SLOTS), random_table(5, 32), random_table(7, 3)]


@pytest.fixture
def always(monkeypatch):
    """Use matrix units for layers of any size."""
    monkeypatch.setattr(cuda_matrix, "_pays", lambda *_: True)
    cuda_matrix.plan.cache_clear()
    yield monkeypatch
    cuda_matrix.plan.cache_clear()


def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None, *arguments) -> Tensor:
    return ops.conv2d(input, weight, bias, *arguments)


def on_matrix_units(*layer) -> Tensor:
    with cuda_matrix.allowed(True):
        return conv2d(*layer)


def assert_near(output: Tensor, total: Tensor, bound: Tensor) -> None:
    """Check outputs against sums in float64; products below 2^-126 count as zero in these, but not on matrix units."""
    finite = total.isfinite()
    assert not output[~finite].isfinite().any()
    excess = ((output.double() - total).abs() - bound - 2.0**-110)[finite]
    assert (excess <= 0).all(), f"{excess.max()} more than the bound"


def assert_layer_is_near(output: Tensor, *layer) -> None:
    assert_near(output, *float64_sums(*layer, rounding=2.0**-22))


def random_layer(rng: random.Random, many: bool) -> tuple:
    groups = rng.choice([1, 1, 2, 3])
    channels, out_channels = (groups * rng.choice([20, 32, 70] if many else [1, 2, 3, 8]) for _ in range(2))
    kernel, size = (rng.randint(1, 4), rng.randint(1, 3)), (rng.randint(8, 20), rng.choice([7, 8, 12, 16]))
    arguments = [(rng.randint(1, 3), rng.randint(1, 2)) for _ in range(3)]
    arguments[1] = rng.randint(0, 3), rng.randint(0, 2)
    input = torch.randn(rng.randint(1, 5), channels, *size, device="cuda")
    weight = torch.randn(out_channels, channels // groups, *kernel, device="cuda")
    bias = torch.randn(out_channels, device="cuda") if rng.random() < 0.5 else None
    return input, weight, bias, *arguments, groups


@on_gpu
@pytest.mark.parametrize("multiplier", MULTIPLIERS, ids=str)
@pytest.mark.parametrize("many", [False, True], ids=["few channels", "many channels"])
@pytest.mark.parametrize("seed", range(3))
def test_sums_of_random_convolutions(always, seed, many, multiplier):
    rng = random.Random(f"{seed} {many} {multiplier}")
    torch.manual_seed(rng.randrange(1 << 30))
    input, *rest = *random_layer(rng, many), multiplier
    inputs = input, input.contiguous(memory_format=torch.channels_last), input[..., 1:]
    for one in inputs:
        sums = float64_sums(one, *rest, rounding=2.0**-22)
        for tile in cuda_matrix._TILES:
            always.setattr(cuda_matrix, "_TILES", (tile,))
            cuda_matrix.plan.cache_clear()
            output = on_matrix_units(one, *rest)
            assert_near(output, *sums)
            assert same_bits(output, on_matrix_units(one, *rest))


@on_gpu
@pytest.mark.parametrize("name", ["drum-k6", "mbm-t20-r3", "mbm-t18-r5"])
def test_matrix_units_are_used_where_they_are_allowed(name):
    torch.manual_seed(0)
    multiplier = Multiplier.parse(name)
    input, weight = torch.randn(16, 64, 56, 56, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    layer = input, weight, None, 1, 1, 1, 1, multiplier
    scalar, output = conv2d(*layer), on_matrix_units(*layer)
    assert not same_bits(scalar, output)
    assert same_bits(scalar, conv2d(*layer))
    assert (output - scalar).abs().max() < 1e-5 * scalar.abs().max()


@on_gpu
@pytest.mark.parametrize("multiplier", MULTIPLIERS, ids=str)
def test_operands_of_any_size_and_kind(always, multiplier):
    """Exponents whose products may underflow, zeros, subnormals, infinities and NaN."""
    generator = torch.Generator("cuda").manual_seed(0)
    input, weight = torch.randn(4, 10, 9, 9, device="cuda"), torch.randn(12, 10, 3, 3, device="cuda")
    for layer, low, high in ((input, -126, -20), (weight, -40, 127)):
        layer.mul_(torch.exp2(torch.randint(low, high, layer.shape, device="cuda", generator=generator).float()) / 4)
    input[:, 3, 2] = 0
    weight[3:5, 2] = 0
    input[1, 2, 3, :4] = torch.tensor([2.0**-127, -(2.0**-140), 0.0, -0.0], device="cuda")
    padded = input, weight, None, 1, 1, 1, 1, multiplier
    assert_layer_is_near(on_matrix_units(*padded), *padded)
    for one in (input[0, 0, 4], weight[7, 7, 1]):
        one[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan], device="cuda")
    output = on_matrix_units(input, weight, None, 1, 0, 1, 1, multiplier)
    assert_layer_is_near(output, input, weight, None, 1, 0, 1, 1, multiplier)


@on_gpu
@pytest.mark.parametrize("multiplier", MULTIPLIERS, ids=str)
@pytest.mark.parametrize(("images", "length", "rows"), [(1, 1, 1), (64, 400, 120), (3, 85, 10), (900, 160, 130)])
def test_sums_of_dense_layers(always, images, length, rows, multiplier):
    torch.manual_seed(length)
    whole, weight = torch.randn(images, 2 * length + 1, device="cuda"), torch.randn(rows, length, device="cuda")
    bias = torch.randn(rows, device="cuda")
    for input in (whole[:, :length].contiguous(), whole[:, 1 : length + 1], whole[:, : 2 * length : 2]):
        with cuda_matrix.allowed(True):
            output = ops.linear(input, weight, bias, multiplier)
        layer = input[..., None, None], weight[..., None, None], bias, 1, 0, 1, 1, multiplier
        assert_layer_is_near(output[..., None, None], *layer)


@on_gpu
def test_captured_graphs_replay_the_same_sums(always):
    multiplier = Multiplier.parse("mbm-t20-r3")
    layer = torch.randn(8, 6, 14, 14, device="cuda"), torch.randn(16, 6, 5, 5, device="cuda"), None, 1, 0, 1, 1
    expected = on_matrix_units(*layer, multiplier)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = on_matrix_units(*layer, multiplier)
    graph.replay()
    assert same_bits(output, expected)


@on_gpu
@pytest.mark.parametrize("name", ["drum-k6", "mbm-t18-r5"])
def test_gradients_do_not_use_matrix_units(always, name):
    layer = torch.nn.Linear(64, 32, device="cuda")
    input, found = torch.randn(50, 64, device="cuda", requires_grad=True), []
    for on in (False, True):
        with cuda_matrix.allowed(on):
            output = ops.linear(input, layer.weight, None, name, backward=name)
        found.append(torch.autograd.grad(output, input, torch.ones_like(output))[0])
    assert same_bits(*found)
