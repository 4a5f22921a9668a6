"""PyTorch's optimizers, started without what ``torch.compile`` needs, and spread over a GPU."""

import inspect
from typing import Any

import torch
from torch import Tensor

Parameters = list[Tensor] | list[dict[str, Any]]

_AT_ONCE = 36  # tensors that a launch of PyTorch's fused kernel takes, each with a block of its own
_LEAST, _MOST = 2048, 12_288  # elements of a piece: a round of a block's threads; as long as another launch


def sgd(parameters: Parameters, lr: Tensor, **options: Any) -> torch.optim.Optimizer:
    """Return ``torch.optim.SGD``; ``options`` are its own."""
    made: torch.optim.Optimizer = _without_dynamo(torch.optim.SGD)(parameters, lr, fused=True, **options)
    return made


def adam(parameters: Parameters, lr: Tensor, weight_decay: float, decoupled: bool) -> torch.optim.Optimizer:
    """Return ``torch.optim.Adam`` or, with decoupled weight decay, ``AdamW``; ``lr`` is on the parameters' device."""
    kind = _without_dynamo(torch.optim.AdamW if decoupled else torch.optim.Adam)
    update: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_

    @torch.no_grad()
    def step(self: Any, closure: None = None) -> None:
        """Update as ``torch.optim.Adam`` does, by the same kernel, but let it see large tensors as several small ones.

        It gives a tensor of up to 65,536 elements one block, so that LeNet's would keep ten of a GPU's 132
        multiprocessors at work, for 30 us. Each element's update is the same.
        """
        for group in self.param_groups:
            lists: list[list[Tensor]] = [[] for _ in range(6)]
            self._init_group(group, *lists)
            params, grads, means, squares, _, steps = lists
            if not params:
                continue
            torch._foreach_add_(steps, 1)
            *pieces, of_steps = _pieces(params, grads, means, squares, steps)
            beta1, beta2 = group["betas"]
            options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            update(*pieces, [], of_steps, beta1=beta1, beta2=beta2, **options)

    if lr.is_cuda:
        kind = type(kind.__name__, (kind,), {"step": step})
    made: torch.optim.Optimizer = kind(parameters, lr, weight_decay=weight_decay, fused=True, capturable=lr.is_cuda)
    return made


def _pieces(*lists: list[Tensor]) -> list[list[Tensor]]:
    """Divide tensors into pieces of equal length. Those of the last list, numbers, are repeated for each piece."""
    total = sum(one.numel() for one in lists[0])
    length = min(max(total // (_AT_ONCE * 2 // 3), _LEAST), _MOST) // 4 * 4  # of which four are read at once
    pieces: list[tuple[Tensor, ...]] = []
    for *tensors, step in zip(*lists, strict=True):
        # Of other numbers of elements the kernel reads one at a time, and rounds some last bits in another way.
        if tensors[0].numel() % 4 == 0 and all(one.is_contiguous() for one in tensors):
            parts = [one.view(-1).split(length) for one in tensors]
            pieces += [(*of_piece, step) for of_piece in zip(*parts, strict=True)]
        else:
            pieces.append((*tensors, step))
    return [list(one) for one in zip(*pieces, strict=True)]


def _without_dynamo(kind: type[torch.optim.Optimizer]) -> Any:
    """Return an optimizer's class with its methods as they are without the wrappers for ``torch.compile``.

    The wrappers import ``torch._dynamo``, which takes as long as the rest of a start; the methods are the same.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(methods["step"])  # as its wrapper does
    return type(kind.__name__, (kind,), methods)
