"""The CUDA kernels on the CPU, under sanitizers: they stay in their buffers, and their sums are right."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from emulator import SLOTS, Emulated
from memory_formats import MEMORY_FORMATS
from test_cuda_integers import TABLES, expected_sums, forward
from test_cuda_matrix import assert_layer_is_near
from test_cuda_terms import random_terms
from torch import Tensor

from mbm_cli import pooling
from mbm_cli.backends import cuda_integers, cuda_matrix, cuda_quantize, cuda_terms, geometry
from mbm_cli.backends.geometry import Pair
from mbm_cli.multipliers.factor import Terms
from mbm_cli.multipliers.names import Multiplier

MULTIPLIERS = {
    1: ("drum-k6", "mbm-t22-r1", "exact-t16"),
    4: ("mbm-t20-r3", "drum-k4-r3"),
    8: ("mitchell-t20",),
    16: ("mbm-t18-r5", "mitchell-t19"),
    32: ("mitchell-t18-r5",),
}
CPU = torch.device("cpu")
PROGRAMS = {module: module.program for module in (cuda_terms, cuda_integers, cuda_quantize, cuda_matrix, pooling)}
SHARED = tuple(kib << 10 for kib in (99, 163, 227))  # bytes of a block, of cards of compute capability 8.6, 8.0, 9.0
MOST_STEPS = 30  # of all blocks of a launch


@pytest.fixture
def emulate(libraries, monkeypatch):
    """Return a function that lets the kernels run here."""

    def start(shared: int, late: bool) -> None:
        for module, program in PROGRAMS.items():
            monkeypatch.setattr(
                module, "program", lambda *slots, p=program: Emulated(libraries(p(*slots)), shared, late)
            )
            monkeypatch.setattr(module, "multiprocessors_of", lambda _: 132, raising=False)
            monkeypatch.setattr(module, "has_matrix_units", lambda _: True, raising=False)
        monkeypatch.setattr(cuda_matrix, "shared_bytes_of", lambda _: shared + 1024)
        monkeypatch.setattr(cuda_integers, "_shared_bytes", lambda _: shared)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
        monkeypatch.setattr(cuda_matrix, "_pays", lambda *_: True)
        monkeypatch.setattr(
            cuda_matrix, "factors_of", lambda *name: cuda_matrix._on_device(cuda_matrix.factorize(*name[:2]), CPU)
        )
        cuda_matrix.plan.cache_clear()
        cuda_terms.plan.cache_clear()

    yield start
    cuda_matrix.plan.cache_clear()
    cuda_terms.plan.cache_clear()


class Layer(NamedTuple):
    """A convolution or, without a kernel, a dense layer."""

    input: Tensor
    weight: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def arguments(self) -> dict:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def images(self) -> tuple[Tensor, Tensor]:
        """The input and the weight, of a dense layer as those of a convolution."""
        both = self.input, self.weight
        return both if self.input.dim() == 4 else tuple(one[..., None, None] for one in both)

    @property
    def geometry(self) -> geometry.Geometry:
        input, weight = self.input, self.weight
        if input.dim() == 2:
            return geometry.linear(tuple(input.shape), input.stride(), weight.shape[0], weight.stride())
        return forward(tuple(input.shape), tuple(weight.shape), **self.arguments, strides=input.stride())

    def output(self, dtype: torch.dtype) -> Tensor:
        of_image = self.geometry.out_size if self.input.dim() == 4 else ()
        return torch.empty(len(self.input), len(self.weight), *of_image, dtype=dtype)


def random_layers(rng: random.Random, numbers: Callable, suits: Callable[[Layer], bool], most: int) -> Iterator[Layer]:
    """Yield the first layers of 100 that suit."""
    layers = (random_layer(rng, numbers) for _ in range(100))
    yield from islice(filter(suits, layers), most)


def random_layer(rng: random.Random, numbers: Callable[..., Tensor]) -> Layer:
    """Return a layer whose input takes no more memory than it needs."""
    channels = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 64, 65, 72, 130])
    rows = rng.choice([1, 2, 5, 16, 17, 32, 33, 63, 65, 100])
    if rng.random() < 0.2:
        layer = Layer(numbers(rng.choice([1, 2, 3, 64, 129, 257]), channels), numbers(rows, channels))
        views = (lambda x: x, lambda x: x.t().contiguous().t(), lambda x: F.pad(x, (1, 2))[:, 1:-2])
    else:
        groups = rng.choice([1, 1, 1, 2, 3])
        kernel, stride, padding, dilation = (
            tuple(rng.choices(of, k=2)) for of in ((1, 2, 3, 5), (1, 1, 2, 3), (0, 1, 2, 7), (1, 1, 2, 3))
        )
        size = [
            max(dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i], rng.choice([1, 2, 4, 7, 8, 12, 17]))
            for i in range(2)
        ]
        input = numbers(rng.choice([1, 1, 2, 3, 5]), channels * groups, *size)
        layer = Layer(input, numbers(rows * groups, channels, *kernel), stride, padding, dilation, groups)
        views = [view for name, view in MEMORY_FORMATS.items() if "negated" not in name]
    shape = layer.input.shape
    view = rng.choice(views)(torch.zeros(shape))
    before = view.storage_offset() * layer.input.element_size() % 16 // layer.input.element_size()
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, view.stride(), strict=True))
    return layer._replace(input=numbers(before + count).as_strided(shape, view.stride(), before))


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def seeded(*of: object) -> random.Random:
    rng = random.Random(repr(of))
    torch.manual_seed(rng.randrange(1 << 30))
    return rng


copies = pytest.mark.parametrize("late", [False, True], ids=["copies at once", "late copies"])


@copies
@pytest.mark.parametrize("tile", cuda_matrix._TILES, ids=lambda tile: tile.kernel)
@pytest.mark.parametrize("slots", SLOTS)
def test_float_layers_on_matrix_units(emulate, monkeypatch, slots, tile, late):
    def suits(layer: Layer) -> bool:
        launch = cuda_matrix.plan(layer.geometry, slots, 132, shared + 1024)
        return launch is not None and launch.blocks * int(launch.layer["steps"][0]) <= MOST_STEPS

    rng = seeded(slots, tile, late)
    monkeypatch.setattr(cuda_matrix, "_TILES", (tile,))
    for shared in SHARED:
        emulate(shared, late)
        for layer in random_layers(rng, torch.randn, suits, 2):
            name, bias = rng.choice(MULTIPLIERS[slots]), torch.randn(len(layer.weight)) if rng.random() < 0.5 else None
            output = layer.output(torch.float32)
            with cuda_matrix.allowed(True):
                cuda_matrix.run(layer.geometry, layer.input, layer.weight, bias, output, name, None)
            input, weight = layer.images
            output = output.reshape(*output.shape[:2], *layer.geometry.out_size)
            assert_layer_is_near(output, input, weight, bias, *layer[2:], Multiplier.parse(name))


def assert_sums(layer: Layer, run: Callable, table: Tensor, rng: random.Random) -> None:
    """Check integer sums, or scaled ones, bit for bit."""
    rows, padding_code = layer.weight.shape[0], rng.randrange(256)
    expected = expected_sums(*layer.images, table, padding_code, **layer.arguments)
    scale, bias = torch.randn(2, rows) if rng.random() < 0.3 else (None, None)
    output = layer.output(torch.int32 if scale is None else torch.float32)
    run(layer.geometry, layer.input, layer.weight, output, padding_code, scale, bias)
    if scale is not None:
        expected = expected.float() * scale[:, None, None] + bias[:, None, None]
    assert torch.equal(output.view(torch.int32), expected.view(torch.int32).reshape(output.shape))


def assert_sums_of_terms(layer: Layer, terms: Terms, rng: random.Random) -> None:
    table = terms.u.astype(int) @ terms.v.astype(int) + terms.f[:, None] + terms.g
    on_device = cuda_terms.on_device(terms, CPU)
    assert_sums(
        layer,
        lambda *operands: cuda_terms.run(*operands[:4], on_device, *operands[4:]),
        torch.from_numpy(table).int(),
        rng,
    )


@copies
@pytest.mark.parametrize("tile", cuda_terms._TILES, ids=lambda tile: tile.kernel)
@pytest.mark.parametrize("count", [1, 2, 4, 7, 13, 33])
def test_integer_layers_on_matrix_units(emulate, monkeypatch, count, tile, late):
    def suits(layer: Layer) -> bool:
        launch = cuda_terms.plan(layer.geometry, count, 132)
        return launch.blocks * int(launch.layer["steps"][0]) <= MOST_STEPS

    rng = seeded(count, tile, late)
    monkeypatch.setattr(cuda_terms, "_TILES", (tile,))
    for most_expanded in (cuda_terms._MOST_EXPANDED, 1 << 12):  # a batch in one piece, and in several
        monkeypatch.setattr(cuda_terms, "_MOST_EXPANDED", most_expanded)
        emulate(SHARED[0], late)
        for layer in random_layers(rng, codes, suits, 3):
            terms = random_terms(count, seed=len(layer.weight))
            if rng.random() < 0.3:
                terms = replace(terms, f=terms.f * 0, g=terms.g * 0)
            assert_sums_of_terms(layer, terms, rng)


@pytest.mark.parametrize("channels", [61, 64, 130])
def test_many_terms_fit_into_99_kib(emulate, channels):
    emulate(SHARED[0], late=False)
    layer = Layer(codes(1, channels), codes(2, channels))
    for count in (212, 213, 256):
        assert_sums_of_terms(layer, random_terms(count), seeded(count))


@pytest.mark.parametrize("slots", SLOTS)
def test_single_products_have_room_for_their_outputs(emulate, monkeypatch, slots):
    for tile in cuda_matrix._TILES:
        monkeypatch.setattr(cuda_matrix, "_TILES", (tile,))
        emulate(SHARED[2], late=True)
        layer, output = Layer(torch.randn(1, 1), torch.randn(1, 1)), torch.empty(1, 1)
        with cuda_matrix.allowed(True):
            cuda_matrix.run(layer.geometry, layer.input, layer.weight, None, output, MULTIPLIERS[slots][0], None)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("path", ["rows", "columns", "gather"])
@pytest.mark.parametrize("shared", SHARED)
def test_integer_layers_look_up_their_table(emulate, kind, path, shared):
    emulate(shared, late=False)
    rng = seeded(kind, path, shared)
    table = torch.randint(*TABLES[kind], (256, 256)).int()

    def run(*operands: object) -> None:
        cuda_integers.run(*operands[:4], table, operands[4], path, *operands[5:])

    for layer in random_layers(rng, codes, lambda layer: layer.geometry.products <= 20_000, 3):
        assert_sums(layer, run, table, rng)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("shape", [(1, 1), (6, 35), (4, 3, 31, 17), (9, 1000)], ids=str)
def test_quantisation_has_the_bits_of_the_cpu(emulate, shape, bits, signed):
    emulate(SHARED[0], late=False)
    torch.manual_seed(0)
    x, grad, running = torch.randn(shape) * 3, torch.randn(shape), torch.tensor([-1.5, 2.5])

    def assert_same(function: str, *arguments: object) -> None:
        mine, theirs = ([x.clone() if isinstance(x, Tensor) else x for x in arguments] for _ in range(2))
        found, expected = getattr(cuda_quantize, function)(*mine), getattr(torch.ops.mbm, function)(*theirs)
        for one, other in zip((found, *mine), (expected, *theirs), strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other

    for scale in (torch.ones(1), torch.rand(shape[0]) + 0.01):
        form = scale, torch.full_like(scale, 0.0 if signed else 3.0), bits, signed
        assert_same("quantize", x, *form)
        assert_same("fake_quantize", x, *form)
        assert_same("quantize_grad", grad, x, *form)
    assert_same("row_scales", x, bits, signed)
    assert_same("update_range", x, running, 0.01, bits, signed)


@pytest.mark.parametrize(
    ("shape", "side"), [((2, 3, 8, 8), 2), ((3, 1, 7, 5), 2), ((1, 2, 9, 11), 3), ((1, 1, 1, 9), 2)]
)
def test_pooling_has_the_bits_of_two_layers(emulate, shape, side):
    emulate(SHARED[0], late=False)
    torch.manual_seed(0)
    x = torch.randint(-2, 3, shape).float()  # so that many of a window are equal
    x.view(-1)[::17] = torch.nan
    x.requires_grad_()
    expected = F.max_pool2d(F.relu(x), side) if min(shape[2:]) >= side else torch.empty(*shape[:2], 0, shape[3] // side)
    grad = -torch.randint(0, 3, expected.shape).float()
    bits = [pooling.relu_max_pool(x.detach(), side), pooling.relu_max_pool_grad(grad, x.detach(), side)]
    if expected.numel() == 0:
        assert bits[0].numel() == 0
        assert not bits[1].any()
        return
    expected.backward(grad)
    for one, other in zip(bits, (expected.detach(), x.grad), strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def assert_sums_without_zero_points(layer: Layer, bits: int, rng: random.Random) -> None:
    """Check codes, their sums and scaled sums, each against the CPU's, bit for bit."""
    input, weight = layer.images
    zeros, scale = torch.randint(0, 1 << bits, (1 + len(weight),)).float(), torch.rand(1 + len(weight)) + 0.01
    rows = weight.flatten(1)[:, :, None, None]
    operands = (
        (input, scale[:1], zeros[:1], bits, layer.groups, layer.padding),
        (rows, scale[1:], zeros[1:], bits, 1, (0, 0)),
    )
    of_codes = []
    for operand in operands:
        found, expected = cuda_quantize.quantize_and_sum(*operand), torch.ops.mbm.quantize_and_sum(*operand)
        assert all(map(torch.equal, found, expected))
        of_codes.append(found[1])
    sums = torch.randint(-(1 << 31), 1 << 31, (len(input), len(weight), *layer.geometry.out_size)).int()
    arguments = sums, of_codes[0], of_codes[1].flatten(), list(weight.shape), layer.stride, layer.dilation
    bias = torch.randn(len(weight)) if rng.random() < 0.5 else None
    arguments += zeros[:1], zeros[1:], scale[1:], bias
    assert torch.equal(cuda_quantize.scale_sums(*arguments), torch.ops.mbm.scale_sums(*arguments))


@pytest.mark.parametrize("seed", range(6))
def test_unsigned_codes_are_padded_and_summed(emulate, monkeypatch, seed):
    emulate(SHARED[0], late=False)
    rng = seeded(seed)
    for many in (cuda_quantize._MANY, 1):  # threads that share a position's channels, and single ones
        monkeypatch.setattr(cuda_quantize, "_MANY", many)
        for layer in random_layers(rng, torch.randn, lambda one: one.geometry.products <= 1_000_000, 8):
            assert_sums_without_zero_points(layer, rng.choice([3, 8]), rng)


def test_empty_batches_have_codes_and_sums(emulate):
    emulate(SHARED[0], late=False)
    layer = Layer(torch.randn(0, 6, 5, 4), torch.randn(4, 3, 3, 2), (2, 1), (1, 2), groups=2)
    assert_sums_without_zero_points(layer, 8, seeded())


def test_input_that_is_not_finite_poisons(emulate):
    emulate(SHARED[0], late=False)
    for wrong, padding in ((float("nan"), [0, 0]), (float("inf"), [2, 1]), (0.0, [2, 1])):
        x, poison = torch.randn(2, 20, 3, 3), torch.ones(5)
        x[1, 10, 2, 0] = wrong  # the first of a thread's channels
        cuda_quantize.quantize_and_sum(x, torch.ones(1), torch.zeros(1), 8, 2, padding, poison)
        assert poison.isnan().tolist() == [wrong != 0.0] * 5
