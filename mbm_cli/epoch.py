"""What an epoch draws: the order of the images, and how each is moved."""

import numpy as np
import torch
from torch import Tensor


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch (from 1) visits ``size`` images: a permutation, int64 (size,), on the CPU.

    ``seed`` (at least 0) and ``epoch`` alone decide it, whatever the device and whatever else draws random numbers.
    """
    return torch.randperm(size, generator=_generator(seed, epoch))


def epoch_moves(size: int, seed: int, epoch: int, crop: int, flip: bool) -> Tensor:
    """Return how each of the ``size`` images of an epoch is moved, in its order, int64 (size, 3), on the CPU.

    A row is the pixels down and to the right, each from ``-crop`` to ``crop``, and 1 for a mirrored image, which takes
    ``flip``. They depend on what `epoch_order` depends on.
    """
    generator = _generator(seed, epoch, 1)
    shifts = torch.randint(-crop, crop + 1, (size, 2), generator=generator)
    mirrored = torch.randint(0, 1 + flip, (size, 1), generator=generator)
    return torch.cat([shifts, mirrored], 1)


def _generator(*numbers: int) -> torch.Generator:
    mixed = np.random.SeedSequence(numbers).generate_state(1)  # seed 1, epoch 2 is not seed 2, epoch 1
    return torch.Generator().manual_seed(int(mixed[0]))
