"""`mbm compare exact-vs-mbm`: a sweep over multipliers, exact among them, with statistics of the pairs of each seed."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mbm_cli import config as configs
from mbm_cli.config import Config, Engine
from mbm_cli.costs import Prices
from mbm_cli.errors import RequestError, RunError
from mbm_cli.experiments import lifecycle, members, weights
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.experiments.members import Row
from mbm_cli.experiments.profile_conv import convolution_seconds
from mbm_cli.launch import launch
from mbm_cli.multipliers.names import Backward
from mbm_cli.runs import Plan, Run
from mbm_cli.training import Split, evaluate
from mbm_cli.turns import Turns, finish

EXACT = "exact"
GOALS = (0.98, 0.99)  # test accuracies; a column says how many epochs each took
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval (Student's t), which one seed does not have."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Column:
    """A multiplier's figures over the seeds, and against exact, seed by seed; fractions and seconds."""

    multiplier: str
    test_accuracy: list[float]
    test_accuracy_mean: float
    test_accuracy_std: float | None
    test_accuracy_best: float
    train_loss_mean: float
    test_loss_mean: float
    epochs_to: dict[str, list[int | None]]
    epoch_seconds_median: float
    convolution_share: float
    images_per_second_median: float
    peak_memory_bytes: int
    trained_exact_evaluated_here: list[float]
    trained_here_evaluated_exact: list[float]
    accuracy_difference: Interval | None = None
    epoch_seconds_ratio: Interval | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Comparison:
    """``compare.json``: a column for each multiplier, exact first, and the runs with their metrics.

    ``costs`` says what the columns' costs are, if there are any.
    """

    config: str
    model: str
    device: str
    multipliers: list[str]
    seeds: int
    epochs: int
    columns: list[Column]
    runs: list[dict[str, Any]]
    verdicts: list[str]
    costs: str | None = None


def compare(
    config: Config,
    multipliers: Sequence[str],
    seeds: int,
    output: Path,
    watch: Watch | None = None,
    stopped: Stopped = never,
    backwards: Sequence[str] = (),
    engine: Engine | None = None,
    prices: Prices | None = None,
) -> Finished[Comparison]:
    """Train the config's network exact and with each multiplier, for so many seeds from the config's on.

    Runs of one seed start from the same weights and see the same batches in the same order. They lie in the
    comparison's folder, below ``output``.

    Args:
        multipliers: names, as a config can have them; the config's without any.
        backwards: multipliers of the gradients, each of which is combined with each multiplier; the config's without
            any.
        engine: where, and how many runs at once; one by default, because epochs that share a device take longer.
        prices: what multipliers cost; the package's without any.

    Raises:
        RequestError: there is nothing to compare with, or a multiplier is wrong; nothing is written then.
        RunError, Interrupted: as ``mbm_cli.experiments.sweep.sweep``.
    """
    engine = engine or Engine()
    config = members.with_threads(config, engine)
    named = [configs.multiplier(name) for name in multipliers] or [config.model.multiplier]
    exact = configs.multiplier(EXACT)
    if exact in named:
        raise RequestError("exact is compared with something else: name a multiplier, --multiplier mbm")
    gradients = [configs.backward(name) for name in backwards] or [config.model.backward]
    columns = list(dict.fromkeys([(exact, Backward()), *itertools.product(named, gradients)]))
    varied = [config.with_model(multiplier=multiplier, backward=backward) for multiplier, backward in columns]
    vary = {members.MULTIPLIER: [str(multiplier) for multiplier in dict.fromkeys(column[0] for column in columns)]}
    if backwards:
        vary[members.BACKWARD] = [str(backward) for backward in dict.fromkeys(column[1] for column in columns)]
    run, plan, varied = members.create("comparison", config, vary, varied, seeds, engine, output, prices)
    with run.hold():
        return members.carry_out(run, config, plan, varied, watch or Watch(), stopped, partial(conclude, stopped))


def conclude(
    stopped: Stopped, run: Run, config: Config, plan: Plan, varied: Sequence[Config], rows: list[Row]
) -> Comparison:
    """Write a comparison's result from its rows; on a cluster in a lane, which has the device that trained."""
    task, failures = _Conclusion(run, config, plan, varied, rows), list[str | None]()
    if plan.on is None:
        return finish(_conclude(task))
    done = lambda task, reason: failures.append(reason)  # noqa: E731
    launch([task], _conclude, Engine(on=plan.on), run.folder, lambda tasks: None, done, stopped)
    if failures != [None]:
        raise RunError(str(failures[0]))
    return run.read(Comparison, "compare.json")


class _Conclusion(NamedTuple):
    """What the result is made of."""

    run: Run
    config: Config
    plan: Plan
    varied: Sequence[Config]
    rows: list[Row]

    def __str__(self) -> str:
        return "the conclusion"


def _conclude(task: _Conclusion, stopped: Stopped = never) -> Turns[Comparison]:
    """Write the result in one turn."""
    yield
    run, config, plan, varied, rows = task
    device = lifecycle.use_device(config)
    data = members.shared_data(config, device)
    steps = math.ceil(len(data[0]) / config.data.batch_size)
    trained = [_Trained(row, Run(run.folder / str(row.run)), steps) for row in rows]
    exact = [one for one in trained if one.row.combination == 1]
    columns = []
    for number, one in enumerate(varied, 1):
        runs = [of_column for of_column in trained if of_column.row.combination == number]
        column = _column(one, runs, exact, varied[0], device, data)
        columns.append(replace(column, cost=plan.combinations[number - 1].cost))
    result = Comparison(
        config=config.name,
        model=str(config.model.name),
        device=device.type,
        multipliers=[column.multiplier for column in columns],
        seeds=plan.seeds,
        epochs=config.train.epochs,
        columns=columns,
        runs=[one.as_json() for one in trained],
        verdicts=[_verdict(column, plan.seeds) for column in columns[1:]],
        costs=plan.costs,
    )
    run.write_json("compare.json", result)
    run.write("compare.csv", members.csv_of(plan.vary, rows))
    return result


class _Trained:
    """A run of the comparison, read back."""

    def __init__(self, row: Row, run: Run, steps: int) -> None:
        self.row, self.run, self.steps = row, run, steps
        self.summary, self.metrics = run.summary(), run.metrics()

    def as_json(self) -> dict[str, Any]:
        places = {"seed": self.row.seed, "run": self.run.name, "folder": str(self.run.folder), "steps": self.steps}
        return {**places, **asdict(self.summary), "metrics": self.metrics}


def _column(
    config: Config,
    runs: Sequence[_Trained],
    exact: Sequence[_Trained],
    exact_config: Config,
    device: torch.device,
    data: tuple[Split, Split],
) -> Column:
    accuracies = [one.row.test_accuracy or 0.0 for one in runs]
    train_seconds = statistics.median(t for one in runs for t in one.summary.train_seconds)
    convolutions = convolution_seconds(config, device) * runs[0].steps
    is_exact = config is exact_config
    last = [one.metrics[-1] for one in runs]
    ratios = [_median_epoch(mine) / _median_epoch(other) for mine, other in zip(runs, exact, strict=True)]
    differences = [a - (other.row.test_accuracy or 0.0) for a, other in zip(accuracies, exact, strict=True)]
    return Column(
        multiplier=config.model.products,
        test_accuracy=accuracies,
        test_accuracy_mean=statistics.mean(accuracies),
        test_accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        test_accuracy_best=max(one.summary.best_test_accuracy or 0.0 for one in runs),
        train_loss_mean=statistics.mean(m["train_loss"] for m in last),
        test_loss_mean=statistics.mean(m["test_loss"] for m in last),
        epochs_to={str(goal): [_epochs_to(one.metrics, goal) for one in runs] for goal in GOALS},
        epoch_seconds_median=statistics.median(t for one in runs for t in one.summary.epoch_seconds),
        convolution_share=convolutions / train_seconds,
        images_per_second_median=statistics.median(m["images_per_second"] for one in runs for m in one.metrics),
        peak_memory_bytes=max(one.summary.peak_memory_bytes or 0 for one in runs),
        trained_exact_evaluated_here=[_exchanged(exact_config, one.run, config, device, data) for one in exact],
        trained_here_evaluated_exact=[_exchanged(config, one.run, exact_config, device, data) for one in runs],
        accuracy_difference=None if is_exact else _interval(differences),
        epoch_seconds_ratio=None if is_exact else _ratio_interval(ratios),
    )


def _exchanged(trained: Config, run: Run, evaluated: Config, device: torch.device, data: tuple[Split, Split]) -> float:
    """Evaluate a run with the multiplier of another config; return its test accuracy."""
    config = trained.with_model(multiplier=evaluated.model.multiplier, backward=Backward())
    model = lifecycle.build_model(config, device)
    checkpoint = run.checkpoint()
    if checkpoint is None:
        raise RunError(f"{run.folder} has lost its checkpoint.pt: evaluating it with another multiplier needs it")
    weights.load_state(model, checkpoint["model"])
    lifecycle.calibrate_model(trained, model, data[0])
    return evaluate(model, data[1], trained.data.eval_batch_size)[1]


def _median_epoch(one: _Trained) -> float:
    return statistics.median(one.summary.epoch_seconds)


def _epochs_to(metrics: Sequence[dict[str, Any]], goal: float) -> int | None:
    return next((m["epoch"] for m in metrics if m["test_accuracy"] >= goal), None)


def _interval(values: Sequence[float]) -> Interval:
    from scipy import stats  # only where there is a comparison: importing it takes longer than a small command

    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(mean, None, None)
    scale = stats.sem(values)
    if scale == 0:
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=scale)
    return Interval(mean, float(low), float(high))


def _ratio_interval(ratios: Sequence[float]) -> Interval:
    """Return the geometric mean and its interval, computed of logarithms, so that it stays above zero."""
    of_logarithms = _interval([math.log(ratio) for ratio in ratios])
    bounds = (of_logarithms.mean, of_logarithms.low, of_logarithms.high)
    return Interval(*(None if bound is None else math.exp(bound) for bound in bounds))  # type: ignore[arg-type]


def _verdict(column: Column, seeds: int) -> str:
    """Say in words whether the difference in accuracy is more than the seeds' noise."""
    difference = column.accuracy_difference
    assert difference is not None  # not the exact column
    points = f"{100 * difference.mean:+.2f} points of test accuracy against exact"
    if difference.low is None or difference.high is None:
        return f"{column.multiplier}: {points}; one seed says nothing about noise, use --seeds 3 or more"
    interval = f"95 % interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f}"
    distinct = difference.low > 0 or difference.high < 0
    return (
        f"{column.multiplier}: {points} ({interval}), "
        f"{'more than' if distinct else 'not distinguishable from'} seed noise at {seeds} seeds"
    )
