"""The CUDA kernels of terms: that they compile (no GPU needed), and on a GPU, that sums are exact."""

import random

import numpy as np
import pytest
import torch
from nvrtc import local_memory
from test_cuda_integers import expected_sums, forward, on_gpu, random_codes, random_convolution
from torch import Tensor

from mbm_cli.backends import cuda_integers, cuda_terms, geometry
from mbm_cli.multipliers.factor import Terms

COUNTS = (0, 1, 2, 3, 4, 5, 7, 8, 12)


@pytest.mark.parametrize("architecture", ["sm_80"])  # the oldest with the instructions; others take as long
def test_every_kernel_compiles_without_spills(architecture):
    layouts = {"Operand": cuda_terms._OPERAND, "Layer": cuda_terms._LAYER}
    checks = (f"static_assert(sizeof(terms::{name}) == {layout.itemsize});" for name, layout in layouts.items())
    found = local_memory(cuda_terms.program(), architecture, "\n".join(checks))
    assert {tile.kernel for tile in cuda_terms._TILES} < set(found)
    assert not any(found.values())


def test_indices_above_32_bits_are_refused():
    with pytest.raises(RuntimeError, match="smaller batches"):
        cuda_terms.plan(forward((1, 1, 1 << 16, 1 << 15), (8, 1, 1, 1)), 1, 132)


@pytest.mark.parametrize(
    ("most", "geometry"),
    [
        (30, forward((64, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1))),
        (30, forward((256, 64, 14, 14), (128, 64, 3, 3), padding=(1, 1))),
        (5, forward((128, 16, 32, 32), (16, 16, 3, 3), padding=(1, 1))),
        (5, geometry.linear((64, 1024), (1024, 1), 1024, (1024, 1))),
        (-1, forward((64, 1, 28, 28), (6, 1, 5, 5), padding=(2, 2))),
        (-1, forward((64, 6, 14, 14), (16, 6, 5, 5))),
        (-1, forward((64, 64, 56, 56), (64, 1, 3, 3), padding=(1, 1), groups=64)),
        (-1, geometry.linear((64, 400), (400, 1), 120, (400, 1))),
        (-1, forward((1, 1, 1 << 16, 1 << 15), (8, 1, 1, 1))),
    ],
)
def test_few_terms_pay_in_large_layers(most, geometry):
    look_up = min(choice.time for choice in cuda_integers._choices(geometry, 132, 232448, False))
    paying = [count for count in range(60) if cuda_terms.expected_clocks(geometry, count, 132) < look_up]
    assert max(paying, default=-1) >= most if most > 0 else not paying


# On a GPU


def random_terms(count: int, seed: int = 0) -> Terms:
    rng = np.random.default_rng(seed)
    u, v = rng.integers(-128, 128, (2, 256, count)).astype(np.int8)
    u[:2], v[:2] = -128, [[-128], [127]]  # the extremes of the range
    f, g = rng.integers(-(1 << 20), 1 << 20, (2, 256))
    return Terms(u, np.ascontiguousarray(v.T), f, g)


def table_of(terms: Terms) -> Tensor:
    table = terms.u.astype(np.int64) @ terms.v.astype(np.int64) + terms.f[:, None] + terms.g
    return torch.from_numpy(table.astype(np.int32)).cuda()


def sums(input, weight, terms, padding_code=0, scale=None, bias=None, **convolution):
    if isinstance(terms, Terms):
        terms = cuda_terms.on_device(terms, input.device)
    dtype = torch.int32 if scale is None else torch.float32
    if input.dim() == 2:
        g = geometry.linear(tuple(input.shape), input.stride(), weight.shape[0], weight.stride())
        output = torch.empty(input.shape[0], weight.shape[0], dtype=dtype, device="cuda")
    else:
        g = forward(tuple(input.shape), tuple(weight.shape), **convolution, strides=input.stride())
        output = torch.empty(g.batch, weight.shape[0], *g.out_size, dtype=dtype, device="cuda")
    cuda_terms.run(g, input, weight, output, terms, padding_code, scale, bias)
    return output


@on_gpu
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("many", [False, True], ids=["few channels", "many channels"])
@pytest.mark.parametrize("seed", range(6))
def test_sums_of_random_convolutions(seed, many, count):
    rng = random.Random(f"{seed} {many} {count}")
    torch.manual_seed(rng.randrange(1 << 30))
    shape, weight_shape, convolution = random_convolution(rng, many)
    dtype, padding_code, terms = (
        rng.choice([torch.int8, torch.uint8]),
        rng.randint(-128, 255),
        random_terms(count, seed),
    )
    input, weight = random_codes(shape, dtype), random_codes(weight_shape, dtype)
    if rng.random() < 0.5:
        input = input.contiguous(memory_format=torch.channels_last)
    expected = expected_sums(input, weight, table_of(terms), padding_code, **convolution)
    for tile in cuda_terms._TILES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_terms, "_TILES", (tile,))
            cuda_terms.plan.cache_clear()
            assert torch.equal(sums(input, weight, terms, padding_code, **convolution), expected), tile
    cuda_terms.plan.cache_clear()


@on_gpu
@pytest.mark.parametrize("count", [0, 1, 5, 33])
@pytest.mark.parametrize(("images", "length", "rows"), [(1, 1, 1), (64, 400, 120), (3, 85, 10), (900, 160, 130)])
def test_sums_of_dense_layers(images, length, rows, count):
    terms, weight = random_terms(count), random_codes((rows, length), torch.uint8)
    whole = random_codes((images, 2 * length + 1), torch.uint8)
    views = (whole[:, :length].contiguous(), whole[:, 1 : length + 1], whole[:, : 2 * length : 2])
    for input in (*views, views[0].t().contiguous().t()):
        expected = expected_sums(input[..., None, None], weight[..., None, None], table_of(terms), 0).flatten(1)
        assert torch.equal(sums(input, weight, terms), expected)


@on_gpu
@pytest.mark.parametrize("count", [1, 3])
def test_sums_of_several_full_tiles_repeat(count):
    terms = random_terms(count)
    input, weight = random_codes((40, 70, 20, 20), torch.int8), random_codes((150, 70, 3, 3), torch.int8)
    expected = expected_sums(input, weight, table_of(terms), -7, padding=(1, 1))
    for _ in range(3):
        assert torch.equal(sums(input, weight, terms, -7, padding=(1, 1)), expected)


@on_gpu
def test_slices_of_a_batch_make_the_same_sums(monkeypatch):
    terms = random_terms(2)
    input, weight = random_codes((7, 6, 9, 8), torch.int8), random_codes((4, 3, 3, 3), torch.int8)
    expected = sums(input, weight, terms, 5, padding=(1, 1), groups=2)
    monkeypatch.setattr(cuda_terms, "_MOST_EXPANDED", 1 << 12)
    assert torch.equal(sums(input, weight, terms, 5, padding=(1, 1), groups=2), expected)


@on_gpu
def test_constants_wrap_modulo_32_bits():
    terms = random_terms(1)
    high = Terms(terms.u, terms.v, terms.f + (1 << 34), terms.g - (1 << 31))
    low = Terms(terms.u, terms.v, terms.f, terms.g + (1 << 31))
    input, weight = random_codes((2, 3, 9, 8), torch.int8), random_codes((4, 3, 3, 3), torch.int8)
    assert torch.equal(sums(input, weight, high), sums(input, weight, low))


@on_gpu
@pytest.mark.parametrize("size", [(17, 17), (16, 18)], ids=["odd planes", "even planes"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_scaled_sums_round_after_each_operation(has_bias, size):
    terms = random_terms(3)
    input, weight = random_codes((3, 5, *size), torch.int8), random_codes((70, 5, 3, 3), torch.int8)
    scale, bias = torch.randn(2, 70, device="cuda")
    bias = bias * 1e5 if has_bias else None
    expected = sums(input, weight, terms).float() * scale[:, None, None]
    if has_bias:
        expected = expected + bias[:, None, None]
    found = sums(input, weight, terms, scale=scale, bias=bias)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@on_gpu
def test_captured_graphs_replay_the_same_sums():
    terms, weight = random_terms(2), random_codes((16, 6, 5, 5), torch.int8)
    input, ready = random_codes((8, 6, 14, 14), torch.int8), cuda_terms.on_device(terms, torch.device("cuda"))
    sums(input, weight, ready)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = sums(input, weight, ready)
    input.copy_(random_codes(tuple(input.shape), torch.int8))
    graph.replay()
    assert torch.equal(output, expected_sums(input, weight, table_of(terms), 0))
