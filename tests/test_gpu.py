"""What only a GPU can show of operators and training; kernels have tests of their own in test_cuda.py."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from mbm_cli import cli
from mbm_cli.config import OptimizerConfig, load
from mbm_cli.data import Split, epoch_order
from mbm_cli.errors import Interrupted, RunError
from mbm_cli.experiments import train as experiment
from mbm_cli.experiments.setup import build_optimizer
from mbm_cli.models import MODELS
from mbm_cli.ops import conv2d
from mbm_cli.render import Display
from mbm_cli.runs import list_runs
from mbm_cli.training import Trainer, learning_rates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def kernel_names(call) -> list[str]:
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return [event.key for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_the_backward_pass_is_cudnn_s():
    """Both gradients come from cuDNN's kernels (or ones that it generates at run time), none from ours."""
    x = torch.randn(64, 32, 28, 28, device=CUDA, requires_grad=True)
    weight = torch.randn(64, 32, 3, 3, device=CUDA, requires_grad=True)
    output = conv2d(x, weight, padding=1, multiplier="mbm")
    names = kernel_names(lambda: output.backward(torch.ones_like(output), retain_graph=True))
    cudnn = ("cudnn", "cutlass", "implicit_convolve", "convolve", "wgrad", "dgrad", "xmma", "nchwToNhwc")
    assert any(word in name for name in names for word in cudnn), names
    assert not any("conv2d_" in name and "cudnn" not in name for name in names), names
    forward = kernel_names(lambda: conv2d(x, weight, padding=1, multiplier="mbm"))
    assert any(name.startswith("conv2d_") for name in forward), forward


def test_gradients_are_the_exact_convolution_s():
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    x = torch.randn(8, 3, 12, 12, device=CUDA, requires_grad=True)
    weight, bias = (
        torch.randn(4, 3, 3, 3, device=CUDA, requires_grad=True),
        torch.randn(4, device=CUDA, requires_grad=True),
    )
    output = conv2d(x, weight, bias, stride=2, padding=1, multiplier="mbm-t8")
    exact = F.conv2d(x, weight, bias, stride=2, padding=1)
    grad = torch.randn_like(exact)
    ours = torch.autograd.grad(output, (x, weight, bias), grad)
    theirs = torch.autograd.grad(exact, (x, weight, bias), grad)
    assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
    torch.testing.assert_close(ours[2], theirs[2])  # summed in another order


@pytest.mark.parametrize("model", ["lenet", "cnn3"])
@pytest.mark.parametrize("optimizer", [{"name": "adam"}, {"name": "sgd", "momentum": 0.9, "nesterov": True}])
def test_a_graph_trains_bit_for_bit_as_eager_steps_do(model, optimizer):
    """Dropout, batch norm, the smaller last batch and a second epoch included."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(300, 1, 28, 28, generator=generator).to(CUDA)
    labels = torch.randint(0, 10, (300,), generator=generator).to(CUDA)
    states = []
    for cuda_graph in (True, False, True):
        torch.manual_seed(1)
        network = MODELS[model]("mbm").to(CUDA)
        data = Split(images, labels)
        trainer = Trainer(
            network, build_optimizer(OptimizerConfig(**optimizer), network, CUDA), data, data, 64, 128, cuda_graph
        )
        epochs = [
            trainer.epoch(epoch_order(300, 0, epoch), learning_rates(0.01, "linear", 5 * epoch - 5, 5, 10))
            for epoch in (1, 2)
        ]
        states.append((network.state_dict(), [(e.train_loss, e.test_loss, e.test_accuracy) for e in epochs]))
    for state, losses in states[1:]:
        assert losses == states[0][1]
        assert all(torch.equal(state[name], states[0][0][name]) for name in state)


def test_the_command_trains_on_the_gpu_and_goes_on_exactly(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    limits = ["--set", "data.train_limit=1000", "--set", "data.test_limit=500", "--set", "optimizer.schedule=none"]

    def mbm(*arguments: str) -> dict:
        monkeypatch.setattr("sys.argv", ["mbm", *arguments, "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return json.loads(capsys.readouterr().out)

    whole = mbm("train", "--epochs", "2", "--config", "cnn3-mbm", *limits)
    first = mbm("train", "--epochs", "1", "--config", "cnn3-mbm", *limits)
    second = mbm("train", "--resume", first["run"], "--epochs", "2")
    assert whole["device"] == "cuda"
    weights = [torch.load(f"{run['run']}/checkpoint.pt", weights_only=True)["model"] for run in (whole, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("cuda_graph", ["auto", "off"])
@pytest.mark.parametrize("config", ["lenet-mbm", "cnn3-mbm"])
def test_a_run_that_is_stopped_within_an_epoch_goes_on_exactly(tmp_path, config, cuda_graph):
    limits = ["data.train_limit=1000", "data.test_limit=500", "train.epochs=2", f"train.cuda_graph={cuda_graph}"]
    loaded = load(config, limits)
    whole, _ = experiment.train(loaded, tmp_path, Display())
    asked = []
    with pytest.raises(Interrupted):
        experiment.train(loaded, tmp_path / "stopped", Display(), lambda: asked.append(1) or len(asked) > 21)
    (stopped,) = list_runs(tmp_path / "stopped")
    assert stopped.checkpoint()["part"]["step"] == 5  # of the second epoch, which has 16
    experiment.resume(stopped, None, Display())
    states = [run.checkpoint()["model"] for run in (whole, stopped)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    accuracies = [[m["train_accuracy"] for m in run.metrics()] for run in (whole, stopped)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_the_layer_that_made_a_loss_infinite_is_named(cuda_graph):
    torch.manual_seed(0)
    network = MODELS["lenet"]("mbm").to(CUDA)
    images = torch.randn(640, 1, 28, 28, device=CUDA)
    images[300] = float("nan")
    data = Split(images, torch.randint(0, 10, (640,), device=CUDA))
    trainer = Trainer(network, build_optimizer(OptimizerConfig(), network, CUDA), data, data, 64, 128, cuda_graph)
    with pytest.raises(RunError, match=r"step 5 of 10 is nan .*not finite is conv1"):
        trainer.epoch(torch.arange(640), learning_rates(0.01, "none", 0, 10, 10))


def test_memory_that_is_full_is_answered_with_a_batch_that_fits(tmp_path):
    """Most of the card is taken, so that a batch of all images does not fit any more."""
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (1 << 30), dtype=torch.uint8, device=CUDA)
    config = load("cnn3-mbm", ["data.batch_size=60000", "train.epochs=1", "data.test_limit=100"])
    with pytest.raises(RunError, match=r"too small for this batch, but these would fit: --set data.batch_size=\d+"):
        experiment.train(config, tmp_path, Display())
    del taken


def test_memory_does_not_grow_from_run_to_run(tmp_path):
    peaks = []
    for seed in range(4):
        config = load("lenet-mbm", ["data.train_limit=2000", "train.epochs=1", f"seed={seed}"])
        peaks.append(experiment.train(config, tmp_path, Display())[1]["peak_memory_bytes"])
    assert max(peaks[1:]) - peaks[1] < 16 << 20, peaks
