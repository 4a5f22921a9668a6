"""The documents hold: `make test-docs` runs their commands and examples, applies their diffs and follows their links.

Fenced ```sh blocks of README.md and docs/*.md run in bash, in a folder for each document that holds the project's
examples and configs. `small.sh` keeps the commands small. ```python blocks run in the same folder. A ```diff block must
fit the file that its line +++ names. Other blocks are not run.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from mbm_cli import data
from mbm_cli.config import parse
from mbm_cli.experiments.train import train
from mbm_cli.multipliers import names

ROOT = Path(__file__).parents[2]
RUN_DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*RUN_DOCUMENTS, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "runs/README.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# In code spans and links; NAME in capitals stands for any.
PATH = re.compile(r"\b(?:mbm_cli|kernels|tests|docs|configs|examples|notebooks)/[\w./-]*\w")
SMALL = Path(__file__).with_name("small.sh")
# A family's products by the kernel's definition, of pairs of bit patterns, on one lane.
KERNEL = """
#include "kernels/multiplier.h"
#include <cstdio>
#include <cstring>

struct Lane {
  using I = int;
  using F = float;
  static int call(int, int) { return 0; }
  static float gather(const float*, int) { return 0; }
};

int main(int, char** arguments) {
  int family = 0, bits[2];
  while (std::strcmp(mbm::FAMILY_NAMES[family], arguments[1])) family++;
  mbm::Multiplier m = mbm::make_multiplier(mbm::Family(family), 16, 23);
  while (std::scanf("%d %d", bits, bits + 1) == 2) {
    float product = mbm::product<Lane>(mbm::from_bits<Lane>(bits[0]), mbm::from_bits<Lane>(bits[1]), m);
    std::printf("%d\\n", mbm::bits<Lane>(product));
  }
}
"""


def blocks(*languages: str, of: list[Path] = RUN_DOCUMENTS) -> list:
    """Return the fenced blocks of these languages as parameters: the document, and the text."""
    found = []
    for document in of:
        text = document.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            if match[1] in languages:
                found.append(pytest.param(document, match[2], id=f"{document.relative_to(ROOT)}:{line}"))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[Path, Path]:
    """Make a folder for each document, in which its blocks run one after the other."""
    made = {document: tmp_path_factory.mktemp(document.stem) for document in RUN_DOCUMENTS}
    for folder in made.values():
        shutil.copytree(ROOT / "examples", folder / "examples")
        shutil.copytree(ROOT / "configs", folder / "configs")
    return made


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    done = tmp_path_factory.mktemp("commands") / "done.txt"
    done.touch()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "MBM_DOCS_DONE": str(done), "MBM_DOCS_ROOT": str(ROOT), "COLUMNS": "100"}
    _, missing = data.FASHION_MNIST.damage()
    return {**os.environ, **variables, **({} if missing else {"MBM_DOCS_FASHION": "here"})}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("document", "text"), blocks("sh"))
def test_commands_run(document, text, folders, environment):
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "{SMALL}"\n{text}'],
        cwd=folders[document],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"\n{text}\nends with {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize(("document", "text"), blocks("python"))
def test_python_examples_run(document, text, folders, monkeypatch):
    monkeypatch.chdir(folders[document])
    with torch.random.fork_rng():
        exec(compile(text, document.name, "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """Apply the diffs of all documents to copies of their files; return the copies' folder."""
    folder = tmp_path_factory.mktemp("changed")
    for block in blocks("diff"):
        document, text = block.values
        header, *hunks = re.split(r"^@@.*\n", text, flags=re.MULTILINE)
        path = header.strip().removeprefix("+++ ")
        file = folder / path
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, file)
        content = file.read_text(encoding="utf-8")
        for hunk in hunks:
            old, new = ("".join(f"{x[1:]}\n" for x in hunk.splitlines() if x[:1] in (kept, " ", "")) for kept in "-+")
            assert content.count(old) == 1, f"{document.name}: {path} does not have these lines once:\n{old}"
            content = content.replace(old, new)
        file.write_text(content, encoding="utf-8")
    return folder


def test_diffs_add_a_family_whose_kernel_equals_its_model(changed, monkeypatch):
    model = runpy.run_path(str(changed / "mbm_cli/multipliers/float32.py"))
    monkeypatch.setattr(names, "FAMILIES", model["FAMILIES"])
    multiplier = names.Multiplier.parse(list(model["FAMILIES"].values())[-1].example)
    assert multiplier.truncate == 16
    a, b = torch.randint(-(2**31), 2**31, (2, 1000), generator=torch.Generator().manual_seed(0)).int()
    product = model["reference_product"](a.view(torch.float32), b.view(torch.float32), multiplier)

    (changed / "kernel.cpp").write_text(KERNEL, encoding="utf-8")
    subprocess.run(["c++", "-std=c++17", "-w", "-o", "kernel", "kernel.cpp"], cwd=changed, check=True)
    pairs = "\n".join(f"{x} {y}" for x, y in zip(a.tolist(), b.tolist(), strict=True))
    command = [changed / "kernel", multiplier.family]
    printed = subprocess.run(command, input=pairs, capture_output=True, text=True, check=True).stdout
    assert [int(line) for line in printed.split()] == product.view(torch.int32).tolist()


def test_diff_adds_a_data_set_with_mnists_layout(changed, monkeypatch, tmp_path):
    """Its checksums are those of these files."""
    found = runpy.run_path(str(changed / "mbm_cli/data.py"))["DATASETS"]
    (name,) = found.keys() - data.DATASETS.keys()
    monkeypatch.setitem(data.DATASETS, name, found[name])
    folder = tmp_path / found[name].folders[0]
    folder.mkdir(parents=True)
    for part, size in (("train", 20), ("t10k", 10)):
        for kind, values in (("images-idx3", np.arange(size * 784) % 251), ("labels-idx1", np.arange(size) % 10)):
            shape = (size, 28, 28) if kind == "images-idx3" else (size,)
            header = np.array([8 << 8 | len(shape), *shape], ">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())
    config = parse(f"name: x\ndevice: cpu\ndata: {{dataset: {name}, root: {tmp_path}}}\ntrain: {{epochs: 1}}", "x")
    result = train(config, tmp_path / "runs").result
    assert (result.status, result.epochs) == ("completed", 1)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_resolve(document):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"(?:src|href|srcset)=\"([^\"]+)\"", text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not resolves(document, unquote(target))] == []


def resolves(document: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = document.parent / path if path else document
    if not file.exists():
        return False
    if not anchor or file.suffix != ".md":
        return True
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The changelog also names what is gone.
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "CHANGELOG.md"], ids=lambda d: d.name)
def test_named_files_exist(document):
    named = {path for path in PATH.findall(document.read_text(encoding="utf-8")) if not re.search("NAME|FILE", path)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_picture_is_shown_and_small():
    text = " ".join(document.read_text(encoding="utf-8") for document in RUN_DOCUMENTS)
    for picture in (ROOT / "docs/figures").iterdir():
        assert f"figures/{picture.name}" in text, f"no document shows {picture.name}"
        assert picture.stat().st_size <= 150_000
