"""The command line: commands and flags, nothing else."""

import json as json_module
import os
import signal
import sys
import traceback
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mbm_cli.errors import MbmError, RequestError, RunError
from mbm_cli.terminal import leave_at_once, make_writable, report_error, stop_on_signal

# \b: the lines after it stay as they are.
START = """Train neural networks on MNIST with approximate multiplications (MBM), bit for bit as the hardware would.

\b
The main commands:
  mbm train                   train LeNet with MBM convolutions, keep the run
  mbm compare exact-vs-mbm    the same exact, seed by seed: a difference?
  mbm profile epoch           where the time of an epoch goes

\b
Where to start:
  mbm doctor                  is everything there, is every product right?
  mbm configs list            what can be trained as it is
  mbm multipliers list        what --multiplier takes
  mbm COMMAND --help          each with an example

What the arithmetic is and how to extend it: README.md and docs/ beside the sources.
"""

app = typer.Typer(
    name="mbm",
    help=START,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
compare_app = typer.Typer(
    no_args_is_help=True,
    help="Is there a difference, and is it more than noise?\n\nFor example: mbm compare exact-vs-mbm --seeds 3",
)
data_app = typer.Typer(no_args_is_help=True, help="The data set.\n\nFor example: mbm data fetch")
runs_app = typer.Typer(no_args_is_help=True, help="Runs: list them, show one.\n\nFor example: mbm runs list")
multipliers_app = typer.Typer(
    no_args_is_help=True,
    help="Multipliers: list what there is, export one as a table.\n\nFor example: mbm multipliers list",
)
configs_app = typer.Typer(
    no_args_is_help=True,
    help="Configs: list those that ship, copy one to edit, check one.\n\nFor example: mbm configs list",
)
profile_app = typer.Typer(no_args_is_help=True, help="Where the time goes.\n\nFor example: mbm profile epoch")
app.add_typer(compare_app, name="compare")
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(configs_app, name="configs")
app.add_typer(multipliers_app, name="multipliers")
app.add_typer(profile_app, name="profile")


def _shipped_configs(incomplete: str) -> list[str]:
    """For completion, at every key: config.py would import PyTorch, which takes seconds."""
    names = (entry.name for entry in (files("mbm_cli") / "configs").iterdir() if entry.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in names if name.startswith(incomplete))


ConfigOption = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help="A YAML file, or the name of a shipped config, for example cnn3-mbm.",
        autocompletion=_shipped_configs,
    ),
]
MultiplierOption = Annotated[
    str | None, typer.Option(help="A multiplier, for example mbm-t8; mbm multipliers list shows them.")
]
BitsOption = Annotated[
    int | None, typer.Option(min=1, max=11, help="Fraction bits of python:FILE.py:function, for example 5; default: 7.")
]
EpochsOption = Annotated[
    int | None,
    typer.Option(min=1, max=2**31 - 1, help="Epochs, for example 5; the learning rate's schedule spans all of them."),
]
ResumeOption = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Go on with what was interrupted: its folder, for example runs/RUN."),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder or its name in --output, for example runs/RUN.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Run the code (python:, c:) that the run names, for example of your own runs.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a field, for example optimizer.lr=0.002; repeatable."),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where to compute, for example cpu; auto takes a GPU.")
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Decides first weights and the images' order, for example 7.")
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, max=4096, help="CPU threads, for example 4; default: PyTorch's choice.")
]
OutputOption = Annotated[Path, typer.Option(help="Folder of the run folders, for example /data/runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else: --json > result.json.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors, for example in a script.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show an error's traceback, for example to report it.")]


@app.command()
def train(
    context: typer.Context,
    config: ConfigOption = "lenet-mbm",
    multiplier: MultiplierOption = None,
    bits: BitsOption = None,
    epochs: EpochsOption = None,
    resume: ResumeOption = None,
    trust: TrustOption = False,
    device: DeviceOption = None,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    output: OutputOption = Path("runs"),
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a network and keep the run.

    For example: mbm train --config lenet-mbm --multiplier mbm-t8 --epochs 3
    """
    from mbm_cli import config as configs
    from mbm_cli.experiments import train as experiment

    if resume is not None:
        _refuse_with_resume(context, "epochs")
        run = _find_to_resume(resume, output, trust)
        with stop_on_signal() as stopped:
            summary = experiment.resume(run, epochs, _display(json, quiet), stopped)
    else:
        _refuse_trust(trust)
        loaded = configs.load(config, _overrides(set_, device, seed, _one_with_bits(multiplier, bits), epochs))
        with stop_on_signal() as stopped:
            run, summary = experiment.train(loaded, output, _display(json, quiet), stopped, threads)
    if json:
        _print_json({**summary, "run": str(run.folder)})


@compare_app.command("exact-vs-mbm")
def compare_exact_vs_mbm(
    context: typer.Context,
    config: ConfigOption = "lenet-mbm",
    multiplier: Annotated[
        str | None, typer.Option(help="One or several, for example mbm,mbm-t8; default: the config's.")
    ] = None,
    bits: BitsOption = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="How many seeds, for example 5, from the config's on.")
    ] = 3,
    epochs: EpochsOption = None,
    resume: ResumeOption = None,
    trust: TrustOption = False,
    device: DeviceOption = None,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    output: OutputOption = Path("runs"),
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train exact and approximate, seed by seed, and compare.

    For example: mbm compare exact-vs-mbm --multiplier mbm,mbm-t16-r7 --seeds 3
    """
    from mbm_cli import config as configs
    from mbm_cli import render
    from mbm_cli.experiments import compare as experiment
    from mbm_cli.lists import split_at_commas

    if json or quiet:
        display = render.CompareDisplay()
    else:
        display = render.LiveCompareDisplay() if sys.stdout.isatty() else render.PlainCompareDisplay()
    if resume is not None:
        _refuse_with_resume(context, "nothing")
        run = _find_to_resume(resume, output, trust)
        with stop_on_signal() as stopped:
            result = experiment.resume(run, display, stopped)
    else:
        _refuse_trust(trust)
        loaded = configs.load(config, _overrides(set_, device, seed, None, epochs))
        columns = _with_bits(split_at_commas(multiplier) if multiplier else [], bits)
        with stop_on_signal() as stopped:
            run, result = experiment.compare(
                loaded, columns or [str(loaded.model.multiplier)], seeds, output, display, stopped, threads
            )
    if json:
        _print_json({**result, "run": str(run.folder)})


@app.command("eval")
def eval_(
    run: RunArgument,
    multiplier: Annotated[
        str, typer.Option(metavar="A,B,...", help="One or several multipliers, for example exact,mbm-t16-r7.")
    ],
    bits: BitsOption = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw confusion matrices, too, for example to see which digits suffer.")
    ] = False,
    trust: TrustOption = False,
    device: DeviceOption = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="CPU threads, for example 4; default: the run's.")
    ] = None,
    output: OutputOption = Path("runs"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate a trained network with other multipliers.

    For example: mbm eval RUN --multiplier exact,mbm-t16-r7 --plot
    """
    from mbm_cli import tables
    from mbm_cli.experiments import evaluate as experiment
    from mbm_cli.lists import split_at_commas

    found, names = _find_to_resume(run, output, trust), _with_bits(split_at_commas(multiplier), bits)
    with tables.console(stderr=True).status("loading") as status:
        made, result, notes = experiment.evaluate(found, names, output, plot, device, threads, status.update)
    if json:
        _print_json(result)
    elif not quiet:
        screen = tables.console()
        screen.print(tables.evaluation_table(result))
        for line in (*notes, f"run: {made.folder}"):
            screen.print(line, soft_wrap=True)


@app.command()
def sweep(
    context: typer.Context,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=A,B,...",
            help="Values of a field, for example model.multiplier=mbm,mbm-t16; several --vary: all combinations.",
        ),
    ] = None,
    config: ConfigOption = "lenet-mbm",
    multiplier: MultiplierOption = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="How many seeds, for example 3, from the config's on.")
    ] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Runs at once, for example 4, each a process; default: 1.")
    ] = None,
    epochs: EpochsOption = None,
    resume: ResumeOption = None,
    trust: TrustOption = False,
    device: DeviceOption = None,
    seed: SeedOption = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="CPU threads of each run, for example 1; default: the CPU's, shared by --jobs. They decide a result's "
            "last bits.",
        ),
    ] = None,
    output: OutputOption = Path("runs"),
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train with every combination of some fields' values.

    For example: mbm sweep --vary model.multiplier=mbm,mbm-t16,mbm-t20 --vary optimizer.lr=0.001,0.002 --seeds 3
    """
    from mbm_cli import config as configs
    from mbm_cli import render
    from mbm_cli.experiments import sweep as experiment

    if json or quiet:
        display = render.SweepDisplay()
    else:
        display = render.LiveSweepDisplay() if sys.stdout.isatty() else render.PlainSweepDisplay()
    if resume is not None:
        _refuse_with_resume(context, "jobs")
        run = _find_to_resume(resume, output, trust)
        with stop_on_signal() as stopped:
            result = experiment.resume(run, jobs, display, stopped)
    else:
        _refuse_trust(trust)
        loaded = configs.load(config, _overrides(set_, device, seed, multiplier, epochs))
        with stop_on_signal() as stopped:
            run, result = experiment.sweep(loaded, vary or [], seeds, jobs or 1, output, display, stopped, threads)
    if json:
        _print_json({**result, "run": str(run.folder)})


@profile_app.command("conv")
def profile_conv(
    config: ConfigOption = "lenet-mbm",
    multiplier: MultiplierOption = None,
    bits: BitsOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    output: OutputOption = Path("runs"),
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Time single convolutions beside exact ones.

    For example: mbm profile conv --multiplier mbm-t16-r7
    """
    from mbm_cli import config as configs
    from mbm_cli import tables
    from mbm_cli.experiments import profile as experiment

    loaded = configs.load(config, _overrides(set_, device, seed, _one_with_bits(multiplier, bits)))
    with tables.console(stderr=True).status("timing") as status, stop_on_signal() as stopped:
        run, result = experiment.profile_conv(loaded, output, threads, status.update, stopped)
    if json:
        _print_json({**result, "run": str(run.folder)})
    elif not quiet:
        tables.console().print(tables.conv_tables(result))
        typer.echo(f"run: {run.folder}")


@app.command()
def doctor(
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Decides the random products, for example 7.")] = 0,
    threads: ThreadsOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Check the installation, and every backend's products.

    For example: mbm doctor
    """
    import torch

    from mbm_cli import tables
    from mbm_cli.experiments import doctor as experiment

    if threads is not None:
        torch.set_num_threads(threads)
    screen = tables.console()

    def report(check: experiment.Check) -> None:
        if not (json or quiet):
            tables.print_check(screen, check)

    result = experiment.doctor(seed, report)
    if json:
        _print_json(result)
    if not result["passed"]:
        raise RunError("mbm train would fail or be wrong here: see the problems above")


@profile_app.command("epoch")
def profile_epoch(
    config: ConfigOption = "lenet-mbm",
    multiplier: MultiplierOption = None,
    bits: BitsOption = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
    output: OutputOption = Path("runs"),
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Run an epoch and tell where its time went.

    For example: mbm profile epoch --config lenet-mbm
    """
    from mbm_cli import config as configs
    from mbm_cli import tables
    from mbm_cli.experiments import profile_epoch as experiment

    loaded = configs.load(config, _overrides(set_, device, seed, _one_with_bits(multiplier, bits)))
    with tables.console(stderr=True).status("loading") as status, stop_on_signal() as stopped:
        run, result = experiment.profile_epoch(loaded, output, threads, status.update, stopped)
    if json:
        _print_json({**result, "run": str(run.folder)})
    elif not quiet:
        tables.console().print(tables.epoch_profile_tables(result))
        typer.echo(f"run: {run.folder}")


@app.command()
def characterize(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Multipliers, for example mbm-t8 and other short forms, lut:FILE, python:FILE.py:function, "
            "c:FILE.h:function; of unsigned integers mbm-int8, mitchell-int16, mbm-int16-t3.",
        ),
    ],
    bits: BitsOption = None,
    samples: Annotated[int, typer.Option(min=1, max=2**48, help="Random pairs, for example 100000.")] = 2**24,
    sweep_truncate: Annotated[
        bool, typer.Option("--sweep-truncate", help="Also errors against truncated bits, for example 0 to 22 of mbm.")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute, for example cpu.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Decides the random pairs, for example 7.")] = 0,
    threads: ThreadsOption = None,
    output: OutputOption = Path("runs"),
    json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure how wrong multipliers are, and where.

    For example: mbm characterize mbm mbm-t16-r7 mitchell mbm-int8
    """
    from mbm_cli import tables
    from mbm_cli.experiments import characterize as experiment

    progress = tables.console(stderr=True)
    progress.quiet = quiet
    with progress.status("starting") as status, stop_on_signal() as stopped:
        run, result = experiment.characterize(
            _with_bits(names, bits),
            output,
            samples,
            seed,
            device,
            threads,
            sweep_truncate,
            status.update,
            stopped,
        )
    if json:
        _print_json({**result, "run": str(run.folder)})
    elif not quiet:
        tables.console().print(tables.error_table(result))
        if sweep_truncate:
            typer.echo(f"errors against truncated bits: {run.folder / 'sweep-truncate.png'}")
        typer.echo(f"run: {run.folder}")


@data_app.command("fetch")
def data_fetch(
    root: Annotated[
        Path | None, typer.Option(help="Data folder, for example /data; default: MBM_DATA_DIR or the cache folder.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Fetch MNIST and verify it.

    For example: mbm data fetch --root /data
    """
    from mbm_cli.data import fetch_mnist

    typer.echo(f"MNIST is complete and verified in {fetch_mnist(root)}")


@runs_app.command("list")
def runs_list(output: OutputOption = Path("runs"), json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the runs in the output folder, the oldest first.

    For example: mbm runs list --output runs
    """
    from mbm_cli import tables
    from mbm_cli.runs import list_runs

    if os.path.exists(output) and not os.path.isdir(output):  # False where nobody may look, and the list says so
        raise RequestError(f"{output} is not a folder: name the one that holds the runs")
    runs = [_summary_or_damage(run) for run in list_runs(output)]
    if json:
        _print_json({"runs": runs})
    elif runs:
        screen = tables.console()
        screen.print(tables.run_table(runs, screen.width))
    else:
        typer.echo(f"no runs in {output}: mbm train makes one")


@runs_app.command("show")
def runs_show(
    run: RunArgument,
    output: OutputOption = Path("runs"),
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a run: its result, its epochs and its config.

    For example: mbm runs show RUN
    """
    from mbm_cli import config as configs
    from mbm_cli import tables
    from mbm_cli.runs import Run

    found = Run.find(run, output)
    summary, metrics = found.summary(), found.metrics()
    if json:
        _print_json({"run": str(found.folder), **summary, "metrics": metrics})
        return
    screen = tables.console()
    screen.print(tables.run_table([{"run": str(found.folder), **summary}], screen.width))
    if "reason" in summary:
        screen.print(f"{summary['status']}: {summary['reason']}\n", soft_wrap=True)
    _print_result(screen, found)
    if metrics:
        # Its multiplier may be code of somebody else's, which showing it does not run.
        shown = configs.parse(found.config_text(), str(found.folder / "config.yaml"), ["model.multiplier=exact"])
        screen.print(tables.epoch_table(metrics, shown.train.epochs, screen.width))
    screen.print("\n" + found.config_text(), soft_wrap=True)


def _print_result(screen: Any, run: Any) -> None:
    """The table of a comparison or a sweep that was completed."""
    from mbm_cli import tables

    prints = {"compare.json": tables.print_comparison, "sweep.json": tables.print_sweep}
    for name, print_one in prints.items():
        if (run.folder / name).exists():
            result = run.read_json(name)
            try:
                print_one(screen, result)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise RunError(f"{run.folder / name} is damaged ({type(error).__name__}: {error})") from None


@multipliers_app.command("list")
def multipliers_list(json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the multipliers that there are, and how to name them.

    For example: mbm multipliers list
    """
    from mbm_cli import tables
    from mbm_cli.multipliers import NAMES

    if json:
        _print_json({"multipliers": [name._asdict() for name in NAMES]})
    else:
        columns = ("name", "what it is", "for example")
        tables.console().print(tables.table(None, columns, NAMES, left=3))


@multipliers_app.command("export")
def multipliers_export(
    name: Annotated[str, typer.Argument(help="A multiplier, for example mbm-t16-r7.")],
    file: Annotated[Path, typer.Argument(help="A .bin (7 bits at most) or .npy file (11), for example mbm.bin.")],
    bits: Annotated[
        int, typer.Option(min=1, max=11, help="Fraction bits of operands and products, for example 5.")
    ] = 7,
    debug: DebugOption = False,
) -> None:
    """Write a multiplier as a table, which lut:FILE reads.

    For example: mbm multipliers export mbm-t16-r7 mbm.bin --bits 7
    """
    from mbm_cli import lut
    from mbm_cli.multipliers import Multiplier, export

    try:
        lut.write(export(Multiplier.parse(name), bits), file)
    except ValueError as error:
        raise RequestError(str(error)) from None
    typer.echo(f"{file}: use it as --multiplier lut:{file}")


@configs_app.command("list")
def configs_list(debug: DebugOption = False) -> None:
    """List the configs that ship with the package.

    For example: mbm configs list
    """
    from mbm_cli import config as configs
    from mbm_cli import tables

    rows = [(name, configs.shipped_summary(name)) for name in configs.shipped()]
    tables.console().print(tables.table(None, ("config", "what it is"), rows, left=2))


@configs_app.command("copy")
def configs_copy(
    name: Annotated[
        str, typer.Argument(help="A shipped config, for example lenet-mbm.", autocompletion=_shipped_configs)
    ],
    to: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to, for example mine.yaml; default: NAME.yaml here.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Copy a shipped config to a file of your own.

    For example: mbm configs copy lenet-mbm mine.yaml
    """
    from mbm_cli import config as configs

    text = configs.shipped_text(name)
    path = to or Path(f"{name.removesuffix('.yaml')}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink()
                raise
    except FileExistsError:
        raise RequestError(f"{path} exists already: name another file") from None
    except OSError as error:
        raise RequestError(f"cannot write {path} ({error.strerror}): name another file") from None
    typer.echo(f"{path}: edit it, then mbm train --config {path}")


@configs_app.command("check")
def configs_check(
    file: Annotated[
        str,
        typer.Argument(
            help="A YAML file, for example mine.yaml, or the name of a shipped config.", autocompletion=_shipped_configs
        ),
    ],
    set_: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Check a config without running it, and print it complete.

    For example: mbm configs check mine.yaml --set optimizer.lr=0.002
    """
    from mbm_cli import config as configs
    from mbm_cli.experiments.setup import check_layers

    loaded = configs.load(file, set_ or [])
    check_layers(loaded)
    typer.echo(configs.dump(loaded), nl=False)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version, for example to report it.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from mbm_cli import __version__

        typer.echo(f"mbm {__version__}")
        raise typer.Exit()


def main() -> None:
    """The entry point: an error becomes a line on standard error and an exit code."""
    arguments = sys.argv[1:]
    # While libraries are being imported, an exception would end up in their hands.
    signal.signal(signal.SIGINT, lambda number, frame: leave_at_once())
    make_writable("stdout")
    make_writable("stderr")
    try:
        code = app(arguments, prog_name="mbm", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code = report_error(error)
    sys.exit(code)


def _summary_or_damage(run: Any) -> dict[str, Any]:
    """A run's summary; of a damaged run what there is to tell."""
    try:
        run.check()
        return {"run": str(run.folder), **run.summary()}
    except MbmError as error:
        return {"run": str(run.folder), "status": "damaged", "reason": str(error)}


def _overrides(
    set_: list[str] | None, device: str | None, seed: int | None, multiplier: str | None, epochs: int | None = None
) -> list[str]:
    """The flags as overrides; a flag wins over --set."""
    if multiplier is not None:
        from mbm_cli import config as configs

        try:
            configs.multiplier(multiplier)
        except RequestError as error:
            several = " (several at once are for mbm compare, eval and sweep)" if "," in multiplier else ""
            raise RequestError(f"--multiplier: {error}{several}") from None
        if not multiplier.startswith("{"):
            multiplier = json_module.dumps(multiplier)  # a file's name may have characters that mean something in YAML
    flags = {"device": device, "seed": seed, "model.multiplier": multiplier, "train.epochs": epochs}
    return [*(set_ or []), *(f"{field}={value}" for field, value in flags.items() if value is not None)]


def _with_bits(names: list[str], bits: int | None) -> list[str]:
    """Tell functions in Python, among multipliers, for how many bits they are tabulated."""
    if bits is None:
        return names
    if not any(name.startswith("python:") for name in names):
        raise RequestError("--bits belongs to a function in Python, python:FILE.py:function")
    return [f"{name}@{bits}" if name.startswith("python:") else name for name in names]


def _one_with_bits(multiplier: str | None, bits: int | None) -> str | None:
    return _with_bits([multiplier or ""], bits)[0] or None


def _refuse_trust(trust: bool) -> None:
    if trust:
        raise RequestError("--trust belongs to --resume RUN: what you name yourself is run without it")


def _find_to_resume(name: str, output: Path, trust: bool) -> Any:
    """The run of that name or folder; if it came with code of somebody else's, only with ``--trust``."""
    from mbm_cli import config as configs
    from mbm_cli.runs import Run

    run = Run.find(name, output)
    if not trust:
        for path, text in run.texts():
            code = configs.code_named_in(text, str(path))
            if code is not None:
                raise RequestError(f"{path} names code, {code}: look at it, then run it with --trust")
    return run


def _refuse_with_resume(context: typer.Context, changeable: str) -> None:
    fitting = {"resume", "trust", changeable, "output", "json", "quiet", "debug"}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    wrong = [f"--{name.rstrip('_')}" for name in given if name not in fitting]
    if wrong:
        raise RequestError(f"--resume uses the run's own config: drop {', '.join(wrong)} ({changeable} may change)")


def _display(json: bool, quiet: bool) -> Any:
    from mbm_cli import render

    if json or quiet:
        return render.Display()
    return render.LiveDisplay() if sys.stdout.isatty() else render.PlainDisplay()


def _print_json(value: object) -> None:
    print(json_module.dumps(value, indent=2))
