"""``MBMConv2d``, a drop-in for ``torch.nn.Conv2d``, and ``convert``, which puts it in a model's place."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from mbm_cli.layer_multipliers import LayerMultipliers
from mbm_cli.multipliers import Multiplier
from mbm_cli.ops import conv2d


class MBMConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` whose products come from a multiplier; same arguments, parameters and ``state_dict``.

    Takes float32 inputs (N, C, H, W) or (C, H, W). Gradients are the exact convolution's (straight-through).

    Args:
        multiplier: a ``Multiplier`` or its short form, for example ``"mbm-t8"``. The others are ``torch.nn.Conv2d``'s.

    Raises:
        ValueError: not a multiplier.
        RuntimeError: (when called) an input that is not float32, or does not fit.
    """

    def __init__(self, *args: Any, multiplier: Multiplier | str = "mbm", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.multiplier = _as_multiplier(multiplier)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: str | int | Sequence[int] = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, self.multiplier)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multiplier={self.multiplier}"


def convert(
    model: nn.Module, multiplier: Multiplier | LayerMultipliers | Mapping[str, Multiplier | str] | str
) -> nn.Module:
    """Make every ``torch.nn.Conv2d`` of a model an ``MBMConv2d``, in place; weights, hooks and modes are kept.

    Args:
        model: the model, or a single convolution.
        multiplier: a ``Multiplier`` or its short form; ``"exact"`` gives the exact product back. Or a mapping from
            layers' names, or patterns such as ``"features.*"``, to multipliers, with ``"default"`` for the others.

    Returns:
        The model.

    Raises:
        ValueError: not a multiplier, or a name that no convolution of the model has.
        TypeError: a subclass of ``torch.nn.Conv2d`` that computes something of its own, which would be lost.
    """
    if isinstance(multiplier, Mapping):
        multiplier = LayerMultipliers.of_mapping(multiplier)
    if not isinstance(multiplier, LayerMultipliers):
        multiplier = LayerMultipliers(_as_multiplier(multiplier), ())
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, module in convolutions.items():
        if type(module) not in (nn.Conv2d, MBMConv2d):
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}; only torch.nn.Conv2d itself is converted"
            )
    unmatched = multiplier.unmatched(list(convolutions))
    if unmatched:
        raise ValueError(f"no convolution is called {unmatched[0]}; those of the model are {', '.join(convolutions)}")
    for name, module in convolutions.items():
        module.__class__ = MBMConv2d  # it adds an attribute and a forward, nothing else
        assert isinstance(module, MBMConv2d)
        module.multiplier = multiplier.of(name)
    return model


def _as_multiplier(multiplier: Multiplier | str) -> Multiplier:
    if isinstance(multiplier, Multiplier):
        return multiplier
    if not isinstance(multiplier, str):
        raise ValueError(f"a multiplier is a Multiplier or its short form, not {multiplier!r}")
    return Multiplier.parse(multiplier)
