"""The loop: what an epoch trains on, what it reports, and that it is no other than a plain PyTorch loop."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_cli import training
from mbm_cli.config import OptimizerConfig
from mbm_cli.data import Split
from mbm_cli.errors import Interrupted, RunError
from mbm_cli.experiments.setup import build_optimizer
from mbm_cli.models import MODELS
from mbm_cli.training import Trainer, learning_rates

BATCHES = [16, 16, 16, 4]
BATCH, STEPS, TRAIN, TEST = BATCHES[0], len(BATCHES), sum(BATCHES), 30
CPU = torch.device("cpu")


def random_split(size: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, 28, 28, generator=generator)
    return Split(images, torch.randint(10, (size,), generator=generator))


def make_model(name: str = "lenet", multiplier: str = "exact") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](multiplier)


def make_trainer(model: nn.Module, optimizer: OptimizerConfig | None = None, eval_batch_size: int = 1000) -> Trainer:
    built = build_optimizer(optimizer or OptimizerConfig(), model, CPU)
    return Trainer(model, built, random_split(TRAIN, 1), random_split(TEST, 2), BATCH, eval_batch_size)


def order(epoch: int = 1) -> Tensor:
    return torch.randperm(TRAIN, generator=torch.Generator().manual_seed(epoch))


RATES = learning_rates(0.01, "linear", 0, STEPS, STEPS)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The learning rate


def test_the_linear_schedule_falls_to_zero_behind_the_last_step():
    torch.testing.assert_close(learning_rates(0.4, "linear", 0, 4, 4), torch.tensor([0.4, 0.3, 0.2, 0.1]))


def test_the_cosine_schedule():
    expected = [0.4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    torch.testing.assert_close(learning_rates(0.4, "cosine", 0, 4, 4), torch.tensor(expected))
    assert expected[0] == 0.4
    assert expected[2] == pytest.approx(0.2)


def test_no_schedule_stays():
    assert learning_rates(0.001, "none", 7, 3, 10).tolist() == [torch.tensor(0.001).item()] * 3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "none"])
def test_the_epochs_of_a_schedule_join(schedule):
    whole = learning_rates(0.1, schedule, 0, 12, 12)
    epochs = [learning_rates(0.1, schedule, first, 4, 12) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(epochs), whole)
    assert whole.dtype == torch.float32
    assert (whole > 0).all()


# An epoch


class Recorder(nn.Module):
    """Keeps what comes by in training: images whose pixels are all their own number."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append(images[:, 0, 0, 0].int().tolist())
        return images / TRAIN


def test_an_epoch_sees_every_image_once_in_the_given_order():
    recorder = Recorder()
    model = nn.Sequential(recorder, nn.Flatten(), nn.Linear(784, 10))
    numbered = torch.arange(TRAIN).float().reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28).contiguous()
    train = Split(numbered, torch.zeros(TRAIN, dtype=torch.int64))
    trainer = Trainer(model, build_optimizer(OptimizerConfig(), model, CPU), train, random_split(TEST, 2), BATCH, 1000)
    for epoch in (1, 2):
        recorder.seen.clear()
        trainer.epoch(order(epoch), RATES)
        assert [len(batch) for batch in recorder.seen] == BATCHES
        assert [number for batch in recorder.seen for number in batch] == order(epoch).tolist()


@pytest.mark.parametrize(("size", "batch", "steps"), [(64, 32, 2), (20, 32, 1), (1, 1, 1), (33, 32, 2)])
def test_any_size_and_any_batch_size(size, batch, steps):
    model = make_model()
    split = random_split(size, 1)
    trainer = Trainer(model, build_optimizer(OptimizerConfig(), model, CPU), split, split, batch, batch)
    assert trainer.steps == steps
    epoch = trainer.epoch(torch.arange(size), learning_rates(0.001, "none", 0, steps, steps))
    assert 0 <= epoch.train_accuracy <= 1
    assert epoch.test_loss > 0


def plain_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images_in_order: Tensor, rates: Tensor
) -> tuple[list[float], list[int]]:
    """An epoch as anybody would write it; the sum of the losses and the hits of each step."""
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
    "adam": (OptimizerConfig(name="adam"), lambda p: torch.optim.Adam(p, fused=True)),
    "adamw": (
        OptimizerConfig(name="adamw", weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, weight_decay=0.1, fused=True),
    ),
    "sgd": (
        OptimizerConfig(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("network", ["lenet", "cnn3"])
def test_the_loop_is_the_plain_one_bit_for_bit(network, name):
    """Dropout and batch norm included: the loop draws no random numbers of its own."""
    config, make_plain = OPTIMIZERS[name]
    ours, plain = make_model(network), make_model(network)
    trainer, optimizer = make_trainer(ours, config), make_plain(plain.parameters())
    rates = learning_rates(0.01, "cosine", 0, 2 * STEPS, 2 * STEPS).split(STEPS)

    torch.manual_seed(5)
    expected = [plain_epoch(plain, optimizer, order(k), rates[k]) for k in (0, 1)]
    torch.manual_seed(5)
    epochs = [trainer.epoch(order(k), rates[k]) for k in (0, 1)]

    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    for epoch, (losses, hits) in zip(epochs, expected, strict=True):
        assert epoch.train_loss == pytest.approx(sum(losses) / TRAIN, rel=1e-5)
        assert epoch.train_accuracy == pytest.approx(sum(hits) / TRAIN, abs=1e-6)


def test_the_report_gives_running_means_over_images(monkeypatch):
    """A short last batch counts for its images only; the report after k steps covers the first k."""
    monkeypatch.setattr(training, "REPORT_INTERVAL", 0)
    ours, plain = make_model(), make_model()
    reports = []
    epoch = make_trainer(ours).epoch(order(), RATES, reports.append)
    losses, hits = plain_epoch(plain, torch.optim.Adam(plain.parameters(), fused=True), order(), RATES)
    assert reports
    assert [r.step for r in reports] == sorted({r.step for r in reports})
    for report in reports:
        images = min(report.step * BATCH, TRAIN)
        assert (report.steps, report.images_per_second > 0) == (STEPS, True)
        assert report.loss == pytest.approx(sum(losses[: report.step]) / images, rel=1e-5)
        assert report.accuracy == pytest.approx(sum(hits[: report.step]) / images, abs=1e-6)
    unweighted = sum(loss / size for loss, size in zip(losses, BATCHES, strict=True)) / STEPS
    assert epoch.train_loss != pytest.approx(unweighted, rel=1e-5)


def test_reporting_changes_nothing(monkeypatch):
    quiet, watched = make_model("cnn3"), make_model("cnn3")
    torch.manual_seed(5)
    make_trainer(quiet).epoch(order(), RATES)
    monkeypatch.setattr(training, "REPORT_INTERVAL", 0)
    torch.manual_seed(5)
    make_trainer(watched).epoch(order(), RATES, lambda progress: None)
    state = quiet.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in watched.state_dict().items())


def test_the_times_of_an_epoch():
    epoch = make_trainer(make_model()).epoch(order(), RATES)
    assert epoch.train_seconds > 0
    assert epoch.eval_seconds > 0
    assert epoch.images_per_second == pytest.approx(TRAIN / epoch.train_seconds)


# Evaluation


@pytest.mark.parametrize("network", ["lenet", "cnn3"])
def test_evaluation_does_not_depend_on_its_batch_size(network):
    model = make_model(network, "mbm")
    test = random_split(TEST, 2)
    with torch.no_grad():
        logits = model.eval()(test.images)
    loss = F.cross_entropy(logits, test.labels).item()
    accuracy = (logits.argmax(1) == test.labels).float().mean().item()
    for size in (1, 7, 15, TEST, 1000):
        found = make_trainer(model, eval_batch_size=size).evaluate()
        assert found == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy, abs=1e-6))


def test_evaluation_leaves_the_model_as_it_was():
    model = make_model("cnn3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    trainer = make_trainer(model)
    assert trainer.evaluate() == trainer.evaluate()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_an_epoch_evaluates_what_it_trained():
    trainer = make_trainer(make_model("cnn3"))
    epoch = trainer.epoch(order(), RATES)
    assert (epoch.test_loss, epoch.test_accuracy) == trainer.evaluate()


# When it goes wrong


@pytest.mark.parametrize(("image", "step"), [(0, 1), (2 * BATCH, 3), (TRAIN - 1, 4)])
def test_a_loss_that_is_not_a_number_is_a_failure_of_that_step(image, step):
    trainer = make_trainer(make_model())
    trainer.train.images[image] = math.nan
    with pytest.raises(RunError, match=f"step {step} of {STEPS}.* nan"):
        trainer.epoch(torch.arange(TRAIN), RATES)


def test_weights_that_the_last_step_broke_are_a_failure():
    trainer = make_trainer(make_model())
    rates = RATES.clone()
    rates[-1] = math.inf
    with pytest.raises(RunError, match=r"after its last step the test loss is nan: lower optimizer\.lr"):
        trainer.epoch(torch.arange(TRAIN), rates)


class Fuse(nn.Module):
    """Passes numbers on as long as they are small."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.where(x.abs().amax() > 1000, torch.inf, 0.0)


def test_the_first_layer_that_is_not_finite_is_named():
    """Of the step that went wrong: after it, every weight is NaN, and every layer would be to blame."""
    torch.manual_seed(0)
    layers = {"flatten": nn.Flatten(), "fc1": nn.Linear(784, 10), "fuse": Fuse(), "fc2": nn.Linear(10, 10)}
    trainer = make_trainer(nn.Sequential(OrderedDict(layers)))
    trainer.train.images[2 * BATCH + 3] = 1e6
    with pytest.raises(RunError, match=rf"step 3 of {STEPS} is (nan|inf) \(.* not finite is fuse\)"):
        trainer.epoch(torch.arange(TRAIN), RATES)


def test_losses_are_looked_at_within_a_tenth_of_an_epoch():
    model, steps = make_model(), 40
    split = random_split(steps, 1)
    split.images[0] = math.nan
    optimizer = build_optimizer(OptimizerConfig(), model, CPU)
    asked = []
    with pytest.raises(RunError, match="step 1 of 40"):
        Trainer(model, optimizer, split, split, 1, 10).epoch(
            torch.arange(steps), learning_rates(0.01, "none", 0, steps, steps), stopped=lambda: asked.append(1)
        )
    assert len(asked) == 5  # steps 0 to 4, of 40


def test_a_huge_loss_is_a_result_not_a_failure():
    """Each loss is finite, their float32 sum is not."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([2e38, *[0.0] * 9]))
    split = Split(torch.zeros(TRAIN, 1, 28, 28), torch.ones(TRAIN, dtype=torch.int64))
    optimizer = build_optimizer(OptimizerConfig(), model, CPU)
    epoch = Trainer(model, optimizer, split, split, BATCH, 1000).epoch(torch.arange(TRAIN), RATES)
    assert epoch.train_loss == pytest.approx(2e38, rel=1e-3)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_stop_is_heard_before_the_next_step(steps):
    stopped, plain = make_model(), make_model()
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > steps

    with pytest.raises(Interrupted):
        make_trainer(stopped).epoch(order(), RATES, stopped=stop)
    optimizer = torch.optim.Adam(plain.parameters(), fused=True)
    plain_epoch(plain, optimizer, order()[: steps * BATCH], RATES[: max(steps, 1)])
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in stopped.state_dict().items())


# Leaving an epoch and going on


@pytest.mark.parametrize("network", ["lenet", "cnn3"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_epoch_goes_on_where_it_was_left_bit_for_bit(network, optimizer, steps):
    """Dropout's random numbers, batch norm's statistics and the means over the whole epoch included."""
    config = OptimizerConfig(name=optimizer, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    whole = make_trainer(make_model(network), config)
    expected = whole.epoch(order(), RATES)

    left, kept = make_trainer(make_model(network), config), []

    def keep(part: training.PartOfEpoch) -> None:
        states = copy.deepcopy((left.model.state_dict(), left.optimizer.state_dict()))
        kept.append((part, *states, torch.get_rng_state()))

    asked = []
    with pytest.raises(Interrupted):
        left.epoch(order(), RATES, stopped=lambda: asked.append(1) or len(asked) > steps, keep=keep)
    (part, model, state, random) = kept[-1]
    assert part.step == steps

    gone_on = make_trainer(make_model(network), config)
    gone_on.model.load_state_dict(model)
    gone_on.optimizer.load_state_dict(state)
    torch.set_rng_state(random)
    epoch = gone_on.epoch(order(), RATES, part=part)
    for field in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert getattr(epoch, field) == getattr(expected, field), field
    wanted = whole.model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in gone_on.model.state_dict().items())


def test_parts_are_kept_every_so_many_steps():
    kept = []
    make_trainer(make_model()).epoch(order(), RATES, keep=kept.append, keep_every=2)
    assert [part.step for part in kept] == [2]
    assert [len(part.logits) for part in kept] == [2 * BATCH]
