"""The documents do what they say: `make test-docs` runs their commands and Python examples, and follows their links.

Every fenced ```sh block of README.md and docs/*.md runs as it is written, in bash, in a temporary folder for each
document that holds the examples and the configs of the project. `stand_in.py` runs in the place of the programs: it
says which commands are run in a small size, and which are not run and why. Every ```python block runs as a program in
the same folder. A ```diff block, whose line +++ names a file, still fits that file. Blocks of other kinds are not run.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

ROOT = Path(__file__).parents[2]
RUN_DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*RUN_DOCUMENTS, ROOT / "runs/README.md", *(ROOT / n for n in ("CONTRIBUTING.md", "CHANGELOG.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STAND_IN = Path(__file__).with_name("stand_in.py")
PROGRAMS = ("mbm", "make", "pip", "pip3", "pipx", "uv", "git", "npm", "python", "python3", "jupyter", "pytest")
SHELL = ("sh", "bash", "shell", "console")

FEW = "--set data.train_limit=256 --set data.test_limit=200"
FEW_SAMPLES = "--samples 20000"


def blocks(document: Path, *languages: str) -> list:
    """The fenced blocks of these languages, each as a parameter with its file and line."""
    text = document.read_text(encoding="utf-8")
    return [
        pytest.param(document, match[2], id=f"{document.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}")
        for match in FENCE.finditer(text)
        if match[1] in languages
    ]


def all_blocks(*languages: str) -> list:
    return [block for document in RUN_DOCUMENTS for block in blocks(document, *languages)]


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Path:
    """A folder of programs that a shell finds first; each hands its arguments to stand_in.py."""
    folder = tmp_path_factory.mktemp("bin")
    for name in PROGRAMS:
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{STAND_IN}" {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """What the documents' folders lie in."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "commands.txt").touch()
    return folder


@pytest.fixture(scope="session")
def folder_of(folders, programs) -> Callable[[Path], Path]:
    """The folder in which a document's blocks run, one after the other. There is a run that RUN can stand for."""

    def folder(document: Path) -> Path:
        made = folders / document.stem
        if not made.exists():
            for name in ("examples", "configs"):
                shutil.copytree(ROOT / name, made / name)
        return made

    bash("mbm train --quiet", folder(Path("before.md")), programs)
    return folder


def bash(text: str, folder: Path, programs: Path) -> None:
    """Run commands as if they were typed there, one after the other."""
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**os.environ, "PATH": path, "MBM_DOCS_FOLDERS": str(folder.parent), "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, f"\n{text}\nends with {done.returncode}: {done.stderr[-2000:]}"


# ---- The tests


@pytest.mark.parametrize(("document", "text"), all_blocks(*SHELL))
def test_commands(document, text, programs, folder_of):
    # A transcript has its commands behind a $.
    if any(line.startswith("$ ") for line in text.splitlines()):
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    bash(text, folder_of(document), programs)


@pytest.mark.parametrize(("document", "text"), all_blocks("python"))
def test_python_examples(document, text, folder_of, monkeypatch):
    monkeypatch.chdir(folder_of(document))
    state = torch.get_rng_state()
    try:
        exec(compile(text, document.name, "exec"), {"__name__": "__main__"})
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("document", [d for d in RUN_DOCUMENTS if blocks(d, "diff")], ids=lambda d: d.name)
def test_changes_that_are_shown_still_fit(document, tmp_path):
    """And the model's part of a family that they add computes what its definition says."""
    for path, text in changed_files(document).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    if (tmp_path / "mbm_cli/multipliers.py").exists():
        changed = load_module(tmp_path / "mbm_cli/multipliers.py")
        name, family = list(changed.FAMILIES.items())[-1]
        one, some = torch.tensor([1.0, 2.0]), torch.tensor([1.0 + 2**-7, -1.5])
        product = changed.reference_product(one, some, changed.Multiplier.parse(family.example))
        assert family.example.startswith(name)
        torch.testing.assert_close(product, one * some, rtol=0.3, atol=0.0)
    compiler = shutil.which("c++")
    if (tmp_path / "kernels/multiplier.h").exists() and compiler:
        (tmp_path / "check.cpp").write_text(
            '#include "kernels/multiplier.h"\n'
            'static_assert(sizeof(mbm::FAMILY_NAMES) / sizeof(char*) == mbm::FUNCTION + 1, "a name for each family");\n'
        )
        subprocess.run([compiler, "-std=c++17", "-fsyntax-only", "-w", "check.cpp"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links(document):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", text)
    relative = [target for target in targets if not re.match(r"[a-z]+:", target)]
    broken = [target for target in relative if not resolves(document, unquote(target))]
    assert not broken, f"{document.relative_to(ROOT)} links to what is not there: {', '.join(broken)}"


def test_every_picture_is_shown_and_small():
    shown = " ".join(document.read_text(encoding="utf-8") for document in RUN_DOCUMENTS)
    for picture in (ROOT / "docs/figures").iterdir():
        assert f"figures/{picture.name}" in shown, f"no document shows {picture.name}"
        assert picture.stat().st_size <= 150_000


# ---- What they need


def changed_files(document: Path) -> dict[str, str]:
    """The files that a document's diff blocks change, by their paths, as they are then."""
    files: dict[str, str] = {}
    for parameter in blocks(document, "diff"):
        lines = parameter.values[1].splitlines()
        path = next(line.removeprefix("+++ ") for line in lines if line.startswith("+++ "))
        if path not in files:
            files[path] = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else ""
        for hunk in re.split(r"^@@.*\n", parameter.values[1], flags=re.MULTILINE)[1:]:
            old, new = (
                "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] in (kept, " ", "")) for kept in "-+"
            )
            assert files[path].count(old) == 1, f"{document.name}: {path} has not once the lines\n{old}"
            files[path] = files[path].replace(old, new)
    return files


def load_module(path: Path):
    """A changed file of the package as a module beside the real one."""
    specification = importlib.util.spec_from_file_location(f"changed_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def resolves(document: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = document.parent / path if path else document
    if not file.exists():
        return False
    if not anchor or file.suffix != ".md":
        return True
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
