"""Names of multipliers, of one and of several by layer. Nothing is read, and PyTorch is not imported."""

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbm_cli import config
from mbm_cli.multipliers.float32 import FAMILIES
from mbm_cli.multipliers.names import NAMES, LayerMultipliers, Multiplier, multiplier_of

PARAMETERS = [(family, t) for family in FAMILIES for t in FAMILIES[family].truncations]
IN_PYTHON = Multiplier("python", file="my.py", function="product")


@pytest.mark.parametrize(
    ("text", "multiplier", "printed"),
    [
        ("exact", Multiplier("exact"), "exact"),
        ("mitchell", Multiplier("mitchell", 0, None), "mitchell"),
        ("mbm-t8", Multiplier("mbm", 8), "mbm-t8"),
        ("mbm-t0", Multiplier("mbm", 0), "mbm"),
        ("mbm-r23", Multiplier("mbm", 0, 23), "mbm-r23"),
        ("mbm-t22-r1", Multiplier("mbm", 22, 1), "mbm-t22-r1"),
        ("drum-k6", Multiplier("drum", 18), "drum-k6"),
        ("drum-k23-r7", Multiplier("drum", 1, 7), "drum-k23-r7"),
        ("lut:~/a b.bin", Multiplier("lut", file="~/a b.bin"), "lut:~/a b.bin"),
        ("python:my.py:product", IN_PYTHON, "python:my.py:product"),
        ("python:my.py:product@9", dataclasses.replace(IN_PYTHON, bits=9), "python:my.py:product@9"),
        ("c:a:b.h:f", Multiplier("c", file="a:b.h", function="f"), "c:a:b.h:f"),
    ],
)
def test_names_are_parsed_and_printed(text, multiplier, printed):
    assert Multiplier.parse(text) == multiplier
    assert str(multiplier) == printed


@given(st.sampled_from(PARAMETERS), st.none() | st.integers(1, 23))
def test_printed_names_are_parsed_back(parameters, result_bits):
    multiplier = Multiplier(*parameters, result_bits)
    assert Multiplier.parse(str(multiplier)) == multiplier


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.name)
def test_examples_shown_to_users_are_names(name):
    assert str(Multiplier.parse(name.example)) == name.example


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *[
            (text, "is not a multiplier: write")
            for text in ("", "MBM", "mbm ", "mbm\n", "mbm-t", "mbm-t-1", "mbm-t1.5")
        ],
        *[(text, "is not a multiplier: write") for text in ("mbm-t8-", "mbm-r7-t16", "mbm_t8", "elut:a.bin")],
        ("booth", "families are exact, mitchell, mbm, drum"),
        ("mbm-int4", "mbm multiplies operands of 8 bits"),
        *[(text, "2 to 23 leading bits") for text in ("drum", "drum-k1", "drum-k24")],
        ("drum-t6", "drum takes -k"),
        ("mbm-k6", "mbm takes -t"),
        ("mbm-t23", "0 to 22"),
        *[(text, "1 to 23") for text in ("mbm-r0", "mbm-r24")],
        *[(text, "write the file and its function, c:FILE.h:function") for text in ("c:", "c:my.h", "c:my.h:3f")],
        *[(f"python:{text}", "write the file and its function") for text in ("my.py", ":f", "my.py:f g", "my.py@7")],
    ],
)
def test_other_names_are_rejected(text, message):
    with pytest.raises(ValueError, match=message):
        Multiplier.parse(text)


@pytest.mark.parametrize("fields", [("MBM",), ("mbm", -1), ("mbm", 23), ("mbm", 0, 0), ("mbm", 0, 24)])
def test_the_constructor_rejects_the_same(fields):
    with pytest.raises(ValueError):
        Multiplier(*fields)


def test_a_multiplier_is_an_immutable_value():
    multiplier = Multiplier.parse("mbm-t8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        multiplier.truncate = 9
    assert {multiplier, Multiplier("mbm", 8)} == {multiplier}


@pytest.mark.parametrize(
    ("text", "is_exact"),
    [("exact", True), ("exact-r23", True), ("exact-r22", False), ("exact-t1", False), ("mbm", False), ("lut:a", False)],
)
def test_only_the_ieee_product_is_exact(text, is_exact):
    assert Multiplier.parse(text).is_exact is is_exact


def test_located_names_hold_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    names = ["mbm-t8", "lut:a.bin", "python:~/my.py:product@9", "c:/x/my.h:f"]
    located = ["mbm-t8", f"lut:{tmp_path}/a.bin", "python:/home/me/my.py:product@9", "c:/x/my.h:f"]
    assert [Multiplier.parse(name).located for name in names] == located
    by_layer = LayerMultipliers.of_mapping({"conv1": names[1], "default": names[2]})
    assert by_layer.located == {"conv1": located[1], "default": located[2]}


def test_names_and_configs_need_no_pytorch():
    program = (
        "import sys, mbm_cli, mbm_cli.config\n"
        "mbm_cli.Multiplier.parse('mbm')\n"
        "mbm_cli.config.multiplier('{conv1: lut:a.bin, default: python:a.py:f}')\n"
        "mbm_cli.config.load('lenet-mbm')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# By layer


@pytest.mark.parametrize(
    ("layer", "multiplier"),
    [("conv1", "exact"), ("features.3", "mbm-t8"), ("features.10", "mbm-t8"), ("conv2", "mbm"), ("", "mbm")],
)
def test_names_win_over_patterns_over_the_default(layer, multiplier):
    mapping = {"conv?": "mbm", "conv1": "exact", "features.*": "mbm-t8", "features.1?": "drum-k6", "default": "mbm"}
    assert str(LayerMultipliers.of_mapping(mapping).of(layer, "conv2d")) == multiplier


@pytest.mark.parametrize("mapping", [{}, {"default": 3}, {"default": "booth"}, {"default": {"a": "mbm"}}])
def test_mappings_without_a_multiplier_are_rejected(mapping):
    with pytest.raises(ValueError, match=r"multiplier|no layer"):
        LayerMultipliers.of_mapping(mapping)


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("mbm-t8", "mbm-t8"),
        (Multiplier("mbm", 8), "mbm-t8"),
        ({"family": "mbm", "truncate": 8, "result_bits": None}, "mbm-t8"),
        ({"family": "drum", "leading_bits": 6, "truncate": 0, "result_bits": 5}, "drum-k6-r5"),
        (
            {"conv1": "exact", "conv2": {"family": "mbm", "truncate": 8}, "default": Multiplier("drum", 18)},
            "{conv1: exact, conv2: mbm-t8, default: drum-k6}",
        ),
        ({"a b": "lut:a, b.bin", "default": "c:~/my.h:f"}, '{"a b": "lut:a, b.bin", default: c:~/my.h:f}'),
    ],
)
def test_configs_hold_names_fields_and_mappings(value, printed):
    multiplier = multiplier_of(value)
    assert str(multiplier) == printed
    assert config.multiplier(printed) == multiplier == multiplier_of(multiplier)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "must be a short form such as mbm-t8 or a mapping"),
        ("bmb", "families are .*did you mean mbm"),
        ({}, "no layer is named"),
        ({"conv1": "booth", "default": "mbm"}, "unknown multiplier family 'booth'"),
        ({"conv1": 3, "default": "mbm"}, "must be a short form"),
        ({"truncate": 8}, "family is missing"),
        ({"family": "mbn"}, r"family must be exact \| .*\| mbm \| .*, not 'mbn'.*did you mean mbm"),
        ({"family": "mbm", "truncated": 8}, "unknown field 'truncated'"),
        ({"family": "mbm", "truncate": 8.0}, "truncate must be null or a whole number, not 8.0"),
        ({"family": "drum", "leading_bits": 6, "truncate": 3}, "is not a multiplier"),
        ({"family": "mbm", "leading_bits": 6}, "mbm takes -t"),
    ],
)
def test_other_values_are_rejected(value, message):
    with pytest.raises(ValueError, match=message):
        multiplier_of(value)
