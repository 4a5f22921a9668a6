"""Which device is meant by ``auto``, ``cpu`` and ``cuda``, and how a GPU's libraries compute."""

import os
from typing import Literal

import torch

from mbm_cli.errors import RequestError

# Environment variables that PyTorch reads once, when a process first needs them.
LIBRARY_VARIABLES = {
    # cuDNN chooses algorithms by a model of their times, not by a decision tree, with which the gradients of LeNet's
    # second convolution take twice as long (batch 64), or four times (batch 256).
    "TORCH_CUDNN_USE_HEURISTIC_MODE_B": "1",
    # Small linear layers by cuBLAS: cuBLASLt takes kernels for long sums for them, and twice the time.
    "DISABLE_ADDMM_CUDA_LT": "1",
}


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        RequestError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("device: cuda was asked for, but PyTorch finds no CUDA device here: use cpu or auto")
    use_cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def set_arithmetic(deterministic: bool) -> None:
    """Decide how a GPU's libraries compute, for the process.

    Args:
        deterministic: always in the same order, and in float32; else as they like, and in TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    for name, value in LIBRARY_VARIABLES.items():
        os.environ.setdefault(name, value)
