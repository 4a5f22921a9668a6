"""The notebook runs from top to bottom, and installs what is missing without touching the runtime's PyTorch."""

import importlib.metadata
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NOTEBOOK = nbformat.read(NOTEBOOKS / "mnist_mbm.ipynb", as_version=4)
PICTURES = ["compare-picture", "profile-picture", "characterize-picture", "own-picture", "own-curves"]


def text_of(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def source(cell: str) -> str:
    return next(c.source for c in NOTEBOOK.cells if c.id == cell)


def check(notebook: Any) -> None:
    """Every cell has run, in order, and has shown what it is there for."""
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name in PICTURES:
        assert [list(output.data) for output in cells[name].outputs] == [["image/png", "text/plain"]]
    shown = {name: text_of(cell) for name, cell in cells.items()}
    assert not [name for name, text in shown.items() if "\x1b" in text or "Traceback" in text]
    assert "equal the model" in shown["doctor"]
    for words in ("test accuracy, mean", "mbm-t16-r7", "points of test accuracy against exact"):
        assert words in shown["compare"]
    assert "phases" in shown["profile"]
    assert "mitchell" in shown["characterize"]
    assert "test accuracy" in shown["own-train"]
    assert "MBMConv2d(1, 8" in shown["python"]


@pytest.mark.timeout(600)
def test_it_runs_from_top_to_bottom():
    check(runpy.run_path(str(NOTEBOOKS / "execute.py"))["execute"]("small"))


def test_its_stored_outputs_are_from_a_whole_run_and_name_no_machine():
    check(NOTEBOOK)
    text = "\n".join(text_of(cell) for cell in NOTEBOOK.cells if cell.cell_type == "code")
    assert "60,000 training" in text or "12,000 training" in text  # not the small size
    assert [word for word in ("/root", "/home", "/tmp", "/work") if word in text] == []


class Runtime:
    """What the cells that install find, and what they ask pip for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.asked: list[list[str]] = []
        self.versions: dict[str, str | None] = {}
        real = importlib.metadata.version

        def version(name: str) -> str:
            found = self.versions.get(name, "as it is")
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found == "as it is" else found

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(subprocess, "run", lambda command, check: self.asked.append(command[5:]))
        monkeypatch.chdir(folder)
        self.monkeypatch = monkeypatch

    def has_gpu(self, cuda: str, capability: tuple[int, int], cupy: str | None) -> None:
        """A GPU with PyTorch for this CUDA; CuPy for another major version of it, or none."""
        patch = self.monkeypatch.setattr
        patch(torch.cuda, "is_available", lambda: True)
        patch(torch.cuda, "get_device_capability", lambda: capability)
        patch(torch.cuda, "get_device_name", lambda: "a GPU")
        patch(torch.version, "cuda", cuda)
        real = importlib.util.find_spec
        patch(importlib.util, "find_spec", lambda name: cupy if name == "cupy" else real(name))
        runtime = types.SimpleNamespace(runtimeGetVersion=lambda: int((cupy or cuda).split(".")[0]) * 1000)
        module: Any = types.ModuleType("cupy")
        module.cuda = types.SimpleNamespace(runtime=runtime)
        self.monkeypatch.setitem(sys.modules, "cupy", module)

    def install(self) -> None:
        names = {"REPOSITORY": "https://example.org/mbm"}
        for cell in ("install", "gpu"):
            exec(compile(source(cell), cell, "exec"), names)


@pytest.fixture
def runtime(monkeypatch, tmp_path) -> Runtime:
    return Runtime(monkeypatch, tmp_path)


def test_where_everything_is_there_nothing_is_installed(runtime):
    runtime.install()
    assert runtime.asked == []


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_a_runtime_that_is_too_old_is_named_and_left_as_it_is(package, runtime):
    runtime.versions[package] = "0.1"
    with pytest.raises(RuntimeError, match=rf"mbm needs {package}>=.*, this runtime has 0.1: choose a newer runtime"):
        runtime.install()
    assert runtime.asked == []


def test_what_is_missing_is_installed_beside_the_runtimes_pytorch(runtime):
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
def test_mbm_comes_from_the_checkout_around_it_or_from_the_repository(folder, wanted, runtime, monkeypatch, tmp_path):
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
def test_cupy_is_chosen_for_pytorchs_cuda(major, runtime):
    runtime.has_gpu(f"{major}.6", (7, 5), cupy=None)
    runtime.install()
    ((package,),) = runtime.asked
    assert package.startswith(f"cupy-cuda{major}x")


def test_a_cupy_that_is_there_is_used(runtime):
    runtime.has_gpu("12.6", (9, 0), cupy="12.9")
    runtime.install()
    assert runtime.asked == []


def test_a_cupy_for_another_cuda_is_named(runtime):
    runtime.has_gpu("13.0", (9, 0), cupy="12.9")
    with pytest.raises(RuntimeError, match="CuPy for CUDA 12: %pip uninstall -y cupy-cuda12x"):
        runtime.install()
    assert runtime.asked == []


def test_a_gpu_that_is_too_old_is_left_alone(runtime, capsys):
    runtime.has_gpu("12.6", (7, 0), cupy=None)
    runtime.install()
    assert runtime.asked == []
    assert "older than compute capability 7.5" in capsys.readouterr().out
