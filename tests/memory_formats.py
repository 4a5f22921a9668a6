"""Layouts of a four-dimensional tensor in memory: the same values, other strides."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _negated_lazily(x: Tensor) -> Tensor:
    """Return a view of every second number in memory, with the opposite sign."""
    return torch.complex(torch.full_like(x, torch.nan), -x).conj().imag


# The expanded layouts repeat some of the values; the others keep them all.
MEMORY_FORMATS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded batch": lambda x: x[:1].expand(x.shape),
    "expanded image": lambda x: x[:, :, :1, :1].expand(x.shape),
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 4).flatten(3)[..., ::2],
    "every third channel": lambda x: torch.stack([torch.full_like(x, torch.nan)] * 2 + [x], 2).flatten(1, 2)[:, 2::3],
    "inside a larger one": lambda x: F.pad(x, (2, 3, 1, 2), value=torch.nan)[..., 1:-2, 2:-3],
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "transposed images": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "behind an odd offset": lambda x: F.pad(x.flatten(), (3, 0), value=torch.nan)[3:].view(x.shape),
    "negated lazily": _negated_lazily,
}
