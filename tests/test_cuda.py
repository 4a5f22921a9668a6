"""The CUDA kernels: that every variant compiles (no GPU needed), and on a GPU, that they compute what they should."""

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from gpu.exhaustive import bfloat16_operands, check_bfloat16_pairs, check_random_convolution, check_random_pairs
from memory_formats import MEMORY_FORMATS
from nvrtc import local_memory
from operands import from_bits, normal
from sums import assert_sums_of_products, same_bits
from tables import IN_C, exported, random_table

from mbm_cli import ApproxConv2d, Multiplier, conv2d, multiply, resolve
from mbm_cli.backends import cuda, cuda_programs, geometry
from mbm_cli.multipliers.content import operands
from mbm_cli.multipliers.float32 import FAMILIES


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


# One for each form of the product (family exact; no correction; one level; two levels; drum), not masked and masked.
NAMES = ("mitchell", "mbm", "mbm-t17", "drum-k6", "exact-t8-r7", "mitchell-r5", "mbm-t8-r10", "mbm-t17-r3", "drum-k20")
FORMS = [Multiplier.parse(name) for name in NAMES]
OTHERS = ("mbm-t7", "mbm-t18-r5", "mbm-t20-r3", "mitchell-t22-r1", "exact-r1", "drum-k12-r5")
TABLES = [random_table(bits) for bits in (1, 5, 7, 8, 11)]
TABLE = TABLES[2]
C = resolve(IN_C)
EACH_KIND = pytest.mark.parametrize("multiplier", [Multiplier("mbm", 16, 7), TABLE, C], ids=str)
# Each has its own kernel.
OUT_CHANNELS = pytest.mark.parametrize("out_channels", [1, 6, 16, 64])


def compile_kernels(multiplier: Multiplier, architecture: str, variant: cuda.Variant) -> dict[str, int]:
    """Return the bytes of local memory of each kernel."""
    handle, table = operands(multiplier, torch.device("cpu"))
    program = cuda.program(handle, 0 if table is None else table.shape[1].bit_length() - 1, variant)
    argument = plan((1, 1, 1, 1), (1, 1, 1, 1), (1, 1)).conv
    return local_memory(program, architecture, f"static_assert(sizeof(mbm::Conv2d) == {argument.itemsize});")


def test_every_variant_compiles_without_spills():
    pytest.importorskip("cuda.bindings.nvrtc")
    # Masked forms contain the others.
    variants = [(form, "sm_90", cuda.FORWARD) for form in (*FORMS[4:], TABLES[3], C)]
    variants += [(form, "sm_75", cuda.FORWARD) for form in (FORMS[8], TABLES[3])]
    # Of the other kernels, those with the most registers: the forms of mbm and the function.
    free = cuda.Variant(free=True, exchanged=True)
    variants += [(form, "sm_90", free) for form in (FORMS[1], C)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda variant: compile_kernels(*variant), variants))
    for variant, stacks in zip(variants, results, strict=True):
        assert {tile.kernel for tile in cuda._TILES} < set(stacks), variant
        assert not any(stacks.values()), (variant, stacks)


def plan(shape, weight_shape, out_size, groups=1, padding=(0, 0)):
    strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
    return cuda.plan(geometry.forward(shape, strides, weight_shape, out_size, (1, 1), padding, (1, 1), groups), 132)


@pytest.mark.parametrize(
    ("kernel", "convolution"),
    [
        ("conv2d_direct_6x1", ((64, 1, 28, 28), (6, 1, 5, 5), (28, 28), 1, (2, 2))),
        ("conv2d_direct_6x2", ((256, 1, 28, 28), (6, 1, 5, 5), (28, 28), 1, (2, 2))),
        ("conv2d_direct_1x4", ((64, 64, 56, 56), (64, 1, 3, 3), (56, 56), 64, (1, 1))),
        ("conv2d_16x32", ((64, 6, 14, 14), (16, 6, 5, 5), (10, 10))),
        ("conv2d_64x128", ((64, 32, 28, 28), (64, 32, 3, 3), (28, 28), 1, (1, 1))),
        ("conv2d_32x128", ((64, 64, 14, 14), (128, 64, 3, 3), (14, 14), 1, (1, 1))),
    ],
)
def test_the_kernel_suits_the_shape(kernel, convolution):
    assert plan(*convolution).kernel == kernel


@pytest.mark.parametrize(
    ("shape", "weight_shape"),
    [((1 << 12, 1, 1 << 10, 1 << 10), (8, 1, 1, 1)), ((1, 1 << 12, 1 << 10, 1 << 10), (8, 1 << 12, 1, 1))],
)
def test_indices_above_32_bits_are_refused(shape, weight_shape):
    with pytest.raises(RuntimeError, match="smaller batches"):
        plan(shape, weight_shape, (1 << 10, 1 << 10))


def test_noted_kernels_are_not_launched(monkeypatch):
    monkeypatch.setattr(cuda, "multiprocessors_of", lambda _: 132)
    x, weight, output = torch.ones(2, 6, 14, 14), torch.ones(16, 6, 5, 5), torch.full((2, 16, 10, 10), 7.0)
    pair = (1, 1)
    of_layer = geometry.forward(tuple(x.shape), x.stride(), tuple(weight.shape), (10, 10), pair, (0, 0), pair, 1)
    with cuda_programs.noted() as kernels:
        for _ in range(2):
            cuda.run(of_layer, x, weight, None, output, "mbm", None)
    assert [(program.name, kernel) for program, kernel in kernels] == [("mbm", "conv2d_16x32")]
    assert (output == 7).all()


CUDA_12 = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: 12090)))


@pytest.mark.parametrize(
    ("cupy", "message"),
    [(None, r"pip install 'mbm-cli\[cuda13\]'"), (CUDA_12, r"for CUDA 12.*uninstall cupy-cuda12x.*cuda13")],
)
def test_missing_or_unfit_cupy_is_named(monkeypatch, cupy, message):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(RuntimeError, match=message):
        cuda_programs.import_cupy()


# On a GPU


normal_on_gpu = partial(normal, device="cuda")


@on_gpu
@pytest.mark.parametrize("multiplier", [*FORMS, *TABLES, *map(Multiplier.parse, OTHERS)], ids=str)
def test_products_of_random_bit_patterns(multiplier):
    check_random_pairs(multiplier, 1 << 20, torch.Generator("cuda").manual_seed(0))


@on_gpu
@pytest.mark.parametrize("multiplier", [*FORMS, *TABLES], ids=str)
def test_products_of_all_seven_bit_fractions(multiplier):
    check_bfloat16_pairs(multiplier, bfloat16_operands()[::257][:248])  # every exponent and many fractions, both signs


@on_gpu
@pytest.mark.parametrize("seed", range(40))
def test_random_convolutions(seed):
    check_random_convolution(random.Random(seed))


@on_gpu
@pytest.mark.parametrize(("family", "bits"), [("C", 23), *product(FAMILIES, (1, 3, 5, 7, 9))])
@OUT_CHANNELS
def test_convolutions_of_built_ins_in_other_forms(family, bits, out_channels, tmp_path):
    input, weight = normal_on_gpu((3, 9, 12, 13), (out_channels, 9, 3, 3))
    multipliers = (C, "mbm") if family == "C" else exported(family, bits, tmp_path / "table.npy")
    assert same_bits(*(conv2d(input, weight, padding=1, multiplier=m) for m in multipliers))


@on_gpu
def test_products_of_mbm_in_c():
    a, b = from_bits(torch.randint(-(1 << 31), 1 << 31, (2, 1 << 22), device="cuda"))
    assert same_bits(multiply(a, b, C), multiply(a, b, "mbm"))


@on_gpu
def test_faults_of_c_functions_are_named(tmp_path):
    (tmp_path / "wrong.h").write_text("unsigned f(unsigned a, unsigned b) { return a + ; }")
    with pytest.raises(ValueError, match="f does not compile: line 1: "):
        multiply(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"), f"c:{tmp_path / 'wrong.h'}:f")


@on_gpu
@pytest.mark.parametrize("multiplier", [*FORMS[1:6], FORMS[8], TABLE], ids=str)
@pytest.mark.parametrize("out_channels", [1, 6, 16, 32, 70])
@pytest.mark.parametrize("special", [1e-40, -1e-25, 3e38, float("inf"), float("nan")])
def test_special_operands_in_any_tile(multiplier, out_channels, special):
    """Put one special operand among normal ones: only its tile is computed from the definition."""
    for where in range(2):
        tensors = normal_on_gpu((2, 9, 12, 13), (out_channels, 9, 3, 3))
        tensors[where].view(-1)[41] = special
        output = conv2d(*tensors, multiplier=multiplier)
        assert_sums_of_products(output, *tensors, None, 1, 0, 1, 1, multiplier)


@on_gpu
@pytest.mark.parametrize("out_channels", [1, 16, 64])
@pytest.mark.parametrize("multiplier", ["mbm", "exact-t8-r7", TABLE, C], ids=str)
def test_padding_is_not_multiplied(multiplier, out_channels):
    input = torch.ones(1, 1, 4, 4, device="cuda")
    weight = torch.ones(out_channels, 1, 3, 3, device="cuda")
    weight[:, :, 0, 0] = float("inf")
    output = conv2d(input, weight, padding=1, multiplier=multiplier)
    assert output[..., 0, :].isfinite().all()
    assert output[..., 1:, 1:].isinf().all()


@on_gpu
@OUT_CHANNELS
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
def test_memory_formats_change_no_bits(memory_format, out_channels):
    input, weight = normal_on_gpu((4, 8, 15, 17), (out_channels, 8, 3, 3))
    strided = MEMORY_FORMATS[memory_format](input)
    expected = conv2d(strided.contiguous(), weight, padding=1)
    for same in (weight, MEMORY_FORMATS["transposed"](weight)):
        assert same_bits(conv2d(strided, same, padding=1), expected)


@on_gpu
def test_empty_batches():
    batch, weight = torch.empty(0, 3, 8, 8, device="cuda"), torch.ones(4, 3, 3, 3, device="cuda")
    assert conv2d(batch, weight).shape == (0, 4, 6, 6)
    assert multiply(torch.empty(0, 5, device="cuda"), torch.empty(5, device="cuda")).shape == (0, 5)


# PyTorch's ways of calling


@on_gpu
@EACH_KIND
def test_operators_take_a_handle_and_a_table(multiplier):
    input, weight, bias = normal_on_gpu((2, 3, 9, 9), (4, 3, 3, 3), (4,))
    direct = operands(multiplier, input.device)
    expected = conv2d(input, weight, bias, multiplier=multiplier)
    assert same_bits(torch.ops.mbm.conv2d(input, weight, bias, [1, 1], [0, 0], [1, 1], 1, *direct), expected)
    assert same_bits(torch.ops.mbm.multiply(bias, bias, *direct), multiply(bias, bias, multiplier))


@on_gpu
@EACH_KIND
def test_layers_move_between_devices(multiplier):
    layer = ApproxConv2d(3, 4, 3, multiplier=multiplier)
    (input,) = normal_on_gpu((2, 3, 9, 9))
    before = layer(input.cpu())
    assert same_bits(layer.cuda()(input), conv2d(input, layer.weight, layer.bias, multiplier=multiplier))
    assert same_bits(layer.cpu()(input.cpu()), before)


@on_gpu
@EACH_KIND
def test_captured_graphs_replay_the_same_bits(multiplier):
    layer = ApproxConv2d(6, 16, 5, multiplier=multiplier).cuda()
    inputs = torch.randn(3, 8, 6, 14, 14, device="cuda")
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        x, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)
        for new, bits in zip(inputs, expected, strict=True):
            x.copy_(new)
            graph.replay()
            assert same_bits(output, bits)


@on_gpu
def test_capturing_before_the_first_use_is_refused():
    input, weight = normal_on_gpu((1, 3, 8, 8), (4, 3, 3, 3))
    with pytest.raises(RuntimeError, match="run it once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        conv2d(input, weight, multiplier="mbm-t3-r11")
    assert torch.rand(3, device="cuda").max() < 1  # what is random has left the capture, too


@on_gpu
def test_the_current_stream_is_used():
    input, weight = normal_on_gpu((64, 32, 28, 28), (64, 32, 3, 3))
    expected = conv2d(2 * input, weight)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        output = conv2d(2 * input, weight)  # 2 * input is on the side stream only
    side.synchronize()
    assert same_bits(output, expected)


@on_gpu
@EACH_KIND
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_changes_no_bits(multiplier):
    layer = ApproxConv2d(3, 16, 3, padding=1, multiplier=multiplier).cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    compiled = torch.compile(lambda x: layer(x).relu(), fullgraph=True)
    assert same_bits(compiled(x), layer(x).relu())


@on_gpu
@EACH_KIND
def test_the_ceiling_is_plausible(multiplier):
    assert 1e10 < cuda.ceiling(*operands(multiplier, torch.device("cuda")), torch.device("cuda")) < 1e15
