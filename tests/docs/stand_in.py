"""Runs in the place of a program in the documents' commands: `stand_in.py mbm train` for `mbm train`.

It gives a command of SMALL a small size, leaves one of NOT_RUN out, and puts a run in the place of the word RUN. What
has run already, in this document or another, and leaves nothing but a run's folder, does not run again.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)

FOLDERS = Path(os.environ["MBM_DOCS_FOLDERS"])  # of the documents
DONE = FOLDERS / "commands.txt"

# By the beginning of a command: what is put behind it, which wins over what stands before.
FEW = "--set data.train_limit=128 --set data.test_limit=100"
SMALL = {
    "mbm train": f"{FEW} --epochs 1",
    "mbm compare": f"{FEW} --epochs 1 --seeds 1",
    "mbm sweep": f"{FEW} --epochs 1 --seeds 1",
    "mbm profile epoch": FEW,
    "mbm characterize": "--samples 20000",
    "mbm profile conv": "--help",  # takes half a minute; an option that there is not is told all the same
}
# By the beginning of a command: why it is not run. What `make` is asked for must be there.
NOT_RUN = {
    "python tests": "takes minutes, and has a target of its own",
    "make": "sets up and runs everything",
    "pip": "installs",
    "uv": "installs",
    "python -m pip": "installs",
    "python -m venv": "installs",
    "git": "needs the network",
    "npm": "needs the network",
    "jupyter": "does not end",
    "mbm --install-completion": "changes the user's shell",
}
GPU_ONLY = "--device cuda"
ONCE = ("mbm train", "mbm compare", "mbm sweep", "mbm profile", "mbm characterize", "mbm doctor")
# What RUN stands for by the beginning of a command: a run with this file.
KINDS = {"mbm compare": "compare.json", "mbm sweep": "sweep.json", "": "checkpoint.pt"}


def main(name: str, arguments: list[str]) -> int:
    """Returns an exit code, or becomes the program."""
    command = " ".join([name, *arguments])
    why = first(NOT_RUN, command.replace("python3 ", "python "))
    if GPU_ONLY in command and not Path("/dev/nvidiactl").exists():
        why = "there is no GPU"
    if why is not None:
        print(f"not run, {why}: {command}")
        pretend(name, arguments)
        # Without running anything, make still says what it does not know.
        is_known = ["make", "--dry-run", "--directory", str(ROOT), *arguments] if name == "make" else ["true"]
        path = os.pathsep.join(os.environ["PATH"].split(os.pathsep)[1:])
        done = subprocess.run(is_known, stdout=subprocess.DEVNULL, env={**os.environ, "PATH": path}, check=False)
        return done.returncode
    if "RUN" in arguments:
        arguments = [newest_run(first(KINDS, command)) if argument == "RUN" else argument for argument in arguments]
    more = first(SMALL, command) or ""
    if "--resume" in arguments or "--help" in arguments:
        more = ""
    command = " ".join([name, *arguments])
    if command.startswith(ONCE) and command in DONE.read_text().splitlines():
        print(f"not run, it has run already: {command}")
        return 0
    program = PYTHON if name.startswith("python") else PYTHON.with_name(name)
    done = subprocess.run([program, *arguments, *more.split()], check=False)
    if done.returncode == 0:
        with DONE.open("a") as file:
            file.write(f"{command}\n")
    return done.returncode


def first(table: dict[str, str], command: str) -> str | None:
    return next((value for beginning, value in table.items() if re.match(rf"{beginning}\b", command)), None)


def newest_run(marker: str) -> str:
    """The newest run with this file that a document's commands, or the test beforehand, have made."""
    found = sorted(FOLDERS.glob(f"*/runs/*/{marker}"), key=lambda path: path.parent.name)
    finished = [path.parent for path in found if status(path.parent) == "completed"]
    if not finished:
        raise SystemExit(f"RUN: no run here has a {marker}; an earlier command has to make one")
    return str(finished[-1])


def status(run: Path) -> str:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["status"]


def pretend(name: str, arguments: list[str]) -> None:
    """What later commands of a block count on: the folder of a clone, something to activate."""
    if name == "git" and arguments[:1] == ["clone"]:
        clone = Path(arguments[-1].rstrip("/").rpartition("/")[2].removesuffix(".git"))
        clone.mkdir(exist_ok=True)
        for folder in ("examples", "configs"):
            (clone / folder).symlink_to(Path(folder).absolute())
    if "venv" in arguments:
        activate = Path(arguments[-1], "bin/activate")
        activate.parent.mkdir(parents=True, exist_ok=True)
        activate.touch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
