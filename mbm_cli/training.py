"""The training loop: an epoch, evaluation, timing. It knows tensors and modules, not configs."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_cli.errors import Interrupted, RunError
from mbm_cli.turns import Turns, finish

REPORT_INTERVAL = 0.2  # seconds between two reports of the metrics
# Checks an epoch whether the losses are finite. A result is read one check later, when it is there without waiting.
CHECKS = 20
PHASES = ("batch gathering", "forward", "loss", "backward", "optimizer", "evaluation")


# Opens a named range, for a clock or a profiler to measure.
Range = Callable[[str], AbstractContextManager[object]]
BatchOf = Callable[..., Tensor]  # of a tensor and the dimension of its images


def no_range(name: str) -> AbstractContextManager[object]:
    """Open a range that is not measured."""
    return nullcontext()


@dataclass(frozen=True)
class Split:
    """The training or the test half of a data set, whole, on one device.

    images: float32 (N, C, H, W), normalised to the training set's mean 0 and standard deviation 1.
    labels: int64 (N,), from 0 to ``classes`` - 1.
    black: float32 (C, 1, 1), a black pixel, which is what lies beyond an image's edge; without it 0.
    """

    images: Tensor
    labels: Tensor
    classes: int
    black: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, some: slice) -> "Split":
        return replace(self, images=self.images[some], labels=self.labels[some])


@dataclass(frozen=True)
class Progress:
    """The state of an epoch: steps done of all, running means over them, images a second so far."""

    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class Epoch:
    """The result of an epoch: mean losses, accuracies as fractions, seconds."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    epoch_seconds: float  # training and evaluation
    train_seconds: float
    eval_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class PartOfEpoch:
    """The finished part of an interrupted epoch, from which the next step continues.

    Attributes:
        step: steps done, at least 1.
        logits: of their images, in the epoch's order, float32 (images, classes).
        seconds: the time they took.
    """

    step: int
    logits: Tensor
    seconds: float


def learning_rates(
    lr: float, schedule: str, first_step: int, steps: int, total_steps: int, warmup: float = 0.0
) -> Tensor:
    """Return the learning rates of ``steps`` steps from ``first_step`` (from 0), float32 (steps,).

    In the first part of ``total_steps``, the fraction ``warmup``, they rise in a straight line to ``lr``. In the rest
    ``linear`` and ``cosine`` fall to zero after the last step; ``none`` is constant.
    """
    number = torch.arange(first_step, first_step + steps, dtype=torch.float64)
    done = (number / total_steps - warmup).clamp(min=0) / (1 - warmup)
    factor = {"linear": 1 - done, "cosine": (1 + torch.cos(math.pi * done)) / 2, "none": torch.ones_like(done)}[
        schedule
    ]
    if warmup:
        factor = factor * ((number + 1) / (warmup * total_steps)).clamp(max=1)
    return (lr * factor).float()


def moved(images: Tensor, moves: Tensor, black: Tensor | None = None) -> Tensor:
    """Mirror and shift each image (N, C, H, W) as its row of `mbm_cli.epoch.epoch_moves` says, int64 (N, 3).

    What comes from beyond an edge is ``black``, (C, 1, 1), or 0.
    """
    height, width = images.shape[2:]
    down, right, mirrored = moves.unsqueeze(2).unbind(1)
    row, column = (torch.arange(size, device=images.device) for size in (height, width))
    row, column = row - down, column - right
    column = torch.where(mirrored > 0, width - 1 - column, column)
    inside = ((row >= 0) & (row < height))[:, None, :, None] & ((column >= 0) & (column < width))[:, None, None, :]
    row, column = row.clamp(0, height - 1)[:, None, :, None], column.clamp(0, width - 1)[:, None, None, :]
    taken = images.gather(2, row.expand_as(images)).gather(3, column.expand_as(images))
    return torch.where(inside, taken, 0.0 if black is None else black)


class Trainer:
    """Trains a model on data that lies on its device, an epoch at a time.

    A step exchanges nothing with the host: it looks its number, images and learning rate up on the device and leaves
    its logits there. So the same step runs eagerly or, captured, as a CUDA graph.

    Args:
        model: maps float32 images (N, C, H, W) to logits (N, classes).
        optimizer: over the model's parameters, with a learning rate that is a tensor (1,) on their device.
        train, test: the two halves of the data set, on the model's device.
        batch_size: images in a training step; the last step of an epoch may have fewer.
        eval_batch_size: images in an evaluation step.
        label_smoothing: of the loss that is minimised; reported losses have none.
        augment: move the training images by the `moves` of an epoch.
        cuda_graph: capture steps once and replay them; for a CUDA device only.
        phase: opens the ranges of a step, named as in PHASES; can be replaced between epochs that run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: Split,
        test: Split,
        batch_size: int,
        eval_batch_size: int,
        label_smoothing: float = 0.0,
        augment: bool = False,
        cuda_graph: bool = False,
        phase: Range = no_range,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.train = train
        self.test = test
        self._training = _Pass(self._train_step, train, batch_size, self._keeping)
        self._testing = _Pass(self._test_step, test, eval_batch_size)
        self._order = torch.stack([train.labels, train.labels])  # of the images and, by it, of their labels
        self.label_smoothing, self.augment = label_smoothing, augment
        self._moves = train.labels.new_zeros(len(train) if augment else 0, 3)
        self._rates = torch.zeros(self.steps, device=train.images.device)
        self.cuda_graph = cuda_graph
        self.phase = phase
        self._captured = False

    @property
    def steps(self) -> int:
        """Training steps of an epoch."""
        return self._training.steps

    def close(self) -> None:
        """Free the captured steps, whose reference cycle would keep them until Python looks for cycles."""
        del self._training, self._testing

    def on(self, train: Split, test: Split, cuda_graph: bool = False, phase: Range = no_range) -> "Trainer":
        """Return what trains the same model in the same way on other data."""
        batches = self._training.batch_size, self._testing.batch_size
        return Trainer(
            self.model, self.optimizer, train, test, *batches, self.label_smoothing, self.augment, cuda_graph, phase
        )

    def epoch(self, *args: Any, **options: Any) -> Epoch:
        """Compute an epoch without giving up a turn. Otherwise as `epoch_in_turns`."""
        return finish(self.epoch_in_turns(*args, **options))

    def epoch_in_turns(
        self,
        order: Tensor,
        learning_rates: Tensor,
        report: Callable[[Progress], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        keep: Callable[[PartOfEpoch], None] | None = None,
        keep_every: int | None = None,
        part: PartOfEpoch | None = None,
        moves: Tensor | None = None,
    ) -> Turns[Epoch]:
        """Train on every image once, in the given order, then evaluate; yield after each step.

        Args:
            order: int64 (images,), a permutation, on any device.
            learning_rates: float32 (steps,), on any device.
            report: called a few times a second.
            stopped: called before every step; true ends the epoch.
            keep: called with the finished part every ``keep_every`` steps, and when ``stopped`` is true.
            part: the finished part of this epoch; model, optimizer and random state are those at its end.
            moves: with ``augment``, how the images are moved, in their order, int64 (images, 3), on any device; without
                it as in the epoch before, at first not at all.

        Raises:
            Interrupted: ``stopped`` returned true.
            RunError: the loss of a step is not finite; the message names the step.
        """
        self._order[0].copy_(order)
        self._order[1].copy_(self.train.labels[self._order[0]])
        self._rates.copy_(learning_rates)
        if moves is not None:
            self._moves.copy_(moves)
        if self.cuda_graph and not self._captured:
            self._capture()
        first = 0 if part is None else part.step
        if part is not None:
            self._training.logits[: len(part.logits)].copy_(part.logits)
        check_every = math.ceil(self.steps / CHECKS)
        reported = time.perf_counter()
        start = reported - (0.0 if part is None else part.seconds)
        self.model.train()
        checked, checks = first, deque[_Check]()

        def confirm(step: int) -> None:
            """Raise unless all losses so far are finite; wait for the device."""
            for check in (*checks, self._check(checked, step)):
                self._refuse_losses(check)

        for step in self._training.run(first):
            if step > first:
                yield
            if stopped():
                if keep is not None and step > 0:
                    confirm(step)
                    keep(self._part(step, start))
                raise Interrupted("interrupted")
            if step > first and step % check_every == 0:
                with self.phase("loss"):
                    checks.append(self._check(checked, step))
                checked = step
                if len(checks) > 1:
                    self._refuse_losses(checks.popleft())
            if keep is not None and keep_every and step > first and step % keep_every == 0:
                confirm(step)
                keep(self._part(step, start))
            if report is not None and step > first and time.perf_counter() - reported > REPORT_INTERVAL:
                loss, accuracy, images = self._train_metrics(step)
                reported = time.perf_counter()
                report(Progress(step, self.steps, loss, accuracy, images / (reported - start)))
        confirm(self.steps)
        train_loss, train_accuracy, images = self._train_metrics(self.steps)
        train_seconds = time.perf_counter() - start
        test_loss, test_accuracy = self.evaluate()
        if not math.isfinite(test_loss):  # no other loss depends on the last step's weights
            raise RunError(f"after its last step the test loss is {test_loss}: lower optimizer.lr")
        epoch_seconds = time.perf_counter() - start
        return Epoch(
            train_loss,
            train_accuracy,
            test_loss,
            test_accuracy,
            epoch_seconds,
            train_seconds,
            epoch_seconds - train_seconds,
            images / train_seconds,
        )

    def evaluate(self) -> tuple[float, float]:
        """Return mean loss and accuracy over the test set."""
        self.model.eval()
        with self.phase("evaluation"):
            for _ in self._testing.run():
                pass
            losses, hits = _losses_and_hits(self._testing.logits, self.test.labels)
            return losses.mean().item(), hits.sum().item() / len(self.test)

    def _train_step(self, batch_of: BatchOf, step: Tensor) -> Tensor:
        with self.phase("batch gathering"):
            indices, labels = batch_of(self._order, 1)
            images = self.train.images.index_select(0, indices)
            if self.augment:
                images = moved(images, batch_of(self._moves), self.train.black)
        with self.phase("optimizer"):
            for group in self.optimizer.param_groups:
                torch.index_select(self._rates, 0, step, out=group["lr"])
            self.optimizer.zero_grad(set_to_none=True)
        with self.phase("forward"):
            logits = self.model(images)
        with self.phase("loss"):
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            self.optimizer.step()
        return logits.detach()

    def _keeping(self) -> AbstractContextManager[object]:
        return self.phase("loss")  # logits are kept for the mean loss and the accuracy

    @torch.no_grad()
    def _test_step(self, batch_of: BatchOf, step: Tensor) -> Tensor:
        return self.model(batch_of(self.test.images))

    def _train_metrics(self, steps: int) -> tuple[float, float, int]:
        """Return means of loss and accuracy over the epoch's first steps, and their images; wait for the device."""
        images = min(steps * self._training.batch_size, len(self.train))
        losses, hits = _losses_and_hits(self._training.logits[:images], self._order[1, :images])
        return losses.mean().item(), hits.sum().item() / images, images

    def _part(self, step: int, start: float) -> PartOfEpoch:
        logits = self._training.logits[: step * self._training.batch_size].clone()
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()  # only then have the steps ended
        return PartOfEpoch(step, logits, time.perf_counter() - start)

    def _losses(self, first: int, steps: int) -> Tensor:
        """Return the losses of the images of the steps from ``first`` to before ``steps``, float64."""
        batch = self._training.batch_size
        images = slice(first * batch, min(steps * batch, len(self.train)))
        return _losses_and_hits(self._training.logits[images], self._order[1, images])[0]

    def _check(self, first: int, steps: int) -> "_Check":
        """Start checking whether the losses of some steps are finite; wait for nothing."""
        finite, known = self._losses(first, steps).isfinite().all(), None
        if finite.is_cuda:
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            known = torch.cuda.Event()
            known.record()
        return _Check(first, steps, finite, known)

    def _refuse_losses(self, check: "_Check") -> None:
        """Read the result of a check; raise for losses that are not finite."""
        if check.known is not None:
            check.known.synchronize()
        if check.finite:
            return
        losses = self._losses(check.first, check.steps)
        image = int((~losses.isfinite()).nonzero()[0])
        step = check.first + image // self._training.batch_size
        raise RunError(f"the loss of step {step + 1} of {self.steps} is {losses[image].item()}: lower optimizer.lr")

    def _capture(self) -> None:
        """Capture both passes, then restore what the trial steps changed: weights, optimizer, random numbers."""
        device = self._order.device
        before = {id(tensor): tensor.detach().clone() for tensor in self._state()}
        cpu_random, cuda_random = torch.get_rng_state(), torch.cuda.get_rng_state(device)
        self.model.train()
        self._training.capture()
        self.model.eval()
        self._testing.capture()
        with torch.no_grad():
            for tensor in self._state():
                # What is new is the optimizer's state, which begins with zeros.
                tensor.copy_(before[id(tensor)]) if id(tensor) in before else tensor.zero_()
        torch.set_rng_state(cpu_random)
        torch.cuda.set_rng_state(cuda_random, device)
        self._captured = True

    def _state(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        optimizer = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *optimizer]


def evaluate(model: nn.Module, split: Split, batch_size: int) -> tuple[float, float]:
    """Return mean loss and accuracy of a model over a data set on its device."""
    return score(predict(model, split, batch_size), split.labels)


def predict(model: nn.Module, split: Split, batch_size: int) -> Tensor:
    """Return a model's logits over a data set on its device, float32 (images, classes)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images) for images in split.images.split(batch_size)])


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy of logits, float32 (images, classes), for labels, int64 (images,)."""
    losses, hits = _losses_and_hits(logits, labels)
    return losses.mean().item(), hits.sum().item() / len(labels)


@dataclass(frozen=True)
class _Check:
    """Whether the losses of the steps from ``first`` to before ``steps`` are finite; on a GPU once ``known``."""

    first: int
    steps: int
    finite: Tensor
    known: "torch.cuda.Event | None"


class _Pass:
    """A pass over a set in batches: ``compute(batch_of, step)`` returns the logits of a step.

    ``batch_of`` takes the step's part of a tensor over the whole set, along a dimension; ``step`` is its number, int64
    (1,) on the device.
    """

    def __init__(
        self,
        compute: Callable[[BatchOf, Tensor], Tensor],
        split: Split,
        batch: int,
        keeping: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        size, device = len(split), split.images.device
        self.batch_size = batch
        self._keeping = keeping
        self.logits = torch.zeros(size, split.classes, device=device)
        self._compute = compute
        self._full_steps, self._rest = divmod(size, batch)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._run_full, self._run_rest = self._full_step, self._rest_step

    @property
    def steps(self) -> int:
        return self._full_steps + (self._rest > 0)

    def run(self, first: int = 0) -> Iterator[int]:
        """Run the steps from ``first``; yield before each the number of steps done."""
        self._step.fill_(first)
        for step in range(first, self._full_steps):
            yield step
            self._run_full()
        if self._rest:
            yield self._full_steps
            self._run_rest()

    def capture(self) -> None:
        """Replace the steps by CUDA graphs of them. Trial steps run first, so the caller restores the state."""
        if self._full_steps:
            self._run_full = _captured(self._full_step, self._step.zero_)
        if self._rest:
            self._run_rest = _captured(self._rest_step, lambda: self._step.fill_(self._full_steps))

    def _full_step(self) -> None:
        logits = self._compute(self._full_batch, self._step)
        with self._keeping():
            self._in_batches(self.logits).index_copy_(0, self._step, logits.unsqueeze(0))
            self._step.add_(1)

    def _rest_step(self) -> None:
        logits = self._compute(self._rest_batch, self._step)
        with self._keeping():
            self.logits[-self._rest :].copy_(logits)

    def _full_batch(self, items: Tensor, dim: int = 0) -> Tensor:
        return self._in_batches(items, dim).index_select(dim, self._step).squeeze(dim)

    def _rest_batch(self, items: Tensor, dim: int = 0) -> Tensor:
        return items.narrow(dim, -self._rest, self._rest)

    def _in_batches(self, items: Tensor, dim: int = 0) -> Tensor:
        full = items.narrow(dim, 0, self._full_steps * self.batch_size)
        return full.unflatten(dim, (self._full_steps, self.batch_size))


@lru_cache(maxsize=64)
def _capture_stream(current: torch.cuda.Stream) -> torch.cuda.Stream:
    """Return the stream of all captures whose graphs are replayed on a stream.

    cuBLAS keeps 32 MiB for every stream that it has seen, and graphs captured on one stream share them: they must not
    run at the same time. Nor may they be those on which runs compute, which are of PyTorch's other pool, of priority 0.
    """
    return torch.cuda.Stream(current.device, priority=-1)


def _captured(step: Callable[[], None], rewind: Callable[[], object]) -> Callable[[], None]:
    """Capture a step as a CUDA graph, after the trial steps on another stream that PyTorch asks for."""
    stream = _capture_stream(torch.cuda.current_stream())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            rewind()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
    except BaseException:
        # A failed capture leaves the generator in it; a copy of its state is outside.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay


def _losses_and_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and whether the largest logit is the label's, both float64 (images,)."""
    return F.cross_entropy(logits, labels, reduction="none").double(), (logits.argmax(1) == labels).double()
