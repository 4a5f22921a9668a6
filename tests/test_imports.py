"""The package's floors: imports go down only, and commands load nothing that they do not use."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mbm_cli

PACKAGE = Path(mbm_cli.__file__).parent
# From the command line down to the arithmetic; a module imports from its own floor and those below.
FLOORS = """__main__ > cli flags terminal > report > experiments > launch slurm > config runs documents shipped
costs device > models data > own_data > data_arrays data_files epoch > training optimizers > nn pooling > quantize >
ops > autograd_integers > autograd > backends > multipliers > turns > errors variables"""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS.split(">")) for room in rooms.split()}


def module_of(path: Path) -> str:
    """Return a module's name without the package's, for example ``multipliers.names``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that code imports, also within functions, but not for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            names = [f"{node.module}.{name}" for name in names]
        for name in names:
            package, _, inner = name.partition(".")
            if package == "mbm_cli" and inner not in ("__version__", "_cpu"):
                yield inner if inner in MODULES else inner.rpartition(".")[0]
        yield from imports_of(node)


IMPORTS = {name: set(imports_of(ast.parse(path.read_text()))) for name, path in MODULES.items()}
EDGES = [(name, imported) for name in MODULES for imported in IMPORTS[name]]


def room(module: str) -> str:
    return module.partition(".")[0]


def test_imports_go_down_only():
    assert {room(name) for name in MODULES} == FLOOR_OF.keys()
    assert [edge for edge in EDGES if FLOOR_OF[room(edge[1])] < FLOOR_OF[room(edge[0])]] == []


def test_imports_have_no_cycles():
    TopologicalSorter(IMPORTS).prepare()


def test_report_is_imported_by_the_command_line_alone():
    assert {room(name) for name, imported in EDGES if room(imported) == "report"} - {"report"} == {"cli"}


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("cli", ["torch", "numpy", "pydantic", "yaml", "matplotlib"]),
        ("runs", ["torch", "numpy"]),
        ("report.progress", ["matplotlib", "mbm_cli.experiments.search"]),
        ("experiments.search", ["torchvision", "matplotlib", "scipy", "cupy", "sympy", "optuna"]),
    ],
)
def test_nothing_unused_is_loaded(module, unused):
    script = f"import mbm_cli.{module}, sys; print(*set({unused}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_training_loads_no_compiler(tmp_path):
    """torch.optim would import torch._dynamo, which takes a second."""
    command = ["train", "--device", "cpu", "--set", "data.train_limit=64", "--set", "data.test_limit=64", "--quiet"]
    script = f"import atexit, sys; sys.argv = ['mbm', *{command}]; from mbm_cli import cli\n"
    script += "atexit.register(lambda: print(*{'torch._dynamo', 'sympy', 'scipy'} & sys.modules.keys())); cli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == []
