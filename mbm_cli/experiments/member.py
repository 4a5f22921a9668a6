"""An ordinary run inside the folder of a comparison or a sweep: new, gone on with, or found finished."""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mbm_cli import config as configs
from mbm_cli.config import Config
from mbm_cli.data import Split
from mbm_cli.errors import RequestError
from mbm_cli.experiments import train as training_run
from mbm_cli.render import Display
from mbm_cli.runs import Run, list_runs

SEEDS = 2**63
NAME_LENGTH = 34  # of the parts: a config's name has 64 characters, a seed up to 19 of them


def member_name(parts: Sequence[str], seed: int) -> str:
    """A name that a config can have, ``<part>-<part>-seed<seed>``; it tells parts apart that do not fit in there."""
    text = "-".join(parts)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:NAME_LENGTH]
    if name != text:
        name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
    return f"{name}-seed{seed}"


def seeds_from(first: int, number: int) -> range:
    """So many seeds.

    Raises:
        RequestError: the last one would be none.
    """
    if first + number > SEEDS:
        raise RequestError(f"--seeds {number} from {first} on goes beyond the last one, 2^63 - 1: use a smaller --seed")
    return range(first, first + number)


def members(folder: Path) -> dict[str, Run]:
    """The runs that were begun in a folder, by their configs' names."""
    return {configs.parse(run.config_text(), str(run.folder / "config.yaml")).name: run for run in list_runs(folder)}


def train_member(
    folder: Path,
    config: Config,
    begun: Run | None,
    display: Display,
    stopped: Callable[[], bool],
    data: tuple[Split, Split],
    threads: int | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Train in a new run below ``folder``, or go on with the one that was begun; gives the run and its summary.

    Arguments and errors as `mbm_cli.experiments.train.train`'s.
    """
    if begun is None:
        return training_run.train(config, folder, display, stopped, threads, data)
    return begun, training_run.resume(begun, None, display, stopped, data)
