"""A run's folder: made once, written whole or not at all, found again, and never trusted blindly."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mbm_cli.errors import MbmError, RequestError, RunError
from mbm_cli.runs import Run, list_runs

SUMMARY = {
    "status": "completed",
    "multiplier": "mbm",
    "device": "cpu",
    "epochs": 2,
    "test_accuracy": 0.98,
    "best_test_accuracy": None,
    "epoch_seconds": [1.0, 1],
    "train_seconds": [0.9, 0.9],
    "total_seconds": 2.0,
}


def metrics(epoch: int, loss: float = 0.1) -> dict:
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "epoch_seconds", "train_seconds")
    return {"epoch": epoch, **dict.fromkeys((*names, "eval_seconds", "images_per_second"), loss)}


def make_run(output: Path, name: str, summary: str = '{"status": "completed"}') -> Run:
    folder = output / name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(summary)
    return Run(folder)


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "runs", "20260101T000000Z-lenet-mbm-0001")


# Making one


def test_each_run_has_a_folder_of_its_own(tmp_path):
    output = tmp_path / "a" / "b"
    runs = [Run.create(output, "lenet-mbm") for _ in range(3)]
    assert len({run.folder for run in runs}) == 3
    for run in runs:
        assert run.folder.parent == output
        assert list(run.folder.iterdir()) == []
        assert re.fullmatch(r"\d{8}T\d{6}Z-lenet-mbm-[0-9a-f]+", run.name)


def test_a_folder_is_seen_with_its_first_files_or_not_at_all(tmp_path, monkeypatch):
    run = Run.create(tmp_path, "a", {"config.yaml": "x", "summary.json": "{}"})
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.yaml", "summary.json"]
    assert run.folder.stat().st_mode & 0o777 == 0o755

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Run.create(tmp_path, "b", {"summary.json": "{}"})
    assert list(tmp_path.iterdir()) == [run.folder]


# Who computes it


def test_a_run_that_nobody_holds_is_stopped_not_running(run):
    run.write_json("summary.json", {**SUMMARY, "status": "running"})
    assert run.summary()["status"] == "stopped"
    with run.hold():
        assert run.summary()["status"] == "running"
    assert run.summary()["status"] == "stopped"


def test_a_run_is_computed_by_one_process(run):
    with run.hold(), pytest.raises(RequestError, match="computed by another process"), run.hold():
        pass
    with run.hold():
        pass


def test_a_killed_process_holds_nothing(run):
    script = f"import os, pathlib; from mbm_cli.runs import Run; r = Run(pathlib.Path({str(run.folder)!r}))\n"
    script += "with r.hold(): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    with run.hold():
        pass


def test_whoever_looks_at_a_run_keeps_nobody_from_computing_it(run):
    descriptor = os.open(run.folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as for a look, which is much shorter
    looked = threading.Thread(target=lambda: (time.sleep(0.05), os.close(descriptor)))
    looked.start()
    with run.hold():
        looked.join()


def test_what_a_killed_process_left_half_written_goes_with_the_next_one(run):
    (run.folder / ".checkpoint.pt-x1y2z3_4").write_bytes(b"half")
    (run.folder / ".lenet-mbm-x1y2z3_4").mkdir()  # of a run in a comparison
    (run.folder / "notes.txt").write_text("the user's")
    with run.hold():
        assert {path.name for path in run.folder.iterdir()} == {
            *("summary.json", "notes.txt", ".lenet-mbm-x1y2z3_4"),
        }


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"{tmp_path / 'file' / 'runs'}.*--output"):
        Run.create(tmp_path / "file" / "runs", "x")


# Writing


def test_what_is_written_is_read_back(run):
    run.write("config.yaml", "name: é\n")
    run.write_json("environment.json", {"device": "cpu", "git_commit": None})
    run.write_json("summary.json", SUMMARY)
    run.write_metrics([metrics(1), metrics(2, 1e-300)])
    assert run.config_text() == "name: é\n"
    assert run.environment() == {"device": "cpu", "git_commit": None}
    assert run.summary() == SUMMARY
    assert run.metrics() == [metrics(1), metrics(2, 1e-300)]
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_before_the_first_epoch_there_are_no_metrics_and_no_checkpoint(run):
    assert run.metrics() == []
    assert run.checkpoint() is None


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(run, monkeypatch, function, failure):
    def fail(*args):
        raise failure

    run.write("config.yaml", "old\n")
    before = sorted(run.folder.iterdir())
    monkeypatch.setattr(os, function, fail)
    expected = RunError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as error:
        run.write("config.yaml", "new")
    assert sorted(run.folder.iterdir()) == before
    assert run.config_text() == "old\n"
    if expected is RunError:
        assert str(run.folder / "config.yaml") in str(error.value)
        assert "No space left on device" in str(error.value)


def test_a_file_appears_only_when_it_is_whole(run, monkeypatch):
    replace, seen = os.replace, []

    def look(source, target):
        seen.append((Path(target).exists(), Path(source).parent, Path(source).read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    run.write("config.yaml", "content")
    assert seen == [(False, run.folder, "content")]


def test_writing_to_a_folder_that_is_gone(tmp_path):
    with pytest.raises(RunError, match="gone"):
        Run(tmp_path / "gone").write("config.yaml", "x")


# Finding


def test_a_run_is_found_by_its_name_and_by_its_path(run, tmp_path, monkeypatch):
    output = run.folder.parent
    assert Run.find(run.name, output) == run
    assert Run.find(str(run.folder), tmp_path / "elsewhere") == run
    assert Run.find(f"{run.folder}/", tmp_path / "elsewhere").folder == run.folder
    monkeypatch.chdir(output)
    assert Run.find(run.name, tmp_path / "elsewhere").folder.resolve() == run.folder


def test_a_run_is_found_by_its_short_id(run):
    output = run.folder.parent
    short = run.name.rpartition("-")[2]
    assert Run.find(short, output) == run
    Run.create(output, f"other-{short}", {"summary.json": "{}"}).folder.rename(output / f"other-{short}")
    with pytest.raises(RequestError, match=f"2 runs .* end with '{short}'"):
        Run.find(short, output)


def test_what_is_no_run_but_a_result_is_said_to_be_one(tmp_path):
    made = Run.create(tmp_path, "lenet-mbm-profile-conv", {"profile.json": "{}"})
    for name in (made.name, made.name.rpartition("-")[2], str(made.folder)):
        with pytest.raises(RequestError, match=r"is no training run: its result is in profile\.json"):
            Run.find(name, tmp_path)


def test_a_run_that_is_not_there(run):
    output = run.folder.parent
    with pytest.raises(RequestError, match=f"did you mean {run.name}"):
        Run.find(run.name.replace("lenet", "lent"), output)
    with pytest.raises(RequestError, match=r"'qqq'.*mbm runs list"):
        Run.find("qqq", output)
    with pytest.raises(RequestError, match="nowhere"):
        Run.find(run.name, output / "nowhere")


def test_the_list_is_in_order_of_time_and_holds_runs_only(tmp_path):
    names = ["20251231T235959Z-z-ffff", "20260101T000000Z-a-0000", "20260101T000001Z-a-0000"]
    for name in (names[1], names[2], names[0]):
        make_run(tmp_path, name)
    (tmp_path / "README.md").write_text("")
    (tmp_path / "20260101T000002Z-no-summary").mkdir()
    assert [run.name for run in list_runs(tmp_path)] == names
    assert list_runs(tmp_path / "nowhere") == []
    assert list_runs(tmp_path / ("x" * 300)) == []


# What is damaged


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b'{"status": "comp', b"[1, 2]", b"null", b"\xff\xfe{}", b"{}", b"[" * 100_000),
        json.dumps({**SUMMARY, "status": "done"}).encode(),
        json.dumps({**SUMMARY, "test_accuracy": "high"}).encode(),
        json.dumps({**SUMMARY, "epoch_seconds": [None]}).encode(),
    ],
)
def test_a_damaged_summary_is_named(run, content):
    (run.folder / "summary.json").write_bytes(content)
    with pytest.raises(RunError, match=re.escape(str(run.folder / "summary.json"))):
        run.summary()


@pytest.mark.parametrize("content", [b'{"epoch": 1}\n', b'{"epo', b"\n\n", b"3\n", b"\xff\n"])
def test_damaged_metrics_are_named(run, content):
    (run.folder / "metrics.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=re.escape(str(run.folder / "metrics.jsonl"))):
        run.metrics()


def write_whole(run: Run) -> None:
    for name in ("config.yaml", "environment.json"):
        run.write(name, "name: x\n" if name == "config.yaml" else "{}")
    run.write_json("summary.json", SUMMARY)
    run.write_metrics([metrics(1, float("nan"))])
    run.write_checkpoint({**CHECKPOINT, "metrics": [metrics(1, float("nan")), metrics(2)]})


def test_files_that_contradict_one_another_are_damaged(run):
    """As after a bit that has made another number; a run that was killed may have the metrics of an epoch less."""
    write_whole(run)
    run.check()
    run.write_metrics([metrics(1, 0.25)])
    with pytest.raises(RunError, match=re.escape(str(run.folder / "metrics.jsonl"))):
        run.check()


@pytest.mark.parametrize("text", ["name: x\ndata: {root\n", "name: x\ntrain:\n  epochs: 1"])
def test_a_config_that_is_cut_off_is_damage(run, text):
    """Also where what is left is a config: the rest would silently be its defaults, 1 might have been 12."""
    write_whole(run)
    run.write("config.yaml", text)
    with pytest.raises(MbmError, match=re.escape(str(run.folder / "config.yaml"))):
        run.check()


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RunError, match=f"{tmp_path} cannot be read .Permission denied.: name another"):
        list_runs(tmp_path)


def test_a_missing_file_is_named(run):
    with pytest.raises(RunError, match=re.escape(str(run.folder / "config.yaml"))):
        run.config_text()


CHECKPOINT = {
    "epoch": 1,
    "multipliers": ["mbm"],
    "metrics": [metrics(1)],
    "model": {"weight": torch.arange(4.0)},
    "random": {"cpu": torch.get_rng_state()},
}


def test_a_checkpoint_is_plain_data(run):
    run.write_checkpoint(CHECKPOINT)
    found = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert found["epoch"] == 1
    assert torch.equal(run.checkpoint()["model"]["weight"], torch.arange(4.0))
    assert torch.equal(run.checkpoint()["random"]["cpu"], CHECKPOINT["random"]["cpu"])


def flip_a_bit(content: bytes) -> bytes:
    """Of a weight: the archive stays readable, the weight would be another."""
    i = content.index(torch.arange(4.0).numpy().tobytes()) + 9
    return content[:i] + bytes([content[i] ^ 64]) + content[i + 1 :]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"garbage\n", flip_a_bit])
def test_a_damaged_checkpoint_is_named(run, damage):
    run.write_checkpoint(CHECKPOINT)
    path = run.folder / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=re.escape(str(path))):
        run.checkpoint()


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_would_run_code_is_refused(run, tmp_path):
    torch.save({"epoch": Payload(tmp_path / "made")}, run.folder / "checkpoint.pt")
    with pytest.raises(RunError, match=re.escape(str(run.folder / "checkpoint.pt"))):
        run.checkpoint()
    assert not (tmp_path / "made").exists()


def test_json_files_end_with_a_newline(run):
    run.write_json("summary.json", {"status": "failed"})
    text = (run.folder / "summary.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"status": "failed"}
