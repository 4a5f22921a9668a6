"""Kill, interrupt and resume small runs: nothing is half-written, and all end as if nothing had happened.

``python tests/stress/kills.py [KILLS]`` kills `mbm train` that often (100), compare and sweep a twentieth as often.
"""

import json
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from runs import DONE, SMALL, Answer, check_readable, check_same, mbm, resume, run_in, stage, start, start_until, state

TRAIN = ["train", "--epochs", "4", *SMALL]
COMPARE = ["compare", "exact-vs-mbm", "--seeds", "1", "--epochs", "2", *SMALL]
SWEEP = ["sweep", "--vary", "model.multiplier=mbm,mbm-t16", "--epochs", "2", *SMALL]


def undisturbed(folder: Path, command: list[str]) -> tuple[dict[str, Any], float]:
    """Return what a command comes to when nothing happens, and the seconds that it takes."""
    folder.mkdir()
    mbm("runs", "list", folder=folder)  # the first start also starts what all are forked from
    began = time.monotonic()
    assert mbm(*command, folder=folder) == DONE
    return state(run_in(folder)), time.monotonic() - began


def kill(folder: Path, command: list[str], kills: int, whole: dict[str, Any], seconds: float) -> None:
    """Kill a command at random instants and resume it each time; begin another when one is complete."""
    choose = random.Random(0)
    killed = rounds = 0
    while killed < kills:
        rounds += 1
        own = folder / f"round{rounds}"
        own.mkdir(parents=True)
        process = start(*command, folder=own)
        while True:
            if killed < kills:
                time.sleep(choose.uniform(0, seconds / 2))
                process.send(signal.SIGKILL)
            answer = process.wait()
            if answer == DONE:
                break
            assert answer == Answer(-signal.SIGKILL), answer
            killed += 1
            run = check_stopped(own)
            process = start(*(resume(run) if run else command), folder=own)
        check_same(run_in(own), whole)


def check_stopped(folder: Path) -> Path | None:
    """Check that all that a killed command has left is whole, and listed as stopped; return its run."""
    run, listed = run_in(folder), mbm("runs", "list", "--json", folder=folder)
    assert (listed.code, listed.err) == (0, ""), listed
    found = {Path(one["run"]).name: one["status"] for one in json.loads(listed.out)["runs"]}
    if run is None:
        assert found == {}
    else:
        check_readable(run)
        # After the last epoch's end a run is completed, although it has yet to draw.
        assert found == {run.name: "stopped" if written_status(run) == "running" else "completed"}
    return run


def written_status(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["status"]


def interrupt(folder: Path, command: list[str], whole: dict[str, Any]) -> None:
    """Interrupt a command in the middle, and again after it was resumed as its message says."""
    folder.mkdir()
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start_until("checkpoint.pt", *command, folder=folder)
        process.send(number)
        answer = process.wait()
        assert answer.code == 130, answer
        assert "Traceback" not in answer.err, answer
        check_readable(run_in(folder))
        assert written_status(run_in(folder)) == "interrupted"
        command = [*re.search(r"mbm (resume .*)", answer.err)[1].split(), "--quiet"]
    assert mbm(*command, folder=folder) == DONE
    check_same(run_in(folder), whole)


def resume_twice(folder: Path, whole: dict[str, Any]) -> None:
    """Resume a run while another process does: the second is refused and changes nothing."""
    folder.mkdir()
    process = start_until("checkpoint.pt", *TRAIN, folder=folder)
    process.send(signal.SIGKILL)
    process.wait()
    run = run_in(folder)
    config = (run / "config.yaml").read_text()
    first = start(*resume(run), folder=folder)
    while '"status": "running"' not in mbm("runs", "list", "--json", folder=folder).out:
        assert first.process.is_alive()
    first.send(signal.SIGSTOP)  # it must not end while the second waits
    refused = mbm(*resume(run), "--epochs", 5, folder=folder)
    first.send(signal.SIGCONT)
    assert (refused.code, refused.out) == (2, ""), refused
    assert "another process" in refused.err, refused
    assert first.wait() == DONE
    check_same(run, whole)
    assert (run / "config.yaml").read_text() == config


def main(kills: int = 100) -> None:
    for name, command, times in (
        ("train", TRAIN, kills),
        ("compare", COMPARE, kills // 20),
        ("sweep", SWEEP, kills // 20),
        ("sweep --jobs 2", [*SWEEP, "--jobs", "2"], kills // 20),
    ):
        if times:
            with stage(f"mbm {name}, {times} kills") as folder:
                whole, seconds = undisturbed(folder / "undisturbed", command)
                kill(folder / "killed", command, times, whole, seconds)
                interrupt(folder / "interrupted", command, whole)
                if command is TRAIN:
                    resume_twice(folder / "twice", whole)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
