"""The lifecycle that all experiments share: how they begin, report progress, are interrupted, fail and end."""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import nn

from mbm_cli import optimizers
from mbm_cli.backends import cuda_matrix
from mbm_cli.backends.cuda_programs import has_matrix_units
from mbm_cli.config import Config, DataConfig, Network, OptimizerConfig
from mbm_cli.data import dataset_of
from mbm_cli.device import choose_device, set_arithmetic
from mbm_cli.errors import Interrupted, MbmError, RequestError, RunError
from mbm_cli.experiments import weights
from mbm_cli.models import Layer, build, describe_layers, try_out
from mbm_cli.multipliers import content
from mbm_cli.multipliers.code.python import Namespace, UsersNetwork, read_network
from mbm_cli.multipliers.names import EXACT, Backward, Multiplier
from mbm_cli.multipliers.tabulate import check_magnitude
from mbm_cli.ops import multiply
from mbm_cli.own_data import OwnFile
from mbm_cli.quantize import Quantization, calibrate, quantizers
from mbm_cli.runs import Run
from mbm_cli.training import Progress, Split, Trainer

OUTPUT_GONE = (errno.EPIPE, errno.EIO)  # a reader who left, a terminal that was closed
Stopped = Callable[[], bool]  # whether the user asked to stop


def never() -> bool:
    return False


R = TypeVar("R")


@dataclass(frozen=True)
class Finished(Generic[R]):
    """What an experiment leaves: its folder, and its result, which becomes JSON."""

    run: Run
    result: R


class RunsFailed(RunError):
    """Some runs of a sweep failed; ``finished`` holds the result of the others."""

    def __init__(self, message: str, hint: str, finished: "Finished[Any] | None") -> None:
        super().__init__(message, hint)
        self.finished = finished


Unit = Literal["epoch", "run", "evaluation"]


class Watch:
    """Receives the progress of an experiment. This one ignores it; `mbm_cli.report.progress` has some that show it."""

    def status(self, doing: str) -> None:
        """Report in a few words what is being done now."""

    def note(self, text: str) -> None:
        """Report something that the user should know."""

    def begin(self, what: str, unit: Unit, total: int, done: int = 0, layers: Sequence[Layer] = ()) -> None:
        """Report what is computed, in how many epochs, runs or evaluations, of which some may be done."""

    def progress(self, label: str, fraction: float, step: Progress | None = None) -> None:
        """Report, a few times a second, how much of an epoch or a run is done, 0 to 1; runs overlap."""

    def done(self, label: str, row: Any) -> None:
        """Report the end of an epoch (its metrics), of a run (its row) or of an evaluation."""

    def close(self) -> None:
        """End the display, whatever happened."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


# How an experiment begins


def resolve(configs: Sequence[Config], device: torch.device) -> list[Config]:
    """Read the content of the configs' networks and multipliers, each once, and check everything about them.

    Raises:
        RequestError: a file is missing or wrong, a function does not multiply, a network does not fit the data or lacks
            a layer, or none of the configs has a layer for its ``backward``.
    """
    read: dict[str, Multiplier] = {}
    run: dict[Path, Namespace] = {}
    tried: dict[tuple[object, ...], Network] = {}

    def network_of(config: Config) -> Network:
        model, images = config.model, dataset_of(config.data.dataset)
        asked = model.name.located, images.shape, images.classes, model.width
        if asked not in tried:
            network = model.name
            if network.runs_code:
                network = replace(network, content=read_network(network.file, network.function, run))
            try_out(network.content or network.name, *asked[1:])
            tried[asked] = network
        return replace(model.name, content=tried[asked].content)

    def read_once(multiplier: Multiplier) -> Multiplier:
        located = multiplier.located
        if located not in read:
            read[located] = content.resolve(multiplier, run)
            check_function(read[located], device)
        return replace(multiplier, content=read[located].content)

    resolved = []
    for one in configs:
        field = "model.name"
        try:
            config = one.with_model(name=network_of(one))
            field = "model.backward"
            backward = content.resolve_backward(config.model.backward, read_once)
            field = "model.multiplier"
            multiplier = content.resolve_layers(config.model.multiplier, read_once)
            with torch.random.fork_rng(devices=[]):
                model = _build(config.with_model(multiplier=multiplier, backward=backward))
        except (ValueError, TypeError) as error:  # the latter for a layer of a user's network that cannot be converted
            raise RequestError(f"{field}: {error}") from None
        gradients = [one for module in model.modules() for one in getattr(module, "backward", ())]
        acts = any(not one.is_exact for one in gradients)
        resolved.append(config.with_model(multiplier=multiplier, backward=backward if acts else Backward()))
    asked = [config.model.backward for config in configs if not config.model.backward.is_exact]
    if asked and all(config.model.backward.is_exact for config in resolved):
        raise RequestError(
            f"model.backward: {asked[0]} acts on no layer, because their multipliers are exact: name another, "
            "--multiplier mbm, or --backward exact"
        )
    return resolved


def check(config: Config) -> None:
    """Check what `resolve` does, on the CPU.

    Raises:
        RequestError: as `resolve`.
    """
    resolve([config], torch.device("cpu"))


def check_function(multiplier: Multiplier, device: torch.device) -> None:
    """Compile a function in C and check that it multiplies; other functions are checked when they are read.

    Raises:
        ValueError: it does not.
    """
    if multiplier.family == "c" and multiplier.bits is None:
        check_magnitude(lambda a, b: multiply(a.to(device), b.to(device), multiplier).cpu(), str(multiplier))


def use_device(config: Config) -> torch.device:
    """Choose the config's device; set threads and the libraries' arithmetic in this process.

    Raises:
        RequestError: there is no such device.
    """
    device = choose_device(config.device)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    set_arithmetic(config.train.deterministic)
    return device


def begin(config: Config) -> tuple[Config, torch.device]:
    """Use the config's device; return the config with its multipliers resolved and its threads recorded.

    Raises:
        RequestError: as `use_device` and `resolve`.
    """
    device = use_device(config)
    (resolved,) = resolve([config], device)
    return resolved.with_train(threads=torch.get_num_threads()), device


def refuse_other_device(config: Config, run: Run) -> None:
    """Refuse to resume a run on another type of device, unless its config was edited to name one.

    Raises:
        RequestError: the types differ.
    """
    device = choose_device(config.device).type
    before = str(run.environment().get("device", device)).partition(":")[0]
    if config.device == "auto" and before != device:
        anyway = f"or set device: {device} in its config.yaml, which changes the last bits of its results"
        raise RequestError(
            f"{run.folder} was begun on {before}, but this machine offers {device}: resume it on the other one, "
            + ("or start a new one" if run.has_several else anyway)
        )


def content_keys(config: Config) -> list[str]:
    """Return the content keys that identify what a config computes, which must be resolved: its products, and files."""
    backward = config.model.backward
    gradients = [] if backward.is_exact else [("input", backward.input), ("weight", backward.weight)]
    keys = [multiplier.key for multiplier in config.model.multiplier.distinct()]
    keys += [f"{name}={'same' if one is None else one.key}" for name, one in gradients]
    if isinstance(network := config.model.name.content, UsersNetwork):
        keys.append(f"network={network.digest}")
    if isinstance(images := dataset_of(config.data.dataset), OwnFile):
        keys.append(f"data={images.digest}")
    return keys


def refuse_other_products(config: Config, keys: list[str], folder: Path) -> None:
    """Refuse to continue with a file of a multiplier, a network or data that has changed.

    Raises:
        RunError: the keys differ.
    """
    if (found := content_keys(config)) != keys:
        changed = next((key.partition("=")[0] for key in found if key not in keys), "")
        files = {"network": config.model.name, "data": config.data.dataset}
        kind = changed if changed in files else "multiplier"
        raise RunError(
            f"{files.get(changed, config.model.products)} differs from the {kind} that {folder} was trained with: "
            "restore its file, or config.yaml, or train a new run"
        )


def products(config: Config) -> dict[Multiplier, int]:
    """Return how many products of an image's forward pass each multiplier computes, in convolutions and dense layers.

    The config's multipliers must be resolved.
    """
    named = {str(one): one for one in (EXACT, *config.model.multiplier.distinct())}
    counts: dict[Multiplier, int] = {}
    for layer in layers(config):
        one = named[layer.multiplier]
        counts[one] = counts.get(one, 0) + layer.multiplications
    return counts


def layers(config: Config) -> list[Layer]:
    """Describe the convolutions and dense layers of the config's network, whose multipliers must be resolved."""
    model = build_model(config, torch.device("cpu"))
    described = describe_layers(model, dataset_of(config.data.dataset).shape)
    return [layer for layer in described if layer.kind in ("Conv2d", "Linear")]


def load_data(data: DataConfig, device: torch.device) -> tuple[Split, Split]:
    """Load a training and a test set on the device.

    Raises:
        RunError, RequestError: the data cannot be had, or has fewer images than are to be held out.
    """
    images, root = dataset_of(data.dataset), Path(data.root) if data.root else None
    if data.validation is None:
        return images.load(device, root, data.train_limit, data.test_limit)
    train, _ = images.load(device, root)
    if data.validation >= len(train):
        raise RequestError(f"data.validation is {data.validation}, but there are only {len(train)} training images")
    kept = len(train) - data.validation
    return train[:kept][: data.train_limit], train[kept:][: data.test_limit]


def build_model(config: Config, device: torch.device) -> nn.Module:
    """Build the network with the initial weights that the seed decides, the same on every device."""
    torch.manual_seed(config.seed)
    model = _build(config).to(device)
    if config.train.matrix_units:
        cuda_matrix.allow_in(model)
    return model


def _build(config: Config) -> nn.Module:
    model, images = config.model, dataset_of(config.data.dataset)
    quantization = Quantization(config.quantize.activations, config.quantize.weights)
    network = model.name.content or model.name.name
    return build(network, images.shape, images.classes, model.multiplier, model.backward, quantization, model.width)


def matrix_units(config: Config, device: torch.device) -> str | None:
    """Say what ``train.matrix_units`` changes for a config with resolved multipliers; ``None`` where it is false."""
    if not config.train.matrix_units:
        return None
    if device.type != "cuda" or not has_matrix_units(device.index):
        return "train.matrix_units has no effect here: it needs an NVIDIA GPU of compute capability 8.0 or higher"
    floats = [one for one in config.model.multiplier.distinct() if not (one.is_exact or one.is_integer)]
    factored = [str(one) for one in floats if cuda_matrix.factors_of(*content.operands(one, device), device.index)]
    if not factored:
        return (
            f"train.matrix_units has no effect on {config.model.products}: it works for multipliers of few bits, "
            "such as drum-k6, exact-t16, mbm-t18-r5 and tables of up to 5 bits"
        )
    return (
        f"matrix units: large forward passes of {', '.join(factored)} are sums of bfloat16 products, in the order and "
        "rounding of the GPU's matrix units"
    )


def calibrate_model(config: Config, model: nn.Module, train: Split) -> None:
    """Calibrate the quantised layers whose scales are unknown on the first training images."""
    images = train.images[: config.quantize.calibration_images]
    calibrate(model, images.split(config.data.eval_batch_size), again=False)


def build_trainer(
    config: Config, device: torch.device, data: tuple[Split, Split], folder: Path | None = None
) -> Trainer:
    """Build the network, its optimizer, and the loop that trains it on the data.

    Args:
        folder: of a run, which may have initial weights.
    """
    model = build_model(config, device)
    if folder is not None:
        weights.load_into(model, folder)
    calibrate_model(config, model, data[0])
    optimizer = _build_optimizer(config.optimizer, model, device)
    use_graph = device.type == "cuda" and config.train.cuda_graph == "auto"
    batches = config.data.batch_size, config.data.eval_batch_size
    augment = config.data.crop > 0 or config.data.flip
    return Trainer(model, optimizer, *data, *batches, config.train.label_smoothing, augment, use_graph)


def _build_optimizer(config: OptimizerConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    # A tensor on the device, so that a step changes the learning rate without a copy from the host.
    lr, decay = torch.tensor([config.lr], device=device), config.weight_decay
    scales = {parameter for *_, quantizer in quantizers(model) for parameter in quantizer.parameters()}
    parameters: list[Any] = [parameter for parameter in model.parameters() if parameter not in scales]
    if scales:  # learned scales do not decay
        own = {"params": [p for p in model.parameters() if p in scales], "weight_decay": 0.0, "lr": lr.clone()}
        parameters = [{"params": parameters}, own]
    if config.name == "sgd":
        return optimizers.sgd(parameters, lr, momentum=config.momentum, weight_decay=decay, nesterov=config.nesterov)
    return optimizers.adam(parameters, lr, decay, decoupled=config.name == "adamw")


# How it ends


@contextmanager
def computing(run: Run, watch: Watch, summarize: Callable[..., object], where: Callable[[], str]) -> Iterator[None]:
    """Keep ``summary.json`` true while a run is computed: ``running``, then ``interrupted`` or ``failed``.

    The caller, who holds the run, writes ``completed``.

    Args:
        summarize: called with a status, and ``reason=`` for a failure; writes the summary.
        where: says how far the run has come.

    Raises:
        Interrupted: the user stopped, or closed what reads the output; the message says how to resume.
    """
    summarize("running")
    try:
        yield
    except Exception as error:
        if isinstance(error, Interrupted) or (isinstance(error, OSError) and error.errno in OUTPUT_GONE):
            summarize("interrupted")
            raise Interrupted(f"interrupted {where()}; to resume: mbm resume {run.folder}") from None
        summarize("failed", reason=str(error) if isinstance(error, MbmError) else f"{type(error).__name__}: {error}")
        raise
    finally:
        watch.close()
