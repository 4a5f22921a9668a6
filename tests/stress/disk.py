"""Disks that are full, folders that cannot be written, files that are damaged: each is named, and nothing else changes.

``python tests/stress/disk.py [DAMAGES]`` damages each file that commands read that often (40), by cutting it off or by
flipping a bit; fills the disk at every size of a file that matters, and (where it may mount one) in a small tmpfs.
"""

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stress.kills import EPOCHS, TRAIN, made, state, survive, undisturbed
from stress.starts import Answer, Server

from mbm_cli import data
from mbm_cli.runs import Run, list_runs

NO_NETWORK = {"http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1", "PATH": "/nonexistent"}
LABELS, IMAGES = "t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, half-written ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(answer: Answer, *parts: str, code: int = 1) -> None:
    assert answer.is_clean, answer
    assert answer.code == code, answer
    assert answer.err[answer.err.index("mbm: ") :].count("\n") <= 2, answer  # what it tried may stand above
    assert all(part in answer.err for part in parts), (parts, answer)


# A full disk


def limit_file_sizes(at: Server, folder: Path, sizes: int) -> Counter[str]:
    """No file can be larger than a limit: the one that does not fit is named, and where there is room it goes on."""
    expected = undisturbed(at, made(folder / "undisturbed"), 2)
    found: Counter[str] = Counter()
    (run,) = list_runs(folder / "undisturbed" / "runs")
    files = sorted(path.stat().st_size for path in run.folder.iterdir())
    limits = [*(size - 1 for size in files), *(size // 2 for size in files)]
    for number, limit in enumerate(limits[:: max(1, len(limits) // sizes)]):
        own = made(folder / str(number))
        command = [*TRAIN, "--epochs", 2, "--quiet"]
        answer = at.run(*command, folder=own, file_size=limit)
        check_refused(answer, "File too large", "free space")
        found[answer.err.partition(" (")[0].rpartition("/")[2].partition(" ")[0]] += 1
        runs = list_runs(own / "runs")
        for run in runs:
            run.check()
            assert run.summary()["status"] in ("failed", "stopped")
        if runs:
            answer = at.run("train", "--resume", runs[0].name, "--quiet", folder=own)
            assert answer == Answer(0, "", ""), answer
            assert state(runs[0]) == expected
        else:
            assert contents(own) == {}
    return found


def fill_a_disk(at: Server, folder: Path) -> str | None:
    """A file system of one MiB, then one with room: the run that could not be written goes on and ends as it should."""
    disk = made(folder / "disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "mbm-stress", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return "left out: a file system cannot be mounted here"
    try:
        command = [*TRAIN, "--epochs", 2, "--quiet"]
        check_refused(at.run(*command, folder=disk), "No space left on device", "free space")
        (run,) = list_runs(disk / "runs")
        run.check()
        assert at.run("runs", "list", "--json", folder=disk).code == 0
        check_refused(at.run("train", "--resume", run.name, folder=disk), "No space left on device")
        before = contents(disk)
        check_refused(at.run("configs", "copy", "lenet-mbm", "mine.yaml", folder=_filled(disk)), "mine.yaml", code=2)
        check_refused(at.run("multipliers", "export", "mbm", "mine.bin", folder=disk), "mine.bin", code=2)
        (disk / "filling").unlink()
        assert contents(disk) == before, "something was left on a full disk, or lost"
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        answer = at.run("train", "--resume", run.name, "--quiet", folder=disk)
        assert answer == Answer(0, "", ""), answer
        assert state(run) == undisturbed(at, made(folder / "undisturbed"), 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return None


def _filled(disk: Path) -> Path:
    """Until nothing more goes onto it."""
    with (disk / "filling").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            return disk


def write_nowhere(at: Server, folder: Path) -> None:
    """Folders without the permission to write, by a process that permissions bind."""
    own = made(folder / "own")
    command = [*TRAIN, "--epochs", 1, "--quiet"]
    assert at.run(*command, folder=own).code == 0
    (run,) = list_runs(own / "runs")
    before = contents(own)
    _set_modes(own, 0o555)
    try:
        how = {"folder": own, "unprivileged": True}
        check_refused(at.run(*command, **how), "runs", "Permission denied", "--output")
        check_refused(at.run("train", "--resume", run.name, "--epochs", 2, **how), run.name, "Permission denied")
        check_refused(at.run("configs", "copy", "lenet-mbm", **how), "lenet-mbm.yaml", "Permission denied", code=2)
        check_refused(at.run("eval", run.name, "--multiplier", "exact", **how), "runs", "Permission denied")
        for shown in (("runs", "list"), ("runs", "show", run.name), ("train", "--resume", run.name)):
            answer = at.run(*shown, **how)
            assert (answer.code, answer.err) == (0, ""), answer
        _set_modes(own, 0o000)
        answer = at.run("runs", "list", "--output", own / "runs", folder=folder, unprivileged=True)
        check_refused(answer, "runs", "Permission denied", code=answer.code)
    finally:
        _set_modes(own, 0o755)
    assert contents(own) == before


def _set_modes(folder: Path, mode: int) -> None:
    if mode & 0o100:
        folder.chmod(mode)
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        inner.chmod(mode)
    folder.chmod(mode)


# Damage


def cut_off(content: bytes, choose: random.Random) -> bytes:
    return content[: choose.randrange(len(content))]


def flip_a_bit(content: bytes, choose: random.Random) -> bytes:
    at = choose.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]


DAMAGES = {"cut off": cut_off, "with a bit flipped": flip_a_bit}


def damage_data(at: Server, folder: Path, damages: int) -> int:
    """A damaged file of MNIST is named, in a folder that the user named and in the cache; no other changes."""
    real, choose, tried = data.fetch_mnist(), random.Random(0), 0
    for place, how in (
        ("named", lambda root: {"environment": {"MBM_DATA_DIR": str(root)}}),
        ("config", lambda root: {"environment": {}}),
        ("cache", lambda root: {"environment": {"MBM_DATA_DIR": None, "XDG_CACHE_HOME": None, "HOME": str(root)}}),
    ):
        root = made(folder / place)
        raw = made(root / (".cache/mbm/MNIST/raw" if place == "cache" else "MNIST/raw"))
        for name in data.MD5:
            (raw / name).symlink_to(real / name)
        arguments = how(root)
        arguments["environment"] |= NO_NETWORK
        command = [*TRAIN, "--epochs", 1, "--quiet", *(["--set", f"data.root={root}"] if place == "config" else [])]
        assert at.run(*command, folder=folder, **arguments).code == 0
        shutil.rmtree(folder / "runs")
        for number in range(damages):
            name, damage = (LABELS, IMAGES)[number % 2], list(DAMAGES.values())[number // 2 % 2]
            damaged = damage((real / name).read_bytes(), choose)
            (raw / name).unlink()
            (raw / name).write_bytes(damaged)
            check_refused(at.run(*command, folder=folder, **arguments), str(raw / name))
            assert (raw / name).read_bytes() == damaged
            assert sorted(os.listdir(raw)) == sorted(data.MD5)
            assert not (folder / "runs").exists()
            (raw / name).unlink()
            (raw / name).symlink_to(real / name)
            tried += 1
    return tried


def damage_runs(at: Server, folder: Path, damages: int) -> Counter[str]:
    """A damaged file of a run is named by every command that needs it, and all the other files stay as they are."""
    choose, found = random.Random(0), Counter()
    assert at.run("multipliers", "export", "mbm-t16-r7", folder / "mbm.bin", "--bits", 4, folder=folder).code == 0
    table = ["--multiplier", f"lut:{folder / 'mbm.bin'}"]
    run = _killed(at, folder, table, "metrics.jsonl")
    whole = contents(run.folder)
    for name in ("checkpoint.pt", "metrics.jsonl", "summary.json", "config.yaml", "environment.json"):
        for number in range(damages):
            kind = list(DAMAGES)[number % 2]
            damaged = DAMAGES[kind](whole[name], choose)
            if damaged != whole[name]:
                (run.folder / name).write_bytes(damaged)
                named = _check_damage(at, folder, run, name)
                found[f"{name} {kind}: {'named' if named else 'still valid'}"] += 1
            (run.folder / name).write_bytes(whole[name])
    assert contents(run.folder) == whole
    return found


def _killed(at: Server, folder: Path, more: list[str], until: str) -> Run:
    """A run that was killed when it had that file; what it left half-written is gone."""
    process = at.start([*TRAIN, *more, "--epochs", EPOCHS, "--quiet"], folder)
    while not any(folder.glob(f"runs/*/{until}")):
        time.sleep(0.002)
    process.kill()
    process.wait()
    (run,) = list_runs(folder / "runs")
    with run.hold():
        return run


def _check_damage(at: Server, folder: Path, run: Run, name: str) -> bool:
    """Whether the damage is seen. Whatever it is, no command stumbles, and no other file of the run changes."""
    before = contents(run.folder)
    listed = at.run("runs", "list", "--json", folder=folder)
    assert (listed.code, listed.err) == (0, ""), listed
    seen = '"status": "damaged"' in listed.out
    assert not seen or str(Path("runs", run.name, name)) in listed.out, listed
    for command in (
        ("runs", "show", run.name),
        ("eval", run.folder, "--multiplier", "exact", "--json", "--output", folder / "evaluations"),
    ):
        answer = at.run(*command, folder=folder)
        assert answer.is_clean, answer
        assert answer.code == 0 or name in answer.err, answer
    assert contents(run.folder) == before
    if not seen:
        return False
    # A copy, because what is not needed may be made anew.
    copy = folder / "runs" / "copy"
    shutil.copytree(run.folder, copy)
    answer = at.run("train", "--resume", "copy", "--quiet", folder=folder)
    after = contents(copy)
    shutil.rmtree(copy)
    assert answer.is_clean, answer
    if answer.code != 0:
        assert name in answer.err, answer
        assert after == before, f"{name} damaged: a refused command has changed {_differing(before, after)}"
    return True


def _differing(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    return [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]


def damage_tables(at: Server, folder: Path, damages: int) -> Counter[str]:
    """A damaged table is named, or is another table; a run that was begun with the whole one does not go on with it."""
    choose, found = random.Random(0), Counter()
    for suffix in (".bin", ".npy"):
        table = folder / f"mbm{suffix}"
        assert at.run("multipliers", "export", "mbm-t16-r7", table, "--bits", 4, folder=folder).code == 0
        whole = table.read_bytes()
        run = _killed(at, folder, ["--multiplier", f"lut:{table}"], "checkpoint.pt")
        before = contents(run.folder)
        for number in range(damages):
            kind = list(DAMAGES)[number % 2]
            table.write_bytes(DAMAGES[kind](whole, choose))
            answer = at.run("train", "--resume", run.name, "--quiet", folder=folder)
            if table.read_bytes() == whole:
                continue
            check_refused(answer, str(table), code=answer.code)
            assert answer.code in (1, 2), answer
            assert contents(run.folder) == before, "a refused command has changed a file"
            found[f"{suffix} {kind}"] += 1
        shutil.rmtree(folder / "runs")
    return found


# All of it


def stages(damages: int = 40) -> Iterator[tuple[str, Callable[[Server, Path], object]]]:
    sizes = max(3, damages // 2)
    yield "files that become too large", lambda at, folder: limit_file_sizes(at, folder, sizes)
    yield "a disk of one MiB", fill_a_disk
    yield "folders that cannot be written", write_nowhere
    yield "MNIST damaged", lambda at, folder: damage_data(at, folder, max(1, damages // 2))
    yield "a run's files damaged", lambda at, folder: damage_runs(at, folder, damages)
    yield "tables damaged", lambda at, folder: damage_tables(at, folder, damages)


if __name__ == "__main__":
    sys.exit(survive("disk.py", stages(*map(int, sys.argv[1:]))))
