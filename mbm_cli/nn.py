"""``ApproxConv2d``, a drop-in for ``torch.nn.Conv2d``, and ``convert``, which replaces a model's convolutions by it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import pad

from mbm_cli.multipliers.content import handle_of, resolve, resolve_layers
from mbm_cli.multipliers.names import LayerMultipliers, Multiplier
from mbm_cli.multipliers.tables import Table
from mbm_cli.ops import conv2d_of_operands


class ApproxConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` whose products come from a multiplier; same arguments, parameters and ``state_dict``.

    Takes float32 inputs (N, C, H, W) or (C, H, W). Gradients are the exact convolution's (straight-through).

    Args:
        multiplier: a ``Multiplier`` or its name, for example ``"mbm-t8"``; a file is read now. The other arguments are
            those of ``torch.nn.Conv2d``.

    Raises:
        ValueError: not a multiplier.
        RuntimeError: (when called) an input that is not float32, or does not fit.
    """

    multiplier: Multiplier
    table: Tensor | None
    _handle: str

    def __init__(self, *args: Any, multiplier: Multiplier | str = "mbm", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _set_multiplier(self, resolve(multiplier))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: str | int | Sequence[int] = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        if self.multiplier.is_exact:
            return nn.functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        arguments = self.stride, padding, self.dilation, self.groups
        return conv2d_of_operands(input, weight, bias, *arguments, self._handle, self.table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.table
        super()._apply(fn, recurse)
        if self.table is not before:  # made anew: no cast may change a table, and to_empty() may not lose it
            _set_multiplier(self, self.multiplier)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multiplier={self.multiplier}"


def _set_multiplier(layer: ApproxConv2d, multiplier: Multiplier) -> None:
    layer.multiplier = multiplier
    layer._handle = handle_of(multiplier)
    table = multiplier.content.tensor() if isinstance(multiplier.content, Table) else None
    layer.register_buffer("table", None if table is None else table.to(layer.weight.device), persistent=False)


def convert(
    model: nn.Module, multiplier: Multiplier | LayerMultipliers | Mapping[str, Multiplier | str] | str
) -> nn.Module:
    """Turn every ``torch.nn.Conv2d`` of a model into an ``ApproxConv2d``, in place; keep weights, hooks and modes.

    Args:
        model: the model, or a single convolution.
        multiplier: a ``Multiplier`` or its name; ``"exact"`` restores the exact product. Or a mapping from layers'
            names, or patterns such as ``"features.*"``, to multipliers, with ``"default"`` for the other layers.

    Returns:
        The model.

    Raises:
        ValueError: not a multiplier, or a name that matches no convolution of the model.
        TypeError: a subclass of ``torch.nn.Conv2d``, whose own computation would be lost.
    """
    multiplier = resolve_layers(multiplier)
    if not isinstance(multiplier, LayerMultipliers):
        multiplier = LayerMultipliers(multiplier, ())
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    for name, module in convolutions.items():
        if type(module) not in (nn.Conv2d, ApproxConv2d):
            raise TypeError(
                f"{name or 'the model'} is a {type(module).__name__}; only torch.nn.Conv2d itself is converted"
            )
    unmatched = multiplier.unmatched(list(convolutions))
    if unmatched:
        raise ValueError(f"no convolution is called {unmatched[0]}; those of the model are {', '.join(convolutions)}")
    for name, module in convolutions.items():
        module.__class__ = ApproxConv2d  # which adds attributes and a forward pass, nothing else
        assert isinstance(module, ApproxConv2d)
        _set_multiplier(module, multiplier.of(name))
    return model
