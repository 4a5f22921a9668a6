"""ReLU and max-pooling in one layer: the values and gradients of PyTorch's two."""

import pytest
import torch
import torch.nn.functional as F
from nvrtc import local_memory

from mbm_cli import pooling
from mbm_cli.pooling import ReLUMaxPool2d

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_EACH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])


@ON_EACH
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("shape", [(64, 6, 28, 28), (3, 16, 10, 11), (2, 1, 3, 5), (0, 2, 8, 8)], ids=str)
def test_bits_are_those_of_two_layers(shape, side, device):
    x = torch.randint(-2, 3, shape, device=device).float()  # so that many of a window are equal
    x.view(-1)[::17] = torch.nan
    x.requires_grad_()
    ours, theirs = ReLUMaxPool2d(side)(x), F.max_pool2d(F.relu(x), side)
    grad = -torch.randint(0, 3, theirs.shape, device=device).float()
    both = [(one.detach(), torch.autograd.grad(one, x, grad)[0]) for one in (ours, theirs)]
    for one, other in zip(*both, strict=True):
        same = one.view(torch.int32) == other.view(torch.int32)
        assert (same | (one.isnan() & other.isnan())).all()  # the bits of a NaN are the compiler's choice


@ON_EACH
def test_gradients_of_each_image_and_compiled_layers(device):
    layer, x = ReLUMaxPool2d(2), torch.randn(3, 2, 8, 8, device=device)
    of_each = torch.func.vmap(torch.func.grad(lambda one: layer(one[None]).sum()))(x)
    x.requires_grad_()
    assert torch.equal(of_each, torch.autograd.grad(layer(x).sum(), x)[0])
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_kernels_compile(architecture):
    check = f"static_assert(sizeof(Windows) == {pooling._WINDOWS.itemsize});"
    assert not any(local_memory(pooling.program(), architecture, check).values())
