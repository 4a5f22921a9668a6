"""One training run: from a config to a run folder with the trained network."""

import gc
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mbm_cli import config as configs
from mbm_cli.config import Config
from mbm_cli.data import dataset_of
from mbm_cli.device import environment
from mbm_cli.epoch import epoch_moves, epoch_order
from mbm_cli.errors import RequestError, RunError
from mbm_cli.experiments import lifecycle, weights
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.models import describe_layers
from mbm_cli.runs import Run, Summary, as_json
from mbm_cli.training import PartOfEpoch, Progress, Split, Trainer, learning_rates
from mbm_cli.turns import Turns, finish, in_turn, is_out_of_memory


@dataclass(frozen=True)
class Trained(Finished[Summary]):
    """A training run: its folder, its summary as the result, a dictionary of metrics an epoch."""

    metrics: list[dict[str, Any]]


def train(
    config: Config,
    output: Path,
    watch: Watch | None = None,
    stopped: Stopped = never,
    data: tuple[Split, Split] | None = None,
) -> Trained:
    """Train the config's network in a new run folder below ``output``.

    Args:
        stopped: called before every step.
        data: the training and the test set, where they are loaded already.

    Raises:
        RequestError: the device or a multiplier is wrong; nothing is written then.
        RunError: the data cannot be had, the folder cannot be written, or the loss is not finite.
        Interrupted: ``stopped`` returned true.
    """
    _forget_earlier_runs()
    return finish(train_in_turns(config, output, watch, stopped, data))


def train_in_turns(
    config: Config, output: Path, watch: Watch | None, stopped: Stopped, data: tuple[Split, Split] | None = None
) -> Turns[Trained]:
    """Train as `train` does; yield after each step."""
    started = time.perf_counter()
    config, device = lifecycle.begin(config)
    about, files = environment(device), dict[str, str | bytes]()
    if config.train.init is not None:
        files[weights.FILE], about["init"] = weights.initial(config.train.init, lifecycle.build_model(config, device))
    data = data or lifecycle.load_data(config.data, device)
    files["config.yaml"] = configs.dump(config)
    files["environment.json"] = as_json(about)
    files["summary.json"] = as_json(_summary("running", config, device, [], 0.0))
    run = Run.create(output, config.name, files)
    with run.hold():
        training = _Training(run, config, device, data, watch or Watch(), stopped, started)
        return (yield from training.run_epochs())


def resume(
    run: Run,
    epochs: int | None = None,
    watch: Watch | None = None,
    stopped: Stopped = never,
    data: tuple[Split, Split] | None = None,
    config: Config | None = None,
) -> Trained:
    """Resume a run from its last checkpoint, or from the beginning if it has none.

    A complete run is returned as it is. ``epochs`` replaces the config's; ``config`` is the run's, where it has been
    read and resolved already. Otherwise as `train`.
    """
    _forget_earlier_runs()
    return finish(resume_in_turns(run, epochs, watch, stopped, data, config))


def resume_in_turns(
    run: Run,
    epochs: int | None,
    watch: Watch | None,
    stopped: Stopped,
    data: tuple[Split, Split] | None,
    config: Config | None = None,
) -> Turns[Trained]:
    """Resume as `resume` does; yield after each step."""
    started = time.perf_counter()
    run.refuse_several()
    with run.hold():  # before anything is read or changed
        config = config or run.config()
        if epochs is not None:
            _refuse_fewer(epochs, run)
            if epochs > config.train.epochs and config.optimizer.schedule != "none" and run.has_checkpoint:
                (watch or Watch()).note(_restarted_schedule(run, config, epochs))
            config = config.with_train(epochs=epochs)
        summary = run.summary()
        if is_complete(summary, config):
            return Trained(run, summary, run.metrics())
        lifecycle.refuse_other_device(config, run)
        config, device = lifecycle.begin(config)
        data = data or lifecycle.load_data(config.data, device)
        training = _Training(run, config, device, data, watch or Watch(), stopped, started)
        training.note_resume()
        return (yield from training.run_epochs())


def _forget_earlier_runs() -> None:
    if torch.cuda.is_initialized():
        gc.collect()  # the CUDA graphs of an earlier run in this process keep their memory until they are collected
        torch.cuda.reset_peak_memory_stats()


def is_complete(summary: Summary, config: Config) -> bool:
    """Return whether a run has all epochs of its config."""
    return summary.status == "completed" and summary.epochs >= config.train.epochs


def _refuse_fewer(epochs: int, run: Run) -> None:
    checkpoint = run.checkpoint()
    done = len(checkpoint["metrics"]) if checkpoint else 0
    part = " and a part of the next" if checkpoint and checkpoint.get("part") else ""
    if epochs < done + bool(part):
        raise RequestError(f"the run has {done} epochs{part} already: --epochs {epochs} would discard some")


def _restarted_schedule(run: Run, config: Config, epochs: int) -> str:
    done, optimizer = config.train.epochs, config.optimizer
    again = learning_rates(optimizer.lr, optimizer.schedule, done, 1, epochs, optimizer.warmup).item()
    return (
        f"the learning rate fell to zero over {done} epoch{'s'[: done != 1]} and starts again at {again:.3g}; for one "
        f"schedule over all {epochs}: mbm train --config {run.folder / 'config.yaml'} --epochs {epochs}"
    )


class _Training:
    """A run that is being computed, and what is written of it."""

    def __init__(
        self,
        run: Run,
        config: Config,
        device: torch.device,
        data: tuple[Split, Split],
        watch: Watch,
        stopped: Stopped,
        started: float,
    ) -> None:
        self.run, self.config, self.device, self.data = run, config, device, data
        self.watch, self.stopped = watch, stopped
        self.keys = lifecycle.content_keys(config)  # of what is used, whatever becomes of the files
        self.trainer = lifecycle.build_trainer(config, device, data, run.folder)
        self.metrics: list[dict[str, Any]] = []  # of the epochs that have ended
        self.part: PartOfEpoch | None = None
        self.started = started  # moved back by the time before an interruption
        checkpoint = run.checkpoint()
        if checkpoint:
            self.part = _restore(run, config, checkpoint, self.trainer, device)
            self.metrics = checkpoint["metrics"]
            self.started -= checkpoint["total_seconds"]
            run.write_metrics(self.metrics)  # a run killed after its checkpoint lacks the last line

    def note_resume(self) -> None:
        """Record what the run is resumed with."""
        recorded = self.run.environment()
        again = [*recorded.get("resumed", []), environment(self.device)]
        self.run.write_json("environment.json", {**recorded, "resumed": again})
        self.run.write("config.yaml", configs.dump(self.config))

    def run_epochs(self) -> Turns[Trained]:
        """Train the remaining epochs; yield after each step."""
        computing = lifecycle.computing(self.run, self.watch, self.summarize, lambda: f"in {self.epoch}")
        with computing, self._failures(), closing(self.trainer):
            train, test = self.data
            what = f"{self.config.name}: {self.config.model.name} with {self.config.model.products} on "
            what += f"{_describe(self.device)}, {len(train):,} training and {len(test):,} test images"
            layers = describe_layers(self.trainer.model, train.images.shape[1:])
            self.watch.begin(what, "epoch", self.config.train.epochs, len(self.metrics), layers)
            if note := lifecycle.matrix_units(self.config, self.device):
                self.watch.note(note)
            for epoch in range(len(self.metrics) + 1, self.config.train.epochs + 1):
                yield from self._run_epoch(epoch)
            return Trained(self.run, self.summarize("completed"), self.metrics)

    def _run_epoch(self, epoch: int) -> Turns[None]:
        train, steps, epochs = self.config.train, self.trainer.steps, self.config.train.epochs
        label = f"epoch {epoch}/{epochs}"

        def report(progress: Progress) -> None:
            self.watch.progress(label, progress.step / progress.steps, progress)

        optimizer, first = self.config.optimizer, (epoch - 1) * steps
        data, drawn = self.config.data, (len(self.data[0]), self.config.seed, epoch)
        result = yield from self.trainer.epoch_in_turns(
            epoch_order(*drawn),
            learning_rates(optimizer.lr, optimizer.schedule, first, steps, epochs * steps, optimizer.warmup),
            report,
            self.stopped,
            partial(self._keep, self.metrics),
            train.checkpoint_every,
            self.part,
            epoch_moves(*drawn, data.crop, data.flip) if self.trainer.augment else None,
        )
        self.part = None
        row = {"epoch": epoch, **asdict(result)}
        # First, and with the metrics in it: whatever fails from here on, nothing contradicts the checkpoint.
        self._keep([*self.metrics, row])
        self.metrics.append(row)
        self.run.write_metrics(self.metrics)
        self.summarize("running")
        self.watch.done(label, row)

    @property
    def epoch(self) -> str:
        """The current epoch, in words."""
        epochs = self.config.train.epochs
        return f"epoch {min(len(self.metrics) + 1, epochs)} of {epochs}"

    def summarize(self, status: str, reason: str | None = None) -> Summary:
        seconds = time.perf_counter() - self.started
        summary = _summary(status, self.config, self.device, self.metrics, seconds, reason)
        self.run.write_json("summary.json", summary)
        return summary

    def _keep(self, metrics: list[dict[str, Any]], part: PartOfEpoch | None = None) -> None:
        """Write a checkpoint: plain tensors and numbers, which ``torch.load(weights_only=True)`` reads."""
        device, trainer = self.device, self.trainer
        checkpoint = {
            "epoch": len(metrics),
            "metrics": metrics,
            "part": None if part is None else {"step": part.step, "logits": part.logits, "seconds": part.seconds},
            "total_seconds": time.perf_counter() - self.started,
            "multipliers": self.keys,
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            },
        }
        self.run.write_checkpoint(checkpoint)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Name the epoch and the run in what a run fails with; answer a full memory with batches that fit."""
        try:
            yield
        except Exception as error:
            failure = RunError(self._full_memory()) if is_out_of_memory(error) else error
            if not isinstance(failure, RunError):
                raise
            raise RunError(f"{self.epoch}: {failure} (run: {self.run.folder})") from error

    def _full_memory(self) -> str:
        if in_turn(self.device):
            return "the GPU's memory is too small: --at-once 1 tries which batch fits"
        return _batch_that_fits(self.config, self.device)


def _summary(
    status: Any,
    config: Config,
    device: torch.device,
    metrics: list[dict[str, Any]],
    total_seconds: float,
    reason: str | None = None,
) -> Summary:
    accuracies = [m["test_accuracy"] for m in metrics]
    return Summary(
        status=status,
        multiplier=config.model.products,
        device=device.type,
        epochs=len(metrics),
        test_accuracy=accuracies[-1] if accuracies else None,
        best_test_accuracy=max(accuracies, default=None),
        epoch_seconds=[m["epoch_seconds"] for m in metrics],
        train_seconds=[m["train_seconds"] for m in metrics],
        total_seconds=total_seconds,
        peak_memory_bytes=peak_memory(device),
        reason=reason,
        note=config.note,
    )


def peak_memory(device: torch.device) -> int | None:
    """Return bytes: on a GPU the most that PyTorch held during this run, on the CPU the process's peak.

    ``None`` for one of several runs at once on a GPU.
    """
    if in_turn(device):
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s'[: threads != 1]})"


def _restore(
    run: Run, config: Config, checkpoint: dict[str, Any], trainer: Trainer, device: torch.device
) -> PartOfEpoch | None:
    """Restore the state of a checkpoint; return the finished part of its epoch.

    Raises:
        RunError: it is not a checkpoint of this run, or a multiplier's file has changed.
    """
    lifecycle.refuse_other_products(config, checkpoint["multipliers"], run.folder)
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


# Out of memory


def _batch_that_fits(config: Config, device: torch.device) -> str:
    """Say which batch sizes fit: the largest halves with which a step works, tried out."""
    asked = {"data.batch_size": config.data.batch_size, "data.eval_batch_size": config.data.eval_batch_size}
    fits = {field: _largest(config, device, batch, field == "data.batch_size") for field, batch in asked.items()}
    smaller = [f"{field}={fits[field]}" for field in fits if 0 < fits[field] < asked[field]]
    where = "the GPU's memory" if device.type == "cuda" else "memory"
    if not smaller:
        return f"{where} is full, and a smaller batch does not help: close what else uses it"
    return f"{where} is too small for this batch, but these would fit: --set {' --set '.join(smaller)}"


def _largest(config: Config, device: torch.device, batch: int, training: bool) -> int:
    while batch > 0:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            _try_step(config, device, batch, training)
            return batch
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            batch //= 2
    return 0


def _try_step(config: Config, device: torch.device, batch: int, training: bool) -> None:
    model = lifecycle.build_model(config, device).train(True)  # training needs no scales
    with torch.set_grad_enabled(training):
        logits = model(torch.zeros(batch, *dataset_of(config.data.dataset).shape, device=device))
        loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64, device=device))
        if training:
            loss.backward()
