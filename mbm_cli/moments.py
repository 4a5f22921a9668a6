"""The state of a training at a moment, to return to: tensors on their device, and random numbers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The state of a training before a step.

    Attributes:
        step: of the epoch, from 0 on.
        tensors: those that the training changes, in groups of one dtype, each with its values then as one flat tensor.
        cpu_random, cuda_random: the generators' states.
    """

    step: int
    tensors: list[tuple[list[Tensor], Tensor]]
    cpu_random: Tensor
    cuda_random: Tensor | None

    @classmethod
    def take(cls, step: int, tensors: Sequence[Tensor], device: torch.device) -> "Moment":
        """As it is now; nothing waits for the device."""
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            groups[tensor.dtype].append(tensor)
        # Detached: a copy's graph would tie the parameters' gradients to this stream, which capture does not allow.
        # In one piece, which a GPU copies at once; dozens of copies would take it as long as a training step.
        copied = [(group, torch.cat([tensor.detach().flatten() for tensor in group])) for group in groups.values()]
        cuda_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(step, copied, torch.get_rng_state(), cuda_random)

    def restore(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Put it back.

        Args:
            tensors: what the training changes now; what was made since starts from zero, as an optimizer's state does.
        """
        torch.set_rng_state(self.cpu_random)
        if self.cuda_random is not None:
            torch.cuda.set_rng_state(self.cuda_random, device)
        known = {id(tensor) for group, _ in self.tensors for tensor in group}
        with torch.no_grad():
            for group, values in self.tensors:
                for tensor, value in zip(group, values.split([tensor.numel() for tensor in group]), strict=True):
                    tensor.copy_(value.view_as(tensor))
            for tensor in tensors:
                if id(tensor) not in known:
                    tensor.zero_()
