"""The CPU kernels of integer multipliers, with each instruction set that this machine runs, against a plain gather."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_cli import _cpu
from mbm_cli.backends import cpu_integers, geometry
from mbm_cli.backends.cpu_integers import faster_path
from mbm_cli.multipliers.factor import Terms

LEAST, MOST = -(2**31), 2**31 - 1


@pytest.fixture(scope="module", params=_cpu.integer_instruction_sets())
def each_instruction_set(request):
    _cpu.use_integer_instruction_set(request.param)
    yield request.param
    _cpu.use_integer_instruction_set(_cpu.integer_instruction_sets()[0])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def random_table(rng, low=-32768, high=32767):
    return rng.integers(low, high, (256, 256), np.int32, endpoint=True)


def random_terms(rng, count, low=-128, high=127, shift=10**5):
    u, v = (rng.integers(low, high, shape, np.int8, endpoint=True) for shape in ((256, count), (count, 256)))
    f, g = rng.integers(-shift, shift, (2, 256), endpoint=True)
    return Terms(u, v, f, g)


def table_of(terms):
    table = terms.u.astype(np.int64) @ terms.v.astype(np.int64) + terms.f[:, None] + terms.g
    return table.astype(np.int32)


def random_codes(rng, *shape, dtype=torch.uint8):
    return torch.from_numpy(rng.integers(0, 256, shape, np.uint8)).view(dtype)


def by_gather(input: Tensor, weight: Tensor, table, padding_code, stride, padding, dilation, groups) -> Tensor:
    """Add up table entries, one kernel element of one channel at a time, modulo 2^32."""
    entries = torch.from_numpy(table).long()
    vertical, horizontal = padding
    codes = F.pad(input.long() & 255, (horizontal, horizontal, vertical, vertical), value=padding_code & 255)
    codes = codes.unflatten(1, (groups, -1))
    weights = weight.long().unflatten(0, (groups, -1)) & 255
    kernel = weight.shape[2:]
    out = [(codes.shape[3 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    spans = [(out[i] - 1) * stride[i] + 1 for i in range(2)]
    sums = torch.zeros(len(input), groups, weights.shape[1], *out, dtype=torch.long)
    for c, i, j in np.ndindex(*weight.shape[1:]):
        top, left = i * dilation[0], j * dilation[1]
        window = codes[:, :, c, top : top + spans[0] : stride[0], left : left + spans[1] : stride[1]]
        sums += entries[window[:, :, None], weights[None, :, :, c, i, j, None, None]]
    return sums.flatten(1, 2).int()


def check(input, weight, table, terms, padding_code=0, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
    """Compare every path that there is with the gather."""
    want = by_gather(input, weight, table, padding_code, stride, padding, dilation, groups)
    out_size = tuple(want.shape[2:])
    g = geometry.forward(input.shape, input.stride(), weight.shape, out_size, stride, padding, dilation, groups)
    for path in ("terms", "lookup", "auto") if terms else ("lookup", "auto"):
        output = torch.full(want.shape, -7, dtype=torch.int32)
        cpu_integers.compute(g, input, weight, output, table, terms, padding_code, path)
        assert torch.equal(output, want), path


@pytest.mark.parametrize("seed", range(25))
def test_random_convolutions(each_instruction_set, seed):
    rng = np.random.default_rng(seed)
    kernel, stride, dilation = rng.integers(1, 5, 2), rng.integers(1, 5, 2), rng.integers(1, 4, 2)
    padding, groups = rng.integers(0, 7, 2), int(rng.integers(1, 4))
    size = np.maximum(1, (kernel - 1) * dilation + 1 - 2 * padding) + rng.integers(0, 12, 2)
    channels, rows = int(rng.integers(1, 6)), int(rng.choice([1, 2, 3, 5, 15, 16, 17, 31, 33, 40]))
    dtype = (torch.uint8, torch.int8)[seed % 2]
    input = random_codes(rng, int(rng.integers(1, 12)), groups * channels, *size, dtype=dtype)
    if seed % 3 == 0:
        input = input.to(memory_format=torch.channels_last)
    weight = random_codes(rng, groups * rows, channels, *kernel, dtype=dtype)
    shape = tuple(tuple(map(int, pair)) for pair in (stride, padding, dilation))
    torch.set_num_threads(1 + seed % 3)
    terms = random_terms(rng, int(rng.integers(0, 12)), shift=10**5 * (seed % 4 > 0))
    code = int(rng.integers(-128, 256))
    check(input, weight, table_of(terms), terms, code, *shape, groups)
    check(input, weight, random_table(rng), None, code, *shape, groups)
    check(input, weight, random_table(rng, LEAST, MOST), None, code, *shape, groups)


@pytest.mark.parametrize("channels", [1, 3, 9, 30])  # 30: more steps than 16-bit sums hold
def test_padding_contributes_products_of_its_code(each_instruction_set, rng, channels):
    table = random_table(rng)
    table[0, 0], table[200] = 12345, 32767
    input, weight = random_codes(rng, 20, channels, 9, 9), random_codes(rng, 20, channels, 3, 3)
    for code in (0, 200, -56):
        check(input, weight, table, None, code, padding=(2, 1))


def test_depthwise(each_instruction_set, rng):
    terms = random_terms(rng, 3)
    input, weight = random_codes(rng, 3, 10, 11, 13), random_codes(rng, 10, 1, 3, 3)
    check(input, weight, table_of(terms), terms, 5, (2, 1), (1, 1), groups=10)


def test_far_apart_kernel_elements(each_instruction_set, rng):
    terms = random_terms(rng, 2)
    input, weight = random_codes(rng, 2, 3, 7, 5), random_codes(rng, 20, 3, 3, 3)
    check(input, weight, table_of(terms), terms, 9, padding=(600, 700), dilation=(600, 700), stride=(3, 2))


def test_large_jobs_are_divided(each_instruction_set, rng):
    terms = random_terms(rng, 16)
    for size in ((4, 150), (40, 8)):
        input, weight = random_codes(rng, 1, 600, *size), random_codes(rng, 3, 600, 3, 3)
        check(input, weight, table_of(terms), terms)
    check(random_codes(rng, 70, 2, 8, 8), random_codes(rng, 40, 2, 3, 3), table_of(terms), terms)


@pytest.mark.parametrize("value", [LEAST, -32768, -1, 255, 65535, MOST])
def test_extreme_entries(each_instruction_set, rng, value):
    input, weight = random_codes(rng, 8, 32, 12, 12), random_codes(rng, 17, 32, 3, 3)
    table = np.full((256, 256), value, np.int32)
    check(input, weight, table, None, padding=(1, 1))
    table[::2] = max(value - 65535, LEAST)
    check(input, weight, table, None, padding=(1, 1))


@pytest.mark.parametrize("factors", [(-128, -128), (-128, 127), (127, 127)])
def test_extreme_factors(each_instruction_set, rng, factors):
    terms = random_terms(rng, 5)
    terms.u[::2], terms.v[:, 1::2] = factors
    input, weight = random_codes(rng, 3, 40, 6, 6), random_codes(rng, 33, 40, 3, 3)
    check(input, weight, table_of(terms), terms)


@pytest.mark.parametrize("shape", [(1, 400, 120), (64, 300, 84), (3, 7, 10), (2100, 5, 33), (1, 1, 1)])
def test_dense_layers(each_instruction_set, rng, shape):
    batch, columns, rows = shape
    terms = random_terms(rng, 4)
    table = table_of(terms)
    input, weight = random_codes(rng, columns, batch).T, random_codes(rng, rows, columns)
    g = geometry.linear(input.shape, input.stride(), rows, weight.stride())
    codes, of_weight = input.long(), weight.long()
    want = torch.stack([torch.from_numpy(table).long()[codes, row].sum(1) for row in of_weight], 1).int()
    for path in ("terms", "lookup", "auto"):
        output = torch.empty(batch, rows, dtype=torch.int32)
        cpu_integers.compute(g, input, weight, output, table, terms, 0, path)
        assert torch.equal(output, want), path


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_threads(each_instruction_set, rng, threads):
    terms = random_terms(rng, 3)
    torch.set_num_threads(threads)
    for batch, size in ((1, 30), (40, 9)):
        input, weight = random_codes(rng, batch, 6, size, size), random_codes(rng, 70, 6, 3, 3)
        check(input, weight, table_of(terms), terms, 77, padding=(1, 1))
        check(input, weight, random_table(rng), None, 77, padding=(1, 1))


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (2, 0)])
def test_empty_sums_and_batches(each_instruction_set, rng, batch, channels):
    terms = random_terms(rng, 2)
    g = geometry.forward((batch, channels, 5, 5), (1,) * 4, (4, channels, 3, 3), (3, 3), (1, 1), (0, 0), (1, 1), 1)
    output = torch.full((batch, 4, 3, 3), -7, dtype=torch.int32)
    codes = torch.empty(0, dtype=torch.uint8)
    cpu_integers.compute(g, codes, codes, output, table_of(terms), terms, 0, "auto")
    assert not output.any()


def test_auto_follows_the_costs(each_instruction_set, rng):
    g = geometry.forward((64, 32, 28, 28), (1,) * 4, (64, 32, 3, 3), (28, 28), (1, 1), (1, 1), (1, 1), 1)
    assert faster_path(g, None) == "lookup"
    assert faster_path(g, random_terms(rng, 200)) == "lookup"
    assert faster_path(g, random_terms(rng, 2)) == ("lookup" if each_instruction_set == "portable" else "terms")


def test_impossible_paths_are_refused(rng):
    g = geometry.linear((1, 2), (2, 1), 3, (2, 1))
    input, weight, output = random_codes(rng, 1, 2), random_codes(rng, 3, 2), torch.empty(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="no terms"):
        cpu_integers.compute(g, input, weight, output, random_table(rng), None, 0, "terms")
    with pytest.raises(ValueError, match="unknown path 'fast'"):
        cpu_integers.compute(g, input, weight, output, random_table(rng), None, 0, "fast")
    with pytest.raises(ValueError, match="does not run the instruction set sse9"):
        _cpu.use_integer_instruction_set("sse9")
