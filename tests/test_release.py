"""What a release says about itself is consistent."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

import mbm_cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    assert mbm_cli.__version__ == version("mbm-cli") == PROJECT["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert newest
    assert newest[1] == PROJECT["version"]


def test_citation_names_the_project_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert (paper["year"], paper["volume"], paper["issue"]) == (2018, 37, 11)


def test_github_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    wanted = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert [line for line in wanted if line not in steps] == []
    supported = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == supported


def test_issue_templates_are_forms():
    templates = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert templates
    for path in templates:
        assert yaml.safe_load(path.read_text()).keys() >= {"name", "description", "body"}
