"""`mbm sweep`: a run for every combination of values of a config's fields, and for every seed."""

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import yaml

from mbm_cli import config as configs
from mbm_cli import slurm
from mbm_cli.config import Config, DataConfig, Engine
from mbm_cli.costs import Prices
from mbm_cli.data import dataset_of
from mbm_cli.device import choose_device, environment
from mbm_cli.errors import RequestError
from mbm_cli.experiments import lifecycle, train
from mbm_cli.experiments.lifecycle import Finished, RunsFailed, Stopped, Watch, never
from mbm_cli.launch import launch
from mbm_cli.runs import Combination, Plan, Run, SearchPlan, Summary, as_json, list_runs
from mbm_cli.training import Progress, Split
from mbm_cli.turns import Turns

MULTIPLIER, BACKWARD = "model.multiplier", "model.backward"
ELSEWHERE = {"seed": "use --seeds N, and --seed for the first", "name": "runs are named after their values"}
LAST_SEED = 2**63 - 1
NAME_LENGTH = 34  # of a run's values: a config's name has 64 characters, a seed up to 19 of them
CSV_FIELDS = (
    *("seed", "status", "test_accuracy", "best_test_accuracy", "test_loss", "train_loss"),
    *("epochs", "epoch_seconds", "train_seconds", "run"),
)
Flags = tuple[int | None, str | None, str | None]  # --jobs, --on and --at-once
R = TypeVar("R")


@dataclass(frozen=True)
class Row:
    """The result of one run: accuracies are fractions, times seconds, ``run`` its folder's name.

    Attributes:
        train_seconds: of all epochs, without evaluation, compilation and capture.
    """

    combination: int
    values: dict[str, Any]
    seed: int
    status: str
    test_accuracy: float | None
    best_test_accuracy: float | None
    test_loss: float | None
    train_loss: float | None
    epochs: int
    epoch_seconds: float | None
    run: str | None
    reason: str | None = None
    train_seconds: float | None = None


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


@dataclass(frozen=True)
class Member:
    """A run of a sweep: to train, to resume, or complete already."""

    label: str
    combination: int
    values: dict[str, Any]
    folder: Path  # of the sweep
    config: Config
    begun: Run | None

    def __str__(self) -> str:
        return self.label

    @property
    def run(self) -> Run | None:
        """The run, once there is a folder of it."""
        found = self.folder.glob(f"*Z-{self.config.name}-????/summary.json")
        return self.begun or next((Run(path.parent) for path in found), None)

    @property
    def part(self) -> float:
        """How much of the run is done, 0 to 1, as far as its folder says."""
        return len(self.run.metrics()) / self.config.train.epochs if self.run else 0.0


# Writes an experiment's result from the rows of all runs, and returns it.
Conclude = Callable[[Run, Config, Plan, Sequence[Config], list[Row]], R]


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
    config = with_threads(config, engine)
    run, plan, varied = create("sweep", config, values, _combinations(config, values), seeds, engine, output, prices)
    with run.hold():
        return carry_out(run, config, plan, varied, watch or Watch(), stopped, conclude)


def with_threads(config: Config, engine: Engine) -> Config:
    """Return the config with the number of threads that each run is to have.

    Raises:
        RequestError: there is no such cluster.
    """
    if engine.on is not None:
        slurm.check(engine.on)
    threads = max(1, torch.get_num_threads() // engine.jobs) if engine.on is None else engine.on.cpus
    return config.with_train(threads=config.train.threads or threads)


def resume(run: Run, flags: Flags, watch: Watch, stopped: Stopped, conclude: Conclude[R]) -> Finished[R]:
    """Resume a sweep or a comparison: keep complete runs, resume those that were begun, train the others.

    ``flags`` are those of the command line that change the engine; ``conclude`` is the experiment's own. Otherwise as
    `sweep`.
    """
    config, plan, varied = reopen(run, flags)
    with run.hold():
        return carry_out(run, config, plan, varied, watch, stopped, conclude)


def reopen(run: Run, flags: Flags) -> tuple[Config, Plan, list[Config]]:
    """Return the config and the plan of a run, and the combinations' configs with resolved multipliers.

    Raises:
        RequestError: the run cannot be resumed here.
        RunError: something in it is damaged, or a multiplier's file has changed.
    """
    plan, config = run.plan(), run.config()
    members = [run] if plan.on is None else list_runs(run.folder)  # a cluster's device is not this process's
    plan = plan.with_flags(*flags)
    if plan.on is not None:
        slurm.check(plan.on)
    where = f"{run.folder / 'plan.json'}, combination"
    varied = [configs.validate(one.config, f"{where} {i}") for i, one in enumerate(plan.combinations, 1)]
    varied = [one.with_train(threads=one.train.threads or config.train.threads) for one in varied]
    config, *varied = lifecycle.resolve([config, *varied], lifecycle.use_device(config))
    for one, combination in zip(varied, plan.combinations, strict=True):
        lifecycle.refuse_other_products(one, combination.keys, run.folder)
        for begun in members if plan.on is None else []:
            lifecycle.refuse_other_device(one, begun)
    _fetch_data(varied)
    return config, plan, varied


# What is planned


def create(
    kind: Literal["comparison", "sweep", "search"],
    config: Config,
    vary: dict[str, list[str]],
    varied: Sequence[Config],
    seeds: int,
    engine: Engine,
    output: Path,
    prices: Prices | None,
    search: SearchPlan | None = None,
) -> tuple[Run, Plan, list[Config]]:
    """Check the config of every combination, fetch the data, and create the folder with the plan.

    Returns:
        The run, its plan, and the combinations' configs with resolved multipliers.
    """
    device = lifecycle.use_device(config)
    for one in varied:
        choose_device(one.device)
        if one.seed + seeds - 1 > LAST_SEED:
            raise RequestError(f"--seeds {seeds} from {one.seed} goes beyond the last, 2^63 - 1: use a smaller --seed")
    varied = lifecycle.resolve(varied, device)
    _fetch_data(varied)
    of_what, costs = (prices or Prices.load()).of_networks([lifecycle.products(one) for one in varied])
    plan = Plan(
        kind=kind,
        vary=vary,
        seeds=seeds,
        **engine.model_dump(),
        combinations=[combination(one, vary, cost) for one, cost in zip(varied, costs, strict=True)],
        costs=of_what,
        search=search,
    )
    files = {
        "config.yaml": configs.dump(config),
        "environment.json": as_json(environment(device)),
        "plan.json": as_json(plan.model_dump()),
        "summary.json": as_json(replace(summary_of("running", varied, device, []), note=config.note)),
    }
    name = "compare" if kind == "comparison" else kind
    return Run.create(output, f"{config.name}-{name}", files), plan, varied


def combination(config: Config, vary: Iterable[str], cost: float | None) -> Combination:
    """Return a plan's combination for a config, whose multipliers must be resolved."""
    values = {field: _value(config, field) for field in vary}
    return Combination(values=values, config=config.model_dump(), keys=lifecycle.content_keys(config), cost=cost)


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


def _value(config: Config, field: str) -> Any:
    if field in (MULTIPLIER, BACKWARD):
        return str(config.model.multiplier if field == MULTIPLIER else config.model.backward)
    value = config.model_dump()
    for part in field.split("."):
        value = value[part]
    return value


def _fetch_data(varied: Sequence[Config]) -> None:
    """Have the data fetched once, before several runs ask for it."""
    for dataset, root in {(config.data.dataset, config.data.root) for config in varied}:
        dataset_of(dataset).fetch(Path(root) if root else None)


def _members(run: Run, plan: Plan, varied: Sequence[Config]) -> list[Member]:
    """Return the runs in the order in which they are computed: a comparison's seed by seed, for their pairs."""
    begun, members = _begun(run), []
    for number, (combination, config) in enumerate(zip(plan.combinations, varied, strict=True), 1):
        for seed in range(config.seed, config.seed + plan.seeds):
            values = [shown(value) for value in combination.values.values()]
            first = str(config.model.name) if plan.kind == "comparison" else str(number)
            name = _member_name([first, *values], seed)
            named = config.model_copy(update={"name": name, "seed": seed})
            label = ", ".join([*values, f"seed {seed}"])
            members.append(Member(label, number, combination.values, run.folder, named, begun.get(name)))
    return members if plan.kind != "comparison" else sorted(members, key=lambda member: member.config.seed)


def _begun(run: Run) -> dict[str, Run]:
    """Return the runs that were begun in the folder, by their configs' names."""
    return {one.config().name: one for one in list_runs(run.folder)}


def _member_name(parts: Sequence[str], seed: int) -> str:
    """Return ``<part>-<part>-seed<seed>`` as a config's name; a digest keeps parts apart that had to be changed."""
    text = "-".join(parts)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:NAME_LENGTH]
    if name != text:
        name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
    return f"{name}-seed{seed}"


def shown(value: Any) -> str:
    """Write a config's value as a person does."""
    return value if isinstance(value, str) else json.dumps(value)


# What is computed


def carry_out(
    run: Run,
    config: Config,
    plan: Plan,
    varied: Sequence[Config],
    watch: Watch,
    stopped: Stopped,
    conclude: Conclude[R],
) -> Finished[R]:
    """Compute the runs of a plan that are not complete, then conclude from the rows of all.

    Raises:
        RunsFailed: some did; a sweep concludes without them, a comparison cannot.
        Interrupted: ``stopped`` returned true.
    """
    device = lifecycle.use_device(varied[0])
    if len({one.device for one in varied}) > 1 or (plan.at_once is None and device.type == "cpu"):
        plan = plan.model_copy(update={"at_once": 1})  # turns are for one device, and save time on a GPU
    members = _members(run, plan, varied)
    rows: dict[str, Row] = {}
    summaries: list[Summary] = []

    def keep(member: Member, made: Run | None, reason: str | None = None) -> Row:
        name = member.config.name
        rows[name] = _row(member, made, reason)
        if made is not None:
            summaries.append(made.summary())
        return rows[name]

    def summarize(status: str, reason: str | None = None) -> None:
        run.write_json(
            "summary.json", replace(summary_of(status, varied, device, summaries), reason=reason, note=config.note)
        )

    def done(member: Member, reason: str | None) -> None:
        made = member.run
        if made is not None and made.summary().status == "stopped":  # its process died
            made.write_json("summary.json", replace(made.summary(), status="failed", reason=reason))
        row = keep(member, made, reason)
        summarize("running")
        watch.done(member.label, row)

    with lifecycle.computing(run, watch, summarize, lambda: f"after {len(rows)} of {len(members)} runs"):
        for member in members:
            if member.begun is not None and train.is_complete(member.begun.summary(), member.config):
                keep(member, member.begun)
        varies = f", {len(varied)} combinations of {', '.join(plan.vary)}" if plan.vary else ""
        watch.begin(
            f"{config.name}: {config.model.name}{varies}, {plan.seeds} seed{'s'[: plan.seeds != 1]}",
            "run",
            len(members),
            len(rows),
        )
        todo = [member for member in members if member.config.name not in rows]
        look = lambda one: watch.progress(one.label, one.part)  # noqa: E731
        work = train_member if plan.on or plan.jobs > 1 else partial(train_member, watch=watch)
        launch(todo, work, plan, run.folder, look, done, stopped)
        failed = [row for row in rows.values() if row.status == "failed"]
        ordered = [rows[member.config.name] for member in members]
        concludes = not failed or plan.kind != "comparison"
        finished = Finished(run, conclude(run, config, plan, varied, ordered)) if concludes else None
        if failed:
            raise RunsFailed(
                f"{len(failed)} of {len(members)} runs failed, the first one: {failed[0].reason}",
                f"To resume: mbm resume {run.folder}",
                finished,
            )
        summarize("completed")
    assert finished is not None
    return finished


def train_member(member: Member, stopped: Stopped, watch: Watch | None = None) -> Turns[object]:
    """Train a member, or resume it; yield after each step. ``watch`` is the sweep's, where this is its process."""
    own = _MemberWatch(member, watch) if watch else None
    data = shared_data(member.config, lifecycle.use_device(member.config))
    if (run := member.run) is None:
        return (yield from train.train_in_turns(member.config, member.folder, own, stopped, data))
    return (yield from train.resume_in_turns(run, None, own, stopped, data, member.config))


def shared_data(config: Config, device: torch.device) -> tuple[Split, Split]:
    """Load the config's data, unless it is what the run before had."""
    plain = DataConfig()
    others = {name: getattr(plain, name) for name in ("batch_size", "eval_batch_size", "crop", "flip")}
    return _load(config.data.model_copy(update=others), device)


@lru_cache(maxsize=1)
def _load(data: DataConfig, device: torch.device) -> tuple[Split, Split]:
    loaded = lifecycle.load_data(data, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams read it, too
    return loaded


class _MemberWatch(Watch):
    """Turns the progress of an epoch into that of its run."""

    def __init__(self, member: Member, watch: Watch) -> None:
        self.member, self.watch = member, watch

    def progress(self, label: str, fraction: float, step: Progress | None = None) -> None:
        epoch = int(label.removeprefix("epoch ").partition("/")[0])
        self.watch.progress(self.member.label, (epoch - 1 + fraction) / self.member.config.train.epochs)


def _row(member: Member, run: Run | None, reason: str | None = None) -> Row:
    """Return a run's result; ``reason`` says why it failed."""
    summary = run.summary() if run else None
    last = (run.metrics() if run else [])[-1:] or [{}]
    seconds = summary.epoch_seconds if summary else []
    return Row(
        combination=member.combination,
        values=member.values,
        seed=member.config.seed,
        status="failed" if reason or summary is None else summary.status,
        test_accuracy=summary.test_accuracy if summary else None,
        best_test_accuracy=summary.best_test_accuracy if summary else None,
        test_loss=last[0].get("test_loss"),
        train_loss=last[0].get("train_loss"),
        epochs=summary.epochs if summary else 0,
        epoch_seconds=float(np.median(seconds)) if seconds else None,
        train_seconds=sum(summary.train_seconds) if summary and seconds else None,
        run=run.name if run else None,
        reason=reason,
    )


def summary_of(status: Any, varied: Sequence[Config], device: torch.device, runs: Sequence[Summary]) -> Summary:
    """Summarize all runs in the form of one, so that ``mbm runs list`` shows what has several, too."""
    best = [run.best_test_accuracy for run in runs if run.best_test_accuracy is not None]
    return Summary(
        status=status,
        multiplier=", ".join(dict.fromkeys(config.model.products for config in varied)),
        device=runs[0].device if runs else device.type,
        epochs=sum(run.epochs for run in runs),
        test_accuracy=None,
        best_test_accuracy=max(best, default=None),
        epoch_seconds=[seconds for run in runs for seconds in run.epoch_seconds],
        train_seconds=[seconds for run in runs for seconds in run.train_seconds],
        total_seconds=sum(run.total_seconds for run in runs),
    )


# What comes out


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
    run.write("sweep.csv", csv_of(result.vary, result.runs))
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


def csv_of(vary: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Write a line a run; a field that is null is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*vary, *CSV_FIELDS])
    for row in rows:
        fields = asdict(row)
        values = ["" if value is None else shown(value) for value in row.values.values()]
        writer.writerow([*values, *(fields[field] for field in CSV_FIELDS)])
    return text.getvalue()
