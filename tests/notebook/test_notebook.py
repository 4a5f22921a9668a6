"""The notebook runs from top to bottom, and installs what is missing but never replaces PyTorch."""

import importlib.metadata
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NOTEBOOK = nbformat.read(NOTEBOOKS / "mnist_mbm.ipynb", as_version=4)
PICTURES = ["compare-picture", "profile-picture", "characterize-picture", "own-picture", "own-curves"]


def text_of(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def check(notebook: Any) -> None:
    """Check that every cell has run, in order, and shows what it is there for."""
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name in PICTURES:
        assert [list(output.data) for output in cells[name].outputs] == [["image/png", "text/plain"]]
    shown = {name: text_of(cell) for name, cell in cells.items()}
    assert not [name for name, text in shown.items() if "\x1b" in text or "Traceback" in text]
    assert f"mbm {importlib.metadata.version('mbm-cli')}, PyTorch" in shown["gpu"]
    assert "equal the model" in shown["doctor"]
    for words in ("test accuracy, mean", "mbm-t16-r7", "points of test accuracy against exact"):
        assert words in shown["compare"]
    assert "phases" in shown["profile"]
    assert "mitchell" in shown["characterize"]
    assert "test accuracy" in shown["own-train"]
    assert "ApproxConv2d(1, 8" in shown["python"]


@pytest.mark.timeout(600)
def test_notebook_runs_from_top_to_bottom():
    check(runpy.run_path(str(NOTEBOOKS / "execute.py"))["execute"]("small"))


def test_stored_outputs_are_complete_and_name_no_folder():
    check(NOTEBOOK)
    text = "\n".join(text_of(cell) for cell in NOTEBOOK.cells if cell.cell_type == "code")
    assert "60,000 training" in text or "12,000 training" in text  # the sizes for a GPU and a CPU, not the small one
    assert [word for word in ("/root", "/home", "/tmp", "/work") if word in text] == []


class Runtime:
    """A runtime as the installing cells find it; records the arguments that they give to pip.

    Attributes:
        versions: of packages that differ from those installed here; ``None`` for one that is missing.
        asked: the arguments of each ``pip install``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[list[str]] = []
        self.versions: dict[str, str | None] = {}
        self.patch = monkeypatch.setattr
        self.set_item = monkeypatch.setitem
        installed = importlib.metadata.version

        def version(name: str) -> str:
            found = self.versions.get(name, "")
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found or installed(name)

        self.patch(importlib.metadata, "version", version)
        self.patch(subprocess, "run", lambda command, check: self.asked.append(command[5:]))

    def add_gpu(self, cuda: str, capability: tuple[int, int], cupy: str | None = None) -> None:
        """Add a GPU, and PyTorch for this CUDA; CuPy for its own version of CUDA, or none."""
        self.patch(torch.cuda, "is_available", lambda: True)
        self.patch(torch.cuda, "get_device_capability", lambda: capability)
        self.patch(torch.cuda, "get_device_name", lambda: "a GPU")
        self.patch(torch.version, "cuda", cuda)
        find_spec = importlib.util.find_spec
        self.patch(importlib.util, "find_spec", lambda name: cupy if name == "cupy" else find_spec(name))
        major = int((cupy or cuda).split(".")[0])
        runtime = SimpleNamespace(runtimeGetVersion=lambda: 1000 * major)
        self.set_item(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))

    def install(self) -> None:
        cells = {cell.id: cell.source for cell in NOTEBOOK.cells}
        names = {"REPOSITORY": "https://example.org/mbm"}
        for name in ("install", "gpu"):
            exec(compile(cells[name], name, "exec"), names)


@pytest.fixture
def runtime(monkeypatch, tmp_path) -> Runtime:
    monkeypatch.chdir(tmp_path)
    return Runtime(monkeypatch)


def test_complete_runtime_installs_nothing(runtime):
    runtime.install()
    assert runtime.asked == []


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_old_pytorch_is_named_and_kept(package, runtime):
    runtime.versions[package] = "0.1"
    with pytest.raises(RuntimeError, match=rf"mbm needs {package}>=.*, this runtime has 0.1: choose a newer runtime"):
        runtime.install()
    assert runtime.asked == []


def test_missing_packages_are_installed_and_pytorch_kept(runtime):
    runtime.versions |= {"typer": None, "pydantic": "1.0"}
    runtime.install()
    ((option, constraints, *packages),) = runtime.asked
    assert option == "--constraint"
    kept = Path(constraints).read_text().split()
    assert kept == [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "torchvision")]
    assert sorted(package.partition(">")[0] for package in packages) == ["pydantic", "typer"]


@pytest.mark.parametrize(
    ("folder", "wanted"), [(".", "git+https://example.org/mbm"), ("checkout/notebooks", "checkout")]
)
def test_mbm_comes_from_the_checkout_or_the_repository(folder, wanted, runtime, monkeypatch, tmp_path):
    for name in ("checkout/pyproject.toml", "checkout/mbm_cli/ops.py", "checkout/notebooks/mnist_mbm.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / folder)
    runtime.versions["mbm-cli"] = None
    runtime.install()
    ((option, place),) = runtime.asked
    assert option == "--no-deps"
    assert place.removeprefix(f"{tmp_path}/") == wanted


@pytest.mark.parametrize("major", ["12", "13"])
def test_cupy_matches_the_cuda_of_pytorch(major, runtime):
    runtime.add_gpu(f"{major}.6", (7, 5))
    runtime.install()
    ((package,),) = runtime.asked
    assert package.startswith(f"cupy-cuda{major}x")


def test_installed_cupy_is_used(runtime):
    runtime.add_gpu("12.6", (9, 0), cupy="12.9")
    runtime.install()
    assert runtime.asked == []


def test_cupy_for_another_cuda_is_named(runtime):
    runtime.add_gpu("13.0", (9, 0), cupy="12.9")
    with pytest.raises(RuntimeError, match="CuPy for CUDA 12: %pip uninstall -y cupy-cuda12x"):
        runtime.install()
    assert runtime.asked == []


def test_old_gpu_is_not_used(runtime, capsys):
    runtime.add_gpu("12.6", (7, 0))
    runtime.install()
    assert runtime.asked == []
    assert "older than compute capability 7.5" in capsys.readouterr().out
