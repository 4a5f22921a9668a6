"""Runs on a Slurm cluster: jobs of one array, each a lane that computes one group of runs after the other."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from mbm_cli.config import Cluster, Engine
from mbm_cli.errors import Interrupted, RequestError, RunError

Look = Callable[[list], object]
Done = Callable[[Any, str | None], None]
Stop = Callable[[], bool]
Attempt = Callable[[list, Stop], list[str | None]]  # computes a group of tasks; returns the reason of each that fails
INTERRUPTED = ""  # instead of a reason: the task is to be computed again
LOOK_INTERVAL, ASK_INTERVAL, PATIENCE = 0.2, 3, 30  # seconds: looks at the folder, asks Slurm, waits for an answer
DEATHS = 2  # of lanes, after which their group is given up
PLACE = "slurm"  # in a sweep's folder: what the lanes print, and a log of each group: its lane, then lines of these
BEGUN, STOPPED, ENDED = "begun\n", "stopped\n", "ended: "


def check(cluster: Cluster) -> None:
    """Raise a RequestError if submitit is not installed, Slurm does not answer, or has no such partition."""
    try:
        import submitit  # noqa: F401

        partitions = _ask("sinfo", "--noheader", "--format=%R").split()
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", None) or error).splitlines()[0]
        raise RequestError(f"--on needs Slurm, and pip install 'mbm-cli[slurm]' ({reason})") from None
    if cluster.partition not in ("", *partitions):
        raise RequestError(f"--on: no partition {cluster.partition!r}, there are {', '.join(partitions)}")


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


def launch_lanes(
    groups: list[list], attempt: Attempt, engine: Engine, permission: Path, look: Look, done: Done, stopped: Stop
) -> None:
    """Compute groups in lanes, and what they leave because some died in new ones; stop them by removing a file."""
    folder, left, ask = permission.parent / PLACE, dict(enumerate(groups)), 0.0
    deaths, numbers = Counter[int](), count(len(groups))
    permission.touch()
    try:
        while left:
            lanes, queued, logs = min(engine.jobs, len(left)), True, dict[int, str]()
            _submit(partial(_compute_lane, left.copy(), attempt, permission, lanes), lanes, folder, engine)
            while queued:
                time.sleep(LOOK_INTERVAL)
                if stopped():
                    raise Interrupted("interrupted")
                if not left or time.monotonic() > ask:
                    queued, ask = _is_queued(permission.parent.name), time.monotonic() + ASK_INTERVAL
                for index in left.keys() & {int(name) for name in os.listdir(folder) if name.isdecimal()}:
                    logs[index] = (folder / str(index)).read_text()
                    look(left[index])
                    if ENDED in logs[index] and logs[index].endswith("\n"):
                        for one in zip(left.pop(index), json.loads(logs[index].partition(ENDED)[2]), strict=True):
                            done(*one)
            if not logs:
                raise RunError(f"no job began a run: see what they wrote in {folder}")
            for index in left.keys() & logs.keys():
                (folder / str(index)).unlink()
                deaths[index] += logs[index].count(BEGUN) - logs[index].count(STOPPED)
                if deaths[index] and len(left[index]) > 1:
                    alone = {next(numbers): [task] for task in left.pop(index)}
                    left, deaths = left | alone, deaths + Counter(alone.keys())
                elif deaths[index] >= DEATHS:
                    (task,) = left.pop(index)
                    done(task, f"{task}: its lane died {DEATHS} times: see {folder}")
    finally:
        permission.unlink(missing_ok=True)
        end_lanes(permission.parent, keep=bool(left) or DEATHS in deaths.values())


def end_lanes(folder: Path, keep: bool = False) -> None:
    """Cancel the lanes of a sweep's folder, if there are any, and wait for their end; remove their files."""
    with suppress(OSError, subprocess.SubprocessError):  # a folder that was copied to where there is no Slurm
        if (folder / PLACE).exists():
            _ask("scancel", "--me", f"--name={folder.name}")
            end = time.monotonic() + PATIENCE
            while _is_queued(folder.name) and time.monotonic() < end:
                time.sleep(LOOK_INTERVAL)
    if not keep:
        shutil.rmtree(folder / PLACE, ignore_errors=True)


def _is_queued(name: str) -> bool:  # not by sacct, which submitit would ask: it needs a database
    try:
        return bool(_ask("squeue", "--me", "--noheader", f"--name={name}"))
    except subprocess.SubprocessError:  # it will answer again
        return True


def _submit(lane: Callable[[int], None], lanes: int, folder: Path, engine: Engine) -> None:
    import submitit

    on, executor = engine.on, submitit.SlurmExecutor(folder)
    assert on is not None
    job = {"job_name": folder.parent.name, "partition": on.partition or None, "time": on.time}
    job |= {"gpus_per_node": on.gpus or None, "cpus_per_task": on.cpus, "signal_delay_s": min(90, 15 * on.time)}
    executor.update_parameters(**job, stderr_to_stdout=True, additional_parameters={"requeue": True})
    try:
        executor.map_array(lane, range(lanes))
    except RuntimeError as error:
        raise RunError(f"Slurm refuses the lanes: {str(error).strip().splitlines()[-1]}") from None


def _compute_lane(groups: dict[int, list], attempt: Attempt, permission: Path, lanes: int, lane: int) -> None:
    """Compute a lane's slice of the groups, then what the others have not begun."""
    signals: list[int] = []
    # submitit would ignore SIGTERM (cancelled, preempted), and break off a step at SIGUSR2 (the time is over).
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: signals.append(number))
    for _, index in sorted(enumerate(groups), key=lambda one: (one[0] - lane) % lanes):
        path = permission.parent / PLACE / str(index)
        if signals or not permission.exists():
            break
        # One lane alone makes it, also where flock does not hold between nodes; this one, perhaps, before a requeue.
        with suppress(FileExistsError), open(path, "x") as file:
            file.write(f"{lane}\n")
        log = path.read_text()
        if not log.startswith(f"{lane}\n") or ENDED in log or log.count(BEGUN) - log.count(STOPPED) >= DEATHS:
            continue
        with open(path, "a", buffering=1) as file:
            file.write(BEGUN)
            reasons = attempt(groups[index], lambda: bool(signals) or not permission.exists())
            file.write(STOPPED if INTERRUPTED in reasons else f"{ENDED}{json.dumps(reasons)}\n")
    if signal.SIGUSR2 in signals and permission.exists():
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
    os._exit(0)  # nobody reads what submitit would write, and to tear down PyTorch's modules takes a second
