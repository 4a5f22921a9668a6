"""Where the engines' tests find the project's other tests, and a Slurm of one node."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
SCRIPT = Path(__file__).with_name("one-node-slurm")
PROGRAMS = ("slurmctld", "slurmd", "squeue", "munged")
# Set here, because `mbm` is forked from a process that begins with this environment.
FOLDER = Path(tempfile.gettempdir(), f"mbm-slurm-{os.getpid()}")
os.environ["SLURM_CONF"] = f"{FOLDER}/slurm.conf"


@pytest.fixture(scope="session")
def slurm():
    """Start a Slurm of two CPUs."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"{', '.join(missing)} missing: see CONTRIBUTING.md" if missing else "Slurm is started as root")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    subprocess.run([SCRIPT, "start", FOLDER, "2", str(port)], check=True, timeout=30)
    yield
    subprocess.run([SCRIPT, "stop", FOLDER], check=True, timeout=30)
    while FOLDER.exists():  # its programs write until they have ended
        shutil.rmtree(FOLDER, ignore_errors=True)
        time.sleep(0.1)
