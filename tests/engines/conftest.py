"""Where the engines' tests find the project's other tests, and a Slurm of one node."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
SCRIPT = Path(__file__).with_name("one-node-slurm")
PROGRAMS = ("slurmctld", "slurmd", "squeue", "munged")
# Set here, because `mbm` is forked from a process that begins with this environment.
FOLDER = tempfile.mkdtemp(prefix="slurm-")
os.environ["SLURM_CONF"] = f"{FOLDER}/slurm.conf"


@pytest.fixture(scope="session")
def slurm():
    """Start a Slurm of two CPUs."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm needs root and {', '.join(missing) or 'nothing else'} (CONTRIBUTING.md)")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    os.chmod(FOLDER, 0o755)
    subprocess.run([SCRIPT, "start", FOLDER, "2", str(port)], check=True, timeout=30)
    yield
    subprocess.run([SCRIPT, "stop", FOLDER], check=True, timeout=30)
    shutil.rmtree(FOLDER, ignore_errors=True)
