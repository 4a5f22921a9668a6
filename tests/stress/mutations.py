"""Mutated configs and command lines: every one is answered with 0 or 2, in two lines at most, and leaves nothing on 2.

``python tests/stress/mutations.py [inputs] [seed]``: 50,000 take about a quarter of an hour.

A command line begins as a right one, made from what the commands themselves declare (so a new flag takes part
by itself), with right and odd values, and is then damaged: flags repeated, unknown, misspelt, without their value,
arguments missing or too many. It often names a config that began as a right one, too, and was damaged as a document
(types, nesting, fields missing, moved, extra) and as text (aliases, tags, duplicated keys, control characters, other
encodings, cut off), tables and functions that are right or damaged, and runs.

Each is run in this process by ``mbm_cli.cli.main``, as the console script does, with its own standard output and error,
in a folder that holds nothing but the config. An alarm ends what takes longer than SECONDS.

What is cut off: no training, no data, no device. Reading the data set (`load_mnist`, `fetch_mnist`) and making a run's
folder (`Run.create`) end the command with "accepted", which counts as 0: all that is checked before a command starts to
compute has been checked by then, and nothing is to be written before. Only where a file is in the place of the output
folder, `Run.create` is the real one. `mbm doctor` computes for seconds and is replaced as a whole; threads are not set.
A function in C that does not compile is compiled once. The copies of configs and tables that a command is asked for are
written, and removed again. A traceback is what --debug is for, so that flag alone is not drawn.

Exit code 1 is right where a file system is at fault, and there alone: for inputs that name something whose name says
"damaged".
"""

import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import typer
import yaml

from mbm_cli import cli, lut
from mbm_cli import config as configs
from mbm_cli.backends import cpu
from mbm_cli.experiments import doctor, evaluate, setup, sweep, train
from mbm_cli.multipliers import Multiplier, export
from mbm_cli.runs import Run

SECONDS = 60  # a compiler takes some of them on a loaded machine
SHOWN = 20  # of what is wrong
WRITING = (["configs", "copy"], ["multipliers", "export"])  # commands that write what they are asked for
NOT_DRAWN = {"--debug", "--help", "--install-completion", "--show-completion"}  # completion writes into the home folder


class Accepted(BaseException):
    """The command would begin to compute now."""


class Hanging(BaseException):
    """The command has taken longer than it may."""


@dataclass
class Input:
    """A command line, and the config that lies in the folder as config.yaml."""

    arguments: list[str]
    config: bytes | None = None


@dataclass
class Answer:
    """What a command did: its exit code, what it printed, and which files are new or changed."""

    code: int | str
    out: str = ""
    error: str = ""
    written: list[str] = field(default_factory=list)


# Odd values

SHORT_FORMS = ["mbm", "exact", "mitchell", "mbm-t8", "mbm-t16-r7", "drum-k6", "exact-r3", "mitchell-t22-r1"]
SHORT_FORMS += ["mbm-int8"]
ODD_NAMES = ["", " ", "mbm-", "mbm-t", "mbm-t23", "mbm-t-1", "mbm-t8-t9", "mbm-r0", "mbm-r24", "MBM", "mbm ", "-mbm"]
ODD_NAMES += ["mbm-t999", "mbm-t99999999999999999999", "drum", "drum-k1", "drum-k24", "drum-t4", "mbm-k3", "nbm"]
ODD_NAMES += ["mbm-int8", "mbm-int7", "mbm-int8-t8", "mbm-int16-t15", "drum-int8", "-int", "mbm-t٣", "mbm-t８"]
ODD_NAMES += ["mbm-t8\n", "lut", "c", "lut:", "python:", "c:", "::", "lut::", "c:::", "python::f", "c:f"]
ODD_NAMES += ["julia:x.jl:f", "mbm\x1b[31m", "{", "}", "{}"]
ODD_NAMES += [
    "{default: mbm}",
    "{conv1: exact, default: mbm}",
    "{conv9: exact, default: mbm}",
    "{conv1: exact}",
    "{default}",
]
ODD_NAMES += ["{'*': mbm, default: exact}", "{'[': mbm, default: exact}", "{conv1: {default: mbm}, default: mbm}"]
ODD_NAMES += [
    "{family: mbm, truncate: 8}",
    "{family: mbm, truncate: 8.0}",
    "{family: drum, leading_bits: 6}",
    "{default: }",
]
ODD_NAMES += [
    "{family: drum, leading_bits: 6, truncate: 1}",
    "{conv1: mbm, conv1: exact, default: mbm}",
    "{default: [mbm]}",
]
ODD_NAMES += [
    "{default: mbm, ? [a] : b}",
    "{default: &a mbm, conv1: *a}",
    "{default: !!str mbm}",
    "{default: lut:nowhere.bin}",
]
ODD_NAMES += [
    "{default: mbm, '': mbm}",
    '{default: mbm, "\\n": mbm}',
    "mbm" * 2000,
    "[mbm]",
    "'mbm'",
    "null",
    "~",
    "~/x",
]

SCALARS = ["0", "-1", "1", "64", "3.0", "1e3", "1e-3", "1e400", "-0.0", ".nan", ".inf", "-.inf", "nan", "0x10", "0o7"]
SCALARS += ["1_0", "9" * 25, "9" * 5000, "2147483647", "2147483648", "9223372036854775808", "0.1", "true", "yes"]
SCALARS += ["off", "null", "~", "", "''", '""', "text", "mbm", "sgd", "adam", "cosine", "lenet", "cnn3", "cpu", "cuda"]
SCALARS += ["auto", "mnist", "2026-01-31", '"\\n"', '"\\0"', '"\\x1b[2J"', '"\\ud800"', '"\\U00110000"']
SCALARS += [
    '"\\Uffffffff"',
    "é",
    "日本語",
    "😀",
    "\u202etxt",
    "\ufeff",
    "!!int 3",
    "!!python/object/apply:os.system [id]",
]
SCALARS += ["!x y", "&a 1", "*a", "&a [*a]", "<<", "|", ">", "@", "`", "%", "- a", "[]", "{}", "[1, 2]", "{a: 1}"]
SCALARS += ["[[[[[[[[[[[[1]]]]]]]]]]]]", "{a: " * 12 + "1" + "}" * 12, "[" * 500, "{" * 500, "? a", ":", "../..", "/"]
SCALARS += ["/nowhere/at/all", "~", "~nobody", "x" * 300, "a\tb", "=", ",", "#", "a #b", "'", '"', "\\", "$HOME"]

FIELDS = [
    f"{name}.{inner}" if inner else name
    for name, value in configs.load("lenet-mbm").model_dump().items()
    for inner in (value if isinstance(value, dict) else [""])
]
FIELDS += ["optimizer.momentum", "optimizer.nesterov"]  # shown with sgd alone
ODD_FIELDS = ["", ".", "..", "data", "data.", ".lr", "optimizer.lr.x", "model.multiplier.family", "optimiser.lr", "lr"]
ODD_FIELDS += ["train.lr", "seed.x", "0", "*", "Data.Batch_size", "data.batch_size ", "data..batch_size", "é.ü"]
ODD_FIELDS += ["x" * 500, "a.b.c.d.e", "\x1b[31m"]
ODD_WORDS = ["", " ", "-", "--", "---", "-1", "0", "1", "3", "4096", "1e3", "1.5", "9" * 25, "nan", "x", "auto", "cpu"]
ODD_WORDS += ["gpu", "\n", "a\nb", "a\n\nb\nc", "\t", "\x1b[2J", "\x7f", "é", "日本語", "😀", "\udcff", "\u202e", "%s"]
ODD_WORDS += ["{}", "[bold]", "$(id)", ".", "..", "../..", "/", "/dev/null", "/nowhere/x", "~", "~no-such-user/x", "*"]
ODD_WORDS += ["x" * 300, "x" * 5000, "config.yaml"]
ODD_FLAGS = ["--no-such-flag", "--epoch", "--sed", "-x", "-q", "-c", "--", "--set", "--vary", "--json=1", "--config="]
ODD_FLAGS += ["--version"]
ODD_FLAGS += ["-é", "--\n", "--multiplier", "--bits", "-h", "--help"]


def odd_word(choose: random.Random) -> str:
    if choose.random() < 0.1:  # no slash: a path is drawn from above
        return "".join(
            chr(choose.choice([*range(1, 47), *range(48, 127), *range(160, 0x250)])) for _ in range(choose.randrange(9))
        )
    return choose.choice(ODD_WORDS)


def odd_scalar(choose: random.Random) -> str:
    return choose.choice(SCALARS)


# Configs


@dataclass(frozen=True, eq=False)  # so that it can be a key more than once
class Raw:
    """A value or a key as it is to stand in the text."""

    text: str

    def __str__(self) -> str:
        return self.text


def as_yaml(value: Any, indent: int = 0) -> str:
    """YAML with whatever is in it: as text it need not be right."""
    if not isinstance(value, dict) or not value or indent > 40:
        return in_one_line(value)
    lines = []
    for key, one in value.items():
        is_nested = isinstance(one, dict) and one and indent + 2 <= 40
        lines.append(f"{' ' * indent}{key}:" + ("\n" if is_nested else " ") + as_yaml(one, indent + 2))
    return "\n".join(lines)


def in_one_line(value: Any) -> str:
    match value:
        case Raw():
            return value.text
        case dict():
            return "{" + ", ".join(f"{key}: {in_one_line(one)}" for key, one in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(in_one_line, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def damaged_config(choose: random.Random) -> bytes:
    document = {**yaml.safe_load(configs.dump(configs.load(choose.choice(configs.shipped()))))}
    for _ in range(choose.choice([0, 1, 1, 1, 2, 3])):
        damage_document(choose, document)
    return damaged_text(choose, as_yaml(document))


def sections(document: dict[Any, Any]) -> list[dict[Any, Any]]:
    return [document, *(value for value in document.values() if isinstance(value, dict))]


def damage_document(choose: random.Random, document: dict[Any, Any]) -> None:
    place = choose.choice(sections(document))
    key = choose.choice([*place, "extra"])
    change = choose.randrange(9)
    if change == 0:
        place.pop(key, None)
    elif change == 1:
        place[Raw(odd_scalar(choose)) if choose.random() < 0.3 else f"{key}s"] = place.pop(key, None)
    elif change == 2:
        choose.choice(sections(document))[key] = copy.deepcopy(place.pop(key, None))
    elif change == 3:
        place[key] = choose.choice([[place.get(key)], {key: place.get(key)}, copy.deepcopy(document)])
    elif change == 4:
        place[Raw(str(key))] = copy.deepcopy(place.get(key))  # given twice
    elif change == 5:
        for _ in range(choose.choice([1, 5, 20])):
            place[key] = {key: place.get(key)}
    elif change == 6 and "model" in document and isinstance(document["model"], dict):
        document["model"]["multiplier"] = Raw(multiplier(choose))
    else:
        place[key] = Raw(odd_scalar(choose))


def damaged_text(choose: random.Random, text: str) -> bytes:
    for _ in range(choose.choice([0, 0, 0, 1, 1, 2])):
        text = choose.choice([damaged_line, damaged_whole])(choose, text)
    encoding = choose.choice(["utf-8"] * 30 + ["utf-8-sig", "utf-16", "latin-1", "utf-32"])
    content = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    kind = choose.random()
    if kind < 0.02:
        content = choose.choice(
            [b"", b"\n", b"#", b"\xff\xfe", b"\x00" * 100, b"\x80", b"x" * (1 << 20) + b"x", os.urandom(0)]
        )
    elif kind < 0.05 and content:
        at = choose.randrange(len(content))
        content = content[:at] + bytes([choose.randrange(256)]) + content[at + 1 :]
    return content


def damaged_line(choose: random.Random, text: str) -> str:
    before = [" ", "\t", "- ", "? ", "#", "&a ", "*a ", "!!map ", "--- ", "%YAML 3.0\n"]
    behind = [" &a", " *a", " #", ":", " |", " {", " ]", "\r", "\x85", "\u2028", "\x00", "\x07", '"']
    lines = text.split("\n")
    at = choose.randrange(len(lines))
    match choose.randrange(6):
        case 0:
            lines.insert(at, lines[choose.randrange(len(lines))])
        case 1:
            lines[at] = choose.choice(before) + lines[at]
        case 2:
            lines[at] += choose.choice(behind)
        case 3:
            del lines[at]
        case 4:
            lines.insert(at, "---")
        case _:
            lines[at] = lines[at].replace(":", choose.choice(["", "=", "::", " :", ": :"]), 1)
    return "\n".join(lines)


def damaged_whole(choose: random.Random, text: str) -> str:
    at = choose.randrange(len(text) + 1)
    match choose.randrange(5):
        case 0:
            return text[:at]
        case 1:
            odd = choose.choice(["\x00", "\x1b", "\ufeff", "\ud800", "\ufffe", "\x7f", "'", "\n"])
            return text[:at] + odd + text[at:]
        case 2:
            return text.replace("\n", choose.choice(["\r\n", "\r", "\n\n", " "]))
        case 3:
            return f"{text}\nextra: {choose.choice(['x' * 100_000, '[' * 3000, '{a: ' * 3000, '[*a, ' * 99])}"
    return f"base: &a {{b: 1}}\n{text}\n<<: *a"


# Command lines


def multiplier(choose: random.Random) -> str:
    kind = choose.random()
    if kind < 0.35:
        return choose.choice(SHORT_FORMS)
    if kind < 0.65:
        return choose.choice(ODD_NAMES)
    if kind < 0.85:
        return choose.choice(references())
    family, bits = choose.choice(["mbm", "exact", "mitchell", "drum", "x"]), choose.randint(-1, 25)
    return f"{family}-{choose.choice('tkr')}{bits}" + choose.choice(["", "", f"-r{choose.randint(-1, 25)}", "-r7-r7"])


def several(choose: random.Random, one: Callable[[random.Random], str]) -> str:
    return choose.choice([",", ",", ",", ", ", ",,"]).join(one(choose) for _ in range(choose.choice([1, 1, 2, 3, 30])))


def assignment(choose: random.Random) -> str:
    name = choose.choice(FIELDS if choose.random() < 0.8 else ODD_FIELDS)
    kind = choose.random()
    if name == "model.multiplier" and kind < 0.8:
        return f"{name}={multiplier(choose)}"
    if kind < 0.05:
        return choose.choice([name, "=", f"={name}", f"{name}==1", f"{name} = 1", ""])
    return f"{name}={odd_scalar(choose)}"


def variation(choose: random.Random) -> str:
    name = choose.choice(FIELDS if choose.random() < 0.8 else ODD_FIELDS)
    if name == "model.multiplier":
        return f"{name}={several(choose, multiplier)}"
    many = ",".join(map(str, range(1, choose.choice([3, 3, 10, 1000])))) if choose.random() < 0.3 else None
    return choose.choice([f"{name}={many or several(choose, odd_scalar)}"] * 9 + [name, f"{name}=", f"{name}=[", ""])


def config_name(choose: random.Random) -> str:
    return choose.choice(
        ["config.yaml"] * 6 + configs.shipped() + ["lenet-mbn", "lenet-mbm.yaml", "nowhere.yaml", odd_word(choose)]
    )


def run_name(choose: random.Random) -> str:
    runs = [
        "one",
        "given/runs/one",
        "one ",
        "damaged-summary",
        "damaged-config",
        "damaged-metrics",
        "damaged-checkpoint",
    ]
    return choose.choice([*runs, "several", "empty", "on", odd_word(choose)])


def destination(choose: random.Random) -> str:
    """Always below the folder."""
    name = choose.choice(
        ["copy", "ü", "a b", "new\nline", "\x1b[31m", "\udcff", "x" * 300, ".", "no/such/folder/x", "config"]
    )
    return name + choose.choice([".yaml", ".bin", ".npy", "", ".BIN", ".txt"])


# A right and an odd value for the arguments that want more than a word: by the name of the parameter.
VALUES: dict[str, Callable[[random.Random], str]] = {
    "config": config_name,
    "file": config_name,
    "multiplier": lambda choose: several(choose, multiplier) if choose.random() < 0.3 else multiplier(choose),
    "names": multiplier,
    "set_": assignment,
    "vary": variation,
    "run": run_name,
    "resume": run_name,
    "output": lambda choose: choose.choice(["given/runs", "runs", "given", "given/damaged-output", odd_word(choose)]),
    "root": lambda choose: choose.choice(["given", "nowhere", odd_word(choose)]),
    "to": destination,
    "device": lambda choose: choose.choice(["auto", "cpu", "cuda", odd_word(choose)]),
    "name": lambda choose: choose.choice([*configs.shipped(), multiplier(choose), odd_word(choose)]),
}


@cache
def commands() -> dict[tuple[str, ...], list[Any]]:
    """The commands by their words, with the parameters that they declare."""
    found: dict[tuple[str, ...], list[Any]] = {}

    def visit(command: Any, words: tuple[str, ...]) -> None:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                visit(below, (*words, name))
        else:
            found[words] = [one for one in command.params if not set(one.opts) & NOT_DRAWN]

    visit(typer.main.get_command(cli.app), ())
    return found


def value(choose: random.Random, words: tuple[str, ...], parameter: Any) -> str:
    if words == ("multipliers", "export") and parameter.name == "file":
        return destination(choose)
    if parameter.name in VALUES:
        return VALUES[parameter.name](choose)
    if choose.random() < 0.3:
        return odd_word(choose)
    bounds = parameter if hasattr(parameter, "min") else parameter.type  # where depends on Typer's version
    least, most = getattr(bounds, "min", None), getattr(bounds, "max", None)
    return choose.choice(
        [str(one) for one in (1, 2, 3, least, most, -1 if least is None else least - 1, (most or 0) + 1)]
    )


def random_input(choose: random.Random) -> Input:
    words = choose.choice(list(commands()))
    arguments: list[str] = list(words)
    flags, positional = [], []
    for parameter in commands()[words]:
        if parameter.param_type_name == "argument":
            for _ in range(choose.choice([1, 2, 3]) if parameter.nargs == -1 else 1):
                positional.append(value(choose, words, parameter))
            continue
        likely = {"config": 0.7, "vary": 0.95, "set_": 0.4, "resume": 0.15, "trust": 0.05}.get(parameter.name, 0.2)
        if parameter.required or choose.random() < likely:
            for _ in range(choose.choice([1, 1, 2, 5]) if parameter.multiple else 1):
                flags.append(flag(choose, words, parameter))
    choose.shuffle(flags)
    arguments += (
        [word for group in (*flags, positional) for word in group]
        if choose.random() < 0.5
        else [*positional, *chain(*flags)]
    )
    for _ in range(choose.choice([0, 0, 0, 1, 1, 2])):
        damage_arguments(choose, arguments)
    # What an operating system hands over: no NUL, and bytes that are no UTF-8 as surrogates from U+DC80 on.
    arguments = [re.sub("[\ud800-\udc7f\udd00-\udfff]", "\udcff", word.replace("\0", "")) for word in arguments]
    return Input(arguments, damaged_config(choose) if "config.yaml" in " ".join(arguments) else None)


def flag(choose: random.Random, words: tuple[str, ...], parameter: Any) -> list[str]:
    name = choose.choice(parameter.opts)
    if parameter.is_flag:
        return [name]
    drawn = value(choose, words, parameter)
    return [f"{name}={drawn}"] if name.startswith("--") and choose.random() < 0.2 else [name, drawn]


def damage_arguments(choose: random.Random, arguments: list[str]) -> None:
    at = choose.randrange(len(arguments))
    match choose.randrange(7):
        case 0:
            del arguments[at]
            if not arguments:
                arguments.append(odd_word(choose))
        case 1:
            arguments.insert(at, arguments[choose.randrange(len(arguments))])
        case 2:
            arguments.insert(at + 1, choose.choice(ODD_FLAGS))
        case 3:
            arguments.append(odd_word(choose))
        case 4:
            arguments[at] = odd_word(choose)
        case 5:
            word = arguments[at]
            arguments[at] = word[:-1] if choose.random() < 0.5 else word + choose.choice("sx =\n")
        case _:
            other = choose.randrange(len(arguments))
            arguments[at], arguments[other] = arguments[other], arguments[at]


# The folder


@cache
def references() -> list[str]:
    """Multipliers from the files that `make_given` makes, and from some that it does not."""
    tables = [f"lut:given/{name}" for name in TABLES]
    python = [f"python:given/{name}:{function}" for name in PYTHON for function in ("product", "none", "pro duct")]
    c = [f"c:given/{name}:{function}" for name in C for function in ("product", "none", "1x")]
    files = [
        "nowhere.bin",
        "given",
        "config.yaml",
        "given/good.BIN",
        "",
        "a\nb.bin",
        "x" * 300 + ".bin",
        "\udcff.npy",
        "~no-such-user/x.bin",
    ]
    odd = [f"{kind}:{name}" for kind in ("lut", "python", "c") for name in files]
    odd += [f"{kind}:{name}:product" for kind in ("python", "c") for name in files]
    bits = [f"python:given/good.py:product@{n}" for n in ("3", "0", "12", "999", "x", "", "-1", "3@3")]
    return [*tables, *python, *c[:4], *odd, *bits, f"{{conv1: lut:given/good.bin, default: {c[0]}}}"]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


TABLES: dict[str, bytes] = {
    "good.bin": b"",  # written by make_given
    "good.npy": b"",
    "short.bin": b"\0" * 100,
    "empty.bin": b"",
    "large.bin": b"\0" * (1 << 17),
    "wrong.bin": b"\xff" * 16,
    "empty.npy": b"",
    "text.npy": b"hello\n\nworld\n",
    "pickle.npy": _npy(np.array([{}, []], dtype=object)),
    "float.npy": _npy(np.full((4, 4), np.nan)),
    "flat.npy": _npy(np.zeros(16, np.uint16)),
    "huge.npy": _npy(np.zeros(1, np.uint16)).replace(b"(1,)", b"(1152921504606846976,)"),
    "negative.npy": _npy(np.zeros(10, np.uint16)).replace(b"(10,)", b"(-4,)"),
    "archive.npy": b"PK\3\4" + b"\0" * 40,
}
PYTHON = {
    "good.py": "def product(a, b):\n    return a * b\n",
    "syntax.py": "def product(a, b:\n",
    "raises.py": "raise ValueError('one\\ntwo\\nthree')\n",
    "deep.py": "def product(a, b):\n    return product(a, b)\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "wrong.py": "def product(a, b):\n    return a + b\n",
    "type.py": "def product(a, b):\n    return 1\n",
    "fails.py": "def product(a, b):\n    raise KeyError('x\\ny')\n",
    "latin1.py": "# \xe9\ndef product(a, b): return a * b\n",
    "value.py": "product = 3\n",
    "nan.py": "def product(a, b):\n    return a * b * float('nan')\n",
}
C = {
    "good.h": "#include <stdint.h>\n"
    "static uint32_t product(uint32_t a, uint32_t b) { float x, y; __builtin_memcpy(&x, &a, 4);\n"
    "__builtin_memcpy(&y, &b, 4); x *= y; __builtin_memcpy(&a, &x, 4); return a; }\n",
    "syntax.h": "uint32_t product(uint32_t a, uint32_t b) { return a +; }\n",
    "wrong.h": "#include <stdint.h>\nstatic uint32_t product(uint32_t a, uint32_t b) { return a + b; }\n",
    "includes.h": '#include "good.h"\n',
    "latin1.h": "/* \xe9 */ uint32_t product(uint32_t a, uint32_t b);\n",
}


def make_given(folder: Path) -> None:
    """Tables, functions and runs, right ones and damaged ones."""
    runs = folder / "runs"
    runs.mkdir(parents=True)
    for name, content in TABLES.items():
        (folder / name).write_bytes(content)
    for name, text in {**PYTHON, **C}.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    for name in ("good.bin", "good.npy"):
        lut.write(export(Multiplier.parse("mbm-t19-r4"), 4), folder / name)
    (folder / "damaged-output").write_text("a file in the place of a folder")
    config = configs.load("lenet-mbm")
    model = setup.build_model(config, torch.device("cpu"))
    checkpoint = {
        "epoch": 0,
        "metrics": [],
        "multipliers": setup.multiplier_keys(config),
        "part": None,
        "model": model.state_dict(),
        "optimizer": {},
        "total_seconds": 0.0,
    }
    summary = train._summary("interrupted", config, torch.device("cpu"), [], 1.0)
    for name in ("one", "several", "damaged-summary", "damaged-config", "damaged-metrics", "damaged-checkpoint"):
        run = Run(runs / name)
        run.folder.mkdir()
        run.write("config.yaml", configs.dump(config))
        run.write_json("environment.json", {"threads": 1, "device": "cpu"})
        run.write_json("summary.json", summary)
        run.write_checkpoint(checkpoint)
    (runs / "several" / "plan.json").write_text("{}")
    (runs / "damaged-summary" / "summary.json").write_text('{"status": "running"')
    (runs / "damaged-config" / "config.yaml").write_text("name: [")
    (runs / "damaged-metrics" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (runs / "damaged-checkpoint" / "checkpoint.pt").write_bytes(b"PK\3\4 no archive")
    (runs / "empty").mkdir()


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """All files and folders below, with their size and time of change."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(root, name)
            status = os.lstat(path)
            is_file = name in names
            found[path] = (status.st_size, status.st_mtime_ns) if is_file else (0, 0)
    return found


# Running


def _accept(*arguments: Any, **named: Any) -> None:
    raise Accepted


def _create(output: Path, name: str, files: Any = None, create: Any = Run.create) -> Run:
    if any(map(os.path.isfile, (output, *output.parents))):
        return create(output, name, files)
    raise Accepted


def _once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Remembers refusals, too."""
    known: dict[Any, ValueError] = {}

    def remembering(code: Any) -> Any:
        if code in known:
            raise known[code]
        try:
            return function(code)
        except ValueError as error:
            known[code] = error
            raise

    return remembering


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """What the module's docstring says."""
    with contextlib.ExitStack() as stack:
        for module, name, replacement in (
            (setup, "load_mnist", _accept),
            (sweep, "fetch_mnist", _accept),
            (sys.modules["mbm_cli.data"], "fetch_mnist", _accept),
            (doctor, "doctor", _accept),
            (evaluate, "predict", _accept),
            (Run, "create", _create),
            (torch, "set_num_threads", lambda threads: None),
            (cpu, "_compiled", _once(cpu._compiled)),
        ):
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def call(one: Input, folder: Path) -> Answer:
    """Run one in the folder, which is the current one."""
    if one.config is not None:
        (folder / "config.yaml").write_bytes(one.config)
    before = files(folder)
    out, error = io.BytesIO(), io.BytesIO()
    # As Python opens them in a UTF-8 locale.
    streams = io.TextIOWrapper(out, "utf-8", "strict"), io.TextIOWrapper(error, "utf-8", "backslashreplace")
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with (
            mock.patch.object(sys, "argv", ["mbm", *one.arguments]),
            contextlib.redirect_stdout(streams[0]),
            contextlib.redirect_stderr(streams[1]),
        ):
            cli.main()
        code: int | str = "no exit"
    except SystemExit as exit_:
        code = exit_.code or 0
    except Accepted:
        code = "accepted"
    except Hanging:
        code = "hanging"
    except BaseException as raised:  # what main() lets out
        code = f"raised {type(raised).__name__}: {raised}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for stream in streams:
            stream.flush()
    after = files(folder)
    written = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    return Answer(code, out.getvalue().decode("utf-8"), error.getvalue().decode("utf-8"), written)


def faults(one: Input, answer: Answer) -> list[str]:
    """What is wrong with an answer."""
    may_fail = any("damaged" in word for word in one.arguments)
    lines = answer.error.split("\n")
    is_error = answer.code in (1, 2)
    found = {
        f"ended with {answer.code}": answer.code not in (0, 2, "accepted", *([1] if may_fail else [])),
        "is unexpected": "Traceback" in answer.error or "This is unexpected" in answer.error,
        f"{len(lines) - 1} lines of error": is_error and not (2 <= len(lines) <= 3 and lines[-1] == ""),
        "does not say who speaks": is_error and not answer.error.startswith("mbm: "),
        "a control character": any(ord(c) < 32 or 127 <= ord(c) < 160 for line in lines for c in line),
        f"{len(answer.error)} characters of error": len(answer.error) > 2000 + 2 * max(map(len, one.arguments)),
        "printed something and refused it": answer.code == 2 and answer.out != "",
        f"wrote {answer.written}": answer.written and not (answer.code == 0 and asks_to_write(one)),
        "the printed config is read as another": is_printed_config(one, answer) and not is_read_back(answer.out),
    }
    return [what for what, is_so in found.items() if is_so]


def asks_to_write(one: Input) -> bool:
    return any(set(words) <= set(one.arguments) for words in WRITING)


def is_printed_config(one: Input, answer: Answer) -> bool:
    return answer.code == 0 and one.arguments[:2] == ["configs", "check"] and answer.out.startswith("name: ")


def is_read_back(text: str) -> bool:
    return configs.dump(configs.parse(text, "the printed config")) == text


def run(inputs: int, seed: int = 0) -> list[str]:
    """Try so many inputs and tell what became of them; gives what was wrong."""
    choose, wrong, codes, started = random.Random(seed), [], Counter(), time.perf_counter()
    home, terminal = Path.cwd(), {"COLUMNS": "100", "TERM": "dumb"}

    def ring(number: int, frame: object) -> None:
        raise Hanging

    handlers = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT)}
    signal.signal(signal.SIGALRM, ring)
    with tempfile.TemporaryDirectory() as temporary:
        outside, folder = Path(temporary, "home"), Path(temporary, "folder")
        outside.mkdir()
        elsewhere = {"HOME": str(outside), "XDG_CACHE_HOME": str(outside / "cache"), "MBM_DATA_DIR": str(outside)}
        with mock.patch.dict(os.environ, {**elsewhere, **terminal}), cut_off():
            try:
                for number in range(1, inputs + 1):
                    if not folder.exists():
                        make_given(folder / "given")
                        os.chdir(folder)
                    one = random_input(choose)
                    answer = call(one, folder)
                    codes[answer.code] += 1
                    problems = faults(one, answer)
                    if problems:
                        wrong.append(
                            f"input {number}: {', '.join(problems)}: {one.arguments!r:.600}\n  {answer.error!r:.600}"
                        )
                        if len(wrong) <= SHOWN:
                            print(wrong[-1], flush=True)
                    (folder / "config.yaml").unlink(missing_ok=True)
                    if set(answer.written) - {str(folder / "config.yaml")}:
                        os.chdir(home)
                        shutil.rmtree(folder)
                    if number % 10_000 == 0:
                        print(f"{number:,} inputs: {time.perf_counter() - started:.0f} s", flush=True)
            finally:
                os.chdir(home)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
    seen = ", ".join(f"{code}: {count:,}" for code, count in codes.most_common())
    print(f"{inputs:,} inputs in {time.perf_counter() - started:.0f} s; exit codes {seen}", flush=True)
    return wrong


def main(inputs: int = 50_000, seed: int = 0) -> int:
    wrong = run(inputs, seed)
    print(f"mutations: {inputs:,} inputs, {len(wrong)} wrong", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
