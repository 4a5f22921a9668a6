"""Training that is killed, interrupted, and started twice: nothing is half-written, and it ends as if nothing had been.

``python tests/stress/kills.py [KILLS]`` kills a small `mbm train` that often (100) at random instants, resumes it each
time, and begins another when one is complete; kills one before each of its operations on files; sends SIGINT and
SIGTERM to train, compare and sweep; starts runs, resumes and fetches at the same time.
"""

import glob
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from stress.starts import MBM, WAIT, Answer, Server, Started, server

from mbm_cli.errors import MbmError
from mbm_cli.runs import Run, list_runs

# 13 steps an epoch, the last one smaller; a checkpoint after every second step.
SIZES = ["data.train_limit=200", "data.batch_size=16", "data.test_limit=50", "device=cpu", "train.checkpoint_every=2"]
SMALL = [argument for setting in SIZES for argument in ("--set", setting)]
TRAIN = ["train", "--threads", "1", *SMALL]
FILES = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "curves.png"}
EPOCHS = 8
WHOLE_PROCESS = 10  # every tenth kill is of a process that begins with Python's own start
TIMED = ("seconds", "per_second")


def untimed(value: Any) -> Any:
    """Without what is measured by a clock; tensors as their bytes, so that equal means bit for bit."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not str(k).endswith(TIMED)}
    if isinstance(value, list):
        return [untimed(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def state(run: Run) -> Any:
    """All that a run has come to: weights, optimizer, random numbers, metrics."""
    return untimed([run.checkpoint(), run.metrics()])


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """The places in two states that are not the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a.get(key), b.get(key)) for key in a.keys() | b.keys()]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(number, *both) for number, both in enumerate(zip(a, b, strict=True))]
    else:
        if a != b:
            yield where
        return
    for key, one, other in pairs:
        yield from differences(one, other, f"{where}/{key}")


def undisturbed(at: Server, folder: Path, epochs: int = EPOCHS) -> Any:
    answer = at.run(*TRAIN, "--epochs", epochs, "--quiet", folder=folder)
    assert answer == Answer(0, "", ""), answer
    (run,) = list_runs(folder / "runs")
    return state(run)


def check_stopped(at: Server, folder: Path) -> Run | None:
    """After a kill: all that is there is whole, and the list says what it is."""
    output = folder / "runs"
    answer = at.run("runs", "list", "--json", folder=folder)
    assert (answer.code, answer.err) == (0, ""), answer
    listed = json.loads(answer.out)["runs"]
    if not output.exists():
        assert listed == []
        return None
    visible = [path for path in output.iterdir() if not path.name.startswith(".")]
    assert [Path(one["run"]).name for one in listed] == sorted(path.name for path in visible), listed
    assert len(listed) <= 1, "a run that is resumed stays in its folder"
    if not listed:
        return None
    run = Run(visible[0])
    run.check()
    assert listed[0]["status"] == ("stopped" if run.read_json("summary.json")["status"] == "running" else "completed")
    assert {path.name for path in run.folder.iterdir() if not path.name.startswith(".")} <= FILES
    checkpoint = run.checkpoint()
    behind = len(checkpoint["metrics"]) - len(run.metrics()) if checkpoint else 0
    assert behind in (0, 1), "what is shown is the checkpoint, or an epoch less"
    return run


def go_on(run: Run | None, epochs: int) -> list[object]:
    """The command that begins a run, or goes on with it."""
    return [*TRAIN, "--epochs", epochs, "--quiet"] if run is None else ["train", "--resume", run.name, "--quiet"]


def check_ended(at: Server, folder: Path, expected: Any) -> None:
    """A run that was killed, however often, is what it would have been; and nothing else is left of it."""
    (run,) = list_runs(folder / "runs")
    assert run.summary()["status"] == "completed"
    assert state(run) == expected, f"not as undisturbed: {', '.join(differences(state(run), expected))}"
    assert {path.name for path in run.folder.iterdir()} == FILES, "something is left that is not the run's"


# Kills


def kill_at_random(at: Server, folder: Path, kills: int, epochs: int = EPOCHS) -> Counter[str]:
    """Kill a run that often, resume it each time; tells in which phase of the run the kills fell."""
    choose = random.Random(0)
    phases: Counter[str] = Counter()
    reference = made(folder / "undisturbed")
    expected = undisturbed(at, reference, epochs)
    seconds = list_runs(reference / "runs")[0].summary()["total_seconds"]
    start_up = _start_up_seconds(at, made(folder / "forked"), False)
    whole_start_up = _start_up_seconds(at, made(folder / "python"), True) if kills >= WHOLE_PROCESS else 0
    for round_ in itertools.count():
        own = folder / f"round{round_}"
        own.mkdir()
        while True:
            run = check_stopped(at, own)
            if sum(phases.values()) >= kills:
                answer = at.run(*go_on(run, epochs), folder=own)
                assert answer == Answer(0, "", ""), answer
                break
            with_python = sum(phases.values()) % WHOLE_PROCESS == WHOLE_PROCESS - 1
            before = _progress(run)
            process = _popen(go_on(run, epochs), own) if with_python else at.start(go_on(run, epochs), own)
            if choose.random() < 0.25:
                time.sleep(choose.uniform(0, whole_start_up if with_python else start_up))
            else:
                _await_checkpoint(own, process)
                time.sleep(choose.uniform(0, 0.2) * seconds)
            answer = _kill(process)
            if answer.code == 0:
                break
            assert (answer.code, answer.out, answer.err) == (-signal.SIGKILL, "", ""), answer
            phases[_phase(before, _progress(check_stopped(at, own)))] += 1
        check_ended(at, own, expected)
        if sum(phases.values()) >= kills:
            return phases


def _start_up_seconds(at: Server, folder: Path, with_python: bool) -> float:
    """From the start to the first checkpoint: forked, or with Python's start and all imports."""
    begun = time.monotonic()
    command = [*TRAIN, "--epochs", EPOCHS, "--quiet"]
    process = _popen(command, folder) if with_python else at.start(command, folder)
    _await_checkpoint(folder, process)
    seconds = time.monotonic() - begun
    _kill(process)
    return seconds


def _popen(command: Sequence[object], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [MBM, *map(str, command)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _await_checkpoint(folder: Path, process: Started | subprocess.Popen[str]) -> None:
    """Wait until a run has a newer one, or has ended."""

    def found() -> list[int]:
        return [path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoint.pt")]

    before = found()
    ended = process.has_ended if isinstance(process, Started) else lambda: process.poll() is not None
    while found() == before and not ended():
        time.sleep(0.002)


def _kill(process: Started | subprocess.Popen[str]) -> Answer:
    process.kill()
    if isinstance(process, Started):
        return process.wait()
    out, err = process.communicate()
    return Answer(process.returncode, out, err)


def _progress(run: Run | None) -> tuple[bool, int, int]:
    """Whether there is a run, the epochs that it has completed, and the steps behind them that it would not lose."""
    if run is None:
        return False, 0, 0
    checkpoint = run.checkpoint()
    if checkpoint is None:
        return True, 0, 0
    return True, checkpoint["epoch"], checkpoint["part"]["step"] if checkpoint["part"] else 0


def _phase(before: tuple[bool, int, int], after: tuple[bool, int, int]) -> str:
    if not after[0]:
        return "before there was a folder"
    return "while it trained" if after[1:] > before[1:] else "before a new checkpoint"


def kill_before_operations(at: Server, folder: Path, every: int = 1, epochs: int = 2) -> int:
    """Kill a run before its first operation on a file, another before its second, and so on; gives their number."""
    reference = folder / "undisturbed"
    reference.mkdir()
    expected = undisturbed(at, reference, epochs)
    for tried in itertools.count():
        own = folder / f"operation{tried}"
        own.mkdir()
        answer = at.start(go_on(None, epochs), own, die_at=1 + tried * every).wait()
        if answer.code == 0:
            return tried
        assert answer == Answer(-signal.SIGKILL, "", ""), answer
        run = check_stopped(at, own)
        # The same instant of a resumed run, whose operations are others.
        answer = at.start(go_on(run, epochs), own, die_at=1 + tried * every // 2).wait()
        assert answer in (Answer(-signal.SIGKILL, "", ""), Answer(0, "", "")), answer
        run = check_stopped(at, own)
        answer = at.run(*go_on(run, epochs), folder=own)
        assert answer == Answer(0, "", ""), answer
        check_ended(at, own, expected)
    raise AssertionError


# Signals

COMMANDS = {
    "train": [*TRAIN, "--epochs", "4"],
    "compare": ["compare", "exact-vs-mbm", "--threads", "1", *SMALL, "--epochs", "2", "--seeds", "1"],
    "sweep": ["sweep", "--vary", "model.multiplier=mbm,mbm-t16", "--threads", "1", *SMALL, "--epochs", "2"],
    "sweep of two at once": [
        *("sweep", "--vary", "model.multiplier=mbm,mbm-t16", "--jobs", "2", "--threads", "1", *SMALL),
        *("--epochs", "2"),
    ],
}


def ends(folder: Path) -> list[Any]:
    """What all the training runs in a folder have come to, whatever their names."""
    found = [Run(path.parent) for path in sorted(folder.glob("**/checkpoint.pt"))]
    return sorted((str(state(run)) for run in found), key=hash)


def ends_undisturbed(at: Server, folder: Path, name: str) -> list[Any]:
    """What a command comes to when nothing happens to it; run once in a folder."""
    own = folder / "undisturbed" / name
    if not own.exists():
        own.mkdir(parents=True)
        answer = at.run(*COMMANDS[name], folder=own)
        assert answer.code == 0, answer
    return ends(own)


def interrupt(at: Server, folder: Path, number: int, name: str, choose: random.Random) -> None:
    """A signal in the middle ends a command with 130, marks it, says how to go on; that ends as it would have."""
    whole, own = ends_undisturbed(at, folder, name), folder / f"{name}-{number}"
    own.mkdir()
    process = at.start(COMMANDS[name], own)
    # Not with pathlib: it trips over the hidden folder that a run is made in, when that is renamed.
    while not glob.glob("runs/**/checkpoint.pt", root_dir=own, recursive=True):
        time.sleep(0.002)
    time.sleep(choose.uniform(0, 0.05))
    process.kill(number)
    answer = process.wait()
    assert answer.code == 130, answer
    assert answer.is_clean, answer
    (run,) = list_runs(own / "runs")
    assert run.summary()["status"] == "interrupted"
    for inner in (Run(path.parent) for path in own.glob("runs/**/summary.json")):
        assert inner.summary()["status"] in ("interrupted", "completed"), inner
        if (inner.folder / "plan.json").exists():
            continue
        inner.check()
    command = re.search(r"to go on: mbm (.*)", answer.err).group(1).split()
    answer = at.run(*command, folder=own)
    assert answer.code == 0, answer
    assert ends(own) == whole, f"{name} ended otherwise than undisturbed"
    assert run.summary()["status"] == "completed"


def kill_many(at: Server, folder: Path, name: str, kills: int, choose: random.Random) -> None:
    """Kills of a command that makes several runs, which is gone on with at once each time."""
    whole, own = ends_undisturbed(at, folder, name), folder / f"{name}-killed"
    own.mkdir()
    command = COMMANDS[name]
    for _ in range(kills):
        process = at.start(command, own)
        before = len(list(own.glob("runs/*/*/checkpoint.pt")))
        while len(list(own.glob("runs/*/*/checkpoint.pt"))) == before and not process.has_ended():
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.2))
        process.kill()
        answer = process.wait()
        runs = list_runs(own / "runs")
        if runs:
            command = [*COMMANDS[name][: 2 if name == "compare" else 1], "--resume", runs[0].name]
    answer = at.run(*command, folder=own)
    assert answer.code == 0, answer
    (run,) = list_runs(own / "runs")
    assert run.summary()["status"] == "completed"
    assert ends(own) == whole, f"{name} ended otherwise than undisturbed"


# Two at a time


def start_together(at: Server, folder: Path, runs: int = 2) -> None:
    """Runs that are started in the same second have folders of their own and do not change one another."""
    expected = undisturbed(at, made(folder / "undisturbed"), 1)
    together = [at.start([*TRAIN, "--epochs", 1, "--quiet"], folder) for _ in range(runs)]
    assert [process.wait() for process in together] == [Answer(0, "", "")] * runs
    found = list_runs(folder / "runs")
    assert len(found) == runs
    assert all(state(run) == expected for run in found)


def resume_together(at: Server, folder: Path) -> None:
    """Of two that go on with a run at once, one is refused and changes nothing, and the other ends as it should."""
    expected = undisturbed(at, made(folder / "undisturbed"))
    own = made(folder / "own")
    process = at.start([*TRAIN, "--epochs", EPOCHS, "--quiet"], own)
    while not any(own.glob("runs/*/checkpoint.pt")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    (run,) = list_runs(own / "runs")
    resume = ["train", "--resume", run.name, "--quiet"]
    more = [*resume, "--epochs", EPOCHS + 1]
    first = at.start(resume, own)
    while run.summary()["status"] != "running":
        time.sleep(0.002)
    first.kill(signal.SIGSTOP)  # so that it does not end while the other one is patient
    refused = at.run(*more, folder=own)
    first.kill(signal.SIGCONT)
    assert (refused.code, refused.out) == (2, ""), refused
    assert "another process" in refused.err
    assert first.wait() == Answer(0, "", "")
    assert state(run) == expected
    assert f"epochs: {EPOCHS}\n" in run.config_text(), "whoever was refused has changed the config"


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def look_while_starting(at: Server, folder: Path, starts: int) -> None:
    """Whoever lists runs does not keep one from being started: looking holds nothing that a run needs."""
    process = at.start([*TRAIN, "--epochs", 1, "--quiet"], folder)
    looks = 0
    for number in range(starts):
        while not process.has_ended():
            for run in list_runs(folder / "runs"):
                run.summary()
                looks += 1
        answer = process.wait()
        assert answer == Answer(0, "", ""), (answer, looks)
        run = list_runs(folder / "runs")[-1]
        process = at.start(["train", "--resume", run.name, "--epochs", number + 2, "--quiet"], folder)
    assert process.wait() == Answer(0, "", "")


FETCH = """
import json, sys
from torchvision.datasets import MNIST
from mbm_cli import cli, data
MNIST.mirrors = [sys.argv[1]]
data.MD5 = json.loads(sys.argv[2])
sys.argv = ["mbm", "data", "fetch", "--root", sys.argv[3]]
cli.main()
"""


def fetch_together(at: Server, folder: Path, fetches: int = 2) -> None:
    """First fetches of the data into one empty folder, from a mirror that lets them all begin before it answers."""
    files = {
        f"{part}-idx{kind}-ubyte": f"{part} {kind}".encode() * 100_000
        for part, kind in (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1))
    }
    sums = json.dumps({name: hashlib.md5(content).hexdigest() for name, content in files.items()})
    all_here = threading.Barrier(fetches, timeout=WAIT)

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/train-images"):
                all_here.wait()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(gzip.compress(files[self.path[1:].removesuffix(".gz")]))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as mirror:
        threading.Thread(target=mirror.serve_forever, args=(0.01,), daemon=True).start()
        command = [sys.executable, "-c", FETCH, f"http://127.0.0.1:{mirror.server_port}/", sums, str(folder / "root")]
        environment = {**os.environ, "no_proxy": "127.0.0.1"}
        together = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(fetches)
        ]
        answers = [Answer(process.wait(), *process.communicate()) for process in together]
        mirror.shutdown()
    assert all(answer.code == 0 and "complete and verified" in answer.out for answer in answers), answers
    assert {path.name: path.read_bytes() for path in (folder / "root/MNIST/raw").iterdir()} == files


# All of it


def stages(kills: int = 100) -> Iterator[tuple[str, Callable[[Server, Path], object]]]:
    choose = random.Random(1)
    yield f"{kills} kills at random instants", lambda at, folder: kill_at_random(at, folder, kills)
    every = max(1, 200 // kills)
    yield (
        f"a kill before every {f'{every}th ' if every > 1 else ''}operation on a file",
        lambda at, folder: kill_before_operations(at, folder, every),
    )
    for name in COMMANDS if kills >= 100 else ("train",):
        for number in (signal.SIGINT, signal.SIGTERM):
            yield (
                f"{signal.Signals(number).name} of {name}",
                lambda at, folder, number=number, name=name: interrupt(at, folder, number, name, choose),
            )
        if kills >= 100 and name != "train":
            yield (
                f"{kills // 20} kills of {name}",
                lambda at, folder, name=name: kill_many(at, folder, name, kills // 20, choose),
            )
    yield f"{2 + kills // 50} runs started at once", lambda at, folder: start_together(at, folder, 2 + kills // 50)
    yield "two resumes at once", resume_together
    yield f"{2 + kills // 50} fetches at once", lambda at, folder: fetch_together(at, folder, 2 + kills // 50)
    yield (
        f"{kills // 10} starts that are looked at all the time",
        lambda at, folder: look_while_starting(at, folder, kills // 10),
    )


def survive(script: str, stages: Iterable[tuple[str, Callable[[Server, Path], object]]]) -> int:
    """Run each stage in a folder of its own, and tell what came of it; the exit code of the script."""
    failures, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, server(Path(temporary, "logs")) as at:
        for number, (what, stage) in enumerate(stages):
            try:
                found = stage(at, made(Path(temporary, str(number))))
                print(f"{what}: survived{in_words(found)}", flush=True)
            except (AssertionError, MbmError, TimeoutError) as error:
                failures += 1
                print(f"{what}: FAILED: {error}", flush=True)
    print(f"{script}: {failures} failures, {time.monotonic() - began:.0f} s")
    return int(failures > 0)


def in_words(found: object) -> str:
    """What a stage has counted."""
    if isinstance(found, Counter):
        return f" ({', '.join(f'{count} {what}' for what, count in found.items())})"
    return "" if found is None else f" ({found})"


if __name__ == "__main__":
    sys.exit(survive("kills.py", stages(*map(int, sys.argv[1:]))))
