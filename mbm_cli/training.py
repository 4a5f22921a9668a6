"""The training loop: an epoch, evaluation, timing. It knows tensors and modules, not configs."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_cli.data import CLASSES, Split
from mbm_cli.errors import Interrupted, RunError
from mbm_cli.moments import Moment

REPORT_INTERVAL = 0.2  # seconds between two looks at the metrics
# Of an epoch: whether the losses since the last one are finite. The answer is looked at one check later, when it is
# there without waiting for it, and so within a tenth of an epoch.
CHECKS = 20
PHASES = ("batch gathering", "forward", "loss", "backward", "optimizer", "evaluation")


# Opens a range with a name, which somebody measures: a clock's or a profiler's.
Range = Callable[[str], AbstractContextManager[object]]


def no_range(name: str) -> AbstractContextManager[object]:
    """A range that nobody measures."""
    return nullcontext()


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
    epoch_seconds: float  # training and evaluation
    train_seconds: float
    eval_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class PartOfEpoch:
    """What has been done of an epoch that was left: the next step goes on from there.

    Attributes:
        step: steps done, from 1 on.
        logits: of their images, in the epoch's order, float32 (images, 10).
        seconds: that they took.
    """

    step: int
    logits: Tensor
    seconds: float


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

    A step takes nothing from the host and gives nothing back: its number, images and learning rate are looked up on the
    device, its logits stay there until they are asked for. So the same step runs eagerly or, captured, as a CUDA graph.

    Args:
        model: takes float32 (N, 1, 28, 28), gives logits (N, 10).
        optimizer: over the model's parameters, with a learning rate that is a tensor (1,) on their device.
        train, test: the two halves of the data set, on the model's device.
        batch_size: images in a training step; the last step of an epoch may have fewer.
        eval_batch_size: images in an evaluation step.
        cuda_graph: capture steps once and replay them; for a CUDA device only.
        phase: opens the ranges of a step, named as in PHASES; can be exchanged between epochs that run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: Split,
        test: Split,
        batch_size: int,
        eval_batch_size: int,
        cuda_graph: bool = False,
        phase: Range = no_range,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.train = train
        self.test = test
        self._training = _Pass(self._train_step, len(train), batch_size, train.images.device, self._keeping)
        self._testing = _Pass(self._test_step, len(test), eval_batch_size, test.images.device)
        self._order = torch.zeros_like(train.labels)
        self._rates = torch.zeros(self.steps, device=train.images.device)
        self.cuda_graph = cuda_graph
        self.phase = phase
        self._captured = False

    @property
    def steps(self) -> int:
        """Training steps of an epoch."""
        return self._training.steps

    def epoch(
        self,
        order: Tensor,
        learning_rates: Tensor,
        report: Callable[[Progress], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
        keep: Callable[[PartOfEpoch], None] | None = None,
        keep_every: int | None = None,
        part: PartOfEpoch | None = None,
    ) -> Epoch:
        """Train on every image once, in the given order, then evaluate.

        Args:
            order: int64 (images,), a permutation, on any device.
            learning_rates: float32 (steps,), on any device.
            report: called a few times a second.
            stopped: asked before every step.
            keep: called when ``stopped`` says so, and every ``keep_every`` steps: the epoch can be left there.
            part: of this epoch, with the model, the optimizer and the random state as they were when it was left.

        Raises:
            Interrupted: ``stopped`` said so.
            RunError: the loss of a step is not finite; says of which, and the first layer to blame.
        """
        self._order.copy_(order)
        self._rates.copy_(learning_rates)
        if self.cuda_graph and not self._captured:
            self._capture()
        first = 0 if part is None else part.step
        if part is not None:
            self._training.logits[: len(part.logits)].copy_(part.logits)
        check_every = math.ceil(self.steps / CHECKS)
        reported = time.perf_counter()
        start = reported - (0.0 if part is None else part.seconds)
        self.model.train()
        moment, checks = self._moment(first), deque[_Check]()

        def confirm(step: int) -> None:
            for check in (*checks, self._check(moment, step)):
                self._refuse_losses(check)

        for step in self._training.run(first):
            if stopped():
                if keep is not None and step > 0:
                    confirm(step)
                    keep(self._part(step, start))
                raise Interrupted("interrupted")
            if step > first and step % check_every == 0:
                with self.phase("loss"):
                    checks.append(self._check(moment, step))
                    moment = self._moment(step)
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
        if not math.isfinite(test_loss):  # the last step's weights are seen by no other loss
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
        """Mean loss and accuracy over the test set."""
        self.model.eval()
        with self.phase("evaluation"):
            for _ in self._testing.run():
                pass
            losses, hits = _losses_and_hits(self._testing.logits, self.test.labels)
            return losses.mean().item(), hits.sum().item() / len(self.test)

    def _train_step(self, batch_of: Callable[[Tensor], Tensor], step: Tensor) -> Tensor:
        with self.phase("batch gathering"):
            indices = batch_of(self._order)
            images, labels = self.train.images.index_select(0, indices), self.train.labels.index_select(0, indices)
        with self.phase("optimizer"):
            for group in self.optimizer.param_groups:
                torch.index_select(self._rates, 0, step, out=group["lr"])
            self.optimizer.zero_grad(set_to_none=True)
        with self.phase("forward"):
            logits = self.model(images)
        with self.phase("loss"):
            loss = F.cross_entropy(logits, labels)
        with self.phase("backward"):
            loss.backward()
        with self.phase("optimizer"):
            self.optimizer.step()
        return logits.detach()

    def _keeping(self) -> AbstractContextManager[object]:
        return self.phase("loss")  # logits are kept for the mean loss and the accuracy

    @torch.no_grad()
    def _test_step(self, batch_of: Callable[[Tensor], Tensor], step: Tensor) -> Tensor:
        return self.model(batch_of(self.test.images))

    def _train_metrics(self, steps: int) -> tuple[float, float, int]:
        """Means of loss and accuracy over the first steps of the epoch, and their images; waits for the device."""
        images = min(steps * self._training.batch_size, len(self.train))
        losses, hits = _losses_and_hits(self._training.logits[:images], self.train.labels[self._order[:images]])
        return losses.mean().item(), hits.sum().item() / images, images

    def _part(self, step: int, start: float) -> PartOfEpoch:
        logits = self._training.logits[: step * self._training.batch_size].clone()
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # the steps' time is not over before
        return PartOfEpoch(step, logits, time.perf_counter() - start)

    def _losses(self, since: Moment, steps: int) -> Tensor:
        """Of the images of the steps since then, float64."""
        batch = self._training.batch_size
        images = slice(since.step * batch, min(steps * batch, len(self.train)))
        return _losses_and_hits(self._training.logits[images], self.train.labels[self._order[images]])[0]

    def _check(self, since: Moment, steps: int) -> "_Check":
        """Ask whether the losses of the steps since then are finite; waits for nothing."""
        finite, known = self._losses(since, steps).isfinite().all(), None
        if finite.is_cuda:
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            known = torch.cuda.Event()
            known.record()
        return _Check(since, steps, finite, known)

    def _refuse_losses(self, check: "_Check") -> None:
        """Look at the answer, and refuse losses that are not finite."""
        if check.known is not None:
            check.known.synchronize()
        if check.finite:
            return
        losses = self._losses(check.since, check.steps)
        first = int((~losses.isfinite()).nonzero()[0])
        step = check.since.step + first // self._training.batch_size
        layer = self._first_layer_not_finite(check.since, step)
        where = f"the first layer whose output is not finite is {layer}" if layer else "every layer's output is finite"
        raise RunError(
            f"the loss of step {step + 1} of {self.steps} is {losses[first].item()} ({where}): lower optimizer.lr"
        )

    def _first_layer_not_finite(self, since: Moment, step: int) -> str | None:
        """Do the steps since then again, which gives the same numbers, and watch the layers in the given one."""
        since.restore(self._state(), self._order.device)
        self.model.train()
        found: list[str] = []

        def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
            return lambda module, inputs, output: None if output.isfinite().all() else found.append(name)

        for now in self._training.run(since.step, captured=False):
            if now > step:
                break
            if now == step:
                leaves = [(name, module) for name, module in self.model.named_modules() if not list(module.children())]
                hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
        for hook in hooks:
            hook.remove()
        return found[0] if found else None

    def _moment(self, step: int) -> Moment:
        return Moment.take(step, self._state(), self._order.device)

    def _capture(self) -> None:
        """Capture both passes; what the trial steps changed (weights, optimizer, random numbers) is put back."""
        before = self._moment(0)
        self.model.train()
        self._training.capture()
        self.model.eval()
        self._testing.capture()
        before.restore(self._state(), self._order.device)
        self._captured = True

    def _state(self) -> list[Tensor]:
        states = self.optimizer.state.values()
        optimizer = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *optimizer]


def evaluate(model: nn.Module, split: Split, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy of a model over a data set on its device."""
    return score(predict(model, split, batch_size), split.labels)


def predict(model: nn.Module, split: Split, batch_size: int) -> Tensor:
    """A model's logits over a data set on its device, float32 (images, 10)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(images) for images in split.images.split(batch_size)])


def score(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy of logits, float32 (images, 10), against labels, int64 (images,)."""
    losses, hits = _losses_and_hits(logits, labels)
    return losses.mean().item(), hits.sum().item() / len(labels)


@dataclass(frozen=True)
class _Check:
    """Whether the losses from a moment on, until so many steps were done, are finite; on a GPU once it is known."""

    since: Moment
    steps: int
    finite: Tensor
    known: "torch.cuda.Event | None"


class _Pass:
    """A pass over a set in batches: ``compute(batch_of, step)`` gives the logits of a step.

    ``batch_of`` picks the step's part of a tensor over the whole set; ``step`` is its number, int64 (1,) on the device.
    """

    def __init__(
        self,
        compute: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor],
        size: int,
        batch: int,
        device: torch.device,
        keeping: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.batch_size = batch
        self._keeping = keeping
        self.logits = torch.zeros(size, CLASSES, device=device)
        self._compute = compute
        self._full_steps, self._rest = divmod(size, batch)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._run_full, self._run_rest = self._full_step, self._rest_step

    @property
    def steps(self) -> int:
        return self._full_steps + (self._rest > 0)

    def run(self, first: int = 0, captured: bool = True) -> Iterator[int]:
        """Run the steps from ``first`` on, and tell before each how many are done."""
        run_full, run_rest = (self._run_full, self._run_rest) if captured else (self._full_step, self._rest_step)
        self._step.fill_(first)
        for step in range(first, self._full_steps):
            yield step
            run_full()
        if self._rest:
            yield self._full_steps
            run_rest()

    def capture(self) -> None:
        """Replace the steps by CUDA graphs of them; trial steps run before, so the state has to be put back after."""
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

    def _full_batch(self, items: Tensor) -> Tensor:
        return self._in_batches(items).index_select(0, self._step).squeeze(0)

    def _rest_batch(self, items: Tensor) -> Tensor:
        return items[-self._rest :]

    def _in_batches(self, items: Tensor) -> Tensor:
        return items[: self._full_steps * self.batch_size].unflatten(0, (self._full_steps, self.batch_size))


@lru_cache(maxsize=8)
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all graphs: cuBLAS keeps 32 MiB for every stream that it has ever seen."""
    return torch.cuda.Stream(device)


def _captured(step: Callable[[], None], rewind: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of the step. Trial steps come first, on a stream of their own, as PyTorch asks for."""
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            rewind()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _losses_and_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and whether the largest logit is the label's, both float64 (images,)."""
    return F.cross_entropy(logits, labels, reduction="none").double(), (logits.argmax(1) == labels).double()
