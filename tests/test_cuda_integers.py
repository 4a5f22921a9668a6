"""The CUDA kernels of integer multipliers: that they compile (no GPU needed), and on a GPU, that sums are exact."""

import random

import pytest
import torch
import torch.nn.functional as F
from nvrtc import local_memory
from torch import Tensor

from mbm_cli.backends import cuda_integers, cuda_quantize, geometry


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


PATHS = ("auto", "rows", "direct", "columns", "gather")
OF_H100 = {"multiprocessors": 132, "shared_bytes": 232448, "wide": False, "aligned": True, "path": "auto"}


def forward(shape, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, strides=None):
    strides = strides or (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
    out_size = [
        (shape[2 + i] + 2 * padding[i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    return geometry.forward(shape, strides, weight, tuple(out_size), stride, padding, dilation, groups)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_every_kernel_compiles_without_spills(architecture):
    check = f"static_assert(sizeof(integer::Conv2d) == {cuda_integers._CONV2D.itemsize});"
    found = local_memory(cuda_integers.program(), architecture, check)
    # Rows may keep a few constants of the loop in local memory, never sums.
    assert not [name for name, stack in found.items() if stack > (16 if name.startswith("rows") else 0)]
    assert {cuda_integers.plan(forward((9, 9, 9, 9), (9, 9, 3, 3)), **OF_H100).kernel} <= set(found)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_quantisation_compiles(architecture):
    structs = {name: getattr(cuda_quantize, f"_{name.upper()}") for name in ("Elementwise", "Images", "Sums")}
    checks = "\n".join(f"static_assert(sizeof({name}) == {of.itemsize});" for name, of in structs.items())
    assert not any(local_memory(cuda_quantize.program(), architecture, checks).values())


@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        ("rows", forward((64, 64, 56, 56), (64, 64, 3, 3), padding=(1, 1))),
        ("rows", forward((256, 64, 14, 14), (128, 64, 3, 3), padding=(1, 1))),
        ("columns_8", forward((64, 1, 28, 28), (6, 1, 5, 5), padding=(2, 2))),
        ("columns_2", forward((64, 6, 14, 14), (16, 6, 5, 5))),
        ("columns_2", forward((64, 64, 56, 56), (64, 1, 3, 3), padding=(1, 1), groups=64)),
        ("gather", geometry.linear((64, 400), (400, 1), 120, (400, 1))),
        ("rows", geometry.linear((8192, 512), (512, 1), 1024, (512, 1))),
    ],
)
def test_the_kernel_suits_the_shape(kernel, geometry):
    assert cuda_integers.plan(geometry, **OF_H100).kernel == kernel


@pytest.mark.parametrize("shape", [(1 << 12, 1, 1 << 10, 1 << 10), (1, 1 << 12, 1 << 10, 1 << 10)])
def test_indices_above_32_bits_are_refused(shape):
    with pytest.raises(RuntimeError, match="smaller batches"):
        cuda_integers.plan(forward(shape, (8, shape[1], 1, 1)), **OF_H100)


def test_unknown_paths_are_refused():
    with pytest.raises(ValueError, match="'diagonal'"):
        cuda_integers.plan(forward((1, 1, 4, 4), (1, 1, 1, 1)), **OF_H100 | {"path": "diagonal"})


# On a GPU


def uniform(low: int, high: int, shape: tuple[int, ...], dtype=torch.int32) -> Tensor:
    return torch.randint(low, high, shape, device="cuda", dtype=torch.int64).to(dtype)


TABLES = {
    "signed": (-(1 << 15), 1 << 15),
    "unsigned": (0, 1 << 16),
    "above 16 bits": (-(1 << 20), (1 << 16) - (1 << 20)),
    "wide": (-(1 << 24), 1 << 24),
}


def random_table(kind: str) -> Tensor:
    table = uniform(*TABLES[kind], (256, 256))
    table[3, 5], table[7, 9] = TABLES[kind][0], TABLES[kind][1] - 1  # the extremes of the range
    return table


def random_codes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    codes = uniform(0, 256, shape, torch.uint8)
    codes.view(-1)[: min(2, codes.numel())] = torch.tensor([0, 255], dtype=torch.uint8)[: codes.numel()]
    return codes.view(dtype)


def expected_sums(input, weight, table, padding_code, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Gather and add up the entries, one kernel element of one channel at a time."""
    codes = F.pad(input.long() & 255, (padding[1],) * 2 + (padding[0],) * 2, value=padding_code & 255)
    rows, channels, *kernel = weight.shape[0] // groups, *weight.shape[1:]
    codes = codes.unflatten(1, (groups, 1, channels))
    weights = (weight.long() & 255).view(groups, rows, channels, *kernel)
    height, width = (codes.shape[4 + i] - dilation[i] * (kernel[i] - 1) for i in range(2))
    total = 0
    for c in range(channels):
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                down, right = i * dilation[0], j * dilation[1]
                a = codes[:, :, :, c, down : down + height : stride[0], right : right + width : stride[1]]
                total = total + table[a, weights[:, :, c, i, j][:, :, None, None]].long()
    return total.flatten(1, 2).int()


def sums(input, weight, table, padding_code=0, path="auto", scale=None, bias=None, **convolution):
    dtype = torch.int32 if scale is None else torch.float32
    if input.dim() == 2:
        g = geometry.linear(tuple(input.shape), input.stride(), weight.shape[0], weight.stride())
        output = input.new_empty(input.shape[0], weight.shape[0], dtype=dtype)
    else:
        g = forward(tuple(input.shape), tuple(weight.shape), **convolution, strides=input.stride())
        output = input.new_empty(g.batch, weight.shape[0], *g.out_size, dtype=dtype)
    cuda_integers.run(g, input, weight, output, table, padding_code, path, scale, bias)
    return output


def random_convolution(rng: random.Random, many: bool = False):
    """Return the shapes of input and weight, and the other arguments."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return rng.randint(low, high), rng.randint(low, high)

    groups = rng.choice([1, 1, 2, 3, 7])
    channels, rows = (rng.choice([1, rng.randint(1, 6)]) for _ in range(2))
    if many:
        groups, channels, rows = rng.choice([1, 2]), rng.randint(1, 12), rng.randint(20, 90)
    kernel, dilation = pair(1, 5), pair(1, 3)
    padding = pair(0, 3)
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    size = [rng.randint(n, n + 20) for n in least]
    convolution = {"stride": pair(1, 3), "padding": padding, "dilation": dilation, "groups": groups}
    return (rng.randint(1, 9), groups * channels, *size), (groups * rows, channels, *kernel), convolution


@on_gpu
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("many", [False, True], ids=["few channels", "many channels"])
@pytest.mark.parametrize("seed", range(8))
def test_sums_of_random_convolutions(seed, many, kind):
    rng = random.Random(f"{seed} {many} {kind}")
    torch.manual_seed(rng.randrange(1 << 30))
    shape, weight_shape, convolution = random_convolution(rng, many)
    dtype, padding_code, table = rng.choice([torch.int8, torch.uint8]), rng.randint(-128, 255), random_table(kind)
    input, weight = random_codes(shape, dtype), random_codes(weight_shape, dtype)
    if rng.random() < 0.5:
        input = input.contiguous(memory_format=torch.channels_last)
    expected = expected_sums(input, weight, table, padding_code, **convolution)
    for path in PATHS:
        assert torch.equal(sums(input, weight, table, padding_code, path, **convolution), expected), path


@on_gpu
@pytest.mark.parametrize("kind", ["signed", "wide"])
@pytest.mark.parametrize(("images", "length", "rows"), [(1, 1, 1), (64, 400, 120), (3, 85, 10), (900, 160, 130)])
def test_sums_of_dense_layers(images, length, rows, kind):
    table, weight = random_table(kind), random_codes((rows, length), torch.uint8)
    whole = random_codes((images, 2 * length + 1), torch.uint8)
    views = (whole[:, :length].contiguous(), whole[:, 1 : length + 1], whole[:, : 2 * length : 2])
    for input in (*views, views[0].t().contiguous().t()):
        expected = expected_sums(input[..., None, None], weight[..., None, None], table, 0).flatten(1)
        for path in PATHS:
            assert torch.equal(sums(input, weight, table, path=path), expected), path


@on_gpu
def test_sums_of_several_full_tiles():
    table = random_table("signed")
    input, weight = random_codes((9, 8, 20, 21), torch.int8), random_codes((150, 8, 3, 3), torch.int8)
    expected = expected_sums(input, weight, table, -7, padding=(1, 1))
    for path in PATHS:
        for _ in range(3):
            assert torch.equal(sums(input, weight, table, -7, path, padding=(1, 1)), expected), path


@on_gpu
def test_sums_of_extreme_entries_wrap_only_in_between():
    table = torch.full((256, 256), 65535, dtype=torch.int32, device="cuda")
    table[0] = 0
    input, weight = random_codes((2, 4000, 3, 3), torch.uint8), random_codes((70, 4000, 3, 3), torch.uint8)
    expected = (input != 0).flatten(1).sum(1)[:, None].expand(-1, 70) * 65535  # up to 2.4e9: as uint32
    for path in PATHS:
        found = sums(input, weight, table, path=path).flatten(1).long() & 0xFFFFFFFF
        assert torch.equal(found, expected), path


@on_gpu
@pytest.mark.parametrize("out_channels", [6, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_scaled_sums_round_after_each_operation(has_bias, out_channels):
    table = random_table("unsigned")
    input, weight = random_codes((3, 5, 17, 18), torch.int8), random_codes((out_channels, 5, 3, 3), torch.int8)
    scale, bias = torch.randn(2, out_channels, device="cuda")
    bias = bias * 1e5 if has_bias else None
    for path in PATHS:
        expected = sums(input, weight, table, path=path).float() * scale[:, None, None]
        if has_bias:
            expected = expected + bias[:, None, None]
        found = sums(input, weight, table, path=path, scale=scale, bias=bias)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), path


@on_gpu
def test_captured_graphs_replay_the_same_sums():
    table, weight = random_table("signed"), random_codes((16, 6, 5, 5), torch.int8)
    input = random_codes((8, 6, 14, 14), torch.int8)
    sums(input, weight, table)
    for path in PATHS:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = sums(input, weight, table, path=path)
        input.copy_(random_codes(tuple(input.shape), torch.int8))
        graph.replay()
        assert torch.equal(output, expected_sums(input, weight, table, 0)), path


@on_gpu
def test_capturing_a_new_table_is_refused():
    input, weight = random_codes((1, 3, 8, 8), torch.int8), random_codes((4, 3, 3, 3), torch.int8)
    table = random_table("signed")
    with pytest.raises(RuntimeError, match="run it once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sums(input, weight, table)
    assert torch.rand(3, device="cuda").max() < 1  # what is random has left the capture, too
