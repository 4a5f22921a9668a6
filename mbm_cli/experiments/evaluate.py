"""`mbm eval`: a trained network's test accuracy and loss with other multipliers than the one it was trained with."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mbm_cli import config as configs
from mbm_cli.config import Config
from mbm_cli.device import environment
from mbm_cli.errors import Interrupted, RequestError, RunError
from mbm_cli.experiments import lifecycle, weights
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.multipliers.names import Backward
from mbm_cli.runs import Run
from mbm_cli.training import predict, score


@dataclass(frozen=True)
class Row:
    """A multiplier's accuracy (a fraction), loss (``None`` if not finite), and difference to the first, in points."""

    multiplier: str
    test_accuracy: float
    test_loss: float | None
    difference: float


@dataclass(frozen=True)
class Evaluation:
    """``eval.json``: the evaluated run, or file, and a row a multiplier, the one of the training first."""

    run: str
    trained_with: str | None  # unknown of a file
    evaluations: list[Row]


@dataclass(frozen=True)
class Evaluated(Finished[Evaluation]):
    """The new folder, its result, what a reader of the figures should know, and confusion matrices by multiplier.

    The matrices are int64 (classes, classes), label by answer.
    """

    notes: list[str]
    confusions: dict[str, np.ndarray]


def evaluate(
    run: Run,
    multipliers: Sequence[str],
    output: Path,
    device: str | None = None,
    threads: int | None = None,
    watch: Watch | None = None,
    stopped: Stopped = never,
) -> Evaluated:
    """Evaluate a run's last checkpoint on the test set of its config, once with each multiplier.

    Nothing is written before everything is evaluated.

    Args:
        multipliers: names, or mappings from layers to names as text, in the order of the result; the one that it was
            trained with always comes first.
        output: where the folder with ``eval.json`` is created.
        device: ``auto``, ``cpu`` or ``cuda`` instead of the config's.
        threads: CPU threads instead of the run's.
        stopped: called before each multiplier.

    Raises:
        RequestError: a name is not a multiplier, the run has no checkpoint or is several, or there is no such device.
        Interrupted: ``stopped`` returned true.
        RunError: the checkpoint is damaged, the data cannot be had, or the folder cannot be written.
    """
    watch = watch or Watch()
    run.refuse_several()
    config, checkpoint = run.config(), run.checkpoint()
    if checkpoint is None:
        raise RequestError(f"{run.folder} has no checkpoint yet: mbm resume {run.folder}")
    update: dict[str, Any] = {} if device is None else {"device": device}
    config = config.model_copy(update=update).with_train(threads=threads or config.train.threads)
    where = lifecycle.use_device(config)
    config, *others = _resolve([config, *_asked(config, multipliers)], where)
    lifecycle.refuse_other_products(config, checkpoint["multipliers"], run.folder)
    restored = partial(_restored, run, checkpoint, where)
    rows, confusions, images = _rows([config, *others], restored, where, watch, stopped)
    notes = _notes(config, checkpoint, images, rows[0].test_accuracy, run.environment().get("device"), where)
    return _keep(config, where, output, Evaluation(str(run.folder), rows[0].multiplier, rows), notes, confusions)


def evaluate_file(
    config: Config,
    file: str,
    multipliers: Sequence[str],
    output: Path,
    watch: Watch | None = None,
    stopped: Stopped = never,
) -> Evaluated:
    """Evaluate the weights in a file, of the config's network, on its test set, once with each multiplier.

    Args:
        config: its data, network, device and threads are used.
        file: a ``state_dict`` or a checkpoint, which ``torch.load`` reads, or ``.safetensors``.

    Otherwise as `evaluate`; the first multiplier's row is the one that the others are compared with.

    Raises:
        RequestError: as `evaluate`, or the file cannot be read or does not fit the network.
        Interrupted, RunError: as `evaluate`.
    """
    where = lifecycle.use_device(config)
    asked = _resolve(_asked(config, multipliers), where)
    state, _ = weights.read(file, lifecycle.build_model(asked[0], torch.device("cpu")), "--weights")

    def restored(one: Config) -> nn.Module:
        model = lifecycle.build_model(one, where)
        weights.load_state(model, state)
        return model

    rows, confusions, images = _rows(asked, restored, where, watch or Watch(), stopped)
    result = Evaluation(os.path.abspath(file), None, rows)
    return _keep(config, where, output, result, [_smallest_step(images)], confusions)


def _asked(config: Config, multipliers: Sequence[str]) -> list[Config]:
    return [config.with_model(multiplier=configs.multiplier(name), backward=Backward()) for name in multipliers]


def _resolve(asked: Sequence[Config], device: torch.device) -> list[Config]:
    try:
        return lifecycle.resolve(asked, device)
    except RequestError as error:
        raise RequestError(str(error).replace("model.multiplier:", "--multiplier:", 1)) from None


def _rows(
    asked: Sequence[Config],
    restored: Callable[[Config], nn.Module],
    device: torch.device,
    watch: Watch,
    stopped: Stopped,
) -> tuple[list[Row], dict[str, np.ndarray], int]:
    """Evaluate the network of each config; return a row each, confusion matrices, and the number of test images."""
    if note := lifecycle.matrix_units(asked[0], device):
        watch.note(note)
    watch.status("loading the data")
    train, test = lifecycle.load_data(asked[0].data, device)
    rows: list[Row] = []
    confusions = {}
    for name, one in {str(one.model.multiplier): one for one in asked}.items():
        if stopped():
            raise Interrupted("interrupted; nothing was kept")
        watch.status(f"evaluating with {name}")
        model = restored(one)
        lifecycle.calibrate_model(one, model, train)
        logits = predict(model, test, one.data.eval_batch_size)
        loss, accuracy = score(logits, test.labels)
        finite = loss if math.isfinite(loss) else None  # JSON knows no others
        difference = 100 * (accuracy - (rows[0].test_accuracy if rows else accuracy))
        rows.append(Row(name, accuracy, finite, difference))
        pairs = test.labels * test.classes + logits.argmax(1)
        counts = torch.bincount(pairs, minlength=test.classes**2)
        confusions[name] = counts.view(test.classes, test.classes).cpu().numpy()
    return rows, confusions, len(test)


def _keep(
    config: Config,
    device: torch.device,
    output: Path,
    result: Evaluation,
    notes: list[str],
    confusions: dict[str, np.ndarray],
) -> Evaluated:
    made = Run.create(output, f"{config.name}-eval")
    made.write_json("environment.json", environment(device))
    made.write_json("eval.json", result)
    return Evaluated(made, result, notes, confusions)


def _restored(run: Run, checkpoint: dict[str, Any], device: torch.device, config: Config) -> nn.Module:
    model = lifecycle.build_model(config, device)
    try:
        weights.load_state(model, checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunError(
            f"{run.folder / 'checkpoint.pt'} does not hold a {config.model.name}: the run is damaged"
        ) from error
    return model


def _notes(
    config: Config, checkpoint: dict[str, Any], images: int, accuracy: float, trained_on: object, device: torch.device
) -> list[str]:
    notes = [_smallest_step(images)]
    metrics, epochs, part = checkpoint["metrics"], config.train.epochs, checkpoint.get("part")
    if part or len(metrics) < epochs:
        steps = f", and {part['step']:,} steps of the next" if part else ""
        notes.append(
            f"the training is unfinished: these are the weights after {len(metrics)} of {epochs} epochs{steps}"
        )
    elif accuracy != metrics[-1]["test_accuracy"]:
        notes.append(
            f"training ended with {100 * metrics[-1]['test_accuracy']:.2f} % on {trained_on}; on {device} "
            "sums differ in the last bits"
        )
    return notes


def _smallest_step(images: int) -> str:
    return f"{images:,} test images: one of them is {100 / images:.2g} points"
