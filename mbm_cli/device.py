"""Which device is meant by ``auto``, ``cpu`` and ``cuda``."""

from typing import Literal

import torch

from mbm_cli.errors import RequestError


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        RequestError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RequestError("device: cuda was asked for, but PyTorch finds no CUDA device here: use cpu or auto")
    use_cuda = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")
