"""What names refer to: read by `resolve` and by nothing else, once."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tables import random_table
from torch import nn

import mbm_cli
from mbm_cli import Multiplier, convert, resolve
from mbm_cli.config import load
from mbm_cli.experiments import lifecycle
from mbm_cli.multipliers import tables
from mbm_cli.multipliers.tables import Table

CPU = torch.device("cpu")
COUNTED = """
from pathlib import Path
with Path(__file__).with_name("executions").open("a") as file:
    file.write("x")
def f(a, b): return a * b
"""


@pytest.fixture
def counted(tmp_path):
    """A function in Python, and how often its file was executed."""
    (tmp_path / "my.py").write_text(COUNTED)
    executions = tmp_path / "executions"
    executions.touch()
    return f"python:{tmp_path / 'my.py'}:f", lambda: len(executions.read_text())


@pytest.mark.parametrize("path", ["nowhere", "x" * 300, "~no-such-user/x", "no/folder"])
@pytest.mark.parametrize("name", ["lut:{}.bin", "python:{}.py:f", "c:{}.h:f"])
def test_only_resolve_needs_the_file(name, path):
    multiplier = Multiplier.parse(name.format(path))
    assert multiplier.content is None
    for unresolved in (multiplier, str(multiplier)):
        with pytest.raises(ValueError, match=r"no such file|cannot be read"):
            resolve(unresolved)
    with pytest.raises(ValueError, match=r"has not been read: mbm_cli\.resolve"):
        _ = multiplier.key


def test_parsing_a_name_executes_nothing(counted):
    name, executions = counted
    assert Multiplier.parse(name).content is None
    load("lenet-mbm", [f"model.multiplier={{conv1: '{name}', default: mbm}}"])
    assert executions() == 0


def test_resolve_executes_a_python_file_once(counted):
    name, executions = counted
    multiplier = resolve(name)
    assert executions() == 1
    assert resolve(multiplier) is multiplier
    layer = mbm_cli.ApproxConv2d(1, 2, 3, multiplier=multiplier)
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), convert(layer, multiplier)):
        again(torch.ones(1, 1, 3, 3)).sum().backward()
    mbm_cli.multiply(torch.ones(1), torch.ones(1), multiplier)
    assert executions() == 1


@pytest.mark.parametrize("by_layer", [False, True])
def test_layers_of_a_model_share_one_execution(counted, by_layer):
    name, executions = counted
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(4)])
    convert(model, {"0": name, "[12]": Multiplier.parse(name), "default": "mbm"} if by_layer else name)
    assert executions() == 1
    assert model[0].multiplier.content is model[2].multiplier.content
    assert model[3].multiplier == (Multiplier("mbm") if by_layer else model[0].multiplier)


def test_functions_of_a_file_share_one_execution(counted, tmp_path):
    name, executions = counted
    with (tmp_path / "my.py").open("a") as file:
        file.write("def g(a, b): return b * a\n")
    convert(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)), {"0": name, "default": name[:-1] + "g"})
    assert executions() == 1


def test_experiments_share_one_execution(counted):
    name, executions = counted
    respelled = name.replace("my.py", "./my.py")
    values = name, f"{{conv1: '{respelled}', default: '{name}'}}"
    configs = [load("lenet-mbm", [f"model.multiplier={value}"]) for value in values]
    first, second = (config.model.multiplier for config in lifecycle.resolve(configs, CPU))
    assert executions() == 1
    assert second.of("conv1", "conv2d").content == second.of("x", "conv2d").content == first.content


def test_multipliers_without_files_are_returned():
    multiplier = Multiplier("mbm", 8)
    assert resolve(multiplier) is multiplier
    assert resolve("mbm-t8") == multiplier


@pytest.mark.parametrize("value", ["booth", "", 3, None, {"default": "mbm"}])
def test_other_values_are_rejected(value):
    with pytest.raises(ValueError, match="multiplier"):
        resolve(value)


def test_keys_identify_content_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    entries = random_table(3).content.entries
    for name, one in (("a.bin", entries), ("b.npy", entries), ("c.bin", entries ^ 1)):
        tables.write(Table(3, one), tmp_path / name)
    a, b, c = (resolve(f"lut:~/{name}").key for name in ("a.bin", "b.npy", "c.bin"))
    assert a == b == random_table(3).key != c
    assert Multiplier("mbm", 8).key == "mbm-t8"


def test_a_changed_file_is_another_multiplier(tmp_path):
    """Functions read a name at each call; what was resolved before keeps its content, even without the file."""
    path, one = tmp_path / "table.bin", torch.ones(1, 1, 1, 1)
    name = f"lut:{path}"
    tables.write(Table(1, np.full((2, 2), 0, np.uint16)), path)
    before, layer = resolve(name), convert(nn.Conv2d(1, 1, 1, bias=False), name)
    nn.init.ones_(layer.weight)
    assert mbm_cli.multiply(one, one, name) == 1.0
    tables.write(Table(1, np.full((2, 2), 1, np.uint16)), path)
    assert before != resolve(name)
    assert mbm_cli.multiply(one, one, name) == mbm_cli.conv2d(one, one, multiplier=name) == 1.5
    path.unlink()
    assert mbm_cli.multiply(one, one, before) == layer(one) == 1.0
