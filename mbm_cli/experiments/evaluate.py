"""`mbm eval`: a trained network's test accuracy and loss under other multipliers than the one it was trained with."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbm_cli import config as configs
from mbm_cli import plots
from mbm_cli.config import Config
from mbm_cli.data import CLASSES
from mbm_cli.environment import environment
from mbm_cli.errors import RequestError, RunError
from mbm_cli.experiments import setup
from mbm_cli.layer_multipliers import LayerMultipliers
from mbm_cli.multipliers import Multiplier
from mbm_cli.nn import convert
from mbm_cli.runs import Run
from mbm_cli.training import predict, score


def evaluate(
    run: Run,
    multipliers: Sequence[str],
    output: Path,
    plot: bool = False,
    device: str | None = None,
    threads: int | None = None,
    report: Callable[[str], None] = lambda doing: None,
) -> tuple[Run, dict[str, Any], list[str]]:
    """Evaluate a run's last checkpoint on the test set of its own config, once with each multiplier.

    Dense layers stay exact, as in training. Nothing is written before everything is evaluated.

    Args:
        multipliers: names, or mappings from layers to names as text, in the order of the result; the one that it was
            trained with always comes first.
        output: where the folder with ``eval.json`` is made.
        plot: write confusion matrices, ``confusion.png``, too.
        device: ``auto``, ``cpu`` or ``cuda`` instead of the config's.
        threads: CPU threads; those of the run without it.
        report: told, in words, what is being done.

    Returns:
        The new folder, what its ``eval.json`` holds (accuracies as fractions, differences in percentage points), and
        what a reader of the figures should know, in words.

    Raises:
        RequestError: a name that is no multiplier, a run without a checkpoint, several runs, or no such device.
        RunError: the checkpoint is damaged, the data cannot be had, or the folder cannot be written.
    """
    run.refuse_several()
    config = configs.parse(run.config_text(), str(run.folder / "config.yaml"))
    checkpoint = run.checkpoint()
    if checkpoint is None:
        raise RequestError(f"{run.folder} has no checkpoint yet: mbm train --resume {run.folder}")
    setup.refuse_other_products(config, checkpoint["multipliers"], run.folder)
    recorded = run.environment()
    if device is not None:
        config = config.model_copy(update={"device": device})
    # The number of threads decides how sums are split, hence the last bits.
    where = setup.prepare(config, threads or recorded.get("threads"))
    wanted = [_checked(name, config) for name in multipliers]
    report("loading the test set")
    _, test = setup.load_data(config, where)
    model = _restored(run, config, checkpoint, where)
    trained = str(config.model.multiplier)
    others = {str(multiplier): multiplier for multiplier in wanted if str(multiplier) != trained}
    rows: list[dict[str, Any]] = []
    confusions = {}
    for name in (trained, *others):
        report(f"evaluating with {name}")
        if name in others:
            convert(model, others[name])
        logits = predict(model, test, config.data.eval_batch_size)
        loss, accuracy = score(logits, test.labels)
        finite = loss if math.isfinite(loss) else None  # JSON knows no others
        difference = 100 * (accuracy - (rows[0]["test_accuracy"] if rows else accuracy))
        rows.append({"multiplier": name, "test_accuracy": accuracy, "test_loss": finite, "difference": difference})
        pairs = test.labels * CLASSES + logits.argmax(1)
        confusions[name] = torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).cpu().numpy()
    made = Run.create(output, f"{config.name}-eval")
    made.write_json("environment.json", environment(where))
    result = {"run": str(run.folder), "trained_with": trained, "evaluations": rows}
    made.write_json("eval.json", result)
    if plot:
        report("drawing")
        made.write("confusion.png", plots.confusions(confusions))
    return made, result, _notes(config, checkpoint, len(test), rows[0]["test_accuracy"], recorded, where)


def _checked(name: str, config: Config) -> Multiplier | LayerMultipliers:
    """A multiplier that fits the config's network."""
    try:
        multiplier = configs.multiplier(name)
        model = config.model.model_copy(update={"multiplier": multiplier})
        setup.prepare(config.model_copy(update={"model": model}))
    except RequestError as error:
        raise RequestError(f"--multiplier {name!r}: {str(error).removeprefix('model.multiplier: ')}") from None
    return multiplier


def _restored(run: Run, config: Config, checkpoint: dict[str, Any], device: torch.device) -> nn.Module:
    model = setup.build_model(config, device)
    try:
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunError(f"{run.folder / 'checkpoint.pt'} holds no {config.model.name}: the run is damaged") from error
    return model


def _notes(
    config: Config,
    checkpoint: dict[str, Any],
    images: int,
    accuracy: float,
    recorded: dict[str, Any],
    device: torch.device,
) -> list[str]:
    notes = [f"{images:,} test images: one of them is {100 / images:.2g} points"]
    metrics, epochs, part = checkpoint["metrics"], config.train.epochs, checkpoint.get("part")
    if part or len(metrics) < epochs:
        steps = f", and {part['step']:,} steps of the next" if part else ""
        notes.append(
            f"the training has not ended: these are the weights after {len(metrics)} of {epochs} epochs{steps}"
        )
    elif accuracy != metrics[-1]["test_accuracy"]:
        notes.append(
            f"training ended with {100 * metrics[-1]['test_accuracy']:.2f} % on {recorded.get('device')}; on {device} "
            "sums differ in the last bits"
        )
    return notes
