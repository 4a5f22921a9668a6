"""`mbm sweep`: a run for every combination of values of a config's fields, and for every seed."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mbm_cli import config as configs
from mbm_cli.config import Config, Engine
from mbm_cli.costs import Prices
from mbm_cli.errors import RequestError
from mbm_cli.experiments import members
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.experiments.members import Row
from mbm_cli.runs import Plan, Run

ELSEWHERE = {"seed": "use --seeds N, and --seed for the first", "name": "runs are named after their values"}


@dataclass(frozen=True)
class CombinationResult:
    """A combination's figures over the seeds whose runs were completed."""

    values: dict[str, Any]
    test_accuracy: list[float]
    test_accuracy_mean: float | None
    test_accuracy_std: float | None
    test_accuracy_best: float | None
    test_loss_mean: float | None
    epoch_seconds_median: float | None
    failed: int
    runs: list[str | None]
    train_seconds_median: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Sweep:
    """``sweep.json``. ``model``, ``device`` and ``epochs`` are ``None`` where they are varied.

    ``costs`` says what the costs of the combinations' products are, if there are any.
    """

    config: str
    vary: dict[str, list[str]]
    seeds: int
    jobs: int
    combinations: list[CombinationResult]
    runs: list[Row]
    model: str | None = None
    device: str | None = None
    epochs: int | None = None
    threads: int | None = None
    costs: str | None = None
    at_once: int | None = 1


def sweep(
    config: Config,
    vary: Sequence[str],
    seeds: int,
    output: Path,
    watch: Watch | None = None,
    stopped: Stopped = never,
    engine: Engine | None = None,
    prices: Prices | None = None,
) -> Finished[Sweep]:
    """Train the config with every combination of values, for so many seeds from the config's on.

    The runs lie in the sweep's folder, below ``output``. One that fails does not stop the others.

    Args:
        vary: ``section.field=A,B,...`` each; a comma in a value is protected by brackets, braces or quotes.
        engine: where, and how many runs at once; by default in turn on a GPU. A script that asks for several processes
            must be importable (``if __name__ == "__main__":``), as for every use of Python's ``multiprocessing``.
        prices: what multipliers cost; the package's without any.

    ``train.threads`` are those of each run, which decide a result's last bits; by default PyTorch's choice is shared
    among the jobs, and a cluster's have as many as CPUs.

    Raises:
        RequestError: a field or a value is wrong; nothing is written then.
        RunError: a run failed, its process died twice, or something cannot be written.
        Interrupted: ``stopped`` returned true.
    """
    if not vary and seeds == 1:
        raise RequestError(
            "nothing is varied: name a field and its values, --vary model.multiplier=mbm,mbm-t8, or several --seeds"
        )
    values, engine = _parse_vary(vary), engine or Engine(at_once=None)
    config = members.with_threads(config, engine)
    run, plan, varied = members.create(
        "sweep", config, values, _combinations(config, values), seeds, engine, output, prices
    )
    with run.hold():
        return members.carry_out(run, config, plan, varied, watch or Watch(), stopped, conclude)


def _parse_vary(vary: Sequence[str]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for text in vary:
        field, equals, listed = text.partition("=")
        field = field.strip()
        if not equals:
            raise RequestError(f"--vary {text!r}: write section.field=A,B,..., for example optimizer.lr=0.001,0.002")
        if field in ELSEWHERE:
            raise RequestError(f"--vary {field}: {ELSEWHERE[field]}")
        if field in values:
            raise RequestError(f"--vary {field} is given twice: name all its values in one, {field}=A,B,...")
        values[field] = split_at_commas(listed)
        if twice := next((value for value in values[field] if values[field].count(value) > 1), None):
            raise RequestError(f"--vary {field} names {twice} twice")
    return values


def split_at_commas(text: str) -> list[str]:
    """Split ``A,B,...``; a comma within brackets, braces or quotes belongs to its value, as in a YAML list.

    Raises:
        RequestError: a quote is not closed, or a value begins with a character that YAML reserves.
    """
    # The YAML scanner knows where a value ends; the texts between its commas are kept as they are.
    opening, closing = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken), yaml.FlowSequenceEndToken
    values, start, depth = [], 0, 0
    try:
        for token in yaml.scan(f"[{text}]"):
            at = token.start_mark.index - 1
            depth += isinstance(token, opening) - isinstance(token, (closing, yaml.FlowMappingEndToken))
            if depth == 1 and isinstance(token, yaml.FlowEntryToken):
                values.append(text[start:at].strip())
                start = at + 1
    except yaml.YAMLError as error:
        raise RequestError(f"{text!r} is not a list A,B,... ({getattr(error, 'problem', error)})") from None
    return [*values, text[start:].strip()]


def _combinations(config: Config, vary: Mapping[str, Sequence[str]]) -> list[Config]:
    """Return the config of every combination, the values of the last field innermost."""
    text, known = configs.dump(config), dict[str, str]()
    combinations = []
    for choice in itertools.product(*vary.values()):
        asked = [f"{field}={value}" for field, value in zip(vary, choice, strict=True)]
        one = configs.parse(text, f"--vary {' '.join(asked)}", asked, flag="--vary")
        same = known.setdefault(configs.dump(one), " ".join(asked))
        if same != " ".join(asked):
            raise RequestError(f"--vary: {' '.join(asked)} is the same as {same}, which is asked for, too")
        combinations.append(one)
    return combinations


def conclude(run: Run, config: Config, plan: Plan, varied: Sequence[Config], rows: list[Row]) -> Sweep:
    """Write a sweep's result from its rows."""
    combinations = [
        replace(_over_seeds(one.values, [row for row in rows if row.combination == number]), cost=one.cost)
        for number, one in enumerate(plan.combinations, 1)
    ]
    devices = [Run(run.folder / row.run).summary().device for row in rows if row.run]
    # What is varied has no single value; the rows have theirs.
    result = Sweep(
        config=config.name,
        vary=plan.vary,
        seeds=plan.seeds,
        jobs=plan.jobs,
        at_once=plan.at_once,
        combinations=combinations,
        runs=rows,
        model=None if "model.name" in plan.vary else str(config.model.name),
        device=None if "device" in plan.vary or not devices else devices[0],
        epochs=None if "train.epochs" in plan.vary else config.train.epochs,
        threads=None if "train.threads" in plan.vary else config.train.threads,
        costs=plan.costs,
    )
    run.write_json("sweep.json", result)
    run.write("sweep.csv", members.csv_of(result.vary, result.runs))
    return result


def _over_seeds(values: dict[str, Any], rows: Sequence[Row]) -> CombinationResult:
    completed = [row for row in rows if row.status == "completed"]

    def mean_of(field: str, mean: Callable[..., Any] = np.mean) -> float | None:
        return float(mean([getattr(row, field) for row in completed])) if completed else None

    accuracies = [row.test_accuracy for row in completed if row.test_accuracy is not None]
    return CombinationResult(
        values=values,
        test_accuracy=accuracies,
        test_accuracy_mean=mean_of("test_accuracy"),
        test_accuracy_std=float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        test_accuracy_best=mean_of("best_test_accuracy", np.max),
        test_loss_mean=mean_of("test_loss"),
        epoch_seconds_median=mean_of("epoch_seconds", np.median),
        train_seconds_median=mean_of("train_seconds", np.median),
        failed=len(rows) - len(completed),
        runs=[row.run for row in rows],
    )
