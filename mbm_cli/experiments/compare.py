"""`mbm compare exact-vs-mbm`: the same network, seed by seed, exact and with multipliers; is there a difference?"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from mbm_cli import config as configs
from mbm_cli import plots
from mbm_cli.config import Config
from mbm_cli.data import Split
from mbm_cli.environment import environment
from mbm_cli.errors import Interrupted, RequestError, RunError
from mbm_cli.experiments import train as training_run
from mbm_cli.experiments.member import member_name, members, train_member
from mbm_cli.experiments.profile import convolution_seconds
from mbm_cli.nn import convert
from mbm_cli.render import CompareDisplay, Display
from mbm_cli.runs import Run, as_json
from mbm_cli.training import evaluate

EXACT = "exact"
GOALS = (0.98, 0.99)  # test accuracies; the table tells how many epochs each took
CONFIDENCE = 0.95


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
    columns = [str(configs.multiplier(m)) for m in multipliers]
    if not columns or EXACT in columns:
        raise RequestError("exact is compared with something else: name a multiplier, --multiplier mbm")
    for column in columns:
        device = training_run.prepare(_with(config, config.seed, column), threads)
    data = training_run.load_data(config, device)
    plan = {"multipliers": list(dict.fromkeys([EXACT, *columns])), "seeds": seeds}
    files = {
        "config.yaml": configs.dump(config),
        "environment.json": as_json(environment(device)),
        "plan.json": as_json(plan),
        "summary.json": as_json(_summary("running", plan, device, [])),
    }
    run = Run.create(output, f"{config.name}-compare", files)
    with run.hold():
        return run, _compare(run, config, device, data, display, stopped)


def resume(run: Run, display: CompareDisplay, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Go on with a comparison: what is finished is kept, the run at hand goes on from its last checkpoint."""
    if not (run.folder / "plan.json").exists() or "multipliers" not in run.read_json("plan.json"):
        raise RequestError(f"{run.folder} is not a comparison: mbm runs list shows those there are")
    config = configs.parse(run.config_text(), str(run.folder / "config.yaml"))
    device = training_run.prepare(config, run.environment()["threads"])
    data = training_run.load_data(config, device)
    with run.hold():
        return _compare(run, config, device, data, display, stopped)


def _compare(
    run: Run,
    config: Config,
    device: torch.device,
    data: tuple[Split, Split],
    display: CompareDisplay,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    plan = run.read_json("plan.json")
    jobs = [(seed, m) for seed in range(config.seed, config.seed + plan["seeds"]) for m in plan["multipliers"]]
    finished: dict[tuple[int, str], dict[str, Any]] = {}

    def summarize(status: str) -> None:
        run.write_json("summary.json", _summary(status, plan, device, list(finished.values())))

    summarize("running")
    try:
        display.start(
            f"{config.name}: {config.model.name}, {', '.join(plan['multipliers'])}, {plan['seeds']} seeds", len(jobs)
        )
        for seed, multiplier in jobs:
            one = _with(config, seed, multiplier)
            watch = display.run(f"seed {seed}, {multiplier}", config.train.epochs)
            finished[seed, multiplier] = _train_one(run, one, data, watch, stopped)
            summarize("running")
            display.run_done(finished[seed, multiplier])
        result = {
            "config": config.name,
            "model": config.model.name,
            "device": device.type,
            **plan,
            "epochs": config.train.epochs,
        }
        result["columns"] = [_column(config, m, plan, finished, device, data) for m in plan["multipliers"]]
        result["runs"] = list(finished.values())
        result["verdicts"] = [_verdict(column, plan["seeds"]) for column in result["columns"][1:]]
        run.write_json("compare.json", result)
        run.write("compare.png", plots.comparison(result))
        summarize("completed")
    except (Interrupted, BrokenPipeError):  # nobody reads the output any more
        summarize("interrupted")
        raise Interrupted(
            f"interrupted after {len(finished)} of {len(jobs)} runs; to go on: "
            f"mbm compare exact-vs-mbm --resume {run.folder}"
        ) from None
    except Exception:
        summarize("failed")
        raise
    finally:
        display.close()
    display.finish(result, run.folder)
    return result


def _with(config: Config, seed: int, multiplier: str) -> Config:
    model = config.model.model_copy(update={"multiplier": configs.multiplier(multiplier)})
    name = member_name([config.model.name, multiplier], seed)
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
    multiplier: str,
    plan: dict[str, Any],
    finished: dict[tuple[int, str], dict[str, Any]],
    device: torch.device,
    data: tuple[Split, Split],
) -> dict[str, Any]:
    """A multiplier's figures over the seeds, and against exact, seed by seed; fractions and seconds."""
    seeds = range(config.seed, config.seed + plan["seeds"])
    runs, exact = [finished[s, multiplier] for s in seeds], [finished[s, EXACT] for s in seeds]
    accuracies = [r["test_accuracy"] for r in runs]
    seconds = [statistics.median(r["epoch_seconds"]) for r in runs]
    train_seconds = statistics.median(t for r in runs for t in r["train_seconds"])
    convolutions = convolution_seconds(_with(config, config.seed, multiplier), device)
    exchanged = [_exchange(config, finished, s, multiplier, device, data[1]) for s in seeds]
    column = {
        "multiplier": multiplier,
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
    if multiplier != EXACT:
        exact_accuracies = [r["test_accuracy"] for r in exact]
        exact_seconds = [statistics.median(r["epoch_seconds"]) for r in exact]
        ratios = [mine / theirs for mine, theirs in zip(seconds, exact_seconds, strict=True)]
        column["accuracy_difference"] = _interval([a - b for a, b in zip(accuracies, exact_accuracies, strict=True)])
        column["epoch_seconds_ratio"] = _interval(ratios)
    return column


def _exchange(
    config: Config,
    finished: dict[tuple[int, str], dict[str, Any]],
    seed: int,
    multiplier: str,
    device: torch.device,
    test: Split,
) -> tuple[float, float]:
    """Test accuracies of exact training evaluated with the multiplier, and the other way round."""
    accuracies = []
    for trained, evaluated in ((EXACT, multiplier), (multiplier, EXACT)):
        run = Run(Path(finished[seed, trained]["folder"]))
        model = training_run.build_model(_with(config, seed, trained), device)
        checkpoint = run.checkpoint()
        if checkpoint is None:
            raise RunError(f"{run.folder} has no checkpoint.pt any more: it cannot be evaluated with {evaluated}")
        model.load_state_dict(checkpoint["model"])
        accuracies.append(evaluate(convert(model, configs.multiplier(evaluated)), test, config.data.eval_batch_size)[1])
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


def _summary(status: str, plan: dict[str, Any], device: torch.device, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """In the form of a training run's, so that ``mbm runs list`` shows comparisons, too."""
    return {
        "status": status,
        "multiplier": ", ".join(plan["multipliers"]),
        "device": device.type,
        "epochs": sum(r["epochs"] for r in runs),
        "test_accuracy": None,
        "best_test_accuracy": max((r["best_test_accuracy"] for r in runs), default=None),
        "epoch_seconds": [t for r in runs for t in r["epoch_seconds"]],
        "train_seconds": [t for r in runs for t in r["train_seconds"]],
        "total_seconds": sum(r["total_seconds"] for r in runs),
    }
