"""The state of a training at a moment, to return to: tensors on their device, and random numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The state of a training before a step.

    Attributes:
        step: of the epoch, from 0 on.
        tensors: those that the training changes, each with its value then.
        cpu_random, cuda_random: the generators' states.
    """

    step: int
    tensors: list[tuple[Tensor, Tensor]]
    cpu_random: Tensor
    cuda_random: Tensor | None

    @classmethod
    def take(cls, step: int, tensors: Sequence[Tensor], device: torch.device) -> "Moment":
        """As it is now; nothing waits for the device."""
        cuda_random = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # Detached: a clone's graph would tie the parameters' gradients to this stream, which capture does not allow.
        return cls(step, [(t, t.detach().clone()) for t in tensors], torch.get_rng_state(), cuda_random)

    def restore(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Put it back.

        Args:
            tensors: what the training changes now; what was made since starts from zero, as an optimizer's state does.
        """
        torch.set_rng_state(self.cpu_random)
        if self.cuda_random is not None:
            torch.cuda.set_rng_state(self.cuda_random, device)
        known = {id(tensor) for tensor, _ in self.tensors}
        with torch.no_grad():
            for tensor, value in self.tensors:
                tensor.copy_(value)
            for tensor in tensors:
                if id(tensor) not in known:
                    tensor.zero_()
