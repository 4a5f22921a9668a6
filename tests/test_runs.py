"""A run's folder: created once, written whole or not at all, found again, and checked when it is read."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from mbm_cli.errors import Interrupted, MbmError, RequestError, RunError
from mbm_cli.runs import Run, Summary, list_runs

NAN = float("nan")
# As version 0.1.0 wrote them: no reason in the summary, no threads in the config but in environment.json.
SUMMARY = json.loads("""{"status": "completed", "multiplier": "mbm", "device": "cpu", "epochs": 2,
"test_accuracy": 0.98, "best_test_accuracy": null, "epoch_seconds": [1.0, 1], "train_seconds": [0.9, 0.9],
"total_seconds": 2.0}""")
CONFIG = "name: x\nmodel: {name: lenet, multiplier: mbm}\ntrain: {epochs: 2, deterministic: true}\n"
ENVIRONMENT = {"mbm": "0.1.0", "threads": 3, "device": "cpu"}
WEIGHT = torch.arange(4.0)


def metrics(epoch: int, loss: float = 0.1) -> dict:
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "epoch_seconds", "train_seconds")
    return {"epoch": epoch, **dict.fromkeys((*names, "eval_seconds", "images_per_second"), loss)}


CHECKPOINT = {
    "epoch": 2,
    "multipliers": ["mbm"],
    "metrics": [metrics(1, NAN), metrics(2)],
    "model": {"weight": WEIGHT},
    "random": {"cpu": torch.get_rng_state()},
}


def make_run(output: Path, name: str, **files: str) -> Run:
    """Write a run's folder; a keyword names a file without its ending."""
    folder = output / name
    folder.mkdir(parents=True)
    texts = {"summary": json.dumps(SUMMARY), "config": CONFIG, "environment": json.dumps(ENVIRONMENT), **files}
    for file, text in texts.items():
        (folder / f"{file}.{'yaml' if file == 'config' else 'json'}").write_text(text)
    return Run(folder)


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "runs", "20260101T000000Z-lenet-mbm-0001")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def named(path: Path) -> str:
    return re.escape(str(path))


# Creating


def test_each_run_has_its_own_folder(tmp_path):
    output = tmp_path / "a" / "b"
    runs = [Run.create(output, "lenet-mbm") for _ in range(3)]
    assert names_in(output) == {run.name for run in runs}
    assert len(names_in(output)) == 3
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-lenet-mbm-[0-9a-f]{4}", run.name) for run in runs)


def test_folder_appears_with_its_files_or_never(tmp_path, monkeypatch):
    run = Run.create(tmp_path, "a", {"config.yaml": "x", "summary.json": "{}"})
    assert names_in(run.folder) == {"config.yaml", "summary.json"}
    assert run.folder.stat().st_mode & 0o777 == 0o755

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Run.create(tmp_path, "b", {"summary.json": "{}"})
    assert names_in(tmp_path) == {run.name}


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"{tmp_path / 'file' / 'runs'}.*--output"):
        Run.create(tmp_path / "file" / "runs", "x")
    with pytest.raises(RunError, match=r"gone.*--output"):
        Run(tmp_path / "gone").write("config.yaml", "x")


@pytest.mark.parametrize(("error", "message"), [(Interrupted("x"), "nothing was kept"), (ValueError("x"), "^x$")])
def test_only_complete_results_are_kept(run, error, message):
    with run.kept_if_complete():
        pass
    assert run.folder.exists()
    with pytest.raises(type(error), match=message), run.kept_if_complete():
        raise error
    assert not run.folder.exists()


# Locking


def test_running_without_a_process_is_stopped(run):
    run.write_json("summary.json", {**SUMMARY, "status": "running"})
    assert run.summary().status == "stopped"
    with run.hold():
        assert run.summary().status == "running"
    assert run.summary().status == "stopped"


def test_one_process_holds_a_run(run):
    with run.hold(), pytest.raises(RequestError, match="computed by another process"), run.hold():
        pass
    script = f"import os, pathlib; from mbm_cli.runs import Run; r = Run(pathlib.Path({str(run.folder)!r}))\n"
    script += "with r.hold(): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with run.hold():
        pass


def test_readers_do_not_block_the_writer(run):
    descriptor = os.open(run.folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as a reader does for an instant
    reader = threading.Thread(target=lambda: (time.sleep(0.05), os.close(descriptor)))
    reader.start()
    with run.hold():
        reader.join()


def test_holding_removes_half_written_files(run):
    before = names_in(run.folder)
    (run.folder / ".checkpoint.pt-x1y2z3_4").write_bytes(b"half")
    (run.folder / ".lenet-mbm-x1y2z3_4").mkdir()  # a member that is being created
    (run.folder / "notes.txt").write_text("the user's")
    with run.hold():
        assert names_in(run.folder) == before | {"notes.txt", ".lenet-mbm-x1y2z3_4"}


# Writing


def test_what_is_written_is_read_back(run):
    assert (run.metrics(), run.checkpoint()) == ([], None)
    summary = Summary(**SUMMARY, reason="é")
    run.write_json("summary.json", summary)
    run.write_json("environment.json", {"device": "cpu", "git_commit": None})
    run.write_metrics([metrics(1), metrics(2, 1e-300)])
    run.write_checkpoint(CHECKPOINT)
    run.write("config.yaml", "name: é\n")
    assert run.config_text() == "name: é\n"
    assert run.summary() == summary
    assert run.environment() == {"device": "cpu", "git_commit": None}
    assert run.metrics() == [metrics(1), metrics(2, 1e-300)]
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert torch.equal(run.checkpoint()["model"]["weight"], WEIGHT)
    assert torch.equal(torch.load(run.folder / "checkpoint.pt", weights_only=True)["model"]["weight"], WEIGHT)
    text = (run.folder / "summary.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == asdict(summary)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_changes_nothing(run, monkeypatch, function, failure):
    before, seen = names_in(run.folder), []

    def fail(*args):
        seen.append(names_in(run.folder) - before)
        raise failure

    monkeypatch.setattr(os, function, fail)
    full = isinstance(failure, OSError)
    where = f"{named(run.folder / 'config.yaml')}.*No space left on device"
    with pytest.raises(RunError if full else KeyboardInterrupt, match=where if full else None):
        run.write("config.yaml", "new")
    assert names_in(run.folder) == before
    assert run.config_text() == CONFIG
    assert [len(names) for names in seen] == [1]  # the temporary file, in the same folder


# Finding


def test_run_is_found_by_name_path_and_id(run, tmp_path, monkeypatch):
    output, elsewhere = run.folder.parent, tmp_path / "elsewhere"
    assert Run.find(run.name, output) == run
    assert Run.find("0001", output) == run
    assert Run.find(str(run.folder), elsewhere) == run
    assert Run.find(f"{run.folder}/", elsewhere) == run
    monkeypatch.chdir(run.folder)
    assert Run.find(".", elsewhere) == run
    assert Run.find("lenet-mbm", output) == run  # as --name called it
    make_run(output, "other-0001")
    with pytest.raises(RequestError, match=r"2 runs .* are called '0001'"):
        Run.find("0001", output)


def test_result_without_training_is_not_a_run(tmp_path):
    made = Run.create(tmp_path, "lenet-mbm-profile-conv", {"profile.json": "{}"})
    for name in (made.name, made.name.rpartition("-")[2], str(made.folder)):
        with pytest.raises(RequestError, match=r"is not a training run: its result is in profile\.json"):
            Run.find(name, tmp_path)


def test_missing_run_is_answered_with_the_nearest(run):
    output = run.folder.parent
    with pytest.raises(RequestError, match=f"did you mean {run.name}"):
        Run.find(run.name.replace("lenet", "lent"), output)
    for name, folder in (("qqq", output), (run.name, output / "nowhere")):
        with pytest.raises(RequestError, match=f"'{name}'.* in {folder}: mbm runs list"):
            Run.find(name, folder)


def test_runs_are_listed_in_order_of_time(tmp_path):
    names = ["20251231T235959Z-z-ffff", "20260101T000000Z-a-0000", "20260101T000001Z-a-0000"]
    for name in (names[1], names[2], names[0]):
        make_run(tmp_path, name)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "20260101T000002Z-no-summary").mkdir()
    assert [run.name for run in list_runs(tmp_path)] == names
    assert list_runs(tmp_path / "nowhere") == list_runs(tmp_path / ("x" * 300)) == []


def test_unreadable_output_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunError, match=f"{tmp_path} cannot be read .Permission denied.: name another"):
        list_runs(tmp_path)


def test_single_run_is_asked_for_with_an_example(run):
    run.refuse_several()
    run.write_json("plan.json", {})
    member = make_run(run.folder, "20260101T000001Z-member-0002")
    with pytest.raises(RequestError, match=f"several runs: name one of them, for example {member.folder}"):
        run.refuse_several()


# Damage


def changed(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new, 1)


DAMAGES = {
    "summary.json": [
        *(None, b"", b'{"status": "comp', b"null", b"\xff\xfe{}", b"{}", b"[" * 100_000),
        *(changed(b"completed", b"done"), changed(b"0.98", b'"high"'), changed(b"1.0", b"null")),
    ],
    "environment.json": [None, b'{"threads": 0}', b'{"threads": "2"}'],
    "metrics.jsonl": [b'{"epoch": 1}\n', b'{"epo', b"\n\n", b"3\n", b"\xff\n", changed(b"NaN", b"0.25")],
    # What is left of a config that was cut off is a config, too: 1 may have been 12, and the rest is missing.
    "config.yaml": [None, b"name: x\ndata: {root\n", b"name: x\ntrain:\n  epochs: 1"],
    "checkpoint.pt": [
        *(b"", b"garbage\n", lambda content: content[: len(content) // 2]),
        changed(WEIGHT.numpy().tobytes(), (WEIGHT + 1).numpy().tobytes()),  # the archive stays readable
    ],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in DAMAGES for damage in DAMAGES[name]])
def test_damaged_or_missing_file_is_named(run, name, damage):
    run.write_metrics([metrics(1, NAN)])  # a run that was killed lacks the last line
    run.write_checkpoint(CHECKPOINT)
    run.check()
    path = run.folder / name
    content = damage(path.read_bytes()) if callable(damage) else damage
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(MbmError, match=named(path)) as error:
        run.check()
    if "other metrics" not in str(error.value):  # lists do not load checkpoints
        assert run.row() == {"run": str(run.folder), "status": "damaged", "reason": str(error.value)}


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_checkpoint_that_runs_code_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**CHECKPOINT, "epoch": Payload()}, run.folder / "checkpoint.pt")
    with pytest.raises(RunError, match=named(run.folder / "checkpoint.pt")):
        run.checkpoint()
    assert not Path("made").exists()


# Comparisons and sweeps, and folders of version 0.1.0

COMBINATIONS = [
    {"values": {"model.multiplier": m}, "config": {"name": "x", "model": {"multiplier": m}}, "keys": [m]}
    for m in ("mbm", "mbm-t8")
]
VARY = {"model.multiplier": ["mbm", "mbm-t8"]}
PLAN = {"kind": "sweep", "vary": VARY, "seeds": 1, "threads": 3, "jobs": 1, "combinations": COMBINATIONS}


def test_old_run_is_read(run):
    assert run.summary() == Summary(**SUMMARY)
    assert run.config().train.threads == 3
    run.write("config.yaml", CONFIG.replace("epochs: 2", "epochs: 2, threads: 4"))
    assert run.config().train.threads == 4


def test_old_sweep_is_read(run):
    run.write_json("plan.json", PLAN)
    plan = run.plan()
    assert run.has_several
    assert (plan.kind, plan.vary, plan.seeds, plan.jobs) == ("sweep", VARY, 1, 1)
    assert [one.model_dump(exclude_unset=True) for one in plan.combinations] == COMBINATIONS


def test_old_comparison_is_refused_with_its_version(run):
    columns = {name: {"multiplier": name, "keys": [name]} for name in ("exact", "mbm")}
    run.write_json("plan.json", {"kind": "comparison", "columns": columns, "seeds": 1})
    with pytest.raises(RequestError, match=r"a comparison of mbm 0\.1\.0: resume it with that version$"):
        run.plan()


@pytest.mark.parametrize(
    ("field", "value"),
    [("seeds", "3"), ("seeds", 0), ("jobs", -1), ("combinations", []), ("vary", None), ("kind", "x")],
)
def test_damaged_plan_is_named(run, field, value):
    run.write_json("plan.json", {**PLAN, field: value})
    with pytest.raises(RunError, match=rf"plan\.json is damaged \({field}: "):
        run.plan()


@pytest.mark.parametrize("combinations", [3, "abc", [3], [{"values": {}, "config": 3, "keys": []}]])
def test_damaged_combinations_are_named(run, combinations):
    run.write_json("plan.json", {**PLAN, "combinations": combinations})
    for read in (run.plan, lambda: run.trusted(False)):
        with pytest.raises(RunError, match=r"plan\.json is damaged"):
            read()


@pytest.mark.parametrize(
    ("multiplier", "code"),
    [
        ("'python:/a.py:f'", "python:/a.py:f"),
        ('"\\x70ython:/a.py:f"', "python:/a.py:f"),
        ("{conv1: 'c:/a.h:f', default: mbm}", "c:/a.h:f"),
    ],
)
@pytest.mark.parametrize("place", ["config", "member", "plan"])
def test_code_is_refused_without_running_it(run, place, multiplier, code):
    text = dict.fromkeys(("config", "member", "plan"), CONFIG.replace("mbm}", "'lut:/a.bin'}"))
    run.write("config.yaml", text["config"])
    assert run.trusted(False) == run
    text[place] = CONFIG.replace("mbm}", f"{multiplier}}}")
    run.write("config.yaml", text["config"])
    make_run(run.folder, "member", config=text["member"])
    planned = {"values": {}, "config": yaml.safe_load(text["plan"]), "keys": []}
    run.write_json("plan.json", {**PLAN, "combinations": [planned]})
    with pytest.raises(RequestError, match=f"{named(run.folder)} names code, {code}: .*--trust"):
        run.trusted(False)
    assert run.trusted(True) == run
