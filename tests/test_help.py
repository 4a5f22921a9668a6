"""Help that teaches, completion in the shell, and what both must not import."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main
from commands import EPOCH, Answer, mbm

from mbm_cli.cli import app
from mbm_cli.shipped import shipped

MBM = Path(sys.executable).with_name("mbm")
ROOT = typer.main.get_command(app)


def commands(command: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command and group with its words."""
    for name, inner in getattr(command, "commands", {}).items():
        yield (*path, name), inner
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands())
COMPUTE = "--device --threads --output --json --quiet --debug"
EXPERIMENT = f"{COMPUTE} --seed --set --config --multiplier"
PROMISED = {  # in design.md, section 5
    "train": f"{EXPERIMENT} --epochs",
    "compare exact-vs-mbm": f"{EXPERIMENT} --epochs --seeds",
    "sweep": f"{EXPERIMENT} --epochs --seeds --vary --jobs --on --pictures",
    "search": f"{COMPUTE} --seed --set --config --init --epochs --candidates --strategy --trials --max-drop --study",
    "resume": "--epochs --jobs --on --pictures --trust --output --json --quiet --debug",
    "eval": f"{COMPUTE} --multiplier --plot --trust",
    "profile conv": EXPERIMENT,
    "profile epoch": EXPERIMENT,
    "characterize": f"{COMPUTE} --seed --samples --sweep-truncate --bits",
    "doctor": "--seed --threads --json --quiet --debug",
    "data fetch": "--root",
    "runs list": "--output --json",
    "runs show": "--output --json",
    "multipliers list": "--json",
    "multipliers show": "--json",
    "configs check": "--set",
}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_command_has_a_sentence_and_an_example(path):
    """Parsing the example refuses what does not exist; a group's example is one of its commands'."""
    sentence, _, example = COMMANDS[path].help.partition("\n\n")
    assert re.fullmatch(r"[A-Z].*[.?]", sentence)
    words = shlex.split(example.removeprefix("For example: "))
    assert words[: 1 + len(path)] == ["mbm", *path]
    command, arguments = ROOT, words[1:]
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("mbm", arguments)
    for flag in ("--help", "-h"):
        answer = mbm(*path, flag)
        assert (answer.code, answer.err) == (0, "")
        assert re.match(rf"\s*Usage: mbm {' '.join(path)} ", answer.out)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_option_has_a_sentence_and_an_example(path):
    for parameter in COMMANDS[path].params:
        text = parameter.help or ""
        assert re.fullmatch(r"[A-Z].*[.?]", text), (parameter.name, text)
        assert "for example" in text or f"{parameter.opts[0]} " in text, (parameter.name, text)


@pytest.mark.parametrize("name", PROMISED)
def test_commands_take_the_promised_options(name):
    taken = {option for parameter in COMMANDS[tuple(name.split())].params for option in parameter.opts}
    assert set(PROMISED[name].split()) <= taken


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_program_alone_shows_where_to_start(arguments):
    answer = mbm(*arguments)
    assert (answer.code, answer.err) == (0, "")
    before, _, rest = answer.out.partition("Options:")
    shown = re.findall(r"^ +(mbm [a-z-]+(?: [a-z-]+)*)  ", before, re.MULTILINE)
    assert shown[:3] == ["mbm train", "mbm compare exact-vs-mbm", "mbm profile epoch"]
    assert {"mbm doctor", "mbm configs list"} <= set(shown)
    assert {tuple(command.split()[1:]) for command in shown} <= COMMANDS.keys()
    assert "Commands:" in rest


@pytest.mark.parametrize("path", [path for path in COMMANDS if hasattr(COMMANDS[path], "commands")], ids=" ".join)
def test_group_alone_shows_its_help(path):
    answer = mbm(*path)
    assert answer.code == 0
    assert answer.out.lstrip().startswith(f"Usage: mbm {' '.join(path)} ")
    assert "Commands:" in answer.out


def test_version():
    assert mbm("--version") == Answer(0, f"mbm {version('mbm-cli')}\n", "")


# Completion


def complete_in_bash(line: str) -> list[str]:
    """Return what bash offers at the end of a line, once it has read the script that the program shows it."""
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    script = f"""
        eval "$(mbm --show-completion)"
        COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
        $(complete -p mbm | sed 's/.*-F \\([^ ]*\\).*/\\1/') mbm
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return run("bash", "-c", script, PATH=f"{MBM.parent}:{os.environ['PATH']}").split()


def complete_in_zsh(line: str) -> list[str]:
    """Return what the program answers to zsh, as its script for zsh asks."""
    script = run(MBM, _MBM_COMPLETE="source_zsh")
    assert script.strip().startswith("#compdef mbm")
    assert "_MBM_COMPLETE=complete_zsh" in script
    answer = run(MBM, _MBM_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    return re.findall(r'^(?:_arguments.*?\(\()?"([^"]+)"', answer, re.MULTILINE)


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("complete", [complete_in_bash, complete_in_zsh])
def test_shell_completes_commands_options_and_configs(complete):
    assert complete("mbm tr") == ["train"]
    assert complete("mbm train --mul") == ["--multiplier"]
    assert complete("mbm train --config cnn") == [name for name in shipped() if name.startswith("cnn")]
    assert complete("mbm configs copy lenet-ex") == ["lenet-exact"]
    assert complete("mbm train --device c") == ["cpu", "cuda"]


# What is imported

HEAVY = {"torch", "torchvision", "matplotlib", "numpy"}
COMPLETION = {"_MBM_COMPLETE": "complete_bash", "COMP_WORDS": "mbm train --config lenet-mi", "COMP_CWORD": "3"}
FIRST_WORDS = {"--help": "Usage:", "train --help": "Usage:", "": "lenet-mitchell"}
FIRST_WORDS |= {"multipliers list": "name", "configs list": "config", "configs copy cnn3-mbm": "cnn3-mbm.yaml:"}


def run_and_list(arguments: list[str], changed: str = "", **environment: str) -> str:
    """Return what a command prints in a new process, followed by what it has imported."""
    code = f"""
import sys
from mbm_cli import cli
def imported(*made): print("imported", *sorted({HEAVY} & sys.modules.keys()))
{changed}
sys.argv = {["mbm", *arguments]}
try: cli.main()
finally: imported()
"""
    return run(sys.executable, "-c", code, **environment)


@pytest.mark.parametrize("line", FIRST_WORDS)
def test_quick_commands_import_no_torch(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run_and_list(line.split(), **({} if line else COMPLETION)).split()
    assert shown[0] == FIRST_WORDS[line]
    assert shown[shown.index("imported") :] == ["imported"]


def test_training_imports_matplotlib_after_its_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run_and_list(["train", *EPOCH], "from mbm_cli.report import tables; tables.print_result = imported")
    at_the_result, at_the_end = (line for line in shown.splitlines() if line.startswith("imported"))
    assert at_the_result == "imported numpy torch"
    assert at_the_end == "imported matplotlib numpy torch"
