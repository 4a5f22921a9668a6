"""The distribution: the source distribution builds a wheel, and the wheel trains without the checkout.

`python -m build --no-isolation` takes the build tools that are installed, so nothing is downloaded.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from mbm_cli.backends import cpu, cuda

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
SMALL = ["--set", "data.train_limit=500", "--set", "data.test_limit=200", "--epochs", "1", "--device", "cpu"]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Run a program that must succeed; return its standard output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """Build the source distribution from this checkout, and the wheel from it alone; return their folder."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def contents(wheel) -> dict[str, bytes]:
    """Return the files in the wheel by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """Install the wheel into an environment that shares this one's packages, but not its mbm; return its programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python does not read the path files of a folder that a path file names, so an editable install stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_source_distribution_is_complete(dist):
    with tarfile.open(dist / f"mbm_cli-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile"}
    for folder in ("mbm_cli", "kernels", "configs", "tests", "examples"):
        paths = (
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".yaml")
        )
        wanted |= {str(path.relative_to(ROOT)) for path in paths}
    assert wanted - names == set()
    assert {name for name in names if name.startswith(("build/", ".venv/", "runs/2"))} == set()


def test_wheel_holds_package_kernels_and_configs_only(contents):
    about = f"mbm_cli-{VERSION}.dist-info"
    wanted = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "mbm_cli").rglob("*.py*") if path.suffix != ".pyc"}
    wanted |= {f"mbm_cli/kernels/{name}" for name in (*cuda._SOURCES, *cpu._SOURCES)}
    wanted |= {f"mbm_cli/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.cu*")}
    wanted |= {"mbm_cli/costs.yaml"} | {f"mbm_cli/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    wanted |= {f"mbm_cli/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}", "mbm_cli/py.typed"}
    assert {"mbm_cli/_cpu.pyi", "mbm_cli/experiments/train.py", "mbm_cli/configs/lenet-mbm.yaml"} <= wanted
    assert contents.keys() == wanted


def test_wheel_names_no_folder_of_the_builder(contents, wheel):
    for path in (ROOT, Path.home(), wheel.parent, Path("/tmp/build")):
        if len(path.parts) > 2:  # a home such as /root is a word that a file may have
            assert [name for name, content in contents.items() if bytes(path) in content] == []


def test_metadata_is_that_of_pyproject(contents):
    metadata = Parser().parsestr(contents[f"mbm_cli-{VERSION}.dist-info/METADATA"].decode())
    assert (metadata["Name"], metadata["Version"]) == ("mbm-cli", VERSION)
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]


def test_wheel_imports_without_the_checkout(programs, tmp_path):
    code = "import mbm_cli, mbm_cli._cpu; print(mbm_cli.__version__, mbm_cli.__file__, mbm_cli._cpu.__file__)"
    version, *files = run(programs / "python", "-c", code, cwd=tmp_path).split()
    assert version == VERSION
    assert all(Path(file).is_relative_to(programs.parent) for file in files)


@pytest.mark.parametrize("command", ["mbm", "python -m mbm_cli"])
def test_program_and_module_tell_the_version(command, programs, tmp_path):
    program, *arguments = command.split()
    assert run(programs / program, *arguments, "--version", cwd=tmp_path) == f"mbm {VERSION}\n"


def test_wheel_trains(programs, tmp_path):
    result = json.loads(run(programs / "mbm", "train", "--json", *SMALL, cwd=tmp_path))
    assert (result["status"], result["multiplier"]) == ("completed", "mbm")
    assert (tmp_path / result["run"] / "checkpoint.pt").exists()


def test_wheel_compiles_a_c_function_with_its_kernels(programs, tmp_path):
    code = "import torch, mbm_cli; a = torch.rand(9) + 1; m = mbm_cli.Multiplier.parse('c:one.h:first')\n"
    code += "assert torch.equal(mbm_cli.multiply(a, a * 2, m), a)"
    (tmp_path / "one.h").write_text("static inline uint32_t first(uint32_t a, uint32_t b) { return a; }\n")
    run(programs / "python", "-c", code, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
