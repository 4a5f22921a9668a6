"""What only a GPU shows of operators and training; test_cuda.py tests the kernels."""

import pytest
import torch
import torch.nn.functional as F
from commands import SILENT, after, made, mbm
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mbm_cli import optimizers
from mbm_cli.config import Config, load
from mbm_cli.device import choose_device, set_arithmetic
from mbm_cli.epoch import epoch_moves, epoch_order
from mbm_cli.errors import RunError
from mbm_cli.experiments.lifecycle import build_trainer
from mbm_cli.experiments.train import train
from mbm_cli.ops import conv2d
from mbm_cli.training import Split, learning_rates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
FEW = ["--set", "data.train_limit=1000", "--set", "data.test_limit=500", "--device", "cuda"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choose_device("cuda")
    set_arithmetic(deterministic=True)


def kernel_names(call) -> list[str]:
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return [event.key for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]


def random_data(images: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 1, 28, 28, generator=generator)
    return Split(x.to(CUDA), torch.randint(0, 10, (images,), generator=generator).to(CUDA), 10)


# Gradients


def test_backward_pass_is_cudnns():
    """Both gradients come from cuDNN's kernels, or ones that it generates at run time, and none from ours."""
    x = torch.randn(64, 32, 28, 28, device=CUDA, requires_grad=True)
    weight = torch.randn(64, 32, 3, 3, device=CUDA, requires_grad=True)
    output = conv2d(x, weight, padding=1, multiplier="mbm")
    names = kernel_names(lambda: output.backward(torch.ones_like(output), retain_graph=True))
    cudnn = ("cudnn", "cutlass", "implicit_convolve", "convolve", "wgrad", "dgrad", "xmma", "nchwToNhwc")
    assert any(word in name for name in names for word in cudnn), names
    assert not any("conv2d_" in name and "cudnn" not in name for name in names), names
    forward = kernel_names(lambda: conv2d(x, weight, padding=1, multiplier="mbm"))
    assert any(name.startswith("conv2d_") for name in forward), forward


def test_gradients_are_the_exact_convolutions():
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=CUDA, requires_grad=True)

    x, weight, bias = random(8, 3, 12, 12), random(4, 3, 3, 3), random(4)
    output = conv2d(x, weight, bias, stride=2, padding=1, multiplier="mbm-t8")
    exact = F.conv2d(x, weight, bias, stride=2, padding=1)
    grad = torch.randn_like(exact)
    ours = torch.autograd.grad(output, (x, weight, bias), grad)
    theirs = torch.autograd.grad(exact, (x, weight, bias), grad)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
    torch.testing.assert_close(ours[2], theirs[2])  # summed in another order


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_adam_in_pieces_has_the_bits_of_adam(decoupled):
    """Of a network and of tensors of many sizes, in one that is not contiguous, too."""
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    shapes = [(120, 400), (7, 11), (1,), (100_003,), (0,), (64, 33, 3, 3), (0, 5)]
    both = []
    for make in (optimizers.adam, lambda params, lr, decay, _: kind(params, lr, weight_decay=decay, fused=True)):
        generator = torch.Generator(CUDA).manual_seed(0)
        params = [torch.randn(shape, generator=generator, device=CUDA) for shape in shapes]
        params.append(params[5].clone().contiguous(memory_format=torch.channels_last))
        optimizer = make(params, torch.tensor([0.01], device=CUDA), 0.1, decoupled)
        for _ in range(3):
            for one in params:
                one.grad = torch.empty_like(one).normal_(generator=generator)
            optimizer.step()
        both.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*both, strict=True))


# CUDA graphs


# Dropout draws random numbers, batch norm keeps statistics, images are moved.
NETWORKS = {
    "lenet": [],
    "cnn3": ["model.name=cnn3"],
    "resnet20": ["model.name=resnet20", "data.crop=2", "data.flip=true", "train.label_smoothing=0.1"],
}


def config_of(network: str, *overrides: str) -> Config:
    return load("lenet-mbm", ["data.batch_size=64", "data.eval_batch_size=128", *NETWORKS[network], *overrides])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "optimizer", [["name=adam"], ["name=sgd", "momentum=0.9", "nesterov=true"]], ids=["adam", "nesterov"]
)
def test_graphs_train_as_eager_steps_do(network, optimizer):
    """Bit for bit: with dropout, batch norm, a smaller last batch and a second epoch."""
    data = random_data(300)
    states = []
    for cuda_graph in ("auto", "off", "auto"):
        config = config_of(network, *(f"optimizer.{field}" for field in optimizer), f"train.cuda_graph={cuda_graph}")
        trainer = build_trainer(config, CUDA, (data, data))
        assert trainer.cuda_graph == (cuda_graph == "auto")
        assert trainer.augment == (network == "resnet20")
        epochs = [
            trainer.epoch(
                epoch_order(300, 0, epoch),
                learning_rates(0.01, "linear", 5 * epoch - 5, 5, 10),
                moves=epoch_moves(300, 0, epoch, 2, flip=True) if trainer.augment else None,
            )
            for epoch in (1, 2)
        ]
        states.append((trainer.model.state_dict(), [(e.train_loss, e.test_loss, e.test_accuracy) for e in epochs]))
    for state_dict, losses in states[1:]:
        assert losses == states[0][1]
        assert all(torch.equal(value, states[0][0][name]) for name, value in state_dict.items())


@pytest.mark.parametrize("cuda_graph", ["auto", "off"])
def test_step_with_an_infinite_loss_is_named(cuda_graph):
    data = random_data(640)
    data.images[300] = torch.nan
    trainer = build_trainer(config_of("lenet", f"train.cuda_graph={cuda_graph}"), CUDA, (data, data))
    with pytest.raises(RunError, match=r"step 5 of 10 is nan"):
        trainer.epoch(torch.arange(640), learning_rates(0.01, "none", 0, 10, 10))


# Commands


@pytest.mark.parametrize("cuda_graph", ["auto", "off"])
@pytest.mark.parametrize("network", NETWORKS)
def test_interrupted_training_resumes_to_undisturbed_bits(network, cuda_graph):
    fields = [word for field in NETWORKS[network] for word in ("--set", field)]
    command = ["train", *fields, *FEW, "--epochs", 2, "--set", f"train.cuda_graph={cuda_graph}"]
    assert mbm(*command, "--output", "whole", "--quiet") == SILENT
    assert mbm(*command, stopped=after(21)).code == 130
    assert made().checkpoint()["part"]["step"] == 5  # of the second epoch, which has 16
    assert mbm("resume", made().name, "--quiet") == SILENT
    assert made().summary().device == "cuda"
    resumed, whole = made(), made("whole")
    expected = whole.checkpoint()["model"]
    assert all(torch.equal(value, expected[name]) for name, value in resumed.checkpoint()["model"].items())
    losses = [[m[field] for m in run.metrics() for field in ("train_loss", "test_loss")] for run in (resumed, whole)]
    assert losses[0] == losses[1]


def test_full_memory_is_answered_with_a_fitting_batch(tmp_path):
    """Most of the card is taken, so that a batch of all images does not fit."""
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (1 << 30), dtype=torch.uint8, device=CUDA)
    config = load("cnn3-mbm", ["data.batch_size=60000", "train.epochs=1", "data.test_limit=100"])
    with pytest.raises(RunError, match=r"too small for this batch, but these would fit: --set data.batch_size=\d+"):
        train(config, tmp_path)
    del taken


def test_memory_does_not_grow_from_run_to_run(tmp_path):
    peaks = []
    for seed in range(4):
        config = load("lenet-mbm", ["data.train_limit=2000", "train.epochs=1", f"seed={seed}"])
        peaks.append(train(config, tmp_path).result.peak_memory_bytes)
    assert max(peaks[1:]) - peaks[1] < 16 << 20, peaks
