"""What every experiment begins with: a device, checks of its config, the data, the network, the loop that trains it."""

from pathlib import Path

import torch
from torch import nn

from mbm_cli.config import Config, OptimizerConfig
from mbm_cli.custom import check_magnitude
from mbm_cli.data import Split, load_mnist
from mbm_cli.device import choose_device, set_arithmetic
from mbm_cli.errors import RequestError, RunError
from mbm_cli.models import MODELS
from mbm_cli.multipliers import Multiplier
from mbm_cli.ops import multiply
from mbm_cli.runs import Run
from mbm_cli.training import Trainer


def prepare(config: Config, threads: int | None = None) -> torch.device:
    """The device of the config; threads and the GPU's arithmetic are set for the process.

    Raises:
        RequestError: there is no such device, or a multiplier that does not fit the model or is none.
    """
    device = choose_device(config.device)
    if threads is not None:
        torch.set_num_threads(threads)
    set_arithmetic(config.train.deterministic)
    _check_multipliers(config, device)
    return device


def prepare_to_resume(config: Config, run: Run) -> torch.device:
    """The device that the run was begun on; otherwise as `prepare`.

    Raises:
        RequestError: as `prepare`, or it was another kind of device, which would give other bits.
    """
    # The number of threads decides how sums are split, hence the last bits.
    device = prepare(config, run.environment().get("threads"))
    refuse_other_device(config, run)
    return device


def check_layers(config: Config) -> None:
    """Whether the model has the layers that its multipliers name.

    Raises:
        RequestError: it has not.
    """
    try:
        MODELS[config.model.name](config.model.multiplier)
    except ValueError as error:
        raise RequestError(f"model.multiplier: {error}") from None


def check_code(multiplier: Multiplier, device: torch.device) -> None:
    """A function in C compiles, and multiplies; other functions were checked when they were read.

    Raises:
        ValueError: it does not.
    """
    if multiplier.code is not None:
        check_magnitude(lambda a, b: multiply(a.to(device), b.to(device), multiplier).cpu(), str(multiplier))


def _check_multipliers(config: Config, device: torch.device) -> None:
    check_layers(config)
    try:
        for multiplier in config.model.multiplier.distinct():
            check_code(multiplier, device)
    except ValueError as error:
        raise RequestError(f"model.multiplier: {error}") from None


def refuse_other_device(config: Config, run: Run) -> None:
    """What was begun on a GPU does not go on on the CPU unasked, or the other way round.

    Raises:
        RequestError: it would.
    """
    device = choose_device(config.device).type
    before = str(run.environment().get("device", device)).partition(":")[0]
    if config.device == "auto" and before != device:
        or_else = f"write device: {device} into its config.yaml, and it goes on with other last bits"
        raise RequestError(
            f"{run.folder} was begun on {before}, not on {device}: resume it where that is, or "
            + ("start it anew" if run.has_several else or_else)
        )


def multiplier_keys(config: Config) -> list[str]:
    """What tells a run's products from any others, also where a file's content decides them."""
    return [multiplier.key for multiplier in config.model.multiplier.distinct()]


def refuse_other_products(config: Config, keys: list[str], folder: Path) -> None:
    """A run does not go on with a multiplier whose file has changed.

    Raises:
        RunError: the config's multipliers are not those with these keys.
    """
    if multiplier_keys(config) != keys:
        raise RunError(
            f"{config.model.multiplier} is not the multiplier that {folder} was trained with so far: "
            "put its file, or config.yaml, back as it was, or train anew"
        )


def load_data(config: Config, device: torch.device) -> tuple[Split, Split]:
    root = Path(config.data.root) if config.data.root else None
    return load_mnist(device, root, config.data.train_limit, config.data.test_limit)


def build_model(config: Config, device: torch.device) -> nn.Module:
    """The network with the initial weights that the seed decides, the same on every device."""
    torch.manual_seed(config.seed)
    return MODELS[config.model.name](config.model.multiplier).to(device)


def build_optimizer(config: OptimizerConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    # A tensor on the device, so that a step changes the learning rate without a copy from the host.
    lr = torch.tensor([config.lr], device=device)
    if config.name == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(
        model.parameters(), lr=lr, weight_decay=config.weight_decay, fused=True, capturable=device.type == "cuda"
    )


def build_trainer(config: Config, device: torch.device, data: tuple[Split, Split]) -> Trainer:
    """The network, its optimizer, and the loop that trains it on the data."""
    model = build_model(config, device)
    optimizer = build_optimizer(config.optimizer, model, device)
    use_graph = device.type == "cuda" and config.train.cuda_graph == "auto"
    return Trainer(model, optimizer, *data, config.data.batch_size, config.data.eval_batch_size, cuda_graph=use_graph)
