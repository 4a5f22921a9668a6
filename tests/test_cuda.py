"""The CUDA kernels: that every variant compiles (no GPU needed), and on a GPU, that they compute what they should."""

import os
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu.exhaustive import (
    bfloat16_operands,
    check_random_convolution,
    check_random_pairs,
    float64_sums,
    one_product_convolutions,
    same_bits,
    same_sums,
)
from tables import exported, random_table

import mbm_cli
from mbm_cli import ops
from mbm_cli.backends import cuda
from mbm_cli.multipliers import Multiplier, reference_product


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


# One for each form of the product (family exact; no correction; one level; two levels; drum), not masked and masked.
FORMS = ("mitchell", "mbm", "mbm-t17", "drum-k6", "exact-t8-r7", "mitchell-r5", "mbm-t8-r10", "mbm-t17-r3", "drum-k20")
MASKED = FORMS[4:]
TABLES = tuple(random_table(bits).key for bits in (1, 5, 7, 8, 11))
IN_C = Multiplier.parse(f"c:{Path(__file__).parent.parent / 'examples' / 'mbm.h'}:mbm")
EXACT_ARGUMENTS = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


def compile_kernels(name: str, architecture: str) -> dict[str, int]:
    """Bytes of local memory of each kernel."""
    multiplier = Multiplier.of_key(name)
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    size = f"static_assert(sizeof(mbm::Conv2d) == {cuda._CONV2D.itemsize});\n"
    _, program = nvrtc.nvrtcCreateProgram((cuda.source(multiplier) + size).encode(), b"conv2d.cu", 0, [], [])
    # CuPy adds the first two.
    options = ("-ftz=true", "--device-as-default-execution-space", *cuda.options(multiplier))
    options = [o.encode() for o in (*options, f"-arch={architecture}", "--ptxas-options=-v")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, length = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * length
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    found = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack frame", log.decode(), re.DOTALL)
    return {name: int(stack) for name, stack in found}


def test_every_variant_compiles_without_spills():
    pytest.importorskip("cuda.bindings.nvrtc")
    variants = [(form, "sm_90") for form in (*FORMS, *TABLES[2:4], IN_C.key)]
    variants += [(form, "sm_75") for form in (*MASKED, *TABLES[2:4], IN_C.key)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda variant: compile_kernels(*variant), variants))
    for variant, stacks in zip(variants, results, strict=True):
        assert set(stacks) == set(cuda._KERNELS), variant
        assert not any(stacks.values()), (variant, stacks)


def plan(shape, weight_shape, out_size, groups=1, padding=(0, 0)):
    strides = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
    out_shape = (shape[0], weight_shape[0], *out_size)
    return cuda.plan(shape, strides, weight_shape, out_shape, (1, 1), padding, (1, 1), groups, 132)


def test_the_kernel_suits_the_shape():
    assert plan((64, 1, 28, 28), (6, 1, 5, 5), (28, 28), padding=(2, 2)).kernel == "conv2d_direct_6x1"
    assert plan((256, 1, 28, 28), (6, 1, 5, 5), (28, 28), padding=(2, 2)).kernel == "conv2d_direct_6x2"
    assert plan((64, 64, 56, 56), (64, 1, 3, 3), (56, 56), 64, (1, 1)).kernel == "conv2d_direct_1x4"
    assert plan((64, 6, 14, 14), (16, 6, 5, 5), (10, 10)).kernel == "conv2d_16x32"
    assert plan((64, 32, 28, 28), (64, 32, 3, 3), (28, 28), padding=(1, 1)).kernel == "conv2d_64x128"
    assert plan((64, 64, 14, 14), (128, 64, 3, 3), (14, 14), padding=(1, 1)).kernel == "conv2d_32x128"


def test_what_32_bits_do_not_index_is_refused():
    with pytest.raises(RuntimeError, match="smaller batches"):
        plan((1 << 12, 1, 1 << 10, 1 << 10), (8, 1, 1, 1), (1 << 10, 1 << 10))
    with pytest.raises(RuntimeError, match="smaller batches"):
        plan((1, 1 << 12, 1 << 10, 1 << 10), (8, 1 << 12, 1, 1), (1 << 10, 1 << 10))


def test_missing_cupy_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"pip install 'mbm-cli\[cuda13\]'"):
        cuda.import_cupy()


def test_cupy_for_another_cuda_is_told(monkeypatch):
    runtime = SimpleNamespace(runtimeGetVersion=lambda: 12090)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    with pytest.raises(RuntimeError, match=r"for CUDA 12.*uninstall cupy-cuda12x.*cuda13"):
        cuda.import_cupy()


@on_gpu
@pytest.mark.parametrize(
    "multiplier", [*FORMS, *TABLES, "mbm-t7", "mbm-t18-r5", "mbm-t20-r3", "mitchell-t22-r1", "exact-r1", "drum-k12-r5"]
)
def test_products_of_random_bit_patterns(multiplier):
    check_random_pairs(multiplier, 1 << 20, torch.Generator("cuda").manual_seed(0))


@on_gpu
@pytest.mark.parametrize("multiplier", [*FORMS, *TABLES])
def test_products_of_all_seven_bit_fractions(multiplier):
    operands = bfloat16_operands()
    some = operands[::257][:248]  # every exponent and many fractions, both signs
    expected = reference_product(some.unsqueeze(1), operands, Multiplier.of_key(multiplier))
    assert same_bits(torch.ops.mbm.multiply(some.unsqueeze(1), operands, multiplier), expected)
    # A table need not be commutative, and a convolution's first operand is the pixel.
    expected = reference_product(operands, some.unsqueeze(1), Multiplier.of_key(multiplier))
    for sums in one_product_convolutions(operands, some, multiplier):
        assert same_sums(sums, expected)


@on_gpu
@pytest.mark.parametrize("family", ["mbm", "mitchell", "drum", "exact"])
@pytest.mark.parametrize("bits", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("out_channels", [1, 6, 16, 64])
def test_a_table_of_a_built_in_gives_its_convolutions(family, bits, out_channels, tmp_path):
    built_in, table = exported(family, bits, tmp_path / "table.npy")
    generator = torch.Generator("cuda").manual_seed(0)
    input = torch.randn(3, 9, 12, 13, device="cuda", generator=generator)
    weight = torch.randn(out_channels, 9, 3, 3, device="cuda", generator=generator)
    outputs = [ops.conv2d(input, weight, padding=1, multiplier=m) for m in (built_in, table)]
    assert same_bits(*outputs)


@on_gpu
@pytest.mark.parametrize("out_channels", [1, 6, 16, 64])
def test_mbm_in_c_gives_mbm_s_bits(out_channels):
    generator = torch.Generator("cuda").manual_seed(0)
    bits = torch.randint(-(1 << 31), 1 << 31, (2, 1 << 22), device="cuda", generator=generator)
    a, b = bits.to(torch.int32).view(torch.float32)
    assert same_bits(ops.multiply(a, b, IN_C), ops.multiply(a, b, "mbm"))
    input = torch.randn(3, 9, 12, 13, device="cuda", generator=generator)
    weight = torch.randn(out_channels, 9, 3, 3, device="cuda", generator=generator)
    assert same_bits(ops.conv2d(input, weight, padding=1, multiplier=IN_C), ops.conv2d(input, weight, padding=1))


@on_gpu
def test_a_function_that_does_not_compile_is_told(tmp_path):
    (tmp_path / "wrong.h").write_text("unsigned f(unsigned a, unsigned b) { return a + ; }")
    with pytest.raises(ValueError, match=r"f does not compile: function\.h\(1\)"):
        ops.multiply(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"), f"c:{tmp_path / 'wrong.h'}:f")


@on_gpu
@pytest.mark.parametrize("seed", range(40))
def test_random_convolution(seed):
    check_random_convolution(random.Random(seed))


@on_gpu
@pytest.mark.parametrize("multiplier", ["mbm", "mitchell-t16-r7", "exact-t8-r7", "drum-k6", "drum-k20", TABLES[2]])
@pytest.mark.parametrize("out_channels", [1, 6, 16, 32, 70])
@pytest.mark.parametrize("special", [1e-40, -1e-25, 3e38, float("inf"), float("nan")])
def test_special_operands_in_any_tile(multiplier, out_channels, special):
    """One special operand among normal ones: its tile is computed from the definition, the others are not touched."""
    generator = torch.Generator("cuda").manual_seed(0)
    for where in ("input", "weight"):
        input = torch.randn(2, 9, 12, 13, device="cuda", generator=generator)
        weight = torch.randn(out_channels, 9, 3, 3, device="cuda", generator=generator)
        (input if where == "input" else weight).view(-1)[41] = special
        output = torch.ops.mbm.conv2d(input, weight, None, *EXACT_ARGUMENTS.values(), multiplier)
        sums, bound = float64_sums(input, weight, None, EXACT_ARGUMENTS, multiplier)
        sums, bound = sums.float(), bound.nan_to_num(posinf=0)
        assert torch.equal(output.isnan(), sums.isnan())
        assert torch.equal(output[sums.isinf()], sums[sums.isinf()])
        finite = sums.isfinite()
        assert ((output - sums).abs() <= 2 * bound)[finite].all()


@on_gpu
@pytest.mark.parametrize("out_channels", [1, 16, 64])
@pytest.mark.parametrize("multiplier", ["mbm", "exact-t8-r7", TABLES[2], IN_C])
def test_padding_does_not_meet_an_infinite_weight(multiplier, out_channels):
    input = torch.ones(1, 1, 4, 4, device="cuda")
    weight = torch.ones(out_channels, 1, 3, 3, device="cuda")
    weight[:, :, 0, 0] = float("inf")
    multiplier = multiplier if isinstance(multiplier, Multiplier) else Multiplier.of_key(multiplier)
    output = ops.conv2d(input, weight, padding=1, multiplier=multiplier)
    assert output[..., 0, :].isfinite().all()
    assert output[..., 1:, 1:].isinf().all()


@on_gpu
@pytest.mark.parametrize("out_channels", [1, 6, 16, 64])
def test_strided_inputs_give_the_same_bits(out_channels):
    generator = torch.Generator("cuda").manual_seed(0)
    input = torch.randn(4, 8, 15, 17, device="cuda", generator=generator)
    weight = torch.randn(out_channels, 8, 3, 3, device="cuda", generator=generator)
    expected = ops.conv2d(input, weight, padding=1)
    wide = torch.randn(4, 16, 30, 34, device="cuda", generator=generator)
    wide[:, ::2, ::2, ::2] = input
    for same in (
        input.contiguous(memory_format=torch.channels_last),
        wide[:, ::2, ::2, ::2],
        input.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert same_bits(ops.conv2d(same, weight, padding=1), expected)
    transposed = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(ops.conv2d(input, transposed, padding=1), expected)
    one = input[:1].expand(4, -1, -1, -1)
    assert same_bits(ops.conv2d(one, weight, padding=1), ops.conv2d(one.contiguous(), weight, padding=1))


@on_gpu
def test_empty_batches():
    assert ops.conv2d(torch.empty(0, 3, 8, 8, device="cuda"), torch.ones(4, 3, 3, 3, device="cuda")).shape == (
        0,
        4,
        6,
        6,
    )
    assert mbm_cli.multiply(torch.empty(0, 5, device="cuda"), torch.empty(5, device="cuda")).shape == (0, 5)


@on_gpu
def test_a_captured_graph_replays_the_same_bits():
    layer = mbm_cli.MBMConv2d(6, 16, 5).cuda()
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
def test_capturing_before_the_first_use_is_told():
    x = torch.randn(1, 3, 8, 8, device="cuda")
    w = torch.randn(4, 3, 3, 3, device="cuda")
    with pytest.raises(RuntimeError, match="run it once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.conv2d(x, w, multiplier="mbm-t3-r11")


@on_gpu
def test_the_current_stream_is_used():
    x = torch.randn(64, 32, 28, 28, device="cuda")
    w = torch.randn(64, 32, 3, 3, device="cuda")
    expected = ops.conv2d(2 * x, w)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        output = ops.conv2d(2 * x, w)  # 2 * x is on the side stream only
    side.synchronize()
    assert same_bits(output, expected)


@on_gpu
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_gives_the_same_bits():
    layer = mbm_cli.MBMConv2d(3, 16, 3, padding=1, multiplier="mbm-t16-r7").cuda()
    x = torch.randn(4, 3, 16, 16, device="cuda")
    compiled = torch.compile(lambda x: layer(x).relu(), fullgraph=True)
    assert same_bits(compiled(x), layer(x).relu())


@on_gpu
def test_the_ceiling_is_that_of_the_card():
    assert 1e10 < cuda.ceiling("mbm") < 1e15
