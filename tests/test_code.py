"""Functions that users write, in Python and in C."""

import re

import pytest
import torch
from operands import normal, wild
from sums import same_bits
from tables import EXAMPLES, IN_C, IN_PYTHON

from mbm_cli import conv2d, multiply, resolve
from mbm_cli.errors import RunError
from mbm_cli.experiments.lifecycle import check_function
from mbm_cli.multipliers.float32 import reference_product
from mbm_cli.multipliers.tabulate import check_magnitude, tabulate


@pytest.fixture
def in_c(tmp_path):
    """Write a function in C and return the name of the multiplier."""

    def write(text: str, function: str = "f") -> str:
        (tmp_path / "f.h").write_text(f"#include <stdint.h>\n{text}\n")
        return f"c:{tmp_path / 'f.h'}:{function}"

    return write


# Python


def test_the_python_example_cuts_to_four_bits():
    a, b = normal((10_000,), (10_000,))
    assert same_bits(multiply(a, b, IN_PYTHON), multiply(a, b, "exact-t19-r7"))
    assert same_bits(multiply(a, b, f"{IN_PYTHON}@9"), multiply(a, b, "exact-t19"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(a, b): return a +", "cannot be run: SyntaxError"),
        ("import nothing_of_that_name", "cannot be run: ModuleNotFoundError"),
        ("raise SystemExit(3)", "cannot be run: SystemExit: 3"),
        ("g = 3", "has no function f"),
        ("f = 3", "has no function f"),
        ("def f(a): return a", "raises TypeError"),
        ("def f(a, b): return [1]", "returns list"),
        ("def f(a, b): return (a * b).double()", "returns torch.float64"),
        ("def f(a, b): return (a * b)[1:]", "returns torch.float32"),
        ("def f(a, b): return a + b", "is not a multiplier: "),
        ("def f(a, b): return (a * b).abs()", "is not a multiplier: -"),
        ("def f(a, b): return a * b * 1.5", "a product of significands is in [1, 4)"),
        ("def f(a, b): return a * b / 0", "is not a multiplier"),
    ],
)
def test_faults_of_python_functions_are_named(tmp_path, text, message):
    (tmp_path / "my.py").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        resolve(f"python:{tmp_path / 'my.py'}:f")
    assert str(tmp_path / "my.py") in str(error.value)
    assert "\n" not in str(error.value)


def test_python_functions_are_tabulated_on_any_default_device():
    with torch.device("meta"):
        table = resolve(IN_PYTHON)
    assert table == resolve(IN_PYTHON)


@pytest.mark.parametrize("bits", [0, 12])
def test_tables_have_1_to_11_bits(bits):
    with pytest.raises(ValueError, match="1 to 11 fraction bits"):
        tabulate(torch.mul, bits)
    with pytest.raises(ValueError, match="1 to 11 fraction bits"):
        resolve(f"{IN_PYTHON}@{bits}")


# C


def test_the_c_example_is_mbm_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    a, b = wild(200_000, generator), wild(200_000, generator)
    assert same_bits(multiply(a, b, IN_C), multiply(a, b, "mbm"))
    input, weight = normal((2, 3, 9, 12), (5, 3, 3, 3))
    for special in (1.0, 2.0**-140, torch.inf):
        input[0, 0, 4, 5] = special
        ours, built_in = (conv2d(input, weight, padding=1, multiplier=m) for m in (IN_C, "mbm"))
        assert same_bits(ours, built_in)


def test_c_functions_round_to_nearest(in_c):
    product = "union { uint32_t u; float f; } x = {a}, y = {b}, p; p.f = x.f * y.f; return p.u;"
    name = in_c(f"static uint32_t f(uint32_t a, uint32_t b) {{ {product} }}")
    (pixels,), weights = normal((1000,)), torch.tensor([1 / 3, -1.1])
    sums = conv2d(pixels.reshape(1, 1, 1, -1), weights.reshape(2, 1, 1, 1), multiplier=name)
    assert same_bits(sums.reshape(2, 1000), pixels * weights.unsqueeze(1))


def test_padding_never_reaches_a_c_function(in_c):
    name = in_c("uint32_t f(uint32_t a, uint32_t b) { return a == 0 ? 0 : b; }")
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 0, 0] = torch.inf
    output = conv2d(torch.ones(1, 1, 4, 4), weight, padding=1, multiplier=name)
    assert output[0, 0, 0].tolist() == [4, 6, 6, 4]
    assert output[0, 0, 1:, 1:].isinf().all()


@pytest.mark.parametrize("function", ["mbm", "product", "conv2d", "multiply"])
def test_c_functions_may_have_the_kernels_names(in_c, function):
    name = in_c((EXAMPLES / "mbm.h").read_text().replace("uint32_t mbm(", f"uint32_t {function}("), function)
    assert multiply(torch.tensor(1.0), torch.tensor(1.0), name) == 1.078125


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uint32_t f(uint32_t a, uint32_t b) { return a + ; }", "f does not compile: line 2: "),
        ("uint32_t f(uint32_t a) { return a; }", "f is uint32_t f(uint32_t): write uint32_t f(uint32_t a, uint32_t b)"),
        ("uint32_t g(uint32_t a, uint32_t b) { return a; }", "there is no definition of a function f"),
        ('#include "mine.h"\nuint32_t f(uint32_t a, uint32_t b) { return mine(a, b); }', "includes another file"),
        ("uint32_t f(uint32_t a, uint32_t b) { return a; }", "f is not a multiplier: "),
        ("uint32_t f(uint32_t a, uint32_t b) { return a + b - 0x3F800000u; }", "zero times a number is zero"),
    ],
)
def test_faults_of_c_functions_are_named(in_c, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_function(resolve(in_c(text)), torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_products_may_err_by_a_factor_of_4():
    for factor in (0.3, 3.9):
        check_magnitude(lambda a, b, factor=factor: a * b * factor, "f")
    for factor in (0.2, 5.0, -1.0):
        with pytest.raises(ValueError, match="whose sign or size is not a product's"):
            check_magnitude(lambda a, b, factor=factor: a * b * factor, "f")


def test_a_missing_compiler_is_named(in_c, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    name = in_c("uint32_t f(uint32_t a, uint32_t b) { return a ^ b; /* never compiled */ }")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        multiply(torch.ones(1), torch.ones(1), name)


def test_an_unusable_cache_is_not_the_functions_fault(in_c, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    name = in_c("uint32_t f(uint32_t a, uint32_t b) { return a & b; /* never compiled */ }")
    with pytest.raises(RunError, match=r"file/mbm/functions, where compiled functions are kept, cannot be used"):
        multiply(torch.ones(1), torch.ones(1), name)


def test_c_functions_have_no_reference_model():
    with pytest.raises(ValueError, match="no other model"):
        reference_product(torch.ones(1), torch.ones(1), resolve(IN_C))
