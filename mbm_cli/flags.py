"""The flags that commands share, how a command takes them, and the config that they make."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option, Typer

from mbm_cli.errors import RequestError
from mbm_cli.variables import set_for_turns


def _configs(incomplete: str) -> list[str]:
    """Complete the name of a shipped config without importing what reads configs."""
    names = (entry.name for entry in (files("mbm_cli") / "configs").iterdir() if entry.name.endswith(".yaml"))
    return sorted(name.removesuffix(".yaml") for name in names if name.startswith(incomplete))


def _multipliers(incomplete: str) -> list[str]:
    from mbm_cli.multipliers.names import NAMES

    before, comma, last = incomplete.rpartition(",")  # several may be listed
    names = dict.fromkeys(name for one in NAMES for name in (one.name.partition("[")[0].split("FILE")[0], one.example))
    return [before + comma + name for name in names if name.startswith(last)]


def _fields(incomplete: str) -> list[str]:
    from mbm_cli.config import Config
    from mbm_cli.documents import fields_of

    leaves = [path for path in fields_of(Config) if path not in ("data", "model", "optimizer", "train")]
    return [f"{path}=" for path in leaves if path.startswith(incomplete)]


def _runs(context: Context, incomplete: str) -> list[str]:
    """Complete the name of a run, from its beginning or from that of its last part."""
    output = Path(context.params.get("output") or "runs")
    names = sorted(entry.name for entry in output.iterdir()) if output.is_dir() else []
    parts = [part for name in names for part in (name, name.partition("-")[2])]
    return [part for part in parts if part.startswith(incomplete)]


def _device(name: str | None) -> str | None:
    if name is not None and not re.fullmatch("auto|cpu|cuda(:[0-9]{1,2})?", name):
        raise RequestError(f"--device must be auto, cpu, cuda or cuda:N, for example cuda:1, not {name!r}")
    return name


def _one_of(allowed: tuple[str, ...], name: str, flag: str) -> str:
    if name not in allowed:
        raise RequestError(f"{flag} must be {' or '.join(allowed)}, not {name!r}")
    return name


COUNT = 2**31 - 1
QUANTITIES = ("power", "area", "delay", "energy")  # as mbm_cli.costs has them, which imports much
CONFIG = {
    "help": "A YAML file, or a shipped config, for example cnn3-mbm; default: lenet-mbm.",
    "autocompletion": _configs,
}
SHIPPED = {**CONFIG, "help": "A YAML file, or a shipped config, for example cnn3-mbm."}
MULTIPLIER = {"help": "A multiplier, for example mbm-t8; see mbm multipliers list.", "autocompletion": _multipliers}
BACKWARD = {
    "help": "A multiplier of the gradients, for example mbm-t8, same or '{weight: mbm}'.",
    "autocompletion": _multipliers,
}
FIELD = {
    "metavar": "FIELD=VALUE",
    "help": "Override a field, for example optimizer.lr=0.002; repeatable.",
    "autocompletion": _fields,
}
VARY = {"metavar": "FIELD=A,B,...", "help": "Values, for example optimizer.lr=0.001,0.002; several: all combinations."}
NAMES = {
    "metavar": "A,B,...",
    "help": "One or several multipliers, for example exact,mbm-t16-r7.",
    "autocompletion": _multipliers,
}
ON = "Where --jobs compute, for example slurm://PARTITION?gpus=1&cpus=4&time=60 (minutes)."
AT_ONCE = "Runs that take turns on a GPU, in each process, for example 8; auto: as many as fit."
PICTURES = "Also draw each run's curves, for example to see which converge."
PLOT = "Draw confusion matrices, for example to see which digits suffer."
MODEL = {
    "metavar": "NAME",
    "help": "The network that --weights are of, for example cnn3 or python:FILE.py:function.",
}
WEIGHTS = "Weights instead of a run: a state_dict, for example w.pt or w.safetensors."
DRY_RUN = "Only show the network and an estimate of the time, for example before a long run."
MEASURED = "Multipliers, for example mbm-t8, lut:FILE, c:FILE.h:function; of integers drum-int8-k4, int8:FILE.c."
DEVICE = {
    "help": "Where to compute: auto, cpu, cuda or cuda:N, for example cuda:1.",
    "autocompletion": lambda incomplete: [n for n in ("auto", "cpu", "cuda") if n.startswith(incomplete)],
    "callback": _device,
}
STRATEGIES = ("sensitivity", "nsga2")
STRATEGY = {
    "help": "How to search: sensitivity or nsga2, which begins with it, for example sensitivity.",
    "autocompletion": lambda incomplete: [name for name in STRATEGIES if name.startswith(incomplete)],
    "callback": lambda name: _one_of(STRATEGIES, name, "--strategy"),
}
CANDIDATES = {
    "metavar": "A,B,...",
    "help": "Multipliers of one kind, for example mbm,mbm-t20; or int8:FOLDER, all files of a folder.",
    "autocompletion": _multipliers,
}
QUANTITY = {
    "help": "What a cost is: power, area, delay or energy, for example area.",
    "autocompletion": lambda incomplete: [name for name in QUANTITIES if name.startswith(incomplete)],
    "callback": lambda name: _one_of(QUANTITIES, name, "--quantity"),
}
BITS = {"min": 1, "max": 11, "help": "Fraction bits of a function's table, for example 5."}


@dataclass
class Options:
    """The options that commands share; each command takes those that it names."""

    config: Annotated[str | None, Option("--config", "-c", **CONFIG)] = None
    multiplier: Annotated[str | None, Option(**MULTIPLIER)] = None
    backward: Annotated[str | None, Option(**BACKWARD)] = None
    bits: Annotated[int | None, Option(**BITS)] = None
    epochs: Annotated[int | None, Option(min=1, max=COUNT, help="Epochs of the whole schedule, for example 5.")] = None
    jobs: Annotated[int | None, Option(min=1, max=1024, help="Runs at once, for example 4, each a process.")] = None
    on: Annotated[str | None, Option(metavar="local|slurm://...", help=ON)] = None
    at_once: Annotated[str | None, Option(metavar="auto|N", help=AT_ONCE)] = None
    device: Annotated[str | None, Option(**DEVICE)] = None
    seed: Annotated[int | None, Option(min=0, max=2**63 - 1, help="Decides what is random, for example 7.")] = None
    init: Annotated[
        str | None, Option(metavar="RUN", help="Start from a run's weights, or a file's, for example w.pt.")
    ] = None
    threads: Annotated[int | None, Option(min=1, max=4096, help="CPU threads of each run, for example 4.")] = None
    set_: Annotated[list[str] | None, Option("--set", **FIELD)] = None
    pictures: Annotated[bool, Option("--pictures", help=PICTURES)] = False
    costs: Annotated[Path | None, Option(help="A YAML file of multipliers' costs, for example my-costs.yaml.")] = None
    quantity: Annotated[str, Option(**QUANTITY)] = "power"
    name: Annotated[str | None, Option(help="Of the run's folder, for example first-try.")] = None
    note: Annotated[str | None, Option(help="A text that lists show, for example 'as in table 2'.")] = None
    trust: Annotated[bool, Option("--trust", help="Run the code that the run names, for example your own.")] = False
    output: Annotated[Path, Option(help="Folder of the run folders, for example /data/runs.")] = Path("runs")
    json: Annotated[bool, Option("--json", help="Print one JSON object, nothing else: --json > r.json.")] = False
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print nothing but errors, for example in a script.")] = False
    debug: Annotated[bool, Option("--debug", help="Show an error's traceback, for example to report it.")] = False


PRICES = "costs quantity"
MEASUREMENT = "bits device seed threads output json quiet"
EXPERIMENT = f"config multiplier backward set_ {MEASUREMENT}"
TRAINING = f"{EXPERIMENT} epochs init name note"
SEARCH = f"config backward set_ {MEASUREMENT} epochs init name note jobs on at_once {PRICES}"
RUN = {
    "metavar": "RUN",
    "help": "A run's folder, its name in --output, its --name, or its last part, for example runs/RUN.",
    "autocompletion": _runs,
}
RunName = Annotated[str, Argument(**RUN)]
RunOrNone = Annotated[str | None, Argument(**RUN)]
Latex = Annotated[Path | None, Option(help="Also write the table for a paper, for example table.tex.")]
Root = Annotated[Path | None, Option(help="Folder, for example /data; default: MBM_DATA_DIR or the cache.")]
Target = Annotated[Path | None, Argument(metavar="FILE", help="Where to, for example mine.yaml; default: NAME.yaml.")]
Version = Annotated[bool, Option("--version", help="Show the version, for example to report it.", is_eager=True)]
Seeds = Annotated[int, Option(min=1, max=1000, help="How many seeds, for example 5, from the config's on.")]


def command(group: Typer, name: str, shared: str, example: str) -> Callable[[Callable[..., None]], Any]:
    """Register a command that takes ``Options`` of the shared names, after flags of its own."""
    taken = [field for field in fields(Options) if field.name in [*shared.split(), "debug"]]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in taken]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def call(**given: Any) -> None:
            function(Options(**{option.name: given.pop(option.name) for option in options}), **given)

        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [*(parameter.replace(kind=keyword) for parameter in own), *options]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return group.command(name, help=f"{function.__doc__}\n\nFor example: {example}")(call)

    return register


def engine_of(o: Options, at_once: int | None = None) -> Any:
    """Return the engine of the flags. Call this before PyTorch is imported: for runs in turn it sets variables."""
    from mbm_cli.config import Engine

    engine = Engine(at_once=at_once).with_flags(o.jobs, o.on, o.at_once)
    if engine.at_once != 1:
        set_for_turns()
    return engine


def config_of(o: Options) -> Any:
    """Load the config with the flags as overrides; a flag wins over --set."""
    from mbm_cli.config import backward, load, multiplier

    (name,) = [None] if (o.multiplier, o.bits) == (None, None) else with_bits([o.multiplier or ""], o.bits)
    if name is not None and multiplier(name):
        name = _text(name)
    base, init = (o.config or "lenet-mbm"), None
    if o.init is not None:
        from mbm_cli.runs import weights_of

        base, init = weights_of(o.init, o.output, o.config, name is not None)
    if o.backward is not None:
        backward(o.backward)
    flags = {"device": o.device, "seed": o.seed, "name": o.name, "note": o.note and json.dumps(o.note)}
    flags |= {"model.multiplier": name, "model.backward": o.backward and _text(o.backward)}
    flags |= {"train.epochs": o.epochs, "train.threads": o.threads, "train.init": init and json.dumps(init)}
    overrides = [f"{field}={value}" for field, value in flags.items() if value is not None]
    named = {"name": "--name"} if o.name is not None else {}
    return load(base, [*(o.set_ or []), *overrides], named)


def refuse_set(o: Options, vary: list[str]) -> None:
    """Refuse ``--vary`` of a field to which another flag gives a value."""
    flags: dict[str, object] = {"device": o.device, "model.multiplier": o.multiplier, "model.backward": o.backward}
    flags |= {"train.init": o.init, "train.epochs": o.epochs, "train.threads": o.threads}
    given = {field: f"--{field.rpartition('.')[2]}" for field, value in flags.items() if value is not None}
    given |= {text.partition("=")[0].strip(): "--set" for text in o.set_ or []}
    for field in (text.partition("=")[0].strip() for text in vary):
        if field in given:
            raise RequestError(f"--vary {field}: {given[field]} gives it a value, too: leave out one of them")


def prices_of(o: Options) -> Any:
    """Read the costs of multipliers, with those of ``--costs``."""
    from mbm_cli.costs import Prices

    return Prices.load(o.costs, o.quantity)  # type: ignore[arg-type]


def _text(name: str) -> str:
    """Return a multiplier's name as YAML; a file's may have characters that mean something there."""
    return name if name.startswith("{") else json.dumps(name)


def names_of(listed: str | None, bits: int | None) -> list[str]:
    """Split the multipliers of ``--multiplier A,B``."""
    from mbm_cli.experiments.sweep import split_at_commas

    return with_bits([] if listed is None else split_at_commas(listed), bits)


def with_bits(names: list[str], bits: int | None) -> list[str]:
    """Append ``--bits`` to the functions among multipliers."""
    functions = [name for name in names if name.startswith(("python:", "c:"))]
    if bits is not None and not functions:
        raise RequestError("--bits belongs to a function, python:FILE.py:function or c:FILE.h:function")
    return [f"{name}@{bits}" if bits is not None and name in functions else name for name in names]


def setting_for(error: Exception) -> str:
    """Return the ``--set`` that does what an unknown option asks for."""
    name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    taken = error.ctx.command.params if getattr(error, "ctx", None) else []  # type: ignore[attr-defined]
    if not name or not any("--set" in parameter.opts for parameter in taken):
        return ""
    from mbm_cli.config import Config
    from mbm_cli.documents import field_called

    field = field_called(name, Config)
    return f"did you mean --set {field}=...?" if field else ""
