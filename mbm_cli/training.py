"""The training loop: an epoch, evaluation, timing. It knows tensors and modules, not configs."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_cli.data import Split
from mbm_cli.errors import Interrupted, RunError

REPORT_INTERVAL = 0.2  # seconds between two looks at the metrics


@dataclass(frozen=True)
class Progress:
    """Where an epoch stands: steps done of all, running means over them, images a second so far."""

    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave: mean losses, accuracies as fractions, seconds."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    train_seconds: float
    eval_seconds: float
    images_per_second: float


def learning_rates(lr: float, schedule: str, first_step: int, steps: int, total_steps: int) -> Tensor:
    """The learning rate of ``steps`` steps from ``first_step`` (from 0) on, float32 (steps,).

    ``linear`` and ``cosine`` fall from ``lr`` at the first step of all to zero behind the last; ``none`` stays.
    """
    done = torch.arange(first_step, first_step + steps, dtype=torch.float64) / total_steps
    factor = {"linear": 1 - done, "cosine": (1 + torch.cos(math.pi * done)) / 2, "none": torch.ones_like(done)}[
        schedule
    ]
    return (lr * factor).float()


class Trainer:
    """Trains a model on data that lies on its device, an epoch at a time.

    Args:
        model: takes float32 (N, 1, 28, 28), gives logits (N, classes).
        optimizer: over the model's parameters, with a learning rate that is a tensor on their device.
        train, test: the two halves of the data set, on the model's device.
        batch_size: images in a training step; the last step of an epoch may have fewer.
        eval_batch_size: images in an evaluation step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: Split,
        test: Split,
        batch_size: int,
        eval_batch_size: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.train = train
        self.test = test
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.steps = math.ceil(len(train) / batch_size)

    def epoch(
        self,
        order: Tensor,
        learning_rates: Tensor,
        report: Callable[[Progress], None] = lambda progress: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Epoch:
        """Train on every image once, in the given order, then evaluate.

        Args:
            order: int64 (images,), a permutation, on any device.
            learning_rates: float32 (steps,).
            report: called a few times a second.
            stopped: asked at every step.

        Raises:
            Interrupted: ``stopped`` said so; the step at hand was finished.
            RunError: the loss of a step is not finite.
        """
        start = time.perf_counter()
        loss, accuracy = self._train(order, learning_rates, report, stopped, start)
        train_seconds = time.perf_counter() - start
        test_loss, test_accuracy = self.evaluate()
        eval_seconds = time.perf_counter() - start - train_seconds
        images_per_second = len(self.train) / train_seconds
        return Epoch(loss, accuracy, test_loss, test_accuracy, train_seconds, eval_seconds, images_per_second)

    def _train(self, order, learning_rates, report, stopped, start) -> tuple[float, float]:
        self.model.train()
        # A step leaves its loss and hits here; the host looks only a few times a second.
        losses = torch.zeros(self.steps)
        hits = torch.zeros(self.steps)
        sizes = torch.tensor([len(indices) for indices in order.split(self.batch_size)], dtype=torch.float64)
        reported = start
        for step, indices in enumerate(order.split(self.batch_size)):
            if stopped():
                raise Interrupted("interrupted")
            losses[step], hits[step] = self._step(indices, learning_rates[step])
            now = time.perf_counter()
            if now - reported > REPORT_INTERVAL:
                reported = now
                loss, accuracy = _running_means(losses, hits, sizes, step + 1)
                report(Progress(step + 1, self.steps, loss, accuracy, sizes[: step + 1].sum().item() / (now - start)))
        return _running_means(losses, hits, sizes, self.steps)

    def _step(self, indices: Tensor, learning_rate: Tensor) -> tuple[Tensor, Tensor]:
        """One step of training; returns the mean loss and the number of hits of its images."""
        labels = self.train.labels[indices]
        for group in self.optimizer.param_groups:
            group["lr"].copy_(learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(self.train.images[indices])
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the test set."""
        self.model.eval()
        loss, hits = 0.0, 0
        batches = zip(
            self.test.images.split(self.eval_batch_size), self.test.labels.split(self.eval_batch_size), strict=True
        )
        for images, labels in batches:
            logits = self.model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            hits += (logits.argmax(1) == labels).sum().item()
        return loss / len(self.test), hits / len(self.test)


def _running_means(losses: Tensor, hits: Tensor, sizes: Tensor, steps: int) -> tuple[float, float]:
    """Loss and accuracy over the images of the first steps.

    Raises:
        RunError: the loss of a step is not finite.
    """
    losses, hits, sizes = losses[:steps].double(), hits[:steps].double(), sizes[:steps]
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        raise RunError(f"the loss of step {step + 1} is {losses[step].item()}")
    images = sizes.sum()
    return ((losses * sizes).sum() / images).item(), (hits.sum() / images).item()
