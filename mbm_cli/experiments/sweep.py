"""`mbm sweep`: a run for every combination of values of a config's fields, and for every seed; what do they give?"""

import csv
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from mbm_cli import config as configs
from mbm_cli import plots
from mbm_cli.config import Config
from mbm_cli.data import fetch_mnist
from mbm_cli.environment import environment
from mbm_cli.errors import Interrupted, RequestError, RunError
from mbm_cli.experiments import setup
from mbm_cli.experiments.member import member_name, members, seeds_from
from mbm_cli.experiments.workers import Outcome, Task, work_here, work_in_processes
from mbm_cli.lists import split_at_commas
from mbm_cli.multipliers import FAMILIES, Multiplier
from mbm_cli.render import SweepDisplay
from mbm_cli.runs import Count, Fields, Run, as_json
from mbm_cli.tables import shown

KIND: Literal["sweep"] = "sweep"
MULTIPLIER = "model.multiplier"
ELSEWHERE = {"seed": "use --seeds N, and --seed for the first", "name": "runs are named after their values"}
CSV_FIELDS = (
    *("seed", "status", "test_accuracy", "best_test_accuracy", "test_loss", "train_loss"),
    *("epochs", "epoch_seconds", "run"),
)
# Improvements of area and power against an IEEE 754 single-precision multiplier, by family and truncated bits, as
# reported in the paper that the multipliers come from (H. Saadat et al., IEEE TCAD 37(11), 2018; AFMA is mitchell).
REPORTED = {("mbm", 0): (11.7, 16.1), ("mitchell", 0): (13.6, 19.2), ("mbm", 20): (28.0, 57.0)}


@dataclass(frozen=True)
class Combination:
    """One value for each field that is varied, and the config that has them."""

    number: int
    values: dict[str, Any]
    config: Config

    @property
    def label(self) -> str:
        return _label(self.values)

    def tasks(self, folder: Path, seeds: int, threads: int, begun: Mapping[str, Run]) -> list[Task]:
        """A run for each seed."""
        tasks = []
        for seed in seeds_from(self.config.seed, seeds):
            name = member_name([str(self.number), *map(shown, self.values.values())], seed)
            config = self.config.model_copy(update={"name": name, "seed": seed})
            tasks.append(Task(f"{self.label}, seed {seed}", folder, config, begun.get(name), threads))
        return tasks


class _Combination(Fields):
    """As a config has it, and what tells its products from any others."""

    values: dict[str, Any]
    config: dict[str, Any]
    keys: list[str]


class _Plan(Fields):
    kind: Literal["sweep"]
    vary: dict[str, list[str]]
    seeds: Count
    threads: Count
    jobs: Count
    combinations: Annotated[list[_Combination], Field(min_length=1)]


def sweep(
    config: Config,
    vary: Sequence[str],
    seeds: int,
    jobs: int,
    output: Path,
    display: SweepDisplay,
    stopped: Callable[[], bool] = lambda: False,
    threads: int | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Train the config with every combination of values, for so many seeds from the config's on.

    The runs lie in the sweep's folder, below ``output``, as ordinary runs. One that fails (its loss is not finite, say)
    does not keep the others from being trained.

    Args:
        vary: ``section.field=A,B,...`` each; a comma in a value is protected by brackets, braces or quotes.
        jobs: runs at once, each in a process of its own. A script that asks for several has to be one that can be
            imported (``if __name__ == "__main__":``), as for every use of Python's ``multiprocessing``.
        threads: CPU threads of each run, which decide a result's last bits; without it, each of so many jobs has an
            equal share of PyTorch's.

    Returns:
        The sweep's run and what its ``sweep.json`` holds.

    Raises:
        RequestError: a field or a value is wrong; nothing is written then.
        RunError: a run failed, its process died, or something cannot be written.
        Interrupted: ``stopped`` said so.
    """
    values = _parse_vary(vary)
    threads = threads or max(1, torch.get_num_threads() // jobs)
    combinations = _combinations(config, values)
    for combination in combinations:
        seeds_from(combination.config.seed, seeds)
    plan = _Plan(
        kind=KIND,
        vary=values,
        seeds=seeds,
        threads=threads,
        jobs=jobs,
        combinations=[
            _Combination(values=c.values, config=c.config.model_dump(), keys=setup.multiplier_keys(c.config))
            for c in combinations
        ],
    )
    device = _prepare(config, combinations, threads)
    files = {
        "config.yaml": configs.dump(config),
        "environment.json": as_json(environment(device)),
        "plan.json": as_json(plan.model_dump()),
        "summary.json": as_json(_summary("running", combinations, device, [])),
    }
    run = Run.create(output, f"{config.name}-sweep", files)
    with run.hold():
        return run, _sweep(run, config, plan, combinations, device, jobs, display, stopped)


def resume(
    run: Run, jobs: int | None, display: SweepDisplay, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Go on with a sweep: finished runs are kept, those that were begun go on from their checkpoints.

    ``jobs`` replaces the sweep's. Results, arguments and errors as `sweep`'s.
    """
    plan = run.plan(KIND, _Plan)
    if plan is None:
        raise RequestError(f"{run.folder} is not a sweep: mbm runs list shows those there are")
    config = configs.parse(run.config_text(), str(run.folder / "config.yaml"))
    combinations = []
    for number, one in enumerate(plan.combinations, 1):
        varied = configs.of_document(one.config, f"{run.folder / 'plan.json'}, combination {number}")
        setup.refuse_other_products(varied, one.keys, run.folder)
        setup.refuse_other_device(varied, run)
        combinations.append(Combination(number, one.values, varied))
    device = _prepare(config, combinations, plan.threads)
    with run.hold():
        return _sweep(run, config, plan, combinations, device, jobs or plan.jobs, display, stopped)


def _label(values: Mapping[str, Any]) -> str:
    """A combination in one line."""
    return ", ".join(map(shown, values.values()))


def _parse_vary(vary: Sequence[str]) -> dict[str, list[str]]:
    if not vary:
        raise RequestError("nothing is varied: name a field and its values, --vary model.multiplier=mbm,mbm-t8")
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
    return values


def _combinations(config: Config, vary: Mapping[str, Sequence[str]]) -> list[Combination]:
    """Every combination, the values of the last field innermost; each config is checked as a whole."""
    text, combinations = configs.dump(config), []
    known: dict[str, list[str]] = {}
    for number, choice in enumerate(itertools.product(*vary.values()), 1):
        asked = [f"{field}={value}" for field, value in zip(vary, choice, strict=True)]
        one = configs.parse(text, f"--vary {' '.join(asked)}", asked, flag="--vary")
        same = known.setdefault(configs.dump(one), asked)
        if same is not asked:
            raise RequestError(f"--vary: {' '.join(asked)} is the same as {' '.join(same)}, which is asked for, too")
        combinations.append(Combination(number, {field: _value(one, field) for field in vary}, one))
    return combinations


def _value(config: Config, field: str) -> Any:
    if field == MULTIPLIER:
        return str(config.model.multiplier)
    value = config.model_dump()
    for part in field.split("."):
        value = value[part]
    return value


def _prepare(config: Config, combinations: Sequence[Combination], threads: int) -> torch.device:
    """Check what can be checked before the first run, and have the data fetched once; gives the config's device."""
    device = setup.prepare(config, threads)
    for combination in combinations:
        try:
            setup.prepare(combination.config)
        except RequestError as error:
            raise RequestError(f"--vary: with {combination.label}: {error}") from None
    for root in {combination.config.data.root for combination in combinations}:
        fetch_mnist(Path(root) if root else None)
    return device


def _sweep(
    run: Run,
    config: Config,
    plan: _Plan,
    combinations: Sequence[Combination],
    device: torch.device,
    jobs: int,
    display: SweepDisplay,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    begun = members(run.folder)
    planned = [(c, task) for c in combinations for task in c.tasks(run.folder, plan.seeds, plan.threads, begun)]
    tasks = {task.config.name: (combination, task) for combination, task in planned}
    rows: dict[str, dict[str, Any]] = {}
    summaries: list[dict[str, Any]] = []

    def keep(name: str, finished: Run | None, reason: str | None) -> None:
        rows[name] = _row(*tasks[name], finished, reason)
        if finished is not None:
            summaries.append(finished.summary())

    for name, (_, task) in tasks.items():
        if task.begun is not None and _is_complete(task.begun, task.config):
            keep(name, task.begun, None)

    def summarize(status: str, **more: Any) -> None:
        run.write_json("summary.json", {**_summary(status, combinations, device, summaries), **more})

    def done(task: Task, outcome: Outcome) -> None:
        name = task.config.name
        finished = Run(run.folder / outcome.run) if outcome.run else members(run.folder).get(name)
        keep(name, finished, outcome.reason)
        summarize("running")
        display.run_done(task.label, rows[name])

    summarize("running")
    try:
        seeds = f"{plan.seeds} seed{'s'[: plan.seeds != 1]}"
        what = f"{config.name}: {len(combinations)} combinations of {', '.join(plan.vary)}, {seeds}"
        display.start(what, len(tasks), len(rows))
        todo = [task for name, (_, task) in tasks.items() if name not in rows]
        if jobs == 1:
            work_here(todo, lambda task, part: display.progress(task.label, part), done, stopped)
        else:
            work_in_processes(todo, jobs, lambda task, part: display.progress(task.label, part), done, stopped)
        result = _result(config, plan, combinations, device, [rows[name] for name in tasks])
        _write(run, result)
        failed = [row for row in result["runs"] if row["status"] == "failed"]
        if failed:
            display.finish(result, run.folder)
            raise RunError(f"{len(failed)} of {len(tasks)} runs failed, the first one: {failed[0]['reason']}")
        summarize("completed")
    except (Interrupted, BrokenPipeError):  # nobody reads the output any more
        summarize("interrupted")
        raise Interrupted(
            f"interrupted after {len(rows)} of {len(tasks)} runs; to go on: mbm sweep --resume {run.folder}"
        ) from None
    except RunError as error:
        summarize("failed", reason=str(error))
        raise RunError(str(error), f"To go on with the sweep: mbm sweep --resume {run.folder}") from error
    except Exception as error:
        summarize("failed", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        display.close()
    display.finish(result, run.folder)
    return result


def _is_complete(run: Run, config: Config) -> bool:
    summary = run.summary()
    return summary["status"] == "completed" and summary["epochs"] >= config.train.epochs


def _row(combination: Combination, task: Task, run: Run | None, reason: str | None = None) -> dict[str, Any]:
    """What became of a run; ``reason`` tells why it failed."""
    summary = run.summary() if run else {}
    last = (run.metrics() if run else [])[-1:] or [{}]
    seconds = summary.get("epoch_seconds", [])
    row = {
        "combination": combination.number,
        "values": combination.values,
        "seed": task.config.seed,
        "status": "failed" if reason else summary["status"],
        "test_accuracy": summary.get("test_accuracy"),
        "best_test_accuracy": summary.get("best_test_accuracy"),
        "test_loss": last[0].get("test_loss"),
        "train_loss": last[0].get("train_loss"),
        "epochs": summary.get("epochs", 0),
        "epoch_seconds": float(np.median(seconds)) if seconds else None,
        "run": run.name if run else None,
    }
    return {**row, "reason": reason} if reason else row


def _result(
    config: Config,
    plan: _Plan,
    combinations: Sequence[Combination],
    device: torch.device,
    rows: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    # What is varied has no single value; the rows tell theirs.
    common = {"model": config.model.name, "device": device.type, "epochs": config.train.epochs}
    varied = {"model.name": "model", "device": "device", "train.epochs": "epochs"}
    for field in plan.vary:
        common.pop(varied.get(field, field), None)
    summaries = [_over_seeds(c, [row for row in rows if row["combination"] == c.number]) for c in combinations]
    planned = plan.model_dump(include={"vary", "seeds", "threads", "jobs"})
    return {"config": config.name, **common, **planned, "combinations": summaries, "runs": list(rows)}


def _over_seeds(combination: Combination, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A combination's figures over the seeds whose runs were completed; fractions and seconds."""
    completed = [row for row in rows if row["status"] == "completed"]
    accuracies = [row["test_accuracy"] for row in completed]
    return {
        "values": combination.values,
        "test_accuracy": accuracies,
        "test_accuracy_mean": float(np.mean(accuracies)) if accuracies else None,
        "test_accuracy_std": float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None,
        "test_accuracy_best": max((row["best_test_accuracy"] for row in completed), default=None),
        "test_loss_mean": float(np.mean([row["test_loss"] for row in completed])) if completed else None,
        "epoch_seconds_median": float(np.median([row["epoch_seconds"] for row in completed])) if completed else None,
        "failed": len(rows) - len(completed),
        "runs": [row["run"] for row in rows],
    }


def _write(run: Run, result: dict[str, Any]) -> None:
    run.write_json("sweep.json", result)
    run.write("sweep.csv", _csv(result))
    drawn = [one for one in result["combinations"] if one["test_accuracy"]]
    if drawn:
        lines = _lines(drawn, list(result["vary"]))
        if lines:
            picture = plots.sweep_lines(lines, REPORTED)
        else:
            title = ", ".join(result["vary"])
            picture = plots.sweep_ranges([(_label(one["values"]), one["test_accuracy"]) for one in drawn], title)
        run.write("sweep.png", picture)


def _csv(result: dict[str, Any]) -> str:
    """A row a run; a field that is null is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*result["vary"], *CSV_FIELDS])
    for row in result["runs"]:
        values = ["" if value is None else shown(value) for value in row["values"].values()]
        writer.writerow([*values, *(row[field] for field in CSV_FIELDS)])
    return text.getvalue()


def _lines(combinations: Sequence[dict[str, Any]], fields: Sequence[str]) -> list[plots.SweepLine] | None:
    """Accuracy against truncated bits, a line a family, where that is what the sweep is about; else ``None``."""
    if MULTIPLIER not in fields:
        return None
    lines: dict[tuple[str, bool, str], plots.SweepLine] = {}
    for one in combinations:
        try:
            multiplier = Multiplier.parse(one["values"][MULTIPLIER])
        except ValueError:  # several, by layer
            return None
        family, rounded = multiplier.family, multiplier.result_bits is not None
        others = _label({field: value for field, value in one["values"].items() if field != MULTIPLIER})
        name = ", ".join(filter(None, (f"{family}-tT-rR" if rounded else family, others)))
        line = lines.setdefault((family, rounded, others), plots.SweepLine(family, name, rounded, {}))
        # User's multipliers have no truncated bits; and some differ in the result's bits alone.
        if family not in FAMILIES or multiplier.truncate in line.accuracies:
            return None
        line.accuracies[multiplier.truncate] = one["test_accuracy"]
    has_line = any(len(line.accuracies) > 1 for line in lines.values())
    return list(lines.values()) if has_line and len(lines) <= plots.MOST_LINES else None


def _summary(
    status: str, combinations: Sequence[Combination], device: torch.device, runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """In the form of a training run's, so that ``mbm runs list`` shows sweeps, too."""
    best = [run["best_test_accuracy"] for run in runs if run["best_test_accuracy"] is not None]
    return {
        "status": status,
        "multiplier": ", ".join(dict.fromkeys(str(one.config.model.multiplier) for one in combinations)),
        "device": device.type,
        "epochs": sum(run["epochs"] for run in runs),
        "test_accuracy": None,
        "best_test_accuracy": max(best, default=None),
        "epoch_seconds": [seconds for run in runs for seconds in run["epoch_seconds"]],
        "train_seconds": [seconds for run in runs for seconds in run["train_seconds"]],
        "total_seconds": sum(run["total_seconds"] for run in runs),
    }
