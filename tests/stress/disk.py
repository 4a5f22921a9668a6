"""Fill disks and damage files: each fault is named in one line, nothing else changes, and a run can be resumed.

``python tests/stress/disk.py [DAMAGES]`` damages each file that often (40), by cutting it off or by flipping a bit.
"""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from runs import DONE, SMALL, Answer, check_readable, check_same, mbm, resume, run_in, stage, start_until, state

TRAIN = ["train", "--epochs", "2", *SMALL]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, half-written ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_refused(answer: Answer, *parts: str) -> None:
    """Check that a command failed with an error of a line, and perhaps a hint, that has these parts."""
    assert answer.code in (1, 2), answer
    assert answer.err.startswith("mbm: "), answer
    assert answer.err.count("\n") <= 2, answer
    assert all(part in answer.err for part in parts), (parts, answer)


def limit_file_sizes(folder: Path, whole: Path, limits: int) -> None:
    """Limit the size of files, so that one of a run's is a byte too large, or twice as large as it may be."""
    sizes = [path.stat().st_size for path in sorted(whole.iterdir())]
    chosen = [limit for size in sizes for limit in (size - 1, size // 2)]
    for limit in random.Random(0).sample(chosen, min(limits, len(chosen))):
        own = folder / str(limit)
        own.mkdir(parents=True)
        check_refused(mbm(*TRAIN, folder=own, file_size=limit), "runs/", "File too large")
        run = run_in(own)
        if run is None:
            assert contents(own) == {}
            continue
        check_readable(run)
        assert mbm(*resume(run), folder=own) == DONE
        check_same(run, state(whole))


def fill_disk(folder: Path, whole: Path) -> None:
    """Train on a file system of one MiB, then give it room."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "mbm-stress", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        print("a full file system: left out, none can be mounted here")
        return
    try:
        check_refused(mbm(*TRAIN, folder=folder), "runs/", "No space left on device")
        run = run_in(folder)
        check_readable(run)
        check_refused(mbm(*resume(run), folder=folder), "runs/", "No space left on device")
        subprocess.run(["dd", "if=/dev/zero", f"of={folder}/filling"], capture_output=True, check=False)
        before = contents(folder)
        check_refused(mbm("configs", "copy", "lenet-mbm", "mine.yaml", folder=folder), "mine.yaml")
        check_refused(mbm("multipliers", "export", "mbm", "mine.bin", folder=folder), "mine.bin")
        assert contents(folder) == before
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        assert mbm(*resume(run), folder=folder) == DONE
        check_same(run, state(whole))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def cut_off(content: bytes, choose: random.Random) -> bytes:
    return content[: choose.randrange(len(content))]


def flip_bit(content: bytes, choose: random.Random) -> bytes:
    at = choose.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]


def damage(folder: Path, damages: int) -> None:
    """Damage a run's checkpoint, its metrics and its table: the command that needs the file names it, or is not harmed.

    Harmless is what is not read (a date in the checkpoint's archive), and what a kill may leave: metrics without
    their last line. The run then ends as the undisturbed one.
    """
    table = folder / "table.npy"
    assert mbm("multipliers", "export", "mbm-t16-r7", table, "--bits", 4, folder=folder).code == 0
    process = start_until("metrics.jsonl", *TRAIN, "--multiplier", f"lut:{table}", folder=folder)
    process.send(signal.SIGINT)
    process.wait()
    begun = run_in(folder)
    whole = copy(begun, folder / "whole")
    assert mbm(*resume(whole), folder=folder / "whole") == DONE
    choose = random.Random(0)
    for name, command in (
        ("checkpoint.pt", resume(begun)),
        ("metrics.jsonl", ["runs", "show", begun.name]),
        ("table.npy", resume(begun)),
    ):
        refused = 0
        for number in range(damages):
            own = folder / f"{name}{number}"
            run = copy(begun, own)
            path = table if name == table.name else run / name
            content = path.read_bytes()
            path.write_bytes((cut_off if number % 2 else flip_bit)(content, choose))
            before = contents(own)
            answer = mbm(*command, folder=own)
            assert contents(own) == before or answer == DONE
            if answer.code:
                check_refused(answer, name)
                refused += 1
            else:
                assert mbm(*resume(run), folder=own) == DONE
                check_same(run, state(whole))
            if path == table:
                path.write_bytes(content)
            shutil.rmtree(own)
        print(f"{name} damaged {damages} times: {refused} refused, {damages - refused} harmless")


def copy(run: Path, folder: Path) -> Path:
    """Copy a run into the runs of another folder."""
    return Path(shutil.copytree(run, folder / "runs" / run.name))


def main(damages: int = 40) -> None:
    with stage("full disks") as folder:
        (folder / "whole").mkdir()
        assert mbm(*TRAIN, folder=folder / "whole") == DONE
        whole = run_in(folder / "whole")
        limit_file_sizes(folder / "limits", whole, damages)
        fill_disk(folder / "disk", whole)
    with stage("damaged files") as folder:
        damage(folder, damages)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
