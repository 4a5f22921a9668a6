"""`mbm search`: which multiplier in which layer, by cost and accuracy; then the front's assignments are retrained."""

import csv
import hashlib
import io
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mbm_cli import config as configs
from mbm_cli.config import Config, Engine
from mbm_cli.costs import Prices, label, operands_of
from mbm_cli.data import dataset_of
from mbm_cli.errors import Interrupted, RequestError, RunError
from mbm_cli.experiments import lifecycle, members, weights
from mbm_cli.experiments.fronts import additive_front, front, hypervolume
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.experiments.members import Flags, Member, Row
from mbm_cli.experiments.study import Assignment, Evaluation, Study, check, load_optuna
from mbm_cli.multipliers.names import EXACT, INTEGER_FILES, Backward, LayerMultipliers, Multiplier
from mbm_cli.nn import convert
from mbm_cli.runs import Plan, Run, SearchPlan
from mbm_cli.training import Split, evaluate
from mbm_cli.turns import finish

Strategy = Literal["sensitivity", "nsga2"]
HELD_OUT = 6  # one of so many training images, the last ones, is held out for evaluation
STARTED = 4  # NSGA-II starts from the additive model's front, with at most one of so many evaluations
STUDY = "study.log"
WORST = 1e6  # the rise of a loss that is not finite
ROUNDING = 1e-9  # of accuracies that are compared


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's multiplier alone does on the calibration images.

    Attributes:
        drop: of accuracy, in points.
        loss: by which the mean cross-entropy rises.
    """

    layer: str
    candidate: str
    drop: float
    loss: float


@dataclass(frozen=True)
class Point:
    """An assignment of candidates to layers, its cost, and its accuracies as fractions.

    Attributes:
        accuracy: on the held-out images, before retraining.
        test_accuracy: on the test images, after retraining in ``run``.
        config: the file in the search's folder that trains it.
    """

    multipliers: Assignment
    cost: float
    accuracy: float
    test_accuracy: float | None = None
    run: str | None = None
    config: str | None = None


@dataclass(frozen=True)
class Search:
    """``search.json``.

    Attributes:
        costs: what costs are, in words.
        candidates: their costs, the exact one first.
        layers: the products of an image's forward pass in each.
        evaluations: of the study, all processes together; ``seconds`` is the time they took.
        held_out: images of an evaluation.
        uniform: one candidate in every layer.
        searched: the front of what was evaluated, by accuracy on the held-out images; retrained, as the uniform ones.
        front: the front of all that was retrained, by test accuracy; by rising cost.
        chosen: of ``searched``, the cheapest within ``max_drop`` points of the exact one; ``None`` without it.
        hypervolume: the area of cost and test accuracy that ``front``, ``searched`` and ``uniform`` dominate, up to
            cost 1 and the accuracy of guessing.
    """

    config: str
    model: str
    device: str
    strategy: str
    trials: int
    epochs: int
    max_drop: float | None
    costs: str | None
    candidates: dict[str, float]
    layers: dict[str, int]
    held_out: int
    evaluations: int
    seconds: float
    sensitivities: list[Sensitivity]
    uniform: list[Point]
    searched: list[Point]
    front: list[Point]
    chosen: Point | None
    hypervolume: dict[str, float]


def search(
    config: Config,
    candidates: Sequence[str],
    output: Path,
    strategy: Strategy = "nsga2",
    trials: int = 100,
    max_drop: float | None = None,
    study: Path | None = None,
    engine: Engine | None = None,
    watch: Watch | None = None,
    stopped: Stopped = never,
    prices: Prices | None = None,
) -> Finished[Search]:
    """Look for the assignments of multipliers to layers that cost least for their accuracy, then retrain them.

    The network starts from ``train.init``, or is trained exactly first, without the held-out images.

    Args:
        candidates: multipliers of one kind of operands, or ``int8:FOLDER`` for all files of a folder. The exact one is
            always among them.
        strategy: ``sensitivity`` evaluates the front of an additive model of each layer's loss; ``nsga2`` goes on
            from there with that algorithm.
        trials: evaluations that this search adds to the study, at most.
        max_drop: choose the cheapest assignment that loses at most so many points of accuracy.
        study: the file of the study, to share it with other processes; in the run's folder without any.
        engine: where, and how many runs at once, when the front is retrained.
        prices: what multipliers cost; the package's without any.

    Raises:
        RequestError: a candidate is wrong or has no cost, or the study is another network's; nothing is written then.
        RunError, Interrupted: as ``mbm_cli.experiments.sweep.sweep``.
    """
    prices = prices or Prices.load()
    engine = engine or Engine(at_once=None)
    config = members.with_threads(config, engine)
    config = config.with_model(multiplier=EXACT)  # a search has its own
    device = lifecycle.use_device(config)
    uniform = _uniform(config, _parse(candidates), device)
    named = {label(one): one for one in map(_only, uniform)}
    _, costs = prices.common([*named.values()])
    if len(named) > trials:
        raise RequestError(f"--trials {trials}: the {len(named)} uniform assignments alone are more")
    file = study.absolute() if study else None
    network = _network(uniform, named, costs)
    if config.train.init is not None:
        network["weights"] = _state(config.train.init, lifecycle.build_model(uniform[0], device))[1]
    load_optuna()
    if file is not None:
        check(file, network)
    settings = SearchPlan(
        strategy=strategy,
        trials=trials,
        max_drop=max_drop,
        candidates={one.located: cost for one, cost in zip(named.values(), costs, strict=True)},
        study=str(file or STUDY),
    )
    vary = {members.MULTIPLIER: [*named]}
    run, plan, uniform = members.create("search", config, vary, uniform, 1, engine, output, prices, settings)
    with run.hold():
        return _carry_out(run, config, plan, uniform, watch or Watch(), stopped)


def resume(run: Run, flags: Flags, watch: Watch, stopped: Stopped) -> Finished[Search]:
    """Resume a search: keep what is evaluated and trained. ``flags`` as in `members.resume`; otherwise as `search`."""
    config, plan, varied = members.reopen(run, flags)
    with run.hold():
        return _carry_out(run, config, plan, [_with_start(one, run.folder) for one in varied], watch, stopped)


# The candidates


def _parse(names: Sequence[str]) -> list[Multiplier]:
    """Parse the candidates, the exact one first."""
    found = []
    try:
        for name in names:
            operands, colon, folder = name.partition(":")
            if colon and Path(folder).expanduser().is_dir():
                files = sorted(path for path in Path(folder).expanduser().iterdir() if path.suffix in INTEGER_FILES)
                found += [Multiplier.parse(f"{operands}:{path}") for path in files if path.suffix != ".py"]
            else:
                found.append(Multiplier.parse(name))
    except ValueError as error:
        raise RequestError(f"--candidates: {error}") from None
    kinds = list(dict.fromkeys(map(operands_of, found)))
    if len(kinds) != 1:
        problem = f"not {' and '.join(kinds)}" if kinds else f"but {','.join(names)} has none"
        raise RequestError(f"--candidates: name multipliers of one kind of operands, {problem}")
    exact = EXACT if kinds == ["float32"] else Multiplier.parse(f"exact-{kinds[0]}")
    return list(dict.fromkeys([exact, *found]))


def _uniform(config: Config, candidates: Sequence[Multiplier], device: torch.device) -> list[Config]:
    """Return the configs with one candidate in every layer, whose multipliers are resolved."""
    names = [label(one) for one in candidates]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice or len(names) < 2:
        problem = f"several are called {twice}" if twice else "name at least one beside the exact one"
        raise RequestError(f"--candidates: {problem}")
    layers = [layer.name for layer in lifecycle.layers(config)]
    uniform = [_assigned(config, dict.fromkeys(layers, one)) for one in candidates]
    try:
        return lifecycle.resolve(uniform, device)
    except RequestError as error:
        raise RequestError(str(error).replace("model.multiplier:", "--candidates:", 1)) from None


def _assigned(config: Config, multipliers: Mapping[str, Multiplier]) -> Config:
    return config.with_model(multiplier=LayerMultipliers(tuple(multipliers.items())))


def _only(uniform: Config) -> Multiplier:
    (multiplier,) = uniform.model.multiplier.distinct()
    return multiplier


# The evaluations


class _Evaluator:
    """One network on the device, whose layers' multipliers are exchanged; it is built and calibrated once.

    Args:
        exact: the config with exact products everywhere.
        start: file of the weights.
        candidates: resolved, by their labels.
        data: all training images: the first calibrate, the last are held out for evaluation.
    """

    def __init__(
        self, exact: Config, start: str, candidates: Mapping[str, Multiplier], data: Split, device: torch.device
    ) -> None:
        self.model = lifecycle.build_model(exact, device)
        state, self.digest = _state(start, self.model)
        weights.load_state(self.model, state)
        self.candidates, self.batch = candidates, exact.data.eval_batch_size
        lifecycle.calibrate_model(exact, self.model, data)
        self.calibration = data[: exact.quantize.calibration_images]
        self.held_out = data[len(data) - _held_out(data) :]

    def __call__(self, assignment: Assignment, images: Split) -> tuple[float, float]:
        """Return loss and accuracy of an assignment."""
        convert(self.model, LayerMultipliers(tuple((layer, self.candidates[c]) for layer, c in assignment.items())))
        return evaluate(self.model, images, self.batch)

    def sensitivities(
        self, layers: Sequence[str], stopped: Stopped, known: Collection[tuple[str, str]]
    ) -> Iterator[Sensitivity]:
        """Measure each layer with each candidate but the first, the others being exact, on the calibration images.

        Args:
            known: layers and candidates that need not be measured.
        """
        exact, *others = self.candidates
        loss, accuracy = self(dict.fromkeys(layers, exact), self.calibration)
        for layer, candidate in itertools.product(layers, others):
            if (layer, candidate) in known:
                continue
            if stopped():
                raise Interrupted("interrupted")
            its_loss, its_accuracy = self({**dict.fromkeys(layers, exact), layer: candidate}, self.calibration)
            rise = its_loss - loss if math.isfinite(its_loss) else WORST
            yield Sensitivity(layer, candidate, 100 * (accuracy - its_accuracy), rise)


def _state(start: str, model: nn.Module) -> tuple[dict[str, Any], str]:
    """Return the weights in a file, which must fit a model, and their digest, without scales."""
    state, _ = weights.read(start, model, "train.init")
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not weights.is_scale(name)):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return state, digest.hexdigest()


def _network(uniform: Sequence[Config], candidates: Mapping[str, Multiplier], costs: Sequence[float]) -> dict[str, Any]:
    """Return what all who share a study have in common, except the weights."""
    exact = uniform[0]
    return {
        "model": str(exact.model.name),
        "data": [exact.data.dataset, exact.data.train_limit],
        "candidates": [[name, one.key, cost] for (name, one), cost in zip(candidates.items(), costs, strict=True)],
        "quantisation": exact.quantize.model_dump(),
    }


def _held_out(data: Split) -> int:
    return max(1, len(data) // HELD_OUT)


def _carry_out(
    run: Run, config: Config, plan: Plan, varied: Sequence[Config], watch: Watch, stopped: Stopped
) -> Finished[Search]:
    """Evaluate what is not evaluated yet, then train what is not trained."""
    settings = plan.search
    assert settings is not None
    if settings.held_out is None:
        device, done = lifecycle.use_device(config), 0

        def summarize(status: str, reason: str | None = None) -> None:
            summary = members.summary_of(status, varied, device, [])
            run.write_json("summary.json", replace(summary, reason=reason, note=config.note))

        def report(evaluation: Evaluation, count: int) -> None:
            nonlocal done
            done = count
            watch.done(", ".join(evaluation.multipliers.values()), evaluation)

        with lifecycle.computing(run, watch, summarize, lambda: f"after {done} of {settings.trials} evaluations"):
            plan, varied = _evaluate(run, config, plan, varied, device, watch, report, stopped)
    return members.carry_out(run, config, plan, varied, watch, stopped, conclude)


def _evaluate(
    run: Run,
    config: Config,
    plan: Plan,
    uniform: Sequence[Config],
    device: torch.device,
    watch: Watch,
    report: Callable[[Evaluation, int], None],
    stopped: Stopped,
) -> tuple[Plan, list[Config]]:
    """Evaluate assignments until the study has enough; return the plan to train the best, with its configs."""
    settings = plan.search
    assert settings is not None
    candidates = {label(one): one for one in map(_only, uniform)}
    costs = dict(zip(candidates, settings.candidates.values(), strict=True))
    layers = _layers(uniform[0])
    watch.status("loading the data")
    data, _ = members.shared_data(config, device)
    start = _start(run, config, len(data) - _held_out(data), watch, stopped)
    evaluator = _Evaluator(uniform[0], start, candidates, data, device)
    network = {**_network(uniform, candidates, [*costs.values()]), "weights": evaluator.digest}
    # This process holds the run: a lock in its folder is that of a process that died.
    (run.folder / f"{STUDY}.lock").unlink(missing_ok=True)
    study = Study(_study_file(run, settings), network, [*layers], [*candidates], run.name, config.seed)
    planned = _planned(study, evaluator, settings, layers, costs, stopped)

    def evaluate_one(one: Assignment) -> tuple[float, float]:
        return _cost(one, layers, costs), evaluator(one, evaluator.held_out)[1]

    what = f"{config.name}: {config.model.name}, {len(candidates)} candidates for {len(layers)} layers"
    what = f"{what}, on {len(evaluator.held_out):,} images"
    watch.begin(what, "evaluation", settings.trials, study.count)
    study.evaluate(planned, settings.trials, settings.strategy == "nsga2", evaluate_one, report, stopped)
    study.complete([dict.fromkeys(layers, name) for name in candidates], evaluate_one)
    settings = settings.model_copy(update={"held_out": len(evaluator.held_out)})
    plan = plan.model_copy(update={"search": settings})
    return _training_plan(run, plan, uniform, candidates, study, layers, start, device)


def _layers(config: Config) -> dict[str, int]:
    """Return the products of an image's forward pass in each layer."""
    return {layer.name: layer.multiplications for layer in lifecycle.layers(config)}


def _study_file(run: Run, settings: SearchPlan) -> Path:
    return run.folder / settings.study  # or the other, which is absolute


def _start(run: Run, config: Config, images: int, watch: Watch, stopped: Stopped) -> str:
    """Return the file with the weights that all assignments start from, trained now unless the config names one."""
    if config.train.init is not None:
        return config.train.init
    watch.status(f"training {config.model.name} exactly, as the start")
    data = config.data.model_copy(update={"train_limit": images})
    exact = config.model_copy(update={"name": "start", "data": data}).with_model(multiplier=EXACT, backward=Backward())
    member = Member("start", 0, {}, run.folder, exact, None)
    finish(members.train_member(member, stopped))
    assert member.run is not None
    return str((member.run.folder / "checkpoint.pt").absolute())


def _with_start(config: Config, folder: Path) -> Config:
    """Return the config with the start that lies in a search's folder, which may have been moved."""
    before = Path(config.train.init or "")
    start = folder.absolute() / before.parent.name / before.name
    return config.with_train(init=str(start)) if start.is_file() else config


def _cost(assignment: Assignment, layers: Mapping[str, int], costs: Mapping[str, float]) -> float:
    """Return the cost of all products, an exact network's being 1."""
    return sum(layers[layer] * costs[candidate] for layer, candidate in assignment.items()) / sum(layers.values())


def _planned(
    study: Study,
    evaluator: _Evaluator,
    settings: SearchPlan,
    layers: Mapping[str, int],
    costs: Mapping[str, float],
    stopped: Stopped,
) -> list[Assignment]:
    """Return what is evaluated first: uniform assignments, and some of the additive model's front, spread evenly.

    The model adds the rises of the cross-entropy: accuracies of so few images are too coarse to be added.
    """
    measured = [Sensitivity(**one) for one in study.sensitivities]
    for one in evaluator.sensitivities([*layers], stopped, {(one.layer, one.candidate) for one in measured}):
        measured.append(one)
        study.keep_sensitivities([vars(one) for one in measured])
    exact = next(iter(costs))
    losses = {layer: {exact: 0.0} for layer in layers}
    for one in measured:
        losses[one.layer][one.candidate] = one.loss
    of_layers = {layer: {name: layers[layer] * cost for name, cost in costs.items()} for layer in layers}
    uniform = [dict.fromkeys(layers, name) for name in costs]
    modelled = [one for one in additive_front(of_layers, losses) if one not in uniform]
    room = settings.trials - len(uniform)
    count = min(len(modelled), room if settings.strategy == "sensitivity" else max(1, room // STARTED))
    places = [round(i * (len(modelled) - 1) / max(1, count - 1)) for i in range(count)]
    return [*uniform, *(modelled[place] for place in places)]


def _training_plan(
    run: Run,
    plan: Plan,
    uniform: Sequence[Config],
    candidates: Mapping[str, Multiplier],
    study: Study,
    layers: Mapping[str, int],
    start: str,
    device: torch.device,
) -> tuple[Plan, list[Config]]:
    """Write the plan to train uniform assignments, and those on the front of the held-out images."""
    evaluations = study.evaluations()
    on_front = [evaluations[i] for i in front([(one.cost, one.accuracy) for one in evaluations])]
    costs = {tuple(one.multipliers.items()): one.cost for one in evaluations}
    wanted = [dict.fromkeys(layers, name) for name in candidates]
    wanted += [one.multipliers for one in on_front if one.multipliers not in wanted]
    varied = []
    for assignment in wanted:
        one = _assigned(uniform[0], {layer: candidates[name] for layer, name in assignment.items()})
        varied.append(one.with_model(backward=uniform[-1].model.backward).with_train(init=start))
    varied = lifecycle.resolve(varied, device)
    combinations = [
        members.combination(one, plan.vary, costs[tuple(assignment.items())])
        for one, assignment in zip(varied, wanted, strict=True)
    ]
    plan = plan.model_copy(update={"combinations": combinations})
    run.write_json("plan.json", plan.model_dump())
    return plan, varied


# What comes out


def conclude(run: Run, config: Config, plan: Plan, varied: Sequence[Config], rows: list[Row]) -> Search:
    """Write a search's result from its evaluations and the rows of its runs."""
    settings = plan.search
    assert settings is not None
    assert settings.held_out is not None
    layers = _layers(varied[0])
    names = [label(Multiplier.parse(name)) for name in settings.candidates]
    file = _study_file(run, settings)
    if not file.exists():
        raise RunError(f"{file} is missing, with the evaluations of this search: restore it, or search again")
    study = Study(file, {}, [*layers], names, run.name, config.seed)
    evaluations = study.evaluations()
    accuracies = {tuple(one.multipliers.items()): one.accuracy for one in evaluations}
    points = []
    for row, one, combination in zip(rows, varied, plan.combinations, strict=True):
        assert isinstance(one.model.multiplier, LayerMultipliers)
        assignment = {layer: label(multiplier) for layer, multiplier in one.model.multiplier.layers}
        accuracy = accuracies[tuple(assignment.items())]
        points.append(Point(assignment, combination.cost or 0.0, accuracy, row.test_accuracy, row.run))
    trained = [i for i, point in enumerate(points) if point.test_accuracy is not None]
    on_front = [trained[i] for i in front([(points[i].cost, points[i].test_accuracy or 0.0) for i in trained])]
    for number, i in enumerate(on_front, 1):
        name = f"front-{number}"
        points[i] = replace(points[i], config=f"{name}.yaml")
        run.write(f"{name}.yaml", configs.dump(varied[i].model_copy(update={"name": name})))
    uniform, best = points[: len(names)], [points[i] for i in on_front]
    searched, chosen = [points[i] for i in front([(point.cost, point.accuracy) for point in points])], None
    if settings.max_drop is not None:
        least = uniform[0].accuracy - settings.max_drop / 100
        chosen = next(point for point in searched if point.accuracy >= least - ROUNDING)
    dataset = dataset_of(config.data.dataset)
    result = Search(
        config=config.name,
        model=str(config.model.name),
        device=lifecycle.use_device(config).type,
        strategy=settings.strategy,
        trials=settings.trials,
        epochs=config.train.epochs,
        max_drop=settings.max_drop,
        costs=plan.costs,
        candidates=dict(zip(names, settings.candidates.values(), strict=True)),
        layers=layers,
        held_out=settings.held_out,
        evaluations=len(evaluations),
        seconds=sum(one.seconds for one in evaluations),
        sensitivities=[Sensitivity(**one) for one in study.sensitivities],
        uniform=uniform,
        searched=searched,
        front=best,
        chosen=chosen,
        hypervolume={
            name: hypervolume([(one.cost, one.test_accuracy or 0.0) for one in some], 1.0, 1 / dataset.classes)
            for name, some in (("front", best), ("searched", searched), ("uniform", uniform))
        },
    )
    run.write_json("search.json", result)
    run.write("search.csv", _csv_of([*layers], evaluations, points))
    return result


def _csv_of(layers: Sequence[str], evaluations: Sequence[Evaluation], points: Sequence[Point]) -> str:
    """Write a line an evaluation, and what retraining made of those that were retrained."""
    retrained = {tuple(point.multipliers.items()): point for point in points}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*layers, "cost", "accuracy", "seconds", "test_accuracy", "run"])
    for one in evaluations:
        point = retrained.get(tuple(one.multipliers.items()))
        trained = [point.test_accuracy, point.run] if point else ["", ""]
        writer.writerow([*one.multipliers.values(), one.cost, one.accuracy, one.seconds, *trained])
    return text.getvalue()
