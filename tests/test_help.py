"""Help that teaches, and what the shell completes."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mbm_cli.cli import app
from mbm_cli.config import shipped

MBM = Path(sys.executable).with_name("mbm")
ROOT = typer.main.get_command(app)


def commands(command: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group below the program, with its words."""
    for name, inner in getattr(command, "commands", {}).items():
        yield (*path, name), inner
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_has_a_sentence_and_an_example_that_it_takes(path):
    text = COMMANDS[path].help
    sentence, _, example = text.partition("\n\n")
    assert re.match(r"[A-Z].*[.?]$", sentence), sentence
    words = shlex.split(example.removeprefix("For example: "))
    assert words[: 1 + len(path)] == ["mbm", *path]
    # An example of a group is one of its commands'; parsing it refuses what there is not.
    command, arguments = ROOT, words[1:]
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context("mbm", arguments)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_an_option_has_a_sentence_and_an_example(path):
    for parameter in COMMANDS[path].params:
        text = parameter.help or ""
        assert re.match(r"[A-Z].*\.$", text), (parameter.name, text)
        assert "for example" in text or f"{parameter.opts[0]} " in text, (parameter.name, text)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_program_alone_shows_where_to_start(arguments):
    done = subprocess.run([MBM, *arguments], capture_output=True, text=True, check=True)
    before, _, rest = done.stdout.partition("Options:")
    shown = re.findall(r"^ +(mbm [a-z-]+(?: [a-z-]+)*)  ", before, re.MULTILINE)
    assert shown[:3] == ["mbm train", "mbm compare exact-vs-mbm", "mbm profile epoch"]
    assert "mbm doctor" in shown
    assert "mbm configs list" in shown
    assert "docs/" in before
    for command in shown:
        assert tuple(command.split()[1:]) in COMMANDS
    assert "Commands:" in rest


def ask(**environment: str) -> str:
    done = subprocess.run([MBM], capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    assert done.stderr == ""
    return done.stdout


def complete_in_bash(line: str) -> list[str]:
    """What bash offers at the end of a line, once it has read the script that the program shows it."""
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    script = f"""
        eval "$(mbm --show-completion)"
        COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
        $(complete -p mbm | sed 's/.*-F \\([^ ]*\\).*/\\1/') mbm
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{MBM.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def complete_in_zsh(line: str) -> list[str]:
    """What the program answers to zsh, as the script that it shows for zsh asks."""
    script = ask(_MBM_COMPLETE="source_zsh")
    assert script.strip().startswith("#compdef mbm")
    assert "_MBM_COMPLETE=complete_zsh" in script
    answer = ask(_MBM_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    return re.findall(r'^(?:_arguments.*?\(\()?"([^"]+)"', answer, re.MULTILINE)


@pytest.mark.parametrize("complete", [complete_in_bash, complete_in_zsh])
def test_the_shell_completes_commands_options_and_configs(complete):
    assert complete("mbm tr") == ["train"]
    assert complete("mbm train --mul") == ["--multiplier"]
    assert complete("mbm train --config ") == shipped()
    assert complete("mbm train --config cnn") == [name for name in shipped() if name.startswith("cnn")]
    assert complete("mbm configs copy lenet-ex") == ["lenet-exact"]
    assert complete("mbm train --device c") == ["cpu", "cuda"]


def test_completion_is_quick():
    """It answers at every key: PyTorch, which takes seconds, stays out."""
    code = "import sys; from mbm_cli.cli import main; sys.argv = ['mbm']\n"
    code += "try: main()\nfinally: print('HEAVY', {'torch', 'matplotlib', 'numpy', 'yaml'} & sys.modules.keys())"
    request = {"_MBM_COMPLETE": "complete_bash", "COMP_WORDS": "mbm train --config lenet-mi", "COMP_CWORD": "3"}
    environment = {**os.environ, **request}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["lenet-mitchell", "HEAVY", "set()"]
