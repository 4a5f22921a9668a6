"""The loop: what an epoch trains on and reports, and that it computes what a plain PyTorch loop does."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_cli import training
from mbm_cli.config import parse
from mbm_cli.epoch import epoch_moves
from mbm_cli.errors import Interrupted, RunError
from mbm_cli.experiments.lifecycle import build_model, build_trainer
from mbm_cli.training import PartOfEpoch, Split, Trainer, learning_rates, moved

BATCHES = [16, 16, 16, 4]
BATCH, STEPS, TRAIN, TEST = BATCHES[0], len(BATCHES), sum(BATCHES), 30
CPU = torch.device("cpu")
RATES = learning_rates(0.01, "linear", 0, STEPS, STEPS)


def random_split(size: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 28, 28, generator=generator)
    return Split(images, torch.randint(10, (size,), generator=generator), 10)


def make_config(network: str = "lenet", multiplier: str = "exact", optimizer: str = "name: adam", batch: int = 1000):
    text = f"name: x\nmodel: {{name: {network}, multiplier: {multiplier}}}\noptimizer: {{{optimizer}}}\n"
    return parse(text + f"data: {{batch_size: {BATCH}, eval_batch_size: {batch}}}", "x")


def make_trainer(*args, **kwargs) -> Trainer:
    return build_trainer(make_config(*args, **kwargs), CPU, (random_split(TRAIN, 1), random_split(TEST, 2)))


def trainer_of(model: nn.Module, train: Split, batch: int = BATCH) -> Trainer:
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor([0.001]), fused=True)
    return Trainer(model, optimizer, train, train, batch, 1000)


def order(epoch: int = 1) -> Tensor:
    return torch.randperm(TRAIN, generator=torch.Generator().manual_seed(epoch))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    state = b.state_dict()
    return all(torch.equal(value, state[key]) for key, value in a.state_dict().items())


def after(steps: int) -> Callable[[], bool]:
    """Return what asks to stop after so many steps."""
    answers = iter([False] * steps)
    return lambda: next(answers, True)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The learning rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.4, 0.3, 0.2, 0.1]),
        ("cosine", [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.2 * (1 - math.sqrt(0.5))]),
        ("none", [0.4] * 4),
    ],
)
def test_schedule_falls_over_all_epochs(schedule, rates):
    whole = learning_rates(0.4, schedule, 0, 4, 4)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, torch.tensor(rates))
    assert torch.equal(torch.cat([learning_rates(0.4, schedule, first, 2, 4) for first in (0, 2)]), whole)


def test_rates_rise_before_they_fall():
    rates = learning_rates(0.4, "linear", 0, 8, 8, warmup=0.5)
    torch.testing.assert_close(rates, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1]))
    assert torch.equal(learning_rates(0.4, "linear", 2, 3, 8, warmup=0.5), rates[2:5])
    torch.testing.assert_close(learning_rates(0.4, "none", 0, 4, 4, 0.5), torch.tensor([0.2, 0.4, 0.4, 0.4]))


# An epoch


@pytest.mark.parametrize(("size", "batch", "steps"), [(64, 32, 2), (20, 32, 1), (1, 1, 1), (33, 32, 2)])
def test_any_number_of_images_and_batch_size(size, batch, steps):
    trainer = trainer_of(build_model(make_config(), CPU), random_split(size, 1), batch)
    assert trainer.steps == steps
    epoch = trainer.epoch(torch.arange(size), learning_rates(0.001, "none", 0, steps, steps))
    assert 0 <= epoch.train_accuracy <= 1
    assert epoch.test_loss > 0


def plain_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images_in_order: Tensor, rates: Tensor
) -> tuple[list[float], list[int]]:
    """Train an epoch in the usual way; return the sum of the losses and the hits of each step."""
    train = random_split(TRAIN, 1)
    losses, hits = [], []
    model.train()
    for indices, rate in zip(images_in_order.split(BATCH), rates.tolist(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        logits = model(train.images[indices])
        loss = F.cross_entropy(logits, train.labels[indices])
        loss.backward()
        optimizer.step()
        losses.append(loss.item() * len(indices))
        hits.append((logits.argmax(1) == train.labels[indices]).sum().item())
    return losses, hits


OPTIMIZERS = {
    "name: adam": lambda p: torch.optim.Adam(p, fused=True),
    "name: adamw, weight_decay: 0.1": lambda p: torch.optim.AdamW(p, weight_decay=0.1, fused=True),
    "name: sgd, momentum: 0.9, nesterov: true, weight_decay: 0.01": lambda p: torch.optim.SGD(
        p, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True
    ),
}


def plain(network: str = "lenet", optimizer: str = "name: adam") -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network with the weights of the trainers here, and an optimizer."""
    model = build_model(make_config(network), CPU)
    return model, OPTIMIZERS[optimizer](model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", ["lenet", "cnn3"])
def test_loop_equals_the_plain_one_bit_for_bit(network, optimizer):
    """The loop draws no random numbers of its own: dropout's are the same, too."""
    trainer, (model, plain_optimizer) = make_trainer(network, optimizer=optimizer), plain(network, optimizer)
    rates = learning_rates(0.01, "cosine", 0, 2 * STEPS, 2 * STEPS).split(STEPS)
    torch.manual_seed(5)
    expected = [plain_epoch(model, plain_optimizer, order(k), rates[k]) for k in (0, 1)]
    torch.manual_seed(5)
    epochs = [trainer.epoch(order(k), rates[k]) for k in (0, 1)]
    assert same_weights(trainer.model, model)
    for epoch, (losses, hits) in zip(epochs, expected, strict=True):
        assert epoch.train_loss == pytest.approx(sum(losses) / TRAIN, rel=1e-5)
        assert epoch.train_accuracy == pytest.approx(sum(hits) / TRAIN, abs=1e-6)
        assert epoch.images_per_second == pytest.approx(TRAIN / epoch.train_seconds)
        assert epoch.epoch_seconds == pytest.approx(epoch.train_seconds + epoch.eval_seconds)
    assert (epochs[-1].test_loss, epochs[-1].test_accuracy) == trainer.evaluate()


def moved_one_by_one(images: Tensor, moves: Tensor, black: Tensor) -> Tensor:
    """Move each image in the plainest way."""
    out = black.expand_as(images[0]).repeat(len(images), 1, 1, 1)
    height, width = images.shape[2:]
    for original, to, (down, right, mirrored) in zip(images, out, moves.tolist(), strict=True):
        image = original.flip(2) if mirrored else original
        for row in range(max(0, down), min(height, height + down)):
            for column in range(max(0, right), min(width, width + right)):
                to[:, row, column] = image[:, row - down, column - right]
    return out


def test_images_are_shifted_then_filled_with_black():
    images, black = torch.randn(20, 3, 6, 9), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    moves = epoch_moves(20, 0, 1, crop=4, flip=True)
    moves[0, 0] = 7  # beyond the image
    expected = moved_one_by_one(images, moves, black)
    mirrored = moves[:, 2:, None] > 0
    assert torch.equal(moved(images, moves, black), expected)
    assert 0 < mirrored.sum() < 20
    assert torch.equal(moved(images, torch.zeros(20, 3, dtype=torch.int64)), images)


def test_moved_images_and_smoothed_labels_equal_the_plain_loop():
    train = replace(random_split(TRAIN, 1), black=torch.full((1, 1, 1), -0.5))
    fields = "data: {batch_size: 16, crop: 2, flip: true}\ntrain: {label_smoothing: 0.1}\nmodel: {multiplier: exact}"
    config = parse(f"name: x\n{fields}", "x")
    trainer = build_trainer(config, CPU, (train, random_split(TEST, 2)))
    model, optimizer = plain()
    moves = epoch_moves(TRAIN, 5, 1, crop=2, flip=True)
    trainer.epoch(order(), RATES, moves=moves)
    images = moved_one_by_one(train.images[order()], moves, train.black)
    for batch, labels, rate in zip(images.split(BATCH), train.labels[order()].split(BATCH), RATES, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate.item()
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels, label_smoothing=0.1).backward()
        optimizer.step()
    assert same_weights(trainer.model, model)


def test_reports_give_running_means_over_images(monkeypatch):
    monkeypatch.setattr(training, "REPORT_INTERVAL", 0)
    reports = []
    trainer, (model, optimizer) = make_trainer(), plain()
    epoch = trainer.epoch(order(), RATES, reports.append)
    losses, hits = plain_epoch(model, optimizer, order(), RATES)
    assert same_weights(trainer.model, model)  # reporting changes nothing
    assert [(report.step, report.steps) for report in reports] == [(1, STEPS), (2, STEPS), (3, STEPS)]
    for report in reports:
        images = report.step * BATCH
        assert report.loss == pytest.approx(sum(losses[: report.step]) / images, rel=1e-5)
        assert report.accuracy == pytest.approx(sum(hits[: report.step]) / images, abs=1e-6)
        assert report.images_per_second > 0
    # The short last batch counts for its images only.
    unweighted = sum(loss / size for loss, size in zip(losses, BATCHES, strict=True)) / STEPS
    assert epoch.train_loss != pytest.approx(unweighted, rel=1e-5)


# Evaluation


@pytest.mark.parametrize("network", ["lenet", "cnn3"])
def test_evaluation_depends_on_no_batch_size(network):
    test = random_split(TEST, 2)
    with torch.no_grad():
        logits = build_model(make_config(network, "mbm"), CPU).eval()(test.images)
    loss = F.cross_entropy(logits, test.labels).item()
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    for size in (1, 7, 15, TEST, 1000):
        trainer = make_trainer(network, "mbm", batch=size)
        for found in (trainer.evaluate(), training.evaluate(trainer.model, test, size)):
            assert found == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy, abs=1e-6))


def test_evaluation_changes_nothing():
    trainer = make_trainer("cnn3")
    before, random = copy.deepcopy(trainer.model), torch.get_rng_state()
    assert trainer.evaluate() == trainer.evaluate()
    assert same_weights(trainer.model, before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# Losses that are not finite


@pytest.mark.parametrize(("image", "step"), [(0, 1), (2 * BATCH, 3), (TRAIN - 1, 4)])
def test_loss_that_is_not_finite_names_its_step(image, step):
    trainer = make_trainer()
    trainer.train.images[image] = math.nan
    with pytest.raises(RunError, match=rf"^the loss of step {step} of {STEPS} is nan: lower optimizer\.lr$"):
        trainer.epoch(torch.arange(TRAIN), RATES)


def test_weights_broken_by_the_last_step_fail():
    rates = RATES.clone()
    rates[-1] = math.inf
    with pytest.raises(RunError, match=r"after its last step the test loss is nan: lower optimizer\.lr"):
        make_trainer().epoch(torch.arange(TRAIN), rates)


def test_losses_are_checked_within_a_tenth_of_an_epoch():
    steps, asked = 40, []
    split = random_split(steps, 1)
    split.images[0] = math.nan
    trainer = trainer_of(build_model(make_config(), CPU), split, batch=1)
    with pytest.raises(RunError, match="step 1 of 40"):
        trainer.epoch(
            torch.arange(steps),
            learning_rates(0.01, "none", 0, steps, steps),
            stopped=lambda: asked.append(1),
        )
    assert len(asked) == 5  # before steps 1 to 5 of 40


def test_huge_finite_losses_are_a_result():
    """Each loss is finite, their float32 sum is not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([2e38, *[0.0] * 9]))
    split = Split(torch.zeros(TRAIN, 1, 28, 28), torch.ones(TRAIN, dtype=torch.int64), 10)
    epoch = trainer_of(model, split).epoch(torch.arange(TRAIN), RATES)
    assert epoch.train_loss == pytest.approx(2e38, rel=1e-3)


# Stopping and resuming


@pytest.mark.parametrize("steps", [0, 2])
def test_stop_is_heard_before_the_next_step(steps):
    trainer, (model, optimizer) = make_trainer(), plain()
    with pytest.raises(Interrupted):
        trainer.epoch(order(), RATES, stopped=after(steps))
    plain_epoch(model, optimizer, order()[: steps * BATCH], RATES[: max(steps, 1)])
    assert same_weights(trainer.model, model)


@pytest.mark.parametrize("network", ["lenet", "cnn3"])
@pytest.mark.parametrize("optimizer", ["name: adam", "name: sgd, momentum: 0.9"])
@pytest.mark.parametrize("steps", [1, 3])
def test_epoch_resumes_bit_for_bit(network, optimizer, steps):
    """Dropout's random numbers, batch norm's statistics and the means over the whole epoch included."""
    whole, cut, resumed = (make_trainer(network, optimizer=optimizer) for _ in range(3))
    torch.manual_seed(5)
    expected = whole.epoch(order(), RATES)
    kept = []

    def keep(part: PartOfEpoch) -> None:
        kept.append((part, *copy.deepcopy((cut.model.state_dict(), cut.optimizer.state_dict())), torch.get_rng_state()))

    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        cut.epoch(order(), RATES, stopped=after(steps), keep=keep)
    part, model, state, random = kept[-1]
    assert part.step == steps

    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    epoch = resumed.epoch(order(), RATES, part=part)
    for field in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert getattr(epoch, field) == getattr(expected, field), field
    assert epoch.train_seconds > part.seconds
    assert same_weights(resumed.model, whole.model)


def test_parts_are_kept_every_so_many_steps():
    kept = []
    make_trainer().epoch(order(), RATES, keep=kept.append, keep_every=2)
    assert [(part.step, len(part.logits)) for part in kept] == [(2, 2 * BATCH)]
