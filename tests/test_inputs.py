"""Answer mutated configs and command lines in a line or two, and start nothing that is wrong.

hypothesis draws them. `make stress` sets MBM_EXAMPLES, the number of examples of each test; without it they are few,
and the same at each run.
"""

import copy
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbm_cli import cli, data
from mbm_cli.experiments import doctor
from mbm_cli.runs import Run

EXAMPLES = int(os.environ.get("MBM_EXAMPLES", "0"))
examples = settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
NOT_DRAWN = {"--debug", "--install-completion", "--show-completion"}  # a traceback; files in the home folder


class Accepted(BaseException):
    """The command would begin to read data or to compute."""


@dataclass(frozen=True)
class Answer:
    """What a command did."""

    code: int | str
    out: str
    err: str
    changed: bool  # a file in the current folder


def mbm(*arguments: str) -> Answer:
    """Run a command in this process."""
    before = files()
    # As Python opens them in a UTF-8 locale.
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    code: int | str = 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mbm", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        except Accepted:
            code = "accepted"
        out.flush()
        err.flush()
    return Answer(code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode(), files() != before)


def files() -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*")}


def check_answered(answer: Answer, *, may_fail: bool = False) -> None:
    """Check that a command did what was asked, or said in a line or two why not and changed nothing."""
    assert answer.code in (0, 2, "accepted", *([1] if may_fail else [])), answer
    assert "Traceback" not in answer.err
    assert "--debug shows" not in answer.err  # the hint of an unexpected error
    if answer.code in (1, 2):
        lines = answer.err.removesuffix("\n").split("\n")
        assert len(lines) <= 2
        assert all(line.isprintable() for line in lines)
        assert lines[0].startswith("mbm: ")
    if answer.code == 2:
        assert answer.out == ""
        assert not answer.changed


def accept(*_: object, **__: object) -> None:
    raise Accepted


def cut_off(patch: pytest.MonkeyPatch) -> None:
    """End each command where it would read data, or make the folder that it computes into."""
    for name, dataset in data.DATASETS.items():
        known = {field: getattr(dataset, field) for field in ("name", "shape", "classes")}
        cut = SimpleNamespace(**known, **dict.fromkeys(("load", "fetch", "damage"), accept))
        patch.setitem(data.DATASETS, name, cut)
    patch.setattr(doctor, "doctor", accept)
    patch.setattr(Run, "create", accept)


@pytest.fixture(scope="module")
def in_folder(tmp_path_factory) -> Iterator[Callable[[bytes], None]]:
    """Return a function that enters a new folder with runs, tables and functions, some of them wrong, and a config."""
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("inputs") / "folder"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def enter(config: bytes) -> None:
        os.chdir(made)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        os.chdir(folder)
        Path("config.yaml").write_bytes(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setenv("COLUMNS", "100")
        patch.setattr(torch, "set_num_threads", lambda threads: None)
        make_files()
        cut_off(patch)
        patch.setenv("HOME", str(folder))
        yield enter
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_files() -> None:
    """Make what command lines name, in the current folder."""
    small = ["--device", "cpu", "--quiet", "--set", "data.train_limit=8", "--set", "data.test_limit=8"]
    assert mbm("train", "--epochs", "1", *small).code == 0
    (run,) = Path("runs").iterdir()
    run = run.rename("runs/one")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 1\n", "epochs: 2\n"))  # so that it can be resumed
    for name, content in (
        ("summary.json", b'{"status": "running"'),
        ("config.yaml", b"name: ["),
        ("metrics.jsonl", b'{"epoch": 1}\n'),
        ("checkpoint.pt", b"PK\3\4 no archive"),
    ):
        shutil.copytree(run, f"runs/damaged-{name}")
        Path(f"runs/damaged-{name}", name).write_bytes(content)
    assert mbm("multipliers", "export", "mbm-t19-r4", "good.npy", "--bits", "4").code == 0
    Path("short.bin").write_bytes(b"\0" * 100)
    Path("text.npy").write_text("hello\n\nworld\n")
    Path("good.py").write_text("def f(a, b):\n    return a * b\n")
    Path("adds.py").write_text("def f(a, b):\n    return a + b\n")
    Path("raises.py").write_text("raise ValueError('one\\ntwo')\n")


@cache
def complete() -> dict[str, Any]:
    """Return a config with all its fields."""
    return yaml.safe_load(mbm("configs", "check", "lenet-mbm").out)


def fields(config: dict[str, Any]) -> set[str]:
    sections = {name: value for name, value in config.items() if isinstance(value, dict)}
    return {*config, *(f"{name}.{field}" for name, section in sections.items() for field in section)}


# Configs

SCALARS = ["0", "-1", "3.0", "1e3", "1e-3", "1e400", "-0.0", ".nan", "-.inf", "0x10", "0o7", "1_0", "9" * 25]
SCALARS += ["2147483648", "9" * 5000, "true", "yes", "null", "~", "", "''", "mbm", "mbm-t8", "sgd", "cosine", "cnn3"]
SCALARS += ["cpu", "2026-01-31", '"\\0"', '"\\x1b[2J"', '"\\ud800"', '"\\U00110000"', "é", "日本語", "\u202etxt"]
SCALARS += ["\ufeff", "!!int 3", "!x y", "!!python/object/apply:os.system [id]", "&a 1", "*a", "&a [*a]", "<<", "|"]
SCALARS += [">", "@", "%", "- a", "[]", "{}", "[1, 2]", "{a: 1}", "[" * 500, "{a: " * 12 + "1" + "}" * 12, "? a", ":"]
SCALARS += ["../..", "~nobody", "x" * 300, "a\tb"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """Draw a config that is damaged as a document, and then as text."""
    document = copy.deepcopy(complete())
    for _ in range(draw(st.integers(0, 2))):
        sections = [document, *(value for value in document.values() if isinstance(value, dict))]
        section, other = draw(st.sampled_from(sections)), draw(st.sampled_from(sections))
        field = draw(st.sampled_from([*section, "extra"]))
        match draw(st.sampled_from(["remove", "misspell", "move", "nest", "replace", "replace"])):
            case "remove":
                section.pop(field, None)
            case "misspell":
                section[f"{field}s"] = section.pop(field, None)
            case "move":
                other[field] = copy.deepcopy(section.pop(field, None))
            case "nest":
                section[field] = {field: section.get(field)}
            case "replace":
                section[field] = draw(VALUES)
    lines = yaml.safe_dump(document, allow_unicode=True, sort_keys=False).splitlines()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["insert", "before", "behind", "value", "value"])):
            case "insert":
                lines.insert(at, draw(st.sampled_from([*lines, "---", "base: &a {b: 1}", "<<: *a"])))
            case "before":
                lines[at] = draw(st.sampled_from([" ", "\t", "- ", "? ", "#", "&a ", "!!map ", "%YAML 3"])) + lines[at]
            case "behind":
                lines[at] += draw(st.sampled_from([" &a", " *a", ":", " |", " {", "\r", "\x85", "\u2028", "\0", '"']))
            case "value":
                lines[at] = f"{lines[at].partition(':')[0]}: {draw(st.sampled_from(SCALARS))}"
    end = draw(st.sampled_from(["\n"] * 8 + ["\r\n", "\r", " ", "\n\n"]))
    text = end.join(lines) + end
    text = text[: draw(st.sampled_from([None] * 9 + [len(text) // 2, len(text) - 5]))]
    encoding = draw(st.sampled_from(["utf-8"] * 24 + ["utf-8-sig", "utf-16", "latin-1", "utf-32"]))
    return text.encode(encoding, "replace")


@examples
@given(configs())
def test_mutated_configs_are_checked_or_refused(in_folder, config):
    in_folder(config)
    answer = mbm("configs", "check", "config.yaml")
    check_answered(answer)
    if answer.code == 0:
        assert fields(yaml.safe_load(answer.out)) >= fields(complete())
        Path("printed.yaml").write_text(answer.out, encoding="utf-8")
        assert mbm("configs", "check", "printed.yaml") == answer


# Command lines


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Yield each command with the parameters that it declares, so that a new one is drawn, too."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))
    if not hasattr(command, "commands"):
        yield words, [one for one in command.params if not set(one.opts) & NOT_DRAWN]


COMMANDS = list(commands(typer.main.get_command(cli.app)))
MULTIPLIERS = ["mbm", "exact", "mbm-t8", "mbm-t16-r7", "drum-k6", "lut:good.npy", "python:good.py:f"] * 4
MULTIPLIERS += ["mitchell", "mbm-int8", "mbm-", "mbm-t23", "mbm-r24"]
MULTIPLIERS += ["drum-k1", "nbm", "MBM", "mbm-t٣", "mbm" * 2000, "lut", "lut:", "c::", "python::f", "julia:x.jl:f"]
MULTIPLIERS += ["lut:short.bin", "lut:text.npy", "lut:nowhere.bin", "lut:runs", "lut:~nobody/x.bin"]
MULTIPLIERS += [f"python:{name}.py:{f}" for name in ("good", "adds", "raises") for f in ("f", "f@3", "f@99", "g", "1x")]
MULTIPLIERS += ["c:good.py:g", "c:runs:f", "{default: mbm}", "{conv1: exact, default: lut:good.npy}", "{conv9: mbm}"]
MULTIPLIERS += ["{family: mbm, truncate: 8.0}", "{'[': mbm, default: [mbm]}", "{default: &a mbm, conv1: *a}", "[mbm]"]
ODD_WORDS = ["", " ", "-", "--", "---", "-1", "0", "4096", "1.5", "9" * 25, "nan", "auto", "\n", "a\n\nb", "\x1b[2J"]
ODD_WORDS += ["\x7f", "日本語", "\udcff", "\u202e", "%s", "[bold]", "$(id)", ".", "..", "~nobody", "x" * 300, "{"]
ODD_WORDS += ["--no-such-flag", "--epoch", "--set", "-x", "-q", "--json=1", "--config=", "--version", "--help", "-é"]
RUNS = ["one", "one", "runs/one", "runs", "tow", *(f"damaged-{name}" for name in ("summary.json", "config.yaml"))]
RUNS += ["damaged-metrics.jsonl", "runs/damaged-checkpoint.pt"]
CONFIGS = ["config.yaml"] * 6 + ["lenet-mbm", "cnn3-exact", "lenet-mbn", "nowhere.yaml"]
VALUES_OF = {  # of options and arguments
    "multiplier": MULTIPLIERS,
    "names": MULTIPLIERS,
    "name": [*MULTIPLIERS, *CONFIGS],
    "config": CONFIGS,
    "file": [*CONFIGS, "new.npy", "new.bin", "no/such/folder/x.npy", "\n.bin"],
    "to": ["new.yaml", "config.yaml", "runs", "no/such/folder/x", "\x1b.yaml"],
    "run": RUNS,
    "output": ["runs", "new", "good.npy", "no/such/folder"],
    "device": ["auto", "cpu", "cuda", "gpu"],
}
NUMBERS = [*["1", "2", "3"] * 5, "0", "-1", "1025", "9" * 25, "1e3", "x"]


def odd_words() -> st.SearchStrategy[str]:
    # No slash, so that nothing outside the folder is named.
    characters = st.characters(exclude_characters="/\0", max_codepoint=0x24F)
    return st.sampled_from(ODD_WORDS) | st.text(characters, max_size=6)


@st.composite
def values(draw: st.DrawFn, name: str) -> str:
    """Draw a value of an option or argument."""
    if draw(st.integers(0, 9)) == 0:
        return draw(odd_words())
    if name in ("set", "vary"):
        odd = ["optimizer.momentum", "lr", ".lr", "optimizer.", "model.multiplier.x"]
        field = draw(st.sampled_from([*sorted(fields(complete())), *odd, *["model.multiplier"] * 8]))
        one = st.sampled_from(MULTIPLIERS if field == "model.multiplier" else SCALARS)
        return f"{field}=" + ",".join(draw(st.lists(one, min_size=1, max_size=3 if name == "vary" else 1)))
    return draw(st.sampled_from(VALUES_OF.get(name, NUMBERS)))


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Draw a command with options and arguments, right and odd ones, and damage the line."""
    words, parameters = draw(st.sampled_from(COMMANDS))
    options: list[str] = []
    positional: list[str] = []
    for parameter in parameters:
        name = parameter.name.rstrip("_")
        if parameter.param_type_name == "argument":
            positional += draw(st.lists(values(name), min_size=1, max_size=2 if parameter.nargs == -1 else 1))
        elif parameter.required or name in ("config", "vary") or draw(st.integers(0, 5)) == 0:
            for _ in range(draw(st.sampled_from([1, 1, 1, 1, 2]))):
                options += [draw(st.sampled_from(parameter.opts)), *([] if parameter.is_flag else [draw(values(name))])]
    line = [*words, *positional, *options]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(line) - 1))
        match draw(st.sampled_from(["drop", "repeat", "odd", "misspell", "swap"])):
            case "drop" if len(line) > 1:
                del line[at]
            case "repeat":
                line.insert(at, line[draw(st.integers(0, len(line) - 1))])
            case "odd":
                line.insert(at, draw(odd_words()))
            case "misspell":
                line[at] = draw(st.sampled_from([line[at][:-1], f"{line[at]}s", f"{line[at]}="]))
            case "swap":
                other = draw(st.integers(0, len(line) - 1))
                line[at], line[other] = line[other], line[at]
    return line


@examples
@given(command_lines(), st.builds(lambda: yaml.safe_dump(complete()).encode()) | configs())
def test_mutated_command_lines_are_answered_or_refused(in_folder, line, config):
    in_folder(config)
    check_answered(mbm(*line), may_fail=any("damaged" in word for word in line))
