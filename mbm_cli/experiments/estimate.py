"""`mbm train --dry-run`: the network, the steps, and how long they will take, from a few timed ones."""

from dataclasses import dataclass

import torch

from mbm_cli.config import Config
from mbm_cli.experiments import lifecycle
from mbm_cli.experiments.lifecycle import Stopped, Watch, never
from mbm_cli.models import Layer, describe_layers
from mbm_cli.training import learning_rates

TIMED_STEPS = 30


@dataclass(frozen=True)
class Estimate:
    """What a training will do and take; seconds."""

    what: str
    layers: list[Layer]
    epochs: int
    steps: int  # of an epoch
    step_seconds: float
    epoch_seconds: float  # training and evaluation
    total_seconds: float


def estimate(config: Config, watch: Watch | None = None, stopped: Stopped = never) -> Estimate:
    """Train and evaluate on a small part of the data, once to warm up and once for the clock; keep nothing.

    Raises:
        RequestError, RunError: as ``mbm_cli.experiments.train.train``.
        Interrupted: ``stopped`` returned true.
    """
    config, device = lifecycle.begin(config)
    train, test = lifecycle.load_data(config.data, device)
    whole = lifecycle.build_trainer(config, device, (train, test))
    (watch or Watch()).status(f"timing {TIMED_STEPS} steps")
    images = min(len(train), TIMED_STEPS * config.data.batch_size)
    evaluated = min(len(test), config.data.eval_batch_size)
    part = whole.on(train[:images], test[:evaluated], whole.cuda_graph)
    rates = learning_rates(config.optimizer.lr, "none", 0, part.steps, part.steps)
    for _ in range(2):
        timed = part.epoch(torch.arange(images), rates, stopped=stopped)
    step = timed.train_seconds / part.steps
    epoch = step * whole.steps + timed.eval_seconds / evaluated * len(test)
    layers = describe_layers(whole.model, train.images.shape[1:])
    what = f"{config.name}: {config.model.name} with {config.model.products} on {device.type}"
    return Estimate(what, layers, config.train.epochs, whole.steps, step, epoch, epoch * config.train.epochs)
