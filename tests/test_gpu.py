"""What only a GPU can show of operators and training; kernels have tests of their own in test_cuda.py."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from mbm_cli import cli
from mbm_cli.config import OptimizerConfig
from mbm_cli.data import Split, epoch_order
from mbm_cli.experiments.train import build_optimizer
from mbm_cli.models import MODELS
from mbm_cli.ops import conv2d
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
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
