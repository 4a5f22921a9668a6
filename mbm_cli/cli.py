"""The command line: commands and flags, nothing else."""

import atexit
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer, confirm, echo

from mbm_cli.errors import RequestError, RunError
from mbm_cli.flags import (
    CANDIDATES,
    DRY_RUN,
    EXPERIMENT,
    MEASURED,
    MEASUREMENT,
    MODEL,
    NAMES,
    PLOT,
    PRICES,
    RUN,
    SEARCH,
    SHIPPED,
    STRATEGY,
    TRAINING,
    VARY,
    WEIGHTS,
    Latex,
    Options,
    Root,
    RunName,
    RunOrNone,
    Seeds,
    Target,
    Version,
    command,
    config_of,
    engine_of,
    names_of,
    prices_of,
    refuse_set,
    setting_for,
    with_bits,
)
from mbm_cli.terminal import leave_at_once, make_writable, report_error, stop_on_signal
from mbm_cli.variables import set_for_turns, set_variables

# \b: the lines after it stay as they are.
START = """Train neural networks with approximate multiplications (MBM), bit for bit as the hardware would.

\b
The main commands:
  mbm train                   train LeNet with MBM convolutions, keep the run
  mbm compare exact-vs-mbm    train exact and approximate, seed by seed
  mbm profile epoch           show where the time of an epoch goes

\b
Where to start:
  mbm doctor                  check the installation and every product
  mbm configs list            list what can be trained as it is
  mbm multipliers list        list what --multiplier takes
  mbm COMMAND --help          show flags, with an example
"""
app = Typer(
    name="mbm",
    help=START,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _group(name: str, help: str, example: str) -> Typer:
    group = Typer(no_args_is_help=True, help=f"{help}\n\nFor example: {example}")
    app.add_typer(group, name=name)
    return group


compare_app = _group("compare", "Compare multipliers over several seeds.", "mbm compare exact-vs-mbm --seeds 3")
data_app = _group("data", "List, fetch and verify data sets.", "mbm data list")
runs_app = _group("runs", "List, show and delete runs.", "mbm runs list")
configs_app = _group("configs", "List, copy and check configs.", "mbm configs list")
multipliers_app = _group("multipliers", "List multipliers, show one, export one as a table.", "mbm multipliers list")
profile_app = _group("profile", "Show where the time goes.", "mbm profile epoch")


@command(app, "train", TRAINING, "mbm train --config lenet-mbm --multiplier mbm-t8 --epochs 3")
def train(
    o: Options,
    dry_run: Annotated[bool, Option("--dry-run", help=DRY_RUN)] = False,
) -> None:
    """Train a network and keep the run."""
    from mbm_cli.experiments import train as experiment

    config = config_of(o)
    if dry_run:
        _estimate(o, config)
    else:
        _compute(o, partial(experiment.train, config, o.output))


@command(
    compare_app,
    "exact-vs-mbm",
    f"{TRAINING} jobs on at_once pictures {PRICES}",
    "mbm compare exact-vs-mbm --multiplier mbm,mbm-t8",
)
def compare_exact_vs_mbm(o: Options, seeds: Seeds = 3, latex: Latex = None) -> None:
    """Train exact and approximate, seed by seed, and compare."""
    engine = engine_of(o, at_once=1)
    from mbm_cli.experiments.compare import compare as experiment

    config = config_of(replace(o, multiplier=None, backward=None, bits=None))
    names, backwards = names_of(o.multiplier, o.bits), names_of(o.backward, None)
    made = partial(experiment, config, names, seeds, o.output, backwards=backwards, engine=engine, prices=prices_of(o))
    _compute(o, made, latex=latex)


@command(
    app,
    "sweep",
    f"{TRAINING} jobs on at_once pictures {PRICES}",
    "mbm sweep --vary model.multiplier=mbm,mbm-t16 --seeds 3",
)
def sweep(
    o: Options, vary: Annotated[list[str] | None, Option(**VARY)] = None, seeds: Seeds = 1, latex: Latex = None
) -> None:
    """Train with every combination of some fields' values."""
    engine = engine_of(o)
    from mbm_cli.experiments.sweep import sweep as experiment

    refuse_set(o, vary or [])
    made = partial(experiment, config_of(o), vary or [], seeds, o.output, engine=engine, prices=prices_of(o))
    _compute(o, made, latex=latex)


@command(app, "search", SEARCH, "mbm search --candidates mbm,mbm-t15,mbm-t20 --init RUN --max-drop 0.5")
def search(
    o: Options,
    candidates: Annotated[str, Option(**CANDIDATES)],
    strategy: Annotated[str, Option(**STRATEGY)] = "nsga2",
    trials: Annotated[int, Option(min=1, max=10**6, help="Evaluations at most, for example 200.")] = 100,
    max_drop: Annotated[float | None, Option(min=0.0, help="Points of accuracy to lose, for example 0.5.")] = None,
    study: Annotated[Path | None, Option(help="A file that several searches share, for example study.log.")] = None,
) -> None:
    """Find which multiplier in which layer costs least for its accuracy, and retrain the best."""
    engine = engine_of(o)
    from mbm_cli.experiments.search import search as experiment

    config = config_of(replace(o, bits=None))
    names = names_of(candidates, o.bits)
    how: Any = {"strategy": strategy, "trials": trials, "max_drop": max_drop, "study": study, "engine": engine}
    _compute(o, partial(experiment, config, names, o.output, **how, prices=prices_of(o)))


@command(app, "resume", "epochs jobs on at_once pictures trust output json quiet", "mbm resume RUN")
def resume(o: Options, run: RunName) -> None:
    """Resume what was interrupted: a training run, a comparison, a sweep or a search."""
    from mbm_cli.runs import Run

    found = Run.find(run, o.output).trusted(o.trust)
    if found.has_several:
        set_for_turns()
    from mbm_cli.experiments.resume import resume as experiment

    _compute(o, partial(experiment, found, o.epochs, o.jobs, on=o.on, at_once=o.at_once))


@command(app, "eval", "bits set_ device threads trust output json quiet", "mbm eval RUN --multiplier exact,mbm-t8")
def eval_(
    o: Options,
    names: Annotated[str, Option("--multiplier", **NAMES)],
    run: RunOrNone = None,
    model: Annotated[str | None, Option(**MODEL)] = None,
    weights: Annotated[str | None, Option(metavar="FILE", help=WEIGHTS)] = None,
    plot: Annotated[bool, Option("--plot", help=PLOT)] = False,
) -> None:
    """Evaluate a trained network, or weights in a file, with other multipliers."""
    from mbm_cli.experiments import evaluate as experiments
    from mbm_cli.runs import Run

    if (run is None) == (weights is None) or (run and model):
        raise RequestError("name a run, or the network and its weights: --model lenet --weights FILE")
    multipliers = names_of(names, o.bits)
    if weights is not None:
        given = [*(o.set_ or []), f"model.name={json.dumps(model or 'lenet')}"]
        config = config_of(replace(o, bits=None, set_=given, name="weights"))
        _compute(o, partial(experiments.evaluate_file, config, weights, multipliers, o.output), draw=plot)
        return
    if o.set_:
        raise RequestError("--set belongs to --weights; a run is evaluated on its own data")
    found = Run.find(run or "", o.output).trusted(o.trust)
    _compute(o, partial(experiments.evaluate, found, multipliers, o.output, o.device, o.threads), draw=plot)


@command(profile_app, "conv", f"config multiplier set_ {MEASUREMENT}", "mbm profile conv --multiplier mbm-t16-r7")
def profile_conv(o: Options) -> None:
    """Time single convolutions beside exact ones."""
    from mbm_cli.experiments.profile_conv import profile_conv as experiment

    _compute(o, partial(experiment, config_of(o), o.output))


@command(profile_app, "epoch", EXPERIMENT, "mbm profile epoch --config lenet-mbm")
def profile_epoch(o: Options) -> None:
    """Run an epoch and show where its time goes."""
    from mbm_cli.experiments.profile_epoch import profile_epoch as experiment

    _compute(o, partial(experiment, config_of(o), o.output))


@command(app, "characterize", f"{MEASUREMENT} costs", "mbm characterize mbm mbm-t16-r7 mitchell mbm-int8")
def characterize(
    o: Options,
    names: Annotated[list[str], Argument(metavar="NAME...", help=MEASURED)],
    samples: Annotated[int, Option(min=1, max=2**48, help="Random pairs, for example 100000.")] = 2**24,
    sweep_truncate: Annotated[
        bool, Option("--sweep-truncate", help="Also each with 0 to 22 truncated bits, for example to draw them.")
    ] = False,
) -> None:
    """Measure how wrong multipliers are, and where."""
    from mbm_cli.experiments.characterize import characterize as experiment

    drawn, place = (samples, o.seed or 0), (o.device or "auto", o.threads)
    named = with_bits(names, o.bits)
    _compute(o, partial(experiment, named, o.output, *drawn, *place, sweep_truncate, prices=prices_of(o)))


@command(app, "doctor", "seed threads json quiet", "mbm doctor")
def doctor(o: Options) -> None:
    """Check the installation, and every backend's products."""
    from mbm_cli.experiments.doctor import doctor as experiment
    from mbm_cli.report.tables import print_check
    from mbm_cli.report.text import console

    screen = console(quiet=o.json or o.quiet)
    result = experiment(o.seed or 0, o.threads, lambda check: print_check(screen, check))
    if o.json:
        _print_json(asdict(result))
    if not result.passed:
        raise RunError("mbm train would fail or be wrong here: see the problems above")


@command(data_app, "list", "json", "mbm data list")
def data_list(o: Options, root: Root = None) -> None:
    """List the data sets, and which are here, verified."""
    from mbm_cli.data import DATASETS, damages
    from mbm_cli.report.text import print_table

    rows = []
    for name, (folder, damaged) in damages(root).items():
        dataset = DATASETS[name]
        state = f"missing or damaged: {', '.join(damaged)}" if damaged and folder.exists() else "not fetched"
        rows.append((name, "x".join(map(str, dataset.shape)), str(dataset.classes), state if damaged else str(folder)))
    columns = ("data set", "image", "classes", "verified in")
    if o.json:
        _print_json({"data": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        print_table(columns, rows)


@command(data_app, "fetch", "", "mbm data fetch fashion-mnist --root /data")
def data_fetch(
    o: Options, root: Root = None, name: Annotated[str, Argument(help="A data set, for example mnist.")] = "mnist"
) -> None:
    """Fetch a data set and verify it."""
    from mbm_cli.data import DATASETS

    if name not in DATASETS:
        raise RequestError(f"no data set is called {name!r}: there are {', '.join(DATASETS)}")
    echo(f"{name} is complete and verified in {DATASETS[name].fetch(root)}")


@command(runs_app, "list", "output json", "mbm runs list --output runs")
def runs_list(
    o: Options, as_csv: Annotated[bool, Option("--csv", help="Print CSV, for example for a spreadsheet.")] = False
) -> None:
    """List the runs in the output folder, the oldest first."""
    from mbm_cli.report.runs import csv_of, print_runs
    from mbm_cli.runs import rows

    runs = rows(o.output)
    if o.json:
        _print_json({"runs": runs})
    elif as_csv:
        echo(csv_of(runs), nl=False)
    elif runs:
        print_runs(runs)
    else:
        echo(f"no runs in {o.output}: mbm train makes one")


@command(runs_app, "show", "output json", "mbm runs show RUN")
def runs_show(o: Options, names: Annotated[list[str], Argument(**RUN)]) -> None:
    """Show a run: its result, its epochs and its config; several side by side."""
    from mbm_cli.runs import Run

    found = [Run.find(name, o.output) for name in names]
    if o.json:
        shown = [{"run": str(run.folder), **asdict(run.summary()), "metrics": run.metrics()} for run in found]
        _print_json(shown[0] if len(shown) == 1 else {"runs": shown})
    elif len(found) > 1:
        from mbm_cli.report.runs import print_side_by_side

        print_side_by_side([run.row() for run in found], [run.config().flat() for run in found])
    else:
        from mbm_cli.report.tables import print_run

        print_run(found[0])


@command(runs_app, "delete", "output", "mbm runs delete RUN")
def runs_delete(
    o: Options,
    names: Annotated[list[str], Argument(**RUN)],
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask, for example in a script.")] = False,
) -> None:
    """Delete runs."""
    from mbm_cli.runs import Run

    found = [Run.find(name, o.output, any_kind=True) for name in names]
    for run in found:
        echo(run.folder)
    if not yes and not confirm(f"delete {len(found)} folder{'s'[: len(found) != 1]}?"):
        raise RequestError("nothing was deleted")
    for run in found:
        run.delete()


@command(multipliers_app, "list", "costs json", "mbm multipliers list")
def multipliers_list(o: Options) -> None:
    """List the multipliers, how to name them, and what publications report about their costs."""
    from mbm_cli.multipliers.names import NAMES, PARAMETERS
    from mbm_cli.report.text import console, costs_table, print_table

    costs = prices_of(o).reported()
    if o.json:
        _print_json({"multipliers": [name._asdict() for name in NAMES], "costs": [asdict(cost) for cost in costs]})
    else:
        print_table(("name", "what it is", "for example"), NAMES)
        echo(PARAMETERS)
        console().print(costs_table(costs))


@command(multipliers_app, "show", "costs json", "mbm multipliers show drum-int8-k4")
def multipliers_show(
    o: Options, name: Annotated[str, Argument(help="A multiplier, for example int8:mul8s_1KVL.c.")]
) -> None:
    """Show a multiplier; of integers its errors, its rank, and the costs in its file."""
    from mbm_cli.experiments.characterize import describe
    from mbm_cli.multipliers.names import NAMES, PARAMETERS
    from mbm_cli.report.tables import print_circuit
    from mbm_cli.report.text import console, costs_table, print_table

    multiplier = _resolved(name)
    costs = prices_of(o).of(multiplier)
    if multiplier.is_integer:
        circuit = describe(multiplier)
        shown = asdict(circuit)
    else:
        kind = next(one for one in NAMES if one.name.startswith(multiplier.family))
        shown = {"name": str(multiplier), "what": kind.what}
    if o.json:
        _print_json({**shown, "reported": [asdict(cost) for cost in costs]})
        return
    if multiplier.is_integer:
        print_circuit(circuit)
    else:
        print_table(("name", "what it is"), [(str(multiplier), kind.what)])
        if "-rR" in kind.name:
            echo(PARAMETERS)
        echo(f"mbm characterize {name} measures its errors")
    console().print(costs_table(costs))


@command(multipliers_app, "export", "", "mbm multipliers export mbm-t16-r7 mbm.bin --bits 7")
def multipliers_export(
    o: Options,
    name: Annotated[str, Argument(help="A multiplier, for example mbm-t16-r7 or drum-int8-k4.")],
    file: Annotated[Path, Argument(help="A .bin (7 bits at most) or .npy file (11; integers), for example mbm.bin.")],
    bits: Annotated[
        int | None, Option(min=1, max=11, help="Fraction bits of operands and products, for example 5; default: 7.")
    ] = None,
) -> None:
    """Write a multiplier as a table, which lut:FILE reads, or int8:FILE for integers."""
    from mbm_cli.multipliers import content, integer_files, tables

    if file.exists():
        raise RequestError(f"{file} exists already: name another file, or remove it")
    multiplier = _resolved(name)
    if multiplier.is_integer and bits is not None:
        raise RequestError(f"--bits is for fractions, but {name} multiplies {multiplier.operands}")
    try:
        if multiplier.is_integer:
            reads = integer_files.write(multiplier.content, file)
        else:
            tables.write(content.export(multiplier, 7 if bits is None else bits), file)
            reads = f"lut:{file}"
    except ValueError as error:
        raise RequestError(str(error)) from None
    echo(f"{file}: use it as --multiplier {reads}")


def _resolved(name: str) -> Any:
    from mbm_cli.multipliers.content import resolve

    try:
        return resolve(name)
    except ValueError as error:
        raise RequestError(str(error)) from None


@command(configs_app, "list", "", "mbm configs list")
def configs_list(o: Options) -> None:
    """List the configs that ship with the package."""
    from mbm_cli.report.text import print_table
    from mbm_cli.shipped import shipped

    rows = [(name, text.partition("\n")[0].removeprefix("#").strip()) for name, text in shipped().items()]
    print_table(("config", "what it is"), rows)


@command(configs_app, "copy", "", "mbm configs copy lenet-mbm mine.yaml")
def configs_copy(o: Options, name: Annotated[str, Argument(**SHIPPED)], to: Target = None) -> None:
    """Copy a shipped config to a file of your own."""
    from mbm_cli.shipped import copy_shipped

    path = to or Path(f"{name.removesuffix('.yaml')}.yaml")
    copy_shipped(name, path)
    echo(f"{path}: edit it, then mbm train --config {path}")


@command(configs_app, "check", "set_", "mbm configs check mine.yaml --set optimizer.lr=0.002")
def configs_check(o: Options, file: Annotated[str, Argument(**SHIPPED)]) -> None:
    """Check a config without running it, and print it complete."""
    from mbm_cli.config import dump, load
    from mbm_cli.experiments.lifecycle import check

    loaded = load(file, o.set_ or [])
    check(loaded)
    echo(dump(loaded), nl=False)


@app.callback(invoke_without_command=True)
def _version(version: Version = False) -> None:
    if version:
        from mbm_cli import __version__

        echo(f"mbm {__version__}")
        raise Exit()


def main() -> None:
    """Run a command; turn an error into a line on standard error and an exit code."""
    arguments = sys.argv[1:]
    set_variables()
    # What is imported stays: to look for garbage in it takes a third of a start, and again as long at the end.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    # While libraries are being imported, they would catch an exception.
    signal.signal(signal.SIGINT, lambda number, frame: leave_at_once())
    make_writable("stdout")
    make_writable("stderr")
    try:
        code = app(arguments, prog_name="mbm", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code = report_error(error, setting_for(error))
    sys.exit(code)


# What commands share


def _compute(o: Options, experiment: Callable[..., Any], draw: bool = True, latex: Path | None = None) -> None:
    """Run an experiment with a display, and show what it made, also where some of its runs failed."""
    from mbm_cli.experiments.lifecycle import RunsFailed
    from mbm_cli.report.progress import watch

    if latex is not None and not os.access(latex.parent, os.W_OK):  # before hours of computing
        raise RequestError(f"--latex {latex}: the folder is missing or cannot be written")
    with watch(o.json, o.quiet) as progress, stop_on_signal() as stopped:
        try:
            made = experiment(watch=progress, stopped=stopped)
        except RunsFailed as failed:
            if failed.finished:
                _show(o, failed.finished, draw)
            raise
    _show(o, made, draw)
    if latex is not None:
        from mbm_cli.report.latex import latex as written
        from mbm_cli.report.tables import paper_table

        latex.write_text(written(paper_table(made.result)), encoding="utf-8")


def _estimate(o: Options, config: Any) -> None:
    """Print the network and an estimate of the training's time."""
    from mbm_cli.experiments.estimate import estimate
    from mbm_cli.report.progress import watch
    from mbm_cli.report.tables import print_estimate

    with watch(o.json, o.quiet) as progress, stop_on_signal() as stopped:
        found = estimate(config, progress, stopped)
    if o.json:
        _print_json(asdict(found))
    elif not o.quiet:
        print_estimate(found)


def _show(o: Options, made: Any, draw: bool) -> None:
    """Print a result, then draw its pictures into the run's folder."""
    if o.json:
        _print_json({"run": str(made.run.folder), **asdict(made.result)})
    elif not o.quiet:
        from mbm_cli.report.tables import print_result

        print_result(made)
    sys.stdout.flush()
    if draw:
        from mbm_cli.report.plots import pictures

        drawn = [made]
        if o.pictures and made.run.has_several:
            from mbm_cli.experiments.train import Trained
            from mbm_cli.runs import list_runs

            drawn += [Trained(run, run.summary(), run.metrics()) for run in list_runs(made.run.folder) if run.metrics()]
        for one in drawn:
            for name, picture in pictures(one.result, one).items():
                one.run.write(name, picture)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
