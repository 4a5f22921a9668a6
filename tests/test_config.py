"""Reading, checking, overriding and writing experiments."""

import os
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mbm_cli.config import Config, ModelConfig, dump, load, multiplier, parse
from mbm_cli.errors import RequestError
from mbm_cli.experiments.sweep import split_at_commas
from mbm_cli.multipliers.float32 import FAMILIES
from mbm_cli.multipliers.names import Backward, LayerMultipliers, Multiplier
from mbm_cli.shipped import shipped, shipped_text

SHIPPED = {
    "cnn3-exact": {"name": "cnn3", "multiplier": "exact"},
    "cnn3-mbm": {"name": "cnn3", "multiplier": "mbm"},
    "lenet-everything": {"multiplier": {"conv2d": "mbm-t16-r7", "linear": "mbm-t16-r7"}, "backward": "same"},
    "lenet-exact": {"multiplier": "exact"},
    "lenet-fast": {"width": 2.0, "multiplier": "mbm"},
    "lenet-int8": {"multiplier": {"conv2d": "exact-int8", "linear": "exact-int8"}},
    "lenet-mbm": {"multiplier": "mbm"},
    "lenet-mitchell": {"multiplier": "mitchell"},
    "mlp-exact": {"name": "mlp", "multiplier": "exact"},
    "mlp-mbm": {"name": "mlp", "multiplier": {"linear": "mbm"}},
    "resnet20-exact": {"name": "resnet20", "multiplier": "exact"},
    "resnet20-mbm": {"name": "resnet20", "multiplier": "mbm"},
}
LENET_MBM = """
name: lenet-mbm
note: null
seed: 0
device: auto
data: {dataset: mnist, root: null, batch_size: 64, eval_batch_size: 1000, train_limit: null, test_limit: null,
  validation: null, crop: 0, flip: false}
model: {name: lenet, width: 1, multiplier: mbm, backward: exact}
quantize: {activations: max, weights: max, calibration_images: 1024}
optimizer: {name: adam, lr: 0.001, weight_decay: 0, schedule: linear, warmup: 0}
train: {epochs: 3, init: null, threads: null, deterministic: true, checkpoint_every: null, cuda_graph: auto,
  matrix_units: false, label_smoothing: 0}
"""


def refusal(text: str, *overrides: str) -> str:
    """Return the message for a wrong config, which must be one line of a readable length."""
    with pytest.raises(RequestError) as error:
        parse(text, "my.yaml", overrides)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# What ships


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_is_complete_and_described(name):
    assert list(shipped()) == list(SHIPPED)
    config = load(name)
    assert config == load(f"{name}.yaml")
    assert config.name == name
    assert config.model == ModelConfig(**{"backward": "exact", **SHIPPED[name]})
    text = shipped_text(name)
    assert text == shipped_text(f"{name}.yaml") == shipped()[name]
    assert text.startswith("# ")
    assert yaml.safe_load(text) == yaml.safe_load(dump(config))  # every field is written out


def test_defaults_are_those_of_lenet_mbm():
    assert parse("name: lenet-mbm", "x") == load("lenet-mbm") == parse(LENET_MBM, "x")
    assert yaml.safe_load(dump(load("lenet-mbm"))) == yaml.safe_load(LENET_MBM)


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load("lenet-mbm").train.epochs = 4


# Where a config comes from


def test_file_wins_over_shipped_name_but_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lenet-exact").write_text("name: mine")
    assert load("lenet-exact").name == "mine"
    Path("lenet-mbm").mkdir()
    assert load("lenet-mbm").name == "lenet-mbm"


def test_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\r\nseed: 3\r\n")
    assert load(str(path)).seed == 3


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("lenet-mb", ["'lenet-mb'", "no such file", *SHIPPED, "did you mean lenet-mbm?"]),
        ("elsewhere/lenet-exact.yaml", ["no such file", "did you mean lenet-exact?"]),
        ("", ["''", "no such file"]),
        ("folder", ["'folder'", "no such file"]),
        ("latin.yaml", ["not UTF-8", "byte 6"]),
        ("a\0b", ["cannot be read"]),
        ("a" * 5000, ["cannot be read", "too long"]),
        ("latin.yaml/x", ["cannot be read"]),
        ("secret.yaml", ["cannot be read: Permission denied"]),
    ],
)
def test_unreadable_source_is_refused(tmp_path, monkeypatch, source, parts):
    if source == "secret.yaml" and os.geteuid() == 0:
        pytest.skip("root reads every file")
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    Path("secret.yaml").touch(0)
    with pytest.raises(RequestError) as error:
        load(source)
    assert [part for part in parts if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


# What is refused, and with which words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("# only a comment", ["is empty", "name, note, seed, device"]),
        ("[1, 2]", ["is [1, 2]", "mapping"]),
        ("&a [*a]", ["is [[", "mapping"]),
        ("name: x\nseed: [1", ["YAML", "line 2"]),
        ("name: x\n\tseed: 1", ["YAML", "line 2"]),
        ("name: x\nseed: 1\nseed: 2", ["line 2", "'seed' is given twice"]),
        ("data: {root: a, root: b}", ["line 1", "'root' is given twice"]),
        ("name: !!python/object:os.system x", ["line 1", "tag"]),
        ("name: *x", ["line 1", "undefined alias"]),
        ("name: " + "[" * 100_000, ["YAML", "recursion"]),
        ("? [a]\n: 1", ["line 1", "a key must be a word"]),
        ("name: x\n---\nname: y", ["line 2", "another document"]),
        ("name: \0", ["YAML", "special characters"]),
        ("seed: " + "9" * 5000, ["YAML", "5000 digits"]),
        ("seed: 2026-13-31", ["YAML", "month"]),
        ("seed: !!int", ["YAML"]),
        ("seed: !!bool x", ["YAML"]),
        ('name: "\\UFFFFFFFF"', ["YAML", "too large"]),
    ],
)
def test_text_that_is_not_a_config(text, parts):
    message = refusal(text)
    assert message.startswith("my.yaml ")
    assert [part for part in parts if part not in message] == []


COUNT = "a whole number from 1 to 2147483647"


def wrong(field: str, value: str) -> str:
    """Return the message for a config with that value, in YAML."""
    section, _, name = field.rpartition(".")
    line = f"{section}: {{{name}: {value}}}" if section else f"{field}: {value}"
    return refusal(line if field == "name" else f"name: x\n{line}").removeprefix("my.yaml: ")


@pytest.mark.parametrize(
    ("field", "allowed", "values"),
    [
        ("data", "a section with the fields dataset, root, batch_size", ["null", "3"]),
        ("train", "a section with the fields epochs, init, threads,", ["[epochs]"]),
        ("data.batch_size", COUNT, ["0", "-64", "true", "'3'", "3.0", "null", "3000000000"]),
        ("data.train_limit", f"null (all) or {COUNT}", ["0", "1e3"]),
        ("train.epochs", COUNT, ["0"]),
        ("train.threads", "null (PyTorch's choice) or a whole number from 1 to 4096", ["0", "4097"]),
        ("seed", "a whole number from 0 to 2^63 - 1", ["-1", str(2**63), "&a {b: *a}"]),
        ("optimizer.lr", "a finite number above 0", ["-0.1", "0", ".nan", "1e999", "1" + "0" * 400, "'1'", "[0.1]"]),
        ("optimizer.weight_decay", "a finite number, at least 0", ["-1"]),
        ("train.deterministic", "true or false", ["1"]),
        ("train.matrix_units", "true or false", ["auto"]),
        ("train.cuda_graph", "auto | off", ["on"]),
        ("optimizer.schedule", "linear | cosine | none", ["null"]),
        (
            "name",
            "a text of at most 64 letters, digits,",
            ["null", "7", "2026-01-31", "''", "../x", '"x\\n"', "x" * 65],
        ),
        ("data.root", "null (the user's cache folder) or a folder", ["''", '"a\\0b"', '"\\ud800"', "3"]),
    ],
)
def test_allowed_values_are_named(field, allowed, values):
    for value in values:
        assert wrong(field, value).startswith(f"{field} must be {allowed}")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *(("true", "true"), ("'3'", "'3'"), ("3.0", "3.0"), ("null", "null"), (".nan", "NaN"), ("[x]", "['x']")),
        *(("2026-01-31", '"2026-01-31"'), ('"x\\n"', r"'x\n'"), ("x" * 65, f"'{'x' * 56}...")),
    ],
)
def test_value_is_shown_in_one_line(value, shown):
    assert wrong("data.batch_size", value) == f"data.batch_size must be {COUNT}, not {shown}"


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("nmae", "y", ["unknown field 'nmae'", "name, note, seed", "did you mean name?"]),
        ("lr", "1", ["unknown field 'lr'", "did you mean optimizer.lr?"]),
        ("data.batchsize", "1", ["'data.batchsize'", "eval_batch_size", "did you mean data.batch_size?"]),
        ("optimizer.epochs", "1", ["'optimizer.epochs'", "did you mean train.epochs?"]),
        ("train.qqqqq", "1", ["'train.qqqqq'", "the fields of train are epochs, init, threads, deterministic"]),
        ('"a\\nb"', "1", [r"unknown field 'a\nb'"]),
        ("device", "cdua", ["device must be auto, cpu, cuda or cuda:N, for example cuda:1, not 'cdua'"]),
        (
            "model.name",
            "LeNet",
            ["lenet | cnn3 | mlp | resnet20 or python:FILE.py:function, not 'LeNet'; did you mean lenet?"],
        ),
        ("model.name", "python:f", ["or python:FILE.py:function, not 'python:f'"]),
        ("model", "{name: python:f.py:f, width: 2}", ["model.width: is for lenet, cnn3,", "f decides its own"]),
        ("data.dataset", "mnits", ["data.dataset: must be mnist | fashion-mnist |", "FILE.npz", "did you mean mnist?"]),
        ("data.dataset", "3", ["or FILE.npz, not 3"]),
        ("model.multiplier", "mbn-t8", ["model.multiplier: ", "'mbn'", "exact, mitchell, mbm", "did you mean mbm?"]),
        ("model.multiplier", "m" * 5000, ["mmm..."]),
        ("model.multiplier", "8", ["short form", "mapping", "not 8"]),
        ("model.multiplier", "{family: mbm, trunc: 8}", ["unknown field 'trunc'", "truncate"]),
        ("model.multiplier", "{conv1: 3}", ["must be a short form"]),
        ("model.backward", "mbn", ["model.backward: ", "did you mean mbm?"]),
        ("model.backward", "mbm-int8", ["model.backward: mbm-int8: ", "take a float multiplier"]),
        ("model.backward", "{bias: mbm}", ["unknown gradient 'bias'", "{input: mbm, weight: exact}"]),
        ("model.backward", "{}", ["no gradient is named"]),
        ("model.backward", "3", ["model.backward: must be a short form", "not 3"]),
        ("optimizer.momentum", "0.9", ["optimizer.momentum", "belongs to the optimizer sgd, not to adam"]),
        ("optimizer", "{name: adamw, nesterov: false}", ["optimizer.nesterov", "not to adamw"]),
        ("optimizer", "{name: sgd, nesterov: true}", ["optimizer.nesterov", "needs a momentum above 0"]),
        ("optimizer", "{name: sgd, momentum: 1}", ["at least 0 and below 1, not 1"]),
    ],
)
def test_wrong_field_is_explained(field, value, parts):
    message = wrong(field, value)
    assert [part for part in parts if part not in message] == []


def test_first_problem_is_explained_and_others_counted():
    message = refusal("name: x\nseed: -1\ntrain: {epochs: 0, deterministic: 3}")
    assert message.startswith("my.yaml: seed must be")
    assert message.endswith("(and 2 more)")
    assert "name is missing: it must be a text" in refusal("seed: 1")
    # A misspelt name comes first: it is why the right one is missing.
    assert refusal("nmae: x\nseed: -1").startswith("my.yaml: unknown field 'nmae'")


# What is accepted


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *(("optimizer.lr", lr, float(lr)) for lr in ("1e-3", "1E3", "1.5e3", ".5", "2")),
        ("data.train_limit", "60_000", 60000),
        ("data.dataset", "emnist-letters", "emnist-letters"),
        ("data.dataset", "/my images.npz", "/my images.npz"),
        ("data.test_limit", "null", None),
        ("data.root", "/data/my set", "/data/my set"),
        ("data.root", "", None),
        *(("name", f"'{word}'", word) for word in ("1e3", "1.5e3", "010", "null", "off", "1_0", "2026-01-31", "---")),
        ("seed", str(2**63 - 1), 2**63 - 1),
        ("train.threads", "4", 4),
        ("train.cuda_graph", "off", "off"),
        ("train.deterministic", "false", False),
        ("optimizer.schedule", "none", "none"),
        ("model.multiplier", "mitchell-t16-r7", Multiplier("mitchell", 16, 7)),
        ("model.backward", "same", Backward(None, None)),
        ("model.backward", "mbm-t8", Backward(Multiplier("mbm", 8), Multiplier("mbm", 8))),
        ("model.backward", "{input: same}", Backward(None, Multiplier("exact"))),
        ("model.backward", "{family: mbm, truncate: 8}", Backward(Multiplier("mbm", 8), Multiplier("mbm", 8))),
        ("model.multiplier", "{family: mbm, truncate: 8}", Multiplier("mbm", 8)),
        ("model.multiplier", "{family: exact, truncate: 0, result_bits: null}", Multiplier("exact")),
        (
            "model.multiplier",
            "{conv1: exact, default: mbm}",
            LayerMultipliers((("conv1", Multiplier("exact")), ("default", Multiplier("mbm")))),
        ),
    ],
)
def test_override_is_read_as_yaml(field, value, expected):
    config = load("lenet-exact", [f"{field}={value}"])
    found = attrgetter(field)(config)
    assert found == expected
    assert type(found) is type(expected)
    assert parse(dump(config), "x") == config


def test_overrides_apply_in_order():
    config = load("lenet-mbm", ["train.epochs=5", "optimizer.name=sgd", " optimizer.momentum = 0.9", "train.epochs=7"])
    assert (config.train.epochs, config.optimizer.name, config.optimizer.momentum) == (7, "sgd", 0.9)
    assert config.data == load("lenet-mbm").data
    assert parse("name: x", "x", ["train.epochs=9"]).train.epochs == 9
    assert parse("name: x\ntrain: {epochs: 0}", "x", ["train.epochs=9"]).train.epochs == 9


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs", ["write section.field=value"]),
        ("", ["write section.field=value"]),
        ("=3", ["unknown field ''"]),
        ("lr=1", ["unknown field 'lr'", "did you mean optimizer.lr?"]),
        ("optimizer.lrr=1", ["unknown field 'optimizer.lrr'", "weight_decay", "did you mean optimizer.lr?"]),
        ("optimizer=adam", ["optimizer must be a section with the fields name, lr,", "not 'adam'"]),
        ("optimizer.lr.x=1", ["optimizer.lr is 0.001, which has no fields", "optimizer.lr=..."]),
        ("model.multiplier.truncate=8", ["which has no fields", "model.multiplier=..."]),
        ("a.b.c.d=1", ["unknown field 'a'"]),
        ("train.epochs=[", ["the value of --set train.epochs", "YAML"]),
        ("train.epochs=", ["--set: train.epochs must be", "not null"]),
        ("optimizer.momentum=0.9", ["--set: optimizer.momentum", "belongs to the optimizer sgd"]),
        ("name=" + "[" * 100_000, ["the value of --set name", "YAML"]),
    ],
)
def test_wrong_override_is_explained(override, parts):
    message = refusal(shipped_text("lenet-mbm"), override)
    assert [part for part in ["--set", *parts] if part not in message] == []


def test_patterns_of_configs_without_backward_match_convolutions_only():
    """Check that a config means what it meant before dense layers had multipliers, also when it is written again."""
    text = "name: x\nmodel: {multiplier: {'*': mbm, fc3: mitchell}}"
    old, new = parse(text, "x"), parse(text.replace("fc3: mitchell}", "fc3: mitchell}, backward: exact"), "x")
    for config, of_dense in ((old, "exact"), (parse(dump(old), "x"), "exact"), (new, "mbm"), (load_again(new), "mbm")):
        found = [str(config.model.multiplier.of(*layer)) for layer in (("conv1", "conv2d"), ("fc1", "linear"))]
        assert found == ["mbm", of_dense]
        assert str(config.model.multiplier.of("fc3", "linear")) == "mitchell"


def load_again(config: Config) -> Config:
    return parse(dump(config), "x")


def test_multiplier_is_a_name_or_a_mapping():
    assert multiplier("mbm-t8") == Multiplier("mbm", 8)
    assert str(multiplier("{conv1: exact, default: mbm}")) == "{conv1: exact, default: mbm}"
    for wrong in ("mbn", "{}", "{conv1: ["):
        with pytest.raises(RequestError):
            multiplier(wrong)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("mbm, mbm-t8 ,exact", ["mbm", "mbm-t8", "exact"]),
        ("{conv1: exact, default: mbm},mbm-t8", ["{conv1: exact, default: mbm}", "mbm-t8"]),
        ("[a,[b,c]],d", ["[a,[b,c]]", "d"]),
        ("'a,b',\"c,]d\",e", ["'a,b'", '"c,]d"', "e"]),
        ("{a: 'x}y', b: z},c", ["{a: 'x}y', b: z}", "c"]),
        ("lut:bob's.bin,lut:ann's.bin", ["lut:bob's.bin", "lut:ann's.bin"]),
        ("{a,b", ["{a,b"]),
        ("a,,b,", ["a", "", "b", ""]),
        ("", [""]),
    ],
)
def test_commas_in_brackets_and_quotes_split_nothing(text, values):
    assert split_at_commas(text) == values


@pytest.mark.parametrize("text", ["a,'b", "@a", "%"])
def test_text_that_is_not_a_list(text):
    with pytest.raises(RequestError, match=r"is not a list A,B,\.\.\."):
        split_at_commas(text)


# Writing


def test_momentum_is_written_for_sgd_only():
    assert "momentum" not in dump(load("lenet-mbm"))
    assert "momentum: 0.0\n  nesterov: false\n" in dump(load("lenet-mbm", ["optimizer.name=sgd"]))


@pytest.mark.parametrize(
    ("name", "located"),
    [
        ("lut:t.bin", "lut:{folder}/t.bin"),
        ("c:../t.h:f", "c:{parent}/t.h:f"),
        ("python:~/t.py:f@5", "python:{home}/t.py:f@5"),
        ("lut:/t.bin", "lut:/t.bin"),
    ],
)
def test_files_are_written_with_absolute_paths(name, located, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    located = located.format(folder=tmp_path, parent=tmp_path.parent, home=Path.home())
    one, by_layer = (load("lenet-mbm", [f"model.multiplier={m}"]) for m in (name, f"{{conv1: '{name}', default: mbm}}"))
    assert str(one.model.multiplier) == name
    assert yaml.safe_load(dump(one))["model"]["multiplier"] == located
    assert yaml.safe_load(dump(by_layer))["model"]["multiplier"] == {"conv1": located, "default": "mbm"}


multipliers = [Multiplier(family, t, r) for family in FAMILIES for t in FAMILIES[family].truncations for r in (None, 7)]


@settings(max_examples=25, deadline=None)
@given(
    st.from_regex(r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}\Z"),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x85"), min_size=1),  # PyYAML folds \x85
    st.sampled_from(multipliers),
    st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_written_config_is_read_back_the_same(name, root, multiplier, lr):
    document = {"name": name, "data": {"root": root}, "model": {"multiplier": multiplier}, "optimizer": {"lr": lr}}
    config = Config.model_validate(document)
    text = dump(config)
    assert parse(text, "x") == config
    assert Config.model_validate(yaml.safe_load(text)) == config  # other readers of YAML agree
