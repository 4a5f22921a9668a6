"""One training run: from a config to a run folder with the trained network."""

import gc
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mbm_cli import config as configs
from mbm_cli import plots
from mbm_cli.config import Config
from mbm_cli.data import Split, epoch_order
from mbm_cli.environment import environment
from mbm_cli.errors import Interrupted, RequestError, RunError
from mbm_cli.experiments import setup
from mbm_cli.experiments.memory import is_out_of_memory, out_of_memory
from mbm_cli.models import describe_layers
from mbm_cli.render import Display
from mbm_cli.runs import Run, as_json
from mbm_cli.training import PartOfEpoch, Trainer, learning_rates


def train(
    config: Config,
    output: Path,
    display: Display,
    stopped: Callable[[], bool] = lambda: False,
    threads: int | None = None,
    data: tuple[Split, Split] | None = None,
) -> tuple[Run, dict[str, Any]]:
    """Run an experiment in a new run folder below ``output``.

    Args:
        stopped: asked before every step.
        threads: CPU threads; PyTorch's choice without it.
        data: the training and the test set, where they are loaded already.

    Returns:
        The run and its summary.

    Raises:
        RequestError: the device is not there; nothing is written then.
        RunError: the data cannot be had, the folder cannot be written, or the loss is not finite.
        Interrupted: ``stopped`` said so.
    """
    started = time.perf_counter()
    device = setup.prepare(config, threads)
    data = data or setup.load_data(config, device)
    files = {
        "config.yaml": configs.dump(config),
        "environment.json": as_json(environment(device)),
        "summary.json": as_json(_summary("running", config, device, [], 0.0)),
    }
    run = Run.create(output, config.name, files)
    with run.hold():
        return run, _train(run, config, device, data, display, stopped, started)


def resume(
    run: Run,
    epochs: int | None,
    display: Display,
    stopped: Callable[[], bool] = lambda: False,
    data: tuple[Split, Split] | None = None,
) -> dict[str, Any]:
    """Go on with a run from its last checkpoint, or from the beginning if it has none; returns the summary.

    A run that is complete is left as it is. ``epochs`` replaces the config's. Arguments and errors as ``train``.
    """
    started = time.perf_counter()
    run.refuse_several()
    with run.hold():  # from before anything is read or changed
        config = configs.parse(run.config_text(), str(run.folder / "config.yaml"))
        if epochs is not None:
            config = config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})
        summary = run.summary()
        if epochs is not None:
            _refuse_fewer(epochs, run)
        if summary["status"] == "completed" and summary["epochs"] >= config.train.epochs:
            display.finish(summary, run.folder)
            return summary
        device = setup.prepare_to_resume(config, run)
        data = data or setup.load_data(config, device)
        return _train(run, config, device, data, display, stopped, started, resumed=True)


def _refuse_fewer(epochs: int, run: Run) -> None:
    checkpoint = run.checkpoint()
    done = len(checkpoint["metrics"]) if checkpoint else 0
    part = " and a part of the next" if checkpoint and checkpoint.get("part") else ""
    if epochs < done + bool(part):
        raise RequestError(f"the run has {done} epochs{part} already: --epochs {epochs} would take some back")


def _train(
    run: Run,
    config: Config,
    device: torch.device,
    data: tuple[Split, Split],
    display: Display,
    stopped: Callable[[], bool],
    started: float,
    resumed: bool = False,
) -> dict[str, Any]:
    if device.type == "cuda":
        gc.collect()  # CUDA graphs of an earlier run in this process keep their memory until their cycles are found
        torch.cuda.reset_peak_memory_stats(device)
    trainer = setup.build_trainer(config, device, data)
    checkpoint = run.checkpoint()
    part = _restore(run, config, checkpoint, trainer, device) if checkpoint else None
    if resumed:
        recorded = run.environment()
        again = [*recorded.get("resumed", []), environment(device)]
        run.write_json("environment.json", {**recorded, "resumed": again})
        run.write("config.yaml", configs.dump(config))
    metrics = checkpoint["metrics"] if checkpoint else []
    record = _Record(run, config, device, trainer, metrics, started)
    if checkpoint:
        record.started -= checkpoint["total_seconds"]
        run.write_metrics(metrics)  # whoever was killed may have written the checkpoint alone
    record.summarize("running")
    try:
        images = f"{len(data[0]):,} training and {len(data[1]):,} test images"
        what = f"{config.name}: {config.model.name} with {config.model.multiplier} on {_describe(device)}, {images}"
        display.start(what, describe_layers(trainer.model, data[0].images.shape[1:]), config.train.epochs)
        _epochs(record, part, len(data[0]), display, stopped)
        title = f"{config.name}: {config.model.name}, {config.model.multiplier}"
        run.write("curves.png", plots.curves(metrics, title))
        summary = record.summarize("completed")
    except (Interrupted, KeyboardInterrupt, BrokenPipeError):  # or nobody reads the output any more
        record.summarize("interrupted")
        raise Interrupted(f"interrupted in {record.epoch}; to go on: mbm train --resume {run.folder}") from None
    except Exception as error:
        if is_out_of_memory(error):
            error = RunError(out_of_memory(config, device))
        if not isinstance(error, RunError):
            record.summarize("failed", reason=f"{type(error).__name__}: {error}")
            raise
        failure = RunError(f"{record.epoch}: {error} (run: {run.folder})")
        record.summarize("failed", reason=str(failure))
        raise failure from error
    finally:
        display.close()
    display.finish(summary, run.folder)
    return summary


def _epochs(
    record: "_Record",
    part: PartOfEpoch | None,
    images: int,
    display: Display,
    stopped: Callable[[], bool],
) -> None:
    """Those that are left to be trained."""
    config, trainer, metrics = record.config, record.trainer, record.metrics
    steps, epochs = trainer.steps, config.train.epochs
    for epoch in range(len(metrics) + 1, epochs + 1):
        order = epoch_order(images, config.seed, epoch)
        first = (epoch - 1) * steps
        result = trainer.epoch(
            order,
            learning_rates(config.optimizer.lr, config.optimizer.schedule, first, steps, epochs * steps),
            partial(display.progress, epoch),
            stopped,
            lambda part: record.keep(metrics, part),
            config.train.checkpoint_every,
            part,
        )
        part = None
        row = {"epoch": epoch, **asdict(result)}
        # First, and with the metrics in it: whatever fails from here on, nothing contradicts the checkpoint.
        record.keep([*metrics, row])
        metrics.append(row)
        record.run.write_metrics(metrics)
        record.summarize("running")
        display.epoch(row)


@dataclass
class _Record:
    """What is written of a run while it goes on."""

    run: Run
    config: Config
    device: torch.device
    trainer: Trainer
    metrics: list[dict[str, Any]]  # of the epochs that have ended
    started: float  # as if there had been no pause

    @property
    def epoch(self) -> str:
        """The one at hand, in words."""
        epochs = self.config.train.epochs
        return f"epoch {min(len(self.metrics) + 1, epochs)} of {epochs}"

    def summarize(self, status: str, **more: Any) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        summary = {**_summary(status, self.config, self.device, self.metrics, seconds), **more}
        self.run.write_json("summary.json", summary)
        return summary

    def keep(self, metrics: list[dict[str, Any]], part: PartOfEpoch | None = None) -> None:
        seconds = time.perf_counter() - self.started
        self.run.write_checkpoint(
            _checkpoint(metrics, part, seconds, setup.multiplier_keys(self.config), self.trainer, self.device)
        )


def _summary(
    status: str, config: Config, device: torch.device, metrics: list[dict[str, Any]], total_seconds: float
) -> dict[str, Any]:
    accuracies = [m["test_accuracy"] for m in metrics]
    return {
        "status": status,
        "multiplier": str(config.model.multiplier),
        "device": device.type,
        "epochs": len(metrics),
        "test_accuracy": accuracies[-1] if accuracies else None,
        "best_test_accuracy": max(accuracies, default=None),
        "epoch_seconds": [m["epoch_seconds"] for m in metrics],
        "train_seconds": [m["train_seconds"] for m in metrics],
        "total_seconds": total_seconds,
        "peak_memory_bytes": peak_memory(device),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what PyTorch held at most during this run, on the CPU what the process did, in its whole life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s'[: threads != 1]})"


def _checkpoint(
    metrics: list[dict[str, Any]],
    part: PartOfEpoch | None,
    total_seconds: float,
    multipliers: list[str],
    trainer: Trainer,
    device: torch.device,
) -> dict[str, Any]:
    """Plain tensors and numbers, as ``torch.load(weights_only=True)`` reads them."""
    return {
        "epoch": len(metrics),
        "metrics": metrics,
        "part": None if part is None else {"step": part.step, "logits": part.logits, "seconds": part.seconds},
        "total_seconds": total_seconds,
        "multipliers": multipliers,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "random": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
    }


def _restore(
    run: Run, config: Config, checkpoint: dict[str, Any], trainer: Trainer, device: torch.device
) -> PartOfEpoch | None:
    """Put everything back as it was, and tell where within an epoch that is.

    Raises:
        RunError: it is not a checkpoint of this run, or a multiplier's file is not what it was.
    """
    setup.refuse_other_products(config, checkpoint["multipliers"], run.folder)
    try:
        trainer.model.load_state_dict(checkpoint["model"])
        trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        for group in trainer.optimizer.param_groups:
            group["lr"] = group["lr"].to(device)
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if checkpoint["random"]["cuda"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
        return PartOfEpoch(**checkpoint["part"]) if checkpoint["part"] else None
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise RunError(
            f"{run.folder / 'checkpoint.pt'} is not a checkpoint of this run: delete it to start again"
        ) from error
