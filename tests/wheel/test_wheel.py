"""What is shipped: the source distribution builds a wheel, and the wheel alone, without the checkout, trains.

Builds take the tools that are installed, so nothing is downloaded; `python -m build` does the same in an empty
environment of its own.
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

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def run(*command: object, cwd: Path, **environment: str) -> str:
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
    """A folder with the source distribution of this checkout and the wheel that was built from it, not from here."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of programs of an environment that has the wheel, and of this one the packages, but not this mbm."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path file's folders are searched, their own path files are not read: an editable install stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_source_distribution_holds_what_building_and_testing_need(dist):
    with tarfile.open(dist / f"mbm_cli-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile"}
    for folder in ("mbm_cli", "kernels", "configs", "tests", "examples"):
        paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cu", ".cpp", ".h", ".yaml"))
        wanted |= {str(path.relative_to(ROOT)) for path in paths}
    assert wanted - names == set()
    assert {name for name in names if name.startswith(("build/", ".venv/", "runs/2"))} == set()


def test_the_wheel_holds_the_package_its_kernels_and_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    about = f"mbm_cli-{VERSION}.dist-info"
    metadata = {f"{about}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "mbm_cli").rglob("*.py*") if path.suffix != ".pyc"}
    wanted |= {f"mbm_cli/kernels/{name}" for name in ("multiplier.h", "conv2d.cu", "conv2d.h", "conv2d_simd.cpp")}
    wanted |= {f"mbm_cli/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    wanted |= {f"mbm_cli/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"}
    wanted |= {"mbm_cli/py.typed"}
    assert {"mbm_cli/_cpu.pyi", "mbm_cli/experiments/train.py", "mbm_cli/configs/lenet-mbm.yaml"} <= wanted
    assert names == wanted | metadata


def test_the_wheel_tells_nothing_of_where_it_was_built(wheel):
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for path in (ROOT, Path.home(), wheel.parent, Path("/tmp/build")):
        if len(path.parts) > 2:  # a home such as /root is a word that a file may have
            assert [name for name, content in contents.items() if bytes(path) in content] == []


def test_the_metadata_has_one_version(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"mbm_cli-{VERSION}.dist-info/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("mbm-cli", VERSION)
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]


def test_the_installed_wheel_is_all_that_is_used(installed, tmp_path):
    code = "import mbm_cli, importlib.util as u; print(mbm_cli.__version__, u.find_spec('mbm_cli._cpu').origin)"
    version, origin = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert version == VERSION
    assert Path(origin).is_relative_to(installed.parent)
    assert run(installed / "mbm", "--version", cwd=tmp_path) == f"mbm {VERSION}\n"


def test_the_installed_wheel_trains(installed, tmp_path):
    small = ["--set", "data.train_limit=500", "--set", "data.test_limit=200", "--epochs", "1", "--device", "cpu"]
    result = json.loads(run(installed / "mbm", "train", "--json", *small, cwd=tmp_path))
    assert (result["status"], result["multiplier"]) == ("completed", "mbm")
    assert (tmp_path / result["run"] / "checkpoint.pt").exists()


def test_the_installed_wheel_compiles_a_function_in_c(installed, tmp_path):
    """From the kernels' sources inside it."""
    code = "import torch, mbm_cli; a = torch.rand(9) + 1; m = mbm_cli.Multiplier.parse('c:one.h:first')\n"
    code += "assert torch.equal(mbm_cli.multiply(a, a * 2, m), a)"
    (tmp_path / "one.h").write_text("static inline uint32_t first(uint32_t a, uint32_t b) { return a; }\n")
    run(installed / "python", "-c", code, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"))
