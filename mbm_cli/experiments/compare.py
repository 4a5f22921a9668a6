"""`mbm compare exact-vs-mbm`: the same network, seed by seed, exact and with multipliers; is there a difference?"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from scipy import stats

from mbm_cli import config as configs
from mbm_cli import plots
from mbm_cli.config import Config
from mbm_cli.data import Split
from mbm_cli.environment import environment
from mbm_cli.errors import Interrupted, MbmError, RequestError, RunError
from mbm_cli.experiments import setup
from mbm_cli.experiments.member import member_name, members, seeds_from, train_member
from mbm_cli.experiments.profile import convolution_seconds
from mbm_cli.layer_multipliers import LayerMultipliers
from mbm_cli.multipliers import Multiplier
from mbm_cli.nn import convert
from mbm_cli.render import CompareDisplay, Display
from mbm_cli.runs import Count, Fields, Run, as_json
from mbm_cli.training import evaluate

KIND: Literal["comparison"] = "comparison"
EXACT = "exact"
GOALS = (0.98, 0.99)  # test accuracies; the table tells how many epochs each took
CONFIDENCE = 0.95

Columns = Mapping[str, Multiplier | LayerMultipliers]  # by the names that they were asked for


class _Column(Fields):
    """As a config has the multiplier, and what tells its products from any others."""

    multiplier: str | dict[str, str]
    keys: list[str]


class _Plan(Fields):
    kind: Literal["comparison"]
    columns: Annotated[dict[str, _Column], Field(min_length=2)]
    seeds: Count

    @field_validator("columns")
    @classmethod
    def _has_exact(cls, columns: dict[str, _Column]) -> dict[str, _Column]:
        if EXACT not in columns:
            raise ValueError(f"{EXACT} is missing")
        return columns


def compare(
    config: Config,
    multipliers: Sequence[str],
    seeds: int,
    output: Path,
    display: CompareDisplay,
    stopped: Callable[[], bool] = lambda: False,
    threads: int | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Train the config's network exact and with each multiplier, for so many seeds from the config's on.

    Runs of one seed start from the same weights and see the same batches in the same order. They lie in the
    comparison's folder, below ``output``, as ordinary runs.

    Args:
        multipliers: names, as a config can have them.

    Returns:
        The comparison's run and what its ``compare.json`` holds.

    Raises:
        RequestError: nothing to compare with, or something is no multiplier; nothing is written then.
        RunError, Interrupted: as ``train`` does.
    """
    asked = {str(one): one for one in map(configs.multiplier, multipliers)}
    if not asked or EXACT in asked:
        raise RequestError("exact is compared with something else: name a multiplier, --multiplier mbm")
    seeds_from(config.seed, seeds)
    columns = {EXACT: Multiplier(EXACT), **asked}
    device = setup.prepare(config, threads)
    _check(config, columns)
    data = setup.load_data(config, device)
    files = {
        "config.yaml": configs.dump(config),
        "environment.json": as_json(environment(device)),
        "plan.json": as_json({"kind": KIND, "columns": _written(config, columns), "seeds": seeds}),
        "summary.json": as_json(_summary("running", columns, device, [])),
    }
    run = Run.create(output, f"{config.name}-compare", files)
    with run.hold():
        return run, _compare(run, config, columns, seeds, device, data, display, stopped)


def resume(run: Run, display: CompareDisplay, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Go on with a comparison: what is finished is kept, the run at hand goes on from its last checkpoint.

    Errors as `compare`'s.
    """
    plan = run.plan(KIND, _Plan)
    if plan is None:
        raise RequestError(f"{run.folder} is not a comparison: mbm runs list shows those there are")
    config = configs.parse(run.config_text(), str(run.folder / "config.yaml"))
    columns = {name: configs.multiplier(column.multiplier) for name, column in plan.columns.items()}
    for name, column in plan.columns.items():
        setup.refuse_other_products(_with(config, config.seed, name, columns), column.keys, run.folder)
    device = setup.prepare_to_resume(config, run)
    _check(config, columns)
    data = setup.load_data(config, device)
    with run.hold():
        return _compare(run, config, columns, plan.seeds, device, data, display, stopped)


def _check(config: Config, columns: Columns) -> None:
    for name in columns:
        setup.prepare(_with(config, config.seed, name, columns))


def _written(config: Config, columns: Columns) -> dict[str, Any]:
    """The columns for ``plan.json``."""
    written = {}
    for name, multiplier in columns.items():
        keys = setup.multiplier_keys(_with(config, config.seed, name, columns))
        written[name] = {"multiplier": configs.located(multiplier), "keys": keys}
    return written


def _compare(
    run: Run,
    config: Config,
    columns: Columns,
    seeds: int,
    device: torch.device,
    data: tuple[Split, Split],
    display: CompareDisplay,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    jobs = [(seed, name) for seed in seeds_from(config.seed, seeds) for name in columns]
    finished: dict[tuple[int, str], dict[str, Any]] = {}

    def summarize(status: str, **more: Any) -> None:
        run.write_json("summary.json", {**_summary(status, columns, device, list(finished.values())), **more})

    summarize("running")
    try:
        display.start(f"{config.name}: {config.model.name}, {', '.join(columns)}, {seeds} seeds", len(jobs))
        for seed, name in jobs:
            watch = display.run(f"seed {seed}, {name}", config.train.epochs)
            trained = _train_one(run, _with(config, seed, name, columns), data, watch, stopped)
            finished[seed, name] = {**trained, "multiplier": name}
            summarize("running")
            display.run_done(finished[seed, name])
        result: dict[str, Any] = {
            "config": config.name,
            "model": config.model.name,
            "device": device.type,
            "multipliers": list(columns),
            "seeds": seeds,
            "epochs": config.train.epochs,
        }
        result["columns"] = [_column(config, name, columns, seeds, finished, device, data) for name in columns]
        result["runs"] = list(finished.values())
        result["verdicts"] = [_verdict(column, seeds) for column in result["columns"][1:]]
        run.write_json("compare.json", result)
        run.write("compare.png", plots.comparison(result))
        summarize("completed")
    except (Interrupted, BrokenPipeError):  # nobody reads the output any more
        summarize("interrupted")
        raise Interrupted(
            f"interrupted after {len(finished)} of {len(jobs)} runs; to go on: "
            f"mbm compare exact-vs-mbm --resume {run.folder}"
        ) from None
    except Exception as error:
        summarize("failed", reason=str(error) if isinstance(error, MbmError) else f"{type(error).__name__}: {error}")
        raise
    finally:
        display.close()
    display.finish(result, run.folder)
    return result


def _with(config: Config, seed: int, column: str, columns: Columns) -> Config:
    model = config.model.model_copy(update={"multiplier": columns[column]})
    name = member_name([config.model.name, column], seed)
    return config.model_copy(update={"name": name, "seed": seed, "model": model})


def _train_one(
    run: Run,
    config: Config,
    data: tuple[Split, Split],
    display: Display,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    """Train one, or go on with it, or find it finished; tells its summary, its losses and where it lies."""
    begun = members(run.folder).get(config.name)
    one, summary = train_member(run.folder, config, begun, display, stopped, data)
    steps = math.ceil(len(data[0]) / config.data.batch_size)
    places = {"seed": config.seed, "run": one.name, "folder": str(one.folder), "steps": steps}
    return {**places, **summary, "metrics": one.metrics()}


def _column(
    config: Config,
    name: str,
    columns: Columns,
    seeds: int,
    finished: dict[tuple[int, str], dict[str, Any]],
    device: torch.device,
    data: tuple[Split, Split],
) -> dict[str, Any]:
    """A multiplier's figures over the seeds, and against exact, seed by seed; fractions and seconds."""
    all_seeds = seeds_from(config.seed, seeds)
    runs, exact = [finished[s, name] for s in all_seeds], [finished[s, EXACT] for s in all_seeds]
    accuracies = [r["test_accuracy"] for r in runs]
    seconds = [statistics.median(r["epoch_seconds"]) for r in runs]
    train_seconds = statistics.median(t for r in runs for t in r["train_seconds"])
    convolutions = convolution_seconds(_with(config, config.seed, name, columns), device)
    exchanged = [_exchange(config, finished, s, name, columns, device, data[1]) for s in all_seeds]
    column = {
        "multiplier": name,
        "test_accuracy": accuracies,
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "test_accuracy_best": max(r["best_test_accuracy"] for r in runs),
        "train_loss_mean": statistics.mean(r["metrics"][-1]["train_loss"] for r in runs),
        "test_loss_mean": statistics.mean(r["metrics"][-1]["test_loss"] for r in runs),
        "epochs_to": {str(goal): [_epochs_to(r["metrics"], goal) for r in runs] for goal in GOALS},
        "epoch_seconds_median": statistics.median(t for r in runs for t in r["epoch_seconds"]),
        "convolution_share": convolutions * runs[0]["steps"] / train_seconds,
        "images_per_second_median": statistics.median(m["images_per_second"] for r in runs for m in r["metrics"]),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in runs),
        "trained_exact_evaluated_here": [accuracy for accuracy, _ in exchanged],
        "trained_here_evaluated_exact": [accuracy for _, accuracy in exchanged],
    }
    if name != EXACT:
        exact_accuracies = [r["test_accuracy"] for r in exact]
        exact_seconds = [statistics.median(r["epoch_seconds"]) for r in exact]
        ratios = [mine / theirs for mine, theirs in zip(seconds, exact_seconds, strict=True)]
        column["accuracy_difference"] = _interval([a - b for a, b in zip(accuracies, exact_accuracies, strict=True)])
        column["epoch_seconds_ratio"] = _ratio_interval(ratios)
    return column


def _exchange(
    config: Config,
    finished: dict[tuple[int, str], dict[str, Any]],
    seed: int,
    name: str,
    columns: Columns,
    device: torch.device,
    test: Split,
) -> tuple[float, float]:
    """Test accuracies of exact training evaluated with the multiplier, and the other way round."""
    accuracies = []
    for trained, evaluated in ((EXACT, name), (name, EXACT)):
        run = Run(Path(finished[seed, trained]["folder"]))
        model = setup.build_model(_with(config, seed, trained, columns), device)
        checkpoint = run.checkpoint()
        if checkpoint is None:
            raise RunError(f"{run.folder} has no checkpoint.pt any more: it cannot be evaluated with {evaluated}")
        model.load_state_dict(checkpoint["model"])
        accuracies.append(evaluate(convert(model, columns[evaluated]), test, config.data.eval_batch_size)[1])
    return accuracies[0], accuracies[1]


def _epochs_to(metrics: Sequence[dict[str, Any]], goal: float) -> int | None:
    return next((m["epoch"] for m in metrics if m["test_accuracy"] >= goal), None)


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean over seeds and its 95 % interval (Student's t); without an interval for one seed."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    scale = stats.sem(values)
    if scale == 0:
        return {"mean": mean, "low": mean, "high": mean}
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=scale)
    return {"mean": mean, "low": float(low), "high": float(high)}


def _ratio_interval(ratios: Sequence[float]) -> dict[str, float | None]:
    """The same of ratios: the geometric mean and its interval, by way of logarithms, so that it stays above zero."""
    of_logarithms = _interval([math.log(ratio) for ratio in ratios])
    return {name: None if value is None else math.exp(value) for name, value in of_logarithms.items()}


def _verdict(column: dict[str, Any], seeds: int) -> str:
    """Whether the difference in accuracy can be told from the seeds' noise, in words."""
    difference = column["accuracy_difference"]
    points = f"{100 * difference['mean']:+.2f} points of test accuracy against exact"
    if difference["low"] is None:
        return f"{column['multiplier']}: {points}; one seed says nothing about noise, use --seeds 3 or more"
    interval = f"95 % interval {100 * difference['low']:+.2f} to {100 * difference['high']:+.2f}"
    told = difference["low"] > 0 or difference["high"] < 0
    return (
        f"{column['multiplier']}: {points} ({interval}), {'more than' if told else 'not distinguishable from'} "
        f"seed noise at {seeds} seeds"
    )


def _summary(status: str, columns: Columns, device: torch.device, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """In the form of a training run's, so that ``mbm runs list`` shows comparisons, too."""
    return {
        "status": status,
        "multiplier": ", ".join(columns),
        "device": device.type,
        "epochs": sum(r["epochs"] for r in runs),
        "test_accuracy": None,
        "best_test_accuracy": max((r["best_test_accuracy"] for r in runs), default=None),
        "epoch_seconds": [t for r in runs for t in r["epoch_seconds"]],
        "train_seconds": [t for r in runs for t in r["train_seconds"]],
        "total_seconds": sum(r["total_seconds"] for r in runs),
    }
