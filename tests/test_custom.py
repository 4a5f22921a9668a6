"""Multipliers that users bring, in Python and in C."""

import copy
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from exhaustive_cpu import wild

from mbm_cli import cli
from mbm_cli.custom import check_magnitude, tabulate
from mbm_cli.errors import RunError
from mbm_cli.multipliers import Multiplier, reference_product
from mbm_cli.nn import MBMConv2d
from mbm_cli.ops import conv2d, multiply

EXAMPLES = Path(__file__).parent.parent / "examples"
IN_PYTHON = f"python:{EXAMPLES / 'four_bits.py'}:product"
IN_C = f"c:{EXAMPLES / 'mbm.h'}:mbm"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_the_example_in_python_cuts_operands_to_four_bits():
    a, b = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(0))
    assert same_bits(multiply(a, b, IN_PYTHON), multiply(a, b, "exact-t19-r7"))
    assert same_bits(multiply(a, b, f"{IN_PYTHON}@9"), multiply(a, b, "exact-t19"))


def test_the_example_in_c_is_mbm_bit_for_bit():
    """Products of any operands, and convolutions, whose sums round alike."""
    generator = torch.Generator().manual_seed(0)
    a, b = wild(200_000, generator), wild(200_000, generator)
    assert same_bits(multiply(a, b, IN_C), multiply(a, b, "mbm"))
    input, weight = torch.randn(2, 3, 9, 12, generator=generator), torch.randn(5, 3, 3, 3, generator=generator)
    for special in (1.0, 2.0**-140, torch.inf):
        input[0, 0, 4, 5] = special
        assert same_bits(
            conv2d(input, weight, padding=1, multiplier=IN_C), conv2d(input, weight, padding=1, multiplier="mbm")
        )


def test_a_cache_that_cannot_be_used_is_not_the_function_s_fault(tmp_path, monkeypatch):
    (tmp_path / "f.h").write_text((EXAMPLES / "mbm.h").read_text() + "/* not compiled before */\n")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"file/mbm/functions, where compiled functions are kept, cannot be used"):
        multiply(torch.ones(1), torch.ones(1), f"c:{tmp_path / 'f.h'}:mbm")


@pytest.mark.parametrize(("factor", "is_one"), [("0.97f", True), ("1.03f", True), ("5.0f", False), ("-1.0f", False)])
def test_a_product_may_be_wrong_by_a_factor_of_up_to_4(tmp_path, factor, is_one):
    body = f"union {{ uint32_t u; float f; }} x = {{a}}, y = {{b}}, p; p.f = x.f * y.f * {factor}; return p.u;"
    (tmp_path / "f.h").write_text(f"#include <stdint.h>\nstatic uint32_t f(uint32_t a, uint32_t b) {{ {body} }}\n")
    product = partial(multiply, multiplier=f"c:{tmp_path / 'f.h'}:f")
    if is_one:
        check_magnitude(product, "f")
    else:
        with pytest.raises(ValueError, match="whose sign or size is not a product's"):
            check_magnitude(product, "f")


def test_padding_contributes_nothing_whatever_a_function_makes_of_it(tmp_path):
    (tmp_path / "f.h").write_text("#include <stdint.h>\nuint32_t f(uint32_t a, uint32_t b) { return a == 0 ? 0 : b; }")
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 0, 0] = torch.inf
    output = conv2d(torch.ones(1, 1, 4, 4), weight, padding=1, multiplier=f"c:{tmp_path / 'f.h'}:f")
    assert output[0, 0, 0].tolist() == [4, 6, 6, 4]
    assert output[0, 0, 1:, 1:].isinf().all()


def test_a_function_may_count_on_the_usual_rounding(tmp_path):
    """A function in C that multiplies floats gets IEEE products."""
    (tmp_path / "f.h").write_text(
        "#include <stdint.h>\nstatic uint32_t f(uint32_t a, uint32_t b) {\n"
        "  union { uint32_t u; float f; } x = {a}, y = {b}, p;\n  p.f = x.f * y.f;\n  return p.u;\n}\n"
    )
    pixels, weights = torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.tensor([1 / 3, -1.1])
    sums = conv2d(pixels.reshape(1, 1, 1, -1), weights.reshape(2, 1, 1, 1), multiplier=f"c:{tmp_path / 'f.h'}:f")
    assert same_bits(sums.reshape(2, 1000), pixels * weights.unsqueeze(1))


def test_a_function_may_be_called_what_the_kernels_call_theirs(tmp_path):
    for name in ("mbm", "product", "conv2d", "multiply"):
        (tmp_path / "f.h").write_text((EXAMPLES / "mbm.h").read_text().replace("uint32_t mbm(", f"uint32_t {name}("))
        assert multiply(torch.tensor(1.0), torch.tensor(1.0), f"c:{tmp_path / 'f.h'}:{name}") == 1.078125


def test_a_function_in_c_is_one_file(tmp_path):
    (tmp_path / "f.h").write_text(
        '#include "mine.h"\nstatic unsigned f(unsigned a, unsigned b) { return mine(a, b); }\n'
    )
    with pytest.raises(ValueError, match="includes another file"):
        Multiplier.parse(f"c:{tmp_path / 'f.h'}:f")


@pytest.mark.parametrize("name", [IN_PYTHON, IN_C])
def test_layers_can_be_copied_pickled_and_trained(name):
    layer = MBMConv2d(1, 2, 3, multiplier=name)
    x = torch.randn(1, 1, 6, 6)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same_bits(again(x), layer(x))
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_there_is_no_model_of_a_function_in_c():
    with pytest.raises(ValueError, match="no other model"):
        reference_product(torch.ones(1), torch.ones(1), Multiplier.parse(IN_C))


PYTHON_FAULTS = {
    "def f(a, b): return a +": "cannot be run: SyntaxError",
    "import nothing_of_that_name": "cannot be run: ModuleNotFoundError",
    "raise SystemExit(3)": "cannot be run: SystemExit: 3",
    "g = 3": "has no function f",
    "f = 3": "has no function f",
    "def f(a): return a": "raises TypeError",
    "def f(a, b): return [1]": "gives list",
    "def f(a, b): return (a * b).double()": "gives torch.float64",
    "def f(a, b): return (a * b)[1:]": "gives torch.float32",
    "def f(a, b): return a + b": "is no multiplier: ",
    "def f(a, b): return (a * b).abs()": "is no multiplier: -",
    "def f(a, b): return a * b * 1.5": "a product of significands is in [1, 4)",
    "def f(a, b): return a * b / 0": "is no multiplier",
}


@pytest.mark.parametrize("text", PYTHON_FAULTS)
def test_faults_of_functions_in_python(tmp_path, text):
    path = tmp_path / "my.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(PYTHON_FAULTS[text])) as error:
        Multiplier.parse(f"python:{path}:f")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [0, 12])
def test_bits_that_no_table_has(bits):
    with pytest.raises(ValueError, match="1 to 11 fraction bits"):
        tabulate(torch.mul, bits)


C_FAULTS = {
    "uint32_t f(uint32_t a, uint32_t b) { return a + ; }": "f does not compile: function.h:",
    "uint32_t f(uint32_t a) { return a; }": "f does not compile",
    "uint32_t g(uint32_t a, uint32_t b) { return a; }": "has no function f",
    "uint32_t f(uint32_t a, uint32_t b) { return a; }": "f is no multiplier: ",
    "uint32_t f(uint32_t a, uint32_t b) { return a + b - 0x3F800000u; }": "zero times a number is zero",
}


@pytest.mark.parametrize("text", C_FAULTS)
def test_faults_are_told_before_anything_is_written(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    Path("my.h").write_text(f"#include <stdint.h>\n{text}\n")
    monkeypatch.setattr("sys.argv", ["mbm", "train", "--device", "cpu", "--multiplier", "c:my.h:f"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert C_FAULTS[text] in said
    assert len(said.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["my.h"]


def test_no_compiler_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "f.h").write_text((EXAMPLES / "mbm.h").read_text() + "/* not compiled before */\n")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        multiply(torch.ones(1), torch.ones(1), f"c:{tmp_path / 'f.h'}:mbm")


@pytest.mark.parametrize("reference", ["c:", "c:my.h", "python:my.py", "python::f", "c:my.h:3f", "python:my.py:f g"])
def test_what_is_no_reference(reference):
    with pytest.raises(ValueError, match="write the file and its function"):
        Multiplier.parse(reference)


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/x"])
@pytest.mark.parametrize("reference", ["lut:{}.bin", "python:{}.py:f", "c:{}.h:f"])
def test_names_that_no_file_can_have(name, reference):
    with pytest.raises(ValueError, match=r"no such file|cannot be read"):
        Multiplier.parse(reference.format(name))
