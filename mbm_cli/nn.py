"""``ApproxConv2d``, a drop-in for ``torch.nn.Conv2d``, and ``convert``, which replaces a model's convolutions by it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch.fx
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrize import is_parametrized

from mbm_cli.multipliers.content import handle_of, resolve, resolve_layers
from mbm_cli.multipliers.names import LayerMultipliers, Multiplier
from mbm_cli.multipliers.tables import Table
from mbm_cli.ops import conv2d_of_operands

torch.fx.wrap("conv2d_of_operands")  # symbolic tracing keeps the call: its checks need real tensors


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
        model: the model, or a single convolution. Shared and parametrized convolutions stay so.
        multiplier: a ``Multiplier`` or its name; ``"exact"`` restores the exact product. Or a mapping from layers'
            names, or patterns such as ``"features.*"``, to multipliers, with ``"default"`` for the other layers. A
            shared layer goes by any of its names.

    Returns:
        The model.

    Raises:
        ValueError: not a multiplier; a model without convolutions; a name that matches none of them; or the names of a
            shared one have different multipliers.
        TypeError: a subclass of ``torch.nn.Conv2d``, whose own computation would be lost.
    """
    multiplier = resolve_layers(multiplier)
    if not isinstance(multiplier, LayerMultipliers):
        multiplier = LayerMultipliers(multiplier, ())
    names: dict[nn.Conv2d, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d):
            names.setdefault(module, []).append(name)
    every_name = [name for of_module in names.values() for name in of_module]
    if not names:
        raise ValueError(f"the model, a {type(model).__name__}, has no torch.nn.Conv2d to convert")
    unmatched = multiplier.unmatched(every_name)
    if unmatched:
        raise ValueError(f"no convolution is called {unmatched[0]}; those of the model are {', '.join(every_name)}")
    chosen = {module: _of_names(multiplier, of_module) for module, of_module in names.items()}
    for module, of_module in names.items():
        if _plain_class(module) not in (nn.Conv2d, ApproxConv2d):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise TypeError(
                f"{of_module[0] or 'the model'} is a {kind}; only torch.nn.Conv2d itself is converted, because what a "
                "subclass computes would be lost"
            )
    for module, one in chosen.items():
        _change_class(module)
        assert isinstance(module, ApproxConv2d)
        _set_multiplier(module, one)
    return model


def _of_names(multipliers: LayerMultipliers, names: list[str]) -> Multiplier:
    """Return the multiplier of a layer by all its names: those that are named win over the default."""
    named = dict.fromkeys(multipliers.of(name) for name in names if multipliers.names(name))
    if len(named) > 1:
        raise ValueError(f"{' and '.join(names)} are one shared layer: name one multiplier for it")
    return next(iter(named), multipliers.default)


def _plain_class(module: nn.Module) -> type:
    """Return a module's class without what ``parametrize`` adds."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _change_class(module: nn.Module) -> None:
    """Make a convolution an ``ApproxConv2d``, which adds attributes and a forward pass, nothing else."""
    if not is_parametrized(module):
        module.__class__ = ApproxConv2d
    elif not isinstance(module, ApproxConv2d):
        # parametrize has made a class with the parameters as properties.
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type("ParametrizedApproxConv2d", (ApproxConv2d,), own)
