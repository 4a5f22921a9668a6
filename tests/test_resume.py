"""`mbm resume`: training runs, comparisons and sweeps end with the bits that they would have had undisturbed."""

import json
import re
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from commands import EPOCH, KINDS, SILENT, SMALL, after, contents, made, mbm
from stress.runs import check_same, start, state

from mbm_cli import runs as run_module
from mbm_cli.experiments import compare
from mbm_cli.runs import list_runs


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "convolution_seconds", lambda config, device: 0.001)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return a function that gives the state that a command leaves where nothing happens."""

    @cache
    def of(*command: str) -> dict:
        output = tmp_path_factory.mktemp("undisturbed")
        assert mbm(*command, "--output", output, "--quiet") == SILENT
        return state(made(output).folder)

    return of


@pytest.mark.parametrize(
    ("name", "jobs", "file"),
    [
        *((name, [], "checkpoint.pt") for name in KINDS),
        ("sweep", ["--jobs", "2"], "checkpoint.pt"),
        ("sweep", ["--jobs", "2"], ".computing-*"),  # workers are starting
    ],
)
def test_interrupted_command_resumes_to_undisturbed_bits(name, jobs, file, undisturbed, tmp_path):
    """After a signal to the process and its workers, and with whatever number of jobs."""
    command = [*KINDS[name], "--epochs", "20"]
    process = start(*command, *jobs, "--quiet", folder=tmp_path)
    while not list(tmp_path.glob(f"runs/**/{file}")):
        time.sleep(0.01)
    process.send(signal.SIGINT)
    answer, run = process.wait(), made()
    assert (answer.code, answer.out) == (130, "")
    assert re.search(rf"mbm: interrupted .*; to resume: mbm resume runs/{run.name}\n$", answer.err)
    assert "Traceback" not in answer.err
    assert run.summary().status == "interrupted"
    assert {one.summary().status for one in list_runs(run.folder)} <= {"interrupted", "completed"}
    assert not list(run.folder.rglob(".*"))
    assert mbm("resume", run.name, *(["--jobs", 1] if jobs else []), "--quiet") == SILENT
    check_same(run.folder, undisturbed(*command))


SETTINGS = {
    "cnn3-mbm": ["data.train_limit=50"],  # dropout draws random numbers, batch norm keeps statistics
    "resnet20-mbm": ["data.dataset=mnist", "data.train_limit=50", "model.width=0.25"],  # images are moved
    "lenet-exact": ["optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.schedule=cosine"],
}


@pytest.mark.parametrize(
    ("name", "steps"),
    [("lenet-exact", 2), ("lenet-exact", 4), ("lenet-exact", 6), ("cnn3-mbm", 6), ("resnet20-mbm", 6)],
)
def test_training_stopped_at_any_step_resumes(name, steps, undisturbed):
    """Within the first of two epochs, at its end, and within the second."""
    command = [*KINDS["train"], "--config", name, *(word for field in SETTINGS[name] for word in ("--set", field))]
    answer, run = mbm(*command, stopped=after(steps)), made()
    assert answer.code == 130
    assert f"mbm: interrupted in epoch {steps // 4 + 1} of 2; to resume: mbm resume {run.folder}\n" in answer.err
    assert (run.summary().status, run.summary().epochs) == ("interrupted", steps // 4)
    torch.rand(7)
    answer = mbm("resume", run.name, "--json")
    assert answer.code == 0
    assert answer.json == {"run": str(run.folder), **run.read_json("summary.json")}
    check_same(made().folder, undisturbed(*command))


@pytest.mark.parametrize("name", ["compare", "sweep"])
def test_complete_members_are_not_repeated(name, undisturbed):
    answer, run = mbm(*KINDS[name], stopped=after(6)), made()  # a run has 4 steps
    assert re.search(rf"interrupted after 1 of 2 runs; to resume: mbm resume {run.folder}\n$", answer.err)
    assert [one.summary().status for one in list_runs(run.folder)] == ["completed", "interrupted"]
    first = contents(list_runs(run.folder)[0].folder)
    answer = mbm("resume", run.name)
    assert answer.code == 0
    assert "1 of 2 runs are done" in answer.out
    assert first.items() <= contents().items()
    check_same(run.folder, undisturbed(*KINDS[name]))


@pytest.mark.parametrize("name", KINDS)
def test_complete_run_is_reported_and_left_alone(name):
    answer = mbm(*KINDS[name], "--json")
    before = contents()
    again = mbm("resume", made().name, "--json")
    assert (again.code, again.json) == (0, answer.json)
    assert f"run: {made().folder}" in mbm("resume", made().folder).out
    assert contents() == before


def test_more_epochs_equal_those_asked_for_at_once():
    """Where the learning rate does not depend on their number."""
    constant = [*SMALL, "--set", "optimizer.schedule=none", "--quiet"]
    assert mbm("train", *constant, "--epochs", 1) == mbm("train", *constant, "--epochs", 2, "--output", "two") == SILENT
    run, whole = made(), made("two")
    assert mbm("resume", run.name, "--epochs", 2, "--quiet") == SILENT
    check_same(run.folder, state(whole.folder))
    assert run.config_text() == whole.config_text()
    environment = run.environment()
    (resumed,) = environment["resumed"]
    assert resumed["torch"] == environment["torch"]
    assert ("resume" in resumed["command"], "resume" in environment["command"]) == (True, False)


# What is refused


def refusal(*arguments: object) -> str:
    """Return why `mbm resume` refuses to resume the only run; check that it changes nothing."""
    before = contents()
    answer = mbm("resume", made().folder, *arguments)
    assert answer.out == ""
    assert answer.err.count("\n") <= 2
    assert contents() == before
    return f"{answer.code} {answer.err}"


def test_done_epochs_are_never_discarded():
    """Nor a part of one: its weights would be those of another epoch than the summary's."""
    command = ["train", *SMALL, "--set", "train.checkpoint_every=1", "--epochs", 3]
    assert mbm(*command, stopped=after(6)).code == 130
    assert "has 1 epochs and a part of the next already: --epochs 1 would discard some" in refusal("--epochs", 1)
    assert mbm("resume", made().name, "--epochs", 2, "--quiet") == SILENT


@pytest.mark.parametrize("name", KINDS)
def test_other_device_type_is_refused(name):
    assert mbm(*KINDS[name], "--set", "device=auto", "--device", "auto", stopped=after(6)).code == 130
    run, recorded = made(), made().environment()
    before = "cuda" if recorded["device"] == "cpu" else "cpu"
    run.write_json("environment.json", {**recorded, "device": f"{before}:0"})
    assert f"{run.folder} was begun on {before}, but this machine offers" in refusal()
    run.write("config.yaml", run.config_text().replace("device: auto", f"device: {recorded['device']}"))
    if name == "train":  # the members of the others have configs of their own
        assert mbm("resume", run.name, "--quiet") == SILENT
    else:
        assert "was begun on" in refusal()


def test_run_of_another_process_is_refused(monkeypatch):
    monkeypatch.setattr(run_module, "PATIENCE", 0)
    assert mbm("train", *EPOCH).code == 0
    with made().hold():
        assert "is being computed by another process" in refusal("--epochs", 2)


def test_a_table_of_the_gradients_may_not_change():
    """With its content restored, the run ends with the weights of an undisturbed one."""
    assert mbm("multipliers", "export", "mbm-t16-r7", "own.bin", "--bits", 4).code == 0
    flags = ["--multiplier", "{conv1: mbm, linear: mbm-t8}", "--backward", "{weight: lut:own.bin}"]
    assert mbm(*KINDS["train"], *flags, stopped=after(6)).code == 130
    table = Path("own.bin").read_bytes()
    Path("own.bin").write_bytes(table[:-1] + bytes([table[-1] ^ 1]))
    assert re.search(r"weight: .*own\.bin.* differs from", refusal())
    Path("own.bin").write_bytes(table)
    assert mbm("resume", made().name, "--quiet") == SILENT
    assert mbm(*KINDS["train"], *flags, "--quiet", "--output", "undisturbed") == SILENT
    resumed, undisturbed = (made(folder).checkpoint()["model"] for folder in ("runs", "undisturbed"))
    assert all(torch.equal(value, undisturbed[key]) for key, value in resumed.items())


@pytest.mark.parametrize("name", KINDS)
def test_changed_table_is_refused(name, monkeypatch):
    """With its content restored, the run resumes from any folder."""
    assert mbm("multipliers", "export", "mbm-t16-r7", "own.bin", "--bits", 4).code == 0
    command = ["sweep", "--vary", "model.multiplier=lut:own.bin,mbm", *EPOCH] if name == "sweep" else KINDS[name]
    flags = [] if name == "sweep" else ["--multiplier", "lut:own.bin"]
    assert mbm(*command, *flags, stopped=after(6)).code == 130
    table = Path("own.bin").read_bytes()
    Path("own.bin").write_bytes(table[:-1] + bytes([table[-1] ^ 1]))
    assert re.match(r"1 mbm: lut:.*own\.bin.* differs from the multiplier that runs/.* was trained with", refusal())
    Path("own.bin").write_bytes(table)
    folder = made().folder.absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert mbm("resume", folder, "--quiet") == SILENT
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"


def test_a_run_whose_gradients_were_edited_is_refused():
    assert mbm(*KINDS["train"], "--multiplier", "mbm", stopped=after(6)).code == 130
    run = made()
    run.write("config.yaml", run.config_text().replace("backward: exact", "backward: same"))
    assert "differs from the multiplier" in refusal()
