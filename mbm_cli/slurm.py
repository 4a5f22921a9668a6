"""Runs on a Slurm cluster: jobs of one array, each a lane that computes one run after the other."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from mbm_cli.errors import Interrupted, RequestError, RunError

FORM = "write local, or slurm://PARTITION?gpus=1&cpus=4&time=60 (of each lane; the time in minutes)"
LOOK_INTERVAL, ASK_INTERVAL, PATIENCE = 0.3, 5, 30  # seconds: looks at the folder, asks Slurm, waits for an answer
DEATHS = 2  # of lanes, after which their run is given up
PLACE = "slurm"  # in a sweep's folder: the lanes' output, and a log of each run in this launch
BEGUN, STOPPED, ENDED = "begun", "stopped", "ended: "  # lines of a log, after one with the lane's number


class Slurm(NamedTuple):
    """A partition (the cluster's default without a name), and what each lane gets of it; ``time`` in minutes."""

    partition: str
    gpus: int = 0
    cpus: int = 1
    time: int = 60


def parse(on: str) -> Slurm | None:
    """Parse ``--on``, and check that Slurm has the partition; return ``None`` for ``local``.

    Raises:
        RequestError: it is wrong, submitit is not installed, or Slurm does not answer.
    """
    if on == "local":
        return None
    url = urlsplit(on)
    try:
        slurm = Slurm(url.netloc, **{name: int(value) for name, value in parse_qsl(url.query, True)})
    except (TypeError, ValueError):
        raise RequestError(f"--on {on}: {FORM}") from None
    if (url.scheme, url.path) != ("slurm", "") or slurm.gpus < 0 or min(slurm.cpus, slurm.time) < 1:
        raise RequestError(f"--on {on}: {FORM}")
    if importlib.util.find_spec("submitit") is None:
        raise RequestError(f"--on {on} needs submitit, which is not installed: pip install 'mbm-cli[slurm]'")
    try:
        partitions = _ask("sinfo", "--noheader", "--format=%R").split()
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        raise RequestError(f"--on {on}: no Slurm answers here ({reason.splitlines()[0]})") from None
    if slurm.partition and slurm.partition not in partitions:
        raise RequestError(f"--on {on}: no partition {slurm.partition!r}, there are {', '.join(partitions)}")
    return slurm


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout


def launch_lanes(
    tasks: Sequence[Any], attempt: Callable[..., str | None], jobs: int, permission: Path, look: Callable[[Any], None],
    done: Callable[[Any, str | None], None], stopped: Callable[[], bool], slurm: Slurm,
) -> None:
    """Compute tasks in lanes, which stop when the file ``permission`` is gone; otherwise as `mbm_cli.launch.launch`.

    What the lanes leave when they have ended, because some died, is left to new ones.
    """
    place = permission.parent / PLACE
    left, deaths, ask = dict(enumerate(tasks)), Counter[int](), 0.0
    permission.touch()
    try:
        while left:
            _submit(_Lane(left.copy(), attempt, place, permission, min(jobs, len(left))), slurm)
            queued = True
            while queued:
                time.sleep(LOOK_INTERVAL)
                if stopped():
                    raise Interrupted("interrupted")
                if not left or time.monotonic() > ask:
                    queued, ask = _is_queued(place.parent), time.monotonic() + ASK_INTERVAL
                for index in left.keys() & {int(name) for name in os.listdir(place) if name.isdecimal()}:
                    log = _read(place / str(index))
                    if _has_ended(log):
                        done(left.pop(index), json.loads(log[-1].removeprefix(ENDED)))
                    else:
                        look(left[index])
            logs = {index: _read(place / str(index)) for index in left}
            if left and not any(logs.values()):
                raise RunError(f"no lane began a run: see what they wrote in {place}")
            for index, log in logs.items():
                (place / str(index)).unlink(missing_ok=True)
                deaths[index] += _deaths(log)
                if deaths[index] >= DEATHS:
                    done(left[index], f"{left.pop(index)}: its lane died {DEATHS} times: see {place}")
    finally:
        permission.unlink(missing_ok=True)
        end_lanes(permission.parent, keep=bool(left) or DEATHS in deaths.values())


def end_lanes(folder: Path, keep: bool = False) -> None:
    """Cancel the lanes of a sweep's folder, if there are any, and wait for their end; remove their files."""
    if (folder / PLACE).exists():
        end = time.monotonic() + PATIENCE
        with suppress(OSError, subprocess.SubprocessError):  # a folder that was copied to where there is no Slurm
            _ask("scancel", "--me", f"--name={folder.name}")
            while _is_queued(folder) and time.monotonic() < end:
                time.sleep(LOOK_INTERVAL)
        if not keep:
            shutil.rmtree(folder / PLACE, ignore_errors=True)


def _is_queued(folder: Path) -> bool:
    """Return whether Slurm still has lanes. squeue knows: sacct, which submitit asks, needs a database."""
    try:
        return bool(_ask("squeue", "--me", "--noheader", f"--name={folder.name}"))
    except subprocess.SubprocessError:  # it will answer again
        return True


def _read(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def _has_ended(log: Sequence[str]) -> bool:
    return bool(log) and log[-1].startswith(ENDED)


def _deaths(log: Sequence[str]) -> int:
    return log.count(BEGUN) - log.count(STOPPED)


def _submit(lanes: "_Lane", slurm: Slurm) -> None:
    import submitit

    executor = submitit.SlurmExecutor(lanes.place)
    executor.update_parameters(
        job_name=lanes.place.parent.name,
        partition=slurm.partition or None,
        gpus_per_node=slurm.gpus or None,
        cpus_per_task=slurm.cpus,
        time=slurm.time,
        signal_delay_s=min(90, 15 * slurm.time),
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},
    )
    try:
        executor.map_array(lanes.compute, range(lanes.number))
    except RuntimeError as error:
        raise RunError(f"Slurm refuses the lanes: {str(error).strip().splitlines()[-1]}") from None


class _Lane(NamedTuple):
    """What the lanes of an array get."""

    tasks: Mapping[int, Any]
    attempt: Callable[..., str | None]
    place: Path
    permission: Path
    number: int

    def compute(self, lane: int) -> None:
        """Compute this lane's slice of the runs, then what the others have not begun."""
        signals: list[int] = []
        # submitit would ignore SIGTERM (cancelled, preempted), and break off a step at SIGUSR2 (the time is over).
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: signals.append(number))

        def stopped() -> bool:
            return bool(signals) or not os.path.exists(self.permission)

        for place in sorted(range(len(self.tasks)), key=lambda place: (place - lane) % self.number):
            if not stopped():
                self._compute_run([*self.tasks][place], lane, stopped)
        if signal.SIGUSR2 in signals and os.path.exists(self.permission):
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
            os._exit(0)

    def _compute_run(self, index: int, lane: int, stopped: Callable[[], bool]) -> None:
        path, log = self.place / str(index), list[str]()
        try:
            # On every shared file system one lane alone creates it; flock may not hold between nodes.
            path.touch(exist_ok=False)
        except FileExistsError:  # another lane's, or this one's before it was requeued
            log = _read(path)
            if log[:1] != [str(lane)] or _has_ended(log) or _deaths(log) >= DEATHS:
                return
        with open(path, "a", buffering=1) as file:
            file.write(f"{BEGUN}\n" if log else f"{lane}\n{BEGUN}\n")
            try:
                file.write(f"{ENDED}{json.dumps(self.attempt(self.tasks[index], stopped=stopped))}\n")
            except Interrupted:
                file.write(f"{STOPPED}\n")
