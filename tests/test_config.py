"""Reading, checking, overriding and writing experiments."""

import copy
import os
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mbm_cli.config import Config, ModelConfig, dump, load, parse, shipped, shipped_summary, shipped_text
from mbm_cli.errors import RequestError
from mbm_cli.multipliers import FAMILIES, Multiplier

NAMES = ["cnn3-exact", "cnn3-mbm", "lenet-exact", "lenet-mbm", "lenet-mitchell"]
LENET_MBM = {
    "name": "lenet-mbm",
    "seed": 0,
    "device": "auto",
    "data": {
        "dataset": "mnist",
        "root": None,
        "batch_size": 64,
        "eval_batch_size": 1000,
        "train_limit": None,
        "test_limit": None,
    },
    "model": {"name": "lenet", "multiplier": "mbm"},
    "optimizer": {"name": "adam", "lr": 0.001, "weight_decay": 0, "schedule": "linear"},
    "train": {"epochs": 3, "deterministic": True, "checkpoint_every": None, "cuda_graph": "auto"},
}


def refusal(text: str, *overrides: str) -> str:
    """The message that answers a wrong config; it must be one line of a readable length."""
    with pytest.raises(RequestError) as error:
        parse(text, "my.yaml", overrides)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# What ships


def test_the_shipped_configs():
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_is_complete_and_says_what_it_is(name):
    config = load(name)
    assert config == load(f"{name}.yaml")
    assert config.name == name
    model, multiplier = name.split("-")
    assert config.model == ModelConfig(name=model, multiplier=Multiplier(multiplier))
    text = shipped_text(name)
    assert text.startswith(f"# {shipped_summary(name)}\n")
    assert yaml.safe_load(text) == yaml.safe_load(dump(config))  # every field is written out; any reader agrees


def test_the_defaults_are_those_of_lenet_mbm():
    assert parse("name: lenet-mbm", "x") == load("lenet-mbm")
    assert yaml.safe_load(dump(load("lenet-mbm"))) == LENET_MBM


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load("lenet-mbm").train.epochs = 4


# Where a config comes from


def test_a_file_wins_over_a_shipped_name_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lenet-mbm").mkdir()
    assert load("lenet-mbm").name == "lenet-mbm"
    Path("lenet-exact").write_text("name: mine")
    assert load("lenet-exact").name == "mine"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\r\nseed: 3\r\n")
    assert load(str(path)).seed == 3


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("lenet-mb", ["'lenet-mb'", "no such file", *NAMES, "did you mean lenet-mbm?"]),
        ("elsewhere/lenet-exact.yaml", ["no such file", "did you mean lenet-exact?"]),
        ("", ["''", "no such file"]),
        ("folder", ["'folder'", "is a folder"]),
        ("latin.yaml", ["not UTF-8", "byte 6"]),
        ("large.yaml", ["larger than 1 MiB"]),
        ("a\0b", ["cannot be read"]),
        ("a" * 5000, ["cannot be read", "too long"]),
        ("latin.yaml/x", ["cannot be read"]),
    ],
)
def test_a_source_that_cannot_be_read(tmp_path, monkeypatch, source, parts):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    Path("large.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(RequestError) as error:
        load(source)
    assert [part for part in parts if part not in str(error.value)] == []
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.yaml"
    path.write_text("name: x")
    path.chmod(0)
    with pytest.raises(RequestError, match="Permission denied"):
        load(str(path))


def test_a_shipped_text_is_asked_for_by_name():
    assert shipped_text("lenet-mbm.yaml") == shipped_text("lenet-mbm")
    with pytest.raises(RequestError, match=r"'lenet-mbn'.*did you mean lenet-mbm\?"):
        shipped_text("lenet-mbn")


# What is refused, and with which words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty", "name, seed, device"]),
        ("# only a comment", ["is empty"]),
        ("[1, 2]", ["is [1, 2]", "mapping"]),
        ("lenet", ["is 'lenet'", "mapping"]),
        ("name: x\nseed: [1", ["YAML", "line 2"]),
        ("name: x\n  seed: 1", ["YAML", "line 2"]),
        ("name: x\n\tseed: 1", ["YAML", "line 2"]),
        ("name: x\nseed: 1\nseed: 2", ["line 3", "'seed' is given twice"]),
        ("data: {root: a, root: b}", ["line 1", "'root' is given twice"]),
        ("a: &a [1]\nb: *a", ["line 2", "aliases"]),
        ("name: !!python/object:os.system x", ["line 1", "tags"]),
        ("name: " + "[" * 100_000, ["line 1", "nested more than 10 levels"]),
        ("name: " + "{a: " * 100_000, ["line 1", "nested more than 10 levels"]),
        ("? [a]\n: 1", ["line 1", "a key must be a word"]),
        ("name: x\n---\nname: y", ["line 2", "another document"]),
        ("name: \0", ["special characters"]),
        ("seed: " + "9" * 5000, ["too large"]),
        ('name: "\\UFFFFFFFF"', ["too large"]),
    ],
)
def test_text_that_is_no_config(text, parts):
    message = refusal(text)
    assert message.startswith("my.yaml ")
    assert [part for part in parts if part not in message] == []


COUNT = "a whole number from 1 to 2147483647"
RATE = "a finite number above 0"


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        # names
        ("nmae", "y", ["unknown field 'nmae'", "name, seed", "did you mean name?"]),
        ("optimiser", "{}", ["unknown field 'optimiser'", "did you mean optimizer?"]),
        ("lr", "1", ["unknown field 'lr'", "did you mean optimizer.lr?"]),
        ("data.batchsize", "1", ["'data.batchsize'", "eval_batch_size", "did you mean data.batch_size?"]),
        ("optimizer.epochs", "1", ["'optimizer.epochs'", "did you mean train.epochs?"]),
        ("train.qqqqq", "1", ["'train.qqqqq'", "the fields of train are epochs, deterministic, checkpoint_every"]),
        ('"a\\nb"', "1", [r"unknown field 'a\nb'"]),
        # sections
        ("data", "null", ["data must be a section with the fields dataset,", "not null"]),
        ("train", "[epochs]", ["train must be a section", 'not ["epochs"]']),
        # whole numbers
        ("data.batch_size", "0", [f"data.batch_size must be {COUNT}, not 0"]),
        ("data.batch_size", "-64", [COUNT, "not -64"]),
        ("data.batch_size", "true", [COUNT, "not true"]),
        ("data.batch_size", "'3'", [COUNT, "not '3'"]),
        ("data.batch_size", "3.0", [COUNT, "not 3.0"]),
        ("data.eval_batch_size", "3.5", [COUNT, "not 3.5"]),
        ("data.eval_batch_size", "null", [COUNT, "not null"]),
        ("data.eval_batch_size", "010", [COUNT, "not '010'"]),
        ("data.train_limit", "0", [f"null (all) or {COUNT}, not 0"]),
        ("data.test_limit", "1e3", ["null (all) or", "not 1000.0"]),
        ("train.epochs", "0", [f"train.epochs must be {COUNT}, not 0"]),
        ("train.epochs", "3000000000", [COUNT]),
        ("seed", "-1", ["seed must be a whole number from 0 to 2^63 - 1, not -1"]),
        ("seed", str(2**63), ["from 0 to 2^63 - 1"]),
        # numbers
        ("optimizer.lr", "-0.1", [f"optimizer.lr must be {RATE}, not -0.1"]),
        ("optimizer.lr", "0", [RATE, "not 0"]),
        ("optimizer.lr", ".nan", [RATE, "not NaN"]),
        ("optimizer.lr", ".inf", [RATE, "not Infinity"]),
        ("optimizer.lr", "1e999", [RATE]),
        ("optimizer.lr", "1" + "0" * 400, [RATE, "..."]),
        ("optimizer.lr", "'0.1'", [RATE, "not '0.1'"]),
        ("optimizer.lr", "true", [RATE, "not true"]),
        ("optimizer.lr", "[0.1]", [RATE, "not [0.1]"]),
        ("optimizer.weight_decay", "-1", ["optimizer.weight_decay must be a finite number, at least 0, not -1"]),
        # switches and choices
        ("train.deterministic", "yes", ["train.deterministic must be true or false, not 'yes'"]),
        ("train.deterministic", "1", ["true or false, not 1"]),
        ("train.cuda_graph", "on", ["auto | off", "not 'on'"]),
        ("device", "cdua", ["device must be auto | cpu | cuda, not 'cdua'; did you mean cuda?"]),
        ("data.dataset", "mnsit", ["data.dataset must be mnist", "did you mean mnist?"]),
        ("model.name", "LeNet", ["lenet | cnn3, not 'LeNet'; did you mean lenet?"]),
        ("optimizer.name", "adamm", ["adam | adamw | sgd", "did you mean adam?"]),
        ("optimizer.schedule", "cosin", ["linear | cosine | none", "did you mean cosine?"]),
        ("optimizer.schedule", "null", ["linear | cosine | none", "not null"]),
        # texts
        ("name", "null", ["name must be a text of at most 64 letters", "not null"]),
        ("name", "7", ["name must be a text", "not 7"]),
        ("name", "''", ["name must be a text", "not ''"]),
        ("name", ".hidden", ["not '.hidden'"]),
        ("name", "../x", ["not '../x'"]),
        ("name", '"x\\n"', [r"not 'x\n'"]),
        ("name", "x" * 65, ["xxx..."]),
        ("data.root", "''", ["data.root must be null (the user's cache folder) or a folder, not ''"]),
        ("data.root", '"a\\0b"', ["data.root must be"]),
        ("data.root", '"\\ud800"', ["data.root must be"]),
        ("data.root", "3", ["data.root must be", "not 3"]),
        # multipliers
        ("model.multiplier", "mbn-t8", ["'mbn'", "exact, mitchell, mbm", "did you mean mbm?"]),
        ("model.multiplier", "mbm_t8", ["'mbm_t8'", "family[-tT][-rR]"]),
        ("model.multiplier", "mbm-t23", ["model.multiplier: truncate is 23", "0 to 22"]),
        ("model.multiplier", "mbm-r0", ["result_bits is 0", "1 to 23"]),
        ("model.multiplier", "m" * 5000, ["mmm..."]),
        ("model.multiplier", "8", ["short form", "mapping", "not 8"]),
        ("model.multiplier", "null", ["short form", "not null"]),
        ("model.multiplier", "{family: mbm, truncate: 23}", ["truncate must be a whole number from 0 to 22, not 23"]),
        ("model.multiplier", "{family: mbm, truncate: true}", ["from 0 to 22, not true"]),
        ("model.multiplier", "{family: mbm, result_bits: 24}", ["null or a whole number from 1 to 23, not 24"]),
        ("model.multiplier", "{family: mbn}", ["exact | mitchell | mbm", "did you mean mbm?"]),
        ("model.multiplier", "{truncate: 8}", ["family is missing"]),
        ("model.multiplier", "{family: mbm, trunc: 8}", ["unknown field 'trunc'", "did you mean truncate?"]),
        # what belongs to sgd
        ("optimizer.momentum", "0.9", ["optimizer.momentum", "belongs to the optimizer sgd, not to adam"]),
        ("optimizer.momentum", "0", ["belongs to the optimizer sgd"]),
        ("optimizer", "{name: adamw, nesterov: false}", ["optimizer.nesterov", "not to adamw"]),
        ("optimizer", "{name: sgd, nesterov: true}", ["optimizer.nesterov", "needs a momentum above 0"]),
        ("optimizer", "{name: sgd, momentum: 1}", ["at least 0 and below 1, not 1"]),
        ("optimizer", "{name: sgd, momentum: -0.1}", ["at least 0 and below 1, not -0.1"]),
    ],
)
def test_a_wrong_field(field, value, parts):
    section, _, key = field.rpartition(".")
    text = f"{section}: {{{key}: {value}}}" if section else f"{key}: {value}"
    message = refusal(text if key == "name" and not section else f"name: x\n{text}")
    assert message.startswith("my.yaml: ")
    assert [part for part in parts if part not in message] == []


def test_a_config_has_a_name():
    assert "name is missing: it must be a text" in refusal("seed: 1")


def test_the_first_of_several_problems_is_told_and_the_others_counted():
    message = refusal("name: x\nseed: -1\ntrain: {epochs: 0, deterministic: 3}")
    assert "seed must be" in message
    assert message.endswith("(and 2 more)")
    # A misspelt name comes first: it is why the right one is missing.
    assert refusal("nmae: x\nseed: -1").startswith("my.yaml: unknown field 'nmae'")


# What is accepted


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("optimizer.lr", "1e-3", 0.001),
        ("optimizer.lr", "1E3", 1000.0),
        ("optimizer.lr", ".5", 0.5),
        ("optimizer.lr", "2", 2.0),
        ("optimizer.weight_decay", "5e-4", 0.0005),
        ("data.train_limit", "60_000", 60000),
        ("data.test_limit", "null", None),
        ("data.root", "/data/my set", "/data/my set"),
        ("data.root", "null", None),
        ("data.root", "", None),
        ("name", "2026-01-31", "2026-01-31"),
        ("name", "'1e3'", "1e3"),
        ("name", "no", "no"),
        ("seed", str(2**63 - 1), 2**63 - 1),
        ("train.cuda_graph", "off", "off"),
        ("train.deterministic", "false", False),
        ("optimizer.schedule", "none", "none"),
        ("model.multiplier", "mbm-t8", Multiplier("mbm", 8)),
        ("model.multiplier", "mitchell-t16-r7", Multiplier("mitchell", 16, 7)),
        ("model.multiplier", "{family: mbm, truncate: 8}", Multiplier("mbm", 8)),
        ("model.multiplier", "{family: exact, truncate: 0, result_bits: null}", Multiplier("exact")),
    ],
)
def test_an_override_is_read_as_yaml(field, value, expected):
    config = load("lenet-exact", [f"{field}={value}"])
    section, _, key = field.rpartition(".")
    found = getattr(getattr(config, section) if section else config, key)
    assert found == expected
    assert type(found) is type(expected)
    assert parse(dump(config), "x") == config


def test_overrides_apply_in_order_and_together():
    overrides = [
        "train.epochs=5",
        "optimizer.name=sgd",
        "optimizer.nesterov=true",
        " optimizer.momentum = 0.9",
        "seed=1",
    ]
    config = load("lenet-mbm", [*overrides, "train.epochs=7"])
    assert (config.train.epochs, config.seed) == (7, 1)
    assert (config.optimizer.name, config.optimizer.momentum, config.optimizer.nesterov) == ("sgd", 0.9, True)
    assert config.data == load("lenet-mbm").data


def test_an_override_fills_a_section_that_is_left_out_and_mends_a_wrong_field():
    assert parse("name: x", "x", ["train.epochs=9"]).train.epochs == 9
    assert parse("name: x\ntrain: {epochs: 0}", "x", ["train.epochs=9"]).train.epochs == 9


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs", ["write section.field=value"]),
        ("", ["write section.field=value"]),
        ("=3", ["unknown field ''"]),
        ("lr=1", ["unknown field 'lr'", "did you mean optimizer.lr?"]),
        ("optimiser.lr=1", ["unknown field 'optimiser.lr'", "did you mean optimizer.lr?"]),
        ("optimizer.lrr=1", ["unknown field 'optimizer.lrr'", "weight_decay", "did you mean optimizer.lr?"]),
        ("optimizer=adam", ["that is a section", "optimizer.name=..."]),
        ("optimizer.lr.x=1", ["optimizer.lr has no parts", "optimizer.lr=..."]),
        ("model.multiplier.truncate=8", ["model.multiplier=..."]),
        ("a.b.c.d=1", ["unknown field 'a.b.c.d'"]),
        ("train.epochs=[", ["the value of --set train.epochs", "YAML"]),
        ("train.epochs=0", ["--set: train.epochs must be", "not 0"]),
        ("train.epochs=", ["--set: train.epochs must be", "not null"]),
        ("optimizer.momentum=0.9", ["--set: optimizer.momentum", "belongs to the optimizer sgd"]),
        ("name=" + "[" * 100_000, ["nested more than"]),
    ],
)
def test_a_wrong_override(override, parts):
    message = refusal(shipped_text("lenet-mbm"), override)
    assert "--set" in message
    assert [part for part in parts if part not in message] == []


def test_a_section_that_cannot_take_an_override_is_what_is_told():
    assert refusal("name: x\ndata: 3", "data.root=null").startswith("my.yaml: data must be a section")


# Writing


def test_momentum_is_written_for_sgd_only():
    assert "momentum" not in dump(load("lenet-mbm"))
    text = dump(load("lenet-mbm", ["optimizer.name=sgd"]))
    assert "momentum: 0.0\n  nesterov: false\n" in text


counts = st.integers(1, 2**31 - 1)
numbers = st.floats(min_value=0, allow_infinity=False, allow_nan=False)
operands = st.sampled_from([(family, t) for family in FAMILIES for t in FAMILIES[family].truncations])
multipliers = st.builds(lambda family_and_t, r: Multiplier(*family_and_t, r), operands, st.none() | st.integers(1, 23))
folders = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
common = {
    "lr": numbers.filter(bool),
    "weight_decay": numbers,
    "schedule": st.sampled_from(["linear", "cosine", "none"]),
}
optimizers = st.one_of(
    st.fixed_dictionaries({"name": st.sampled_from(["adam", "adamw"]), **common}),
    st.fixed_dictionaries({"name": st.just("sgd"), **common}, optional={"momentum": st.floats(0, 0.99)}),
    st.fixed_dictionaries(
        {"name": st.just("sgd"), **common, "momentum": st.floats(0.1, 0.99), "nesterov": st.booleans()}
    ),
)
documents = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}\Z")
        | st.sampled_from(
            ["1e-3", "1e5", "0o17", "010", "null", "off", "1_0", "2026-01-31", "-", "---", "5.", "1.5e3"]
        ),
        "seed": st.integers(0, 2**63 - 1),
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
        "data": st.fixed_dictionaries(
            {"batch_size": counts, "eval_batch_size": counts, "train_limit": st.none() | counts},
            optional={"root": st.none() | folders, "test_limit": counts},
        ),
        "model": st.fixed_dictionaries({"name": st.sampled_from(["lenet", "cnn3"]), "multiplier": multipliers}),
        "optimizer": optimizers,
        "train": st.fixed_dictionaries(
            {"epochs": counts, "deterministic": st.booleans(), "cuda_graph": st.sampled_from(["auto", "off"])}
        ),
    }
)


@settings(max_examples=25, deadline=None)
@given(documents)
def test_what_is_written_is_read_back_the_same(document):
    config = Config.model_validate(document)
    text = dump(config)
    assert parse(text, "x") == config
    assert dump(parse(text, "x")) == text
    # Other YAML readers see the same values, too.
    assert Config.model_validate(yaml.safe_load(text)) == config


# Anything else


ODD_VALUES = [
    None,
    True,
    0,
    -1,
    3,
    3.5,
    2**70,
    float("nan"),
    float("inf"),
    "",
    "3",
    "mbm",
    "\n",
    "é",
    "\0",
    [],
    [[]],
    {},
]
ODD_VALUES += [
    {"family": "mbm"},
    {"family": ["mbm"]},
    {"truncate": 23, "family": "mbm"},
    {1: 2},
    {None: {}},
    "x" * 5000,
]

ODD_MARKS = ["", "\n", ":", " ", "*a", "&a ", "!!int ", "{", "]", '"', "\t", "%", "\\"]


def damage(document: dict, rng: random.Random) -> None:
    """Change one place of a config as a person or a broken tool might."""
    place = rng.choice([document, *(value for value in document.values() if isinstance(value, dict))])
    key = rng.choice([*place, "extra"])
    match rng.randrange(4):
        case 0:
            place.pop(key, None)
        case 1:
            place[rng.choice([f"{key}s", key[1:], key.upper(), 7, None, "\n"])] = place.pop(key, None)
        case 2:
            place[key] = rng.choice([copy.deepcopy(document), place.get(key), [place.get(key)]])
        case _:
            place[key] = rng.choice(ODD_VALUES)


def damaged_text(rng: random.Random) -> str:
    document = copy.deepcopy(LENET_MBM)
    for _ in range(rng.randint(1, 2)):
        damage(document, rng)
    text = yaml.safe_dump(document)
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(ODD_MARKS) + text[at + 1 :]
    return text


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_config_is_read_or_refused_and_nothing_else(seed):
    rng = random.Random(seed)
    configs, messages = [], []
    for _ in range(100):
        field, value = rng.choice(["seed", "data.root", "model.multiplier"]), rng.choice(["1", "mbm", *ODD_MARKS])
        overrides = [f"{field}={value}"] if rng.random() < 0.2 else []
        try:
            configs.append(parse(damaged_text(rng), "damaged.yaml", overrides))
        except RequestError as error:
            messages.append(str(error))
    assert len(configs) > 3
    assert len(messages) > 30
    assert [message for message in messages if "\n" in message or len(message) > 400] == []
    assert [parse(dump(config), "x") for config in configs] == configs
