"""The runs of a sweep, a comparison or a search: how they are planned, computed and resumed."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from mbm_cli import config as configs
from mbm_cli import slurm
from mbm_cli.config import Config, DataConfig, Engine
from mbm_cli.costs import Prices
from mbm_cli.data import dataset_of
from mbm_cli.device import choose_device, environment
from mbm_cli.errors import RequestError
from mbm_cli.experiments import lifecycle, train
from mbm_cli.experiments.lifecycle import Finished, RunsFailed, Stopped, Watch
from mbm_cli.launch import launch
from mbm_cli.runs import Combination, Plan, Run, SearchPlan, Summary, as_json, list_runs
from mbm_cli.training import Progress, Split
from mbm_cli.turns import Turns

MULTIPLIER, BACKWARD = "model.multiplier", "model.backward"
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
class Member:
    """One of the runs: to train, to resume, or complete already."""

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


# What is planned


def with_threads(config: Config, engine: Engine) -> Config:
    """Return the config with the number of threads that each run is to have.

    Raises:
        RequestError: there is no such cluster.
    """
    if engine.on is not None:
        slurm.check(engine.on)
    threads = max(1, torch.get_num_threads() // engine.jobs) if engine.on is None else engine.on.cpus
    return config.with_train(threads=config.train.threads or threads)


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


def _value(config: Config, field: str) -> Any:
    if field in (MULTIPLIER, BACKWARD):
        return str(config.model.multiplier if field == MULTIPLIER else config.model.backward)
    value = config.model_dump()
    for part in field.split("."):
        value = value[part]
    return value


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
    on_cpu = device.type == "cpu" if plan.on is None else plan.on.gpus == 0
    if len({one.device for one in varied}) > 1 or (plan.at_once is None and on_cpu):
        plan = plan.model_copy(update={"at_once": 1})  # turns are for one device, and save time on a GPU
    members = _members(run, plan, varied)
    results = _Results(run, config.note, varied, device)

    def done(member: Member, reason: str | None) -> None:
        row = results.add(member, reason)
        results.summarize("running")
        watch.done(member.label, row)

    def look(members: Sequence[Member]) -> None:
        for member in members:
            watch.progress(member.label, member.part)

    with lifecycle.computing(run, watch, results.summarize, lambda: f"after {len(results)} of {len(members)} runs"):
        for member in members:
            if member.begun is not None and train.is_complete(member.begun.summary(), member.config):
                results.add(member)
        counted = f"{len(varied)} combination{'s'[: len(varied) != 1]}"
        varies = f", {counted} of {', '.join(plan.vary)}" if plan.vary else ""
        what = f"{config.name}: {config.model.name}{varies}, {plan.seeds} seed{'s'[: plan.seeds != 1]}"
        watch.begin(what, "run", len(members), len(results))
        todo = [member for member in members if member not in results]
        work = train_member if plan.on or plan.jobs > 1 else partial(train_member, watch=watch)
        launch(todo, work, plan, run.folder, look, done, stopped)
        rows = results.of(members)
        failed = [row for row in rows if row.status == "failed"]
        concludes = not failed or plan.kind != "comparison"
        finished = Finished(run, conclude(run, config, plan, varied, rows)) if concludes else None
        if failed:
            raise RunsFailed(
                f"{len(failed)} of {len(members)} runs failed, the first one: {failed[0].reason}",
                f"To resume: mbm resume {run.folder}",
                finished,
            )
        results.summarize("completed")
    assert finished is not None
    return finished


class _Results:
    """The rows of the runs that have ended, and a summary of them in the folder of all."""

    def __init__(self, run: Run, note: str | None, varied: Sequence[Config], device: torch.device) -> None:
        self._run, self._note, self._varied, self._device = run, note, varied, device
        self._rows: dict[str, Row] = {}
        self._summaries: list[Summary] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, member: Member) -> bool:
        return member.config.name in self._rows

    def of(self, members: Sequence[Member]) -> list[Row]:
        return [self._rows[member.config.name] for member in members]

    def add(self, member: Member, reason: str | None = None) -> Row:
        """Add a run that has ended; ``reason`` says why it failed."""
        made = member.run
        if made is not None:
            if made.summary().status == "stopped":  # its process died
                made.write_json("summary.json", replace(made.summary(), status="failed", reason=reason))
            self._summaries.append(made.summary())
        row = self._rows[member.config.name] = _row(member, made, reason)
        return row

    def summarize(self, status: str, reason: str | None = None) -> None:
        summary = summary_of(status, self._varied, self._device, self._summaries)
        self._run.write_json("summary.json", replace(summary, reason=reason, note=self._note))


def resume(run: Run, flags: Flags, watch: Watch, stopped: Stopped, conclude: Conclude[R]) -> Finished[R]:
    """Resume a sweep or a comparison: keep complete runs, resume those that were begun, train the others.

    ``flags`` are those of the command line that change the engine; ``conclude`` is the experiment's own. Otherwise as
    `sweep`.
    """
    config, plan, varied = reopen(run, flags)
    with run.hold():
        return carry_out(run, config, plan, varied, watch, stopped, conclude)


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
