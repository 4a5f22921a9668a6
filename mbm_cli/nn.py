"""``ApproxConv2d`` and ``ApproxLinear``, drop-ins for PyTorch's layers, and ``convert``, which puts them in a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch.fx
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrize import is_parametrized

from mbm_cli.multipliers.content import handle_of, resolve, resolve_backward, resolve_layers
from mbm_cli.multipliers.integer import IntegerTable
from mbm_cli.multipliers.names import EXACT, KINDS, Backward, LayerMultipliers, Multiplier
from mbm_cli.multipliers.tables import Table, tensor_on
from mbm_cli.ops import (
    BackwardLike,
    conv2d_of_operands,
    linear_of_operands,
    operands_to_quantize,
    quantized_conv2d_of_operands,
    quantized_linear_of_operands,
)
from mbm_cli.quantize import Quantization, Quantizer

# Symbolic tracing keeps the calls: their checks need real tensors.
torch.fx.wrap("conv2d_of_operands")
torch.fx.wrap("linear_of_operands")
torch.fx.wrap("operands_to_quantize")
torch.fx.wrap("quantized_conv2d_of_operands")
torch.fx.wrap("quantized_linear_of_operands")

# Buffers with the tables of the forward pass and of the gradients of input and weight.
_TABLES = ("table", "input_grad_table", "weight_grad_table")


class _Approximate(nn.Module):
    """What approximate layers share: their multipliers, and tables that no cast changes.

    Attributes:
        multiplier: of the forward pass.
        backward: of the gradients of input and weight.
        quantizer: of both operands, with an integer multiplier; else ``None``.
    """

    multiplier: Multiplier
    backward: tuple[Multiplier, Multiplier]
    quantizer: Quantizer | None
    weight: Tensor
    _handles: tuple[str, ...]
    _bounds: tuple[int, bool, int, int] | None

    def _set_multipliers(
        self,
        multiplier: Multiplier,
        backward: tuple[Multiplier, Multiplier],
        quantization: Quantization | None = None,
    ) -> None:
        """Set the multipliers; keep a quantizer that has this format and quantization (``None``: its own)."""
        self.multiplier, self.backward = multiplier, backward
        self._handles = tuple(handle_of(one) for one in (multiplier, *backward))
        self._bounds = multiplier.content.bounds if isinstance(multiplier.content, IntegerTable) else None
        device = self.weight.device
        for name, one in zip(_TABLES, (multiplier, *backward), strict=True):
            # The same tensor in every layer: what backends prepare for a table, they keep by its tensor.
            table = tensor_on(one.content, device) if isinstance(one.content, Table | IntegerTable) else None
            self.register_buffer(name, table, persistent=False)
        before: Quantizer | None = getattr(self, "quantizer", None)
        quantization = quantization or (before.quantization if before else Quantization())
        if multiplier.operands is None:
            self._modules.pop("quantizer", None)
            self.__dict__["quantizer"] = None  # so that it is not listed among the modules
        elif before is None or (before.operands, before.quantization) != (multiplier.operands, quantization):
            self.__dict__.pop("quantizer", None)
            quantizer = Quantizer(multiplier.operands, len(self.weight), quantization, device)
            self.register_module("quantizer", quantizer.train(self.training))

    @property
    def _is_exact(self) -> bool:
        return all(one.is_exact for one in (self.multiplier, *self.backward))

    def _products(self) -> list[str | Tensor | None]:
        """Return the multipliers as operators take them."""
        return [x for handle, name in zip(self._handles, _TABLES, strict=True) for x in (handle, getattr(self, name))]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = [getattr(self, name) for name in _TABLES]
        super()._apply(fn, recurse)
        # Made anew: no cast may change a table, and to_empty() may not lose it.
        if any(getattr(self, name) is not table for name, table in zip(_TABLES, before, strict=True)):
            self._set_multipliers(self.multiplier, self.backward)
        return self

    def extra_repr(self) -> str:
        gradients = "" if all(one.is_exact for one in self.backward) else f", backward={Backward(*self.backward)}"
        return f"{super().extra_repr()}, multiplier={self.multiplier}{gradients}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.quantizer is None:  # scales, for which this layer has no use
            for name in [name for name in state if name.startswith(f"{prefix}quantizer.")]:
                del state[name]
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def _computes_floats(self) -> bool:
        """Whether the layer is exact, also for the time of a calibration."""
        return self._is_exact or (self.quantizer is not None and self.quantizer.is_observing)


class ApproxConv2d(_Approximate, nn.Conv2d):
    """``torch.nn.Conv2d`` whose products come from multipliers; same arguments, parameters and ``state_dict``.

    Takes float32 inputs (N, C, H, W) or (C, H, W).

    Args:
        multiplier: of the forward pass: a ``Multiplier`` or its name, for example ``"mbm-t8"``; a file is read now. The
            other arguments are those of ``torch.nn.Conv2d``.
        backward: of the gradients, as `mbm_cli.conv2d` takes it; under an integer multiplier, of the dequantised
            operands.
        quantization: how scales are found, with an integer multiplier. They are known after a training step,
            `mbm_cli.calibrate`, or a ``state_dict`` with them.

    Raises:
        ValueError: not a multiplier.
        RuntimeError: (when called) an input that is not float32, or does not fit.
    """

    def __init__(
        self,
        *args: Any,
        multiplier: Multiplier | str = "mbm",
        backward: BackwardLike = "exact",
        quantization: Quantization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        forward = resolve(multiplier)
        self._set_multipliers(forward, resolve_backward(backward).of_layer(forward), quantization)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: str | int | Sequence[int] = self.padding
        if self.padding_mode != "zeros":
            input = pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        arguments: Any = self.stride, padding, self.dilation, self.groups
        if self._computes_floats:
            if self.quantizer is not None:
                self.quantizer.observe(input)
            return nn.functional.conv2d(input, weight, bias, *arguments)
        if self.quantizer is not None:
            input, weight, bias = operands_to_quantize(input, weight, bias, -3, self.in_channels)
            products = self._bounds, *self._products()[1:]
            scales = self.quantizer(input, weight)
            return quantized_conv2d_of_operands(input, weight, bias, scales, *arguments, *products)
        return conv2d_of_operands(input, weight, bias, *arguments, *self._products())


class ApproxLinear(_Approximate, nn.Linear):
    """``torch.nn.Linear`` whose products come from multipliers; same arguments, parameters and ``state_dict``.

    Takes float32 inputs (..., in_features).

    Args:
        multiplier, backward, quantization: as in `ApproxConv2d`. The other arguments are those of ``torch.nn.Linear``.

    Raises:
        ValueError, RuntimeError: as `ApproxConv2d`.
    """

    def __init__(
        self,
        *args: Any,
        multiplier: Multiplier | str = "mbm",
        backward: BackwardLike = "exact",
        quantization: Quantization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        forward = resolve(multiplier)
        self._set_multipliers(forward, resolve_backward(backward).of_layer(forward), quantization)

    def forward(self, input: Tensor) -> Tensor:
        if self._computes_floats:
            if self.quantizer is not None:
                self.quantizer.observe(input)
            return nn.functional.linear(input, self.weight, self.bias)
        if self.quantizer is not None:
            input, weight, bias = operands_to_quantize(input, self.weight, self.bias, -1, self.in_features)
            products = self._bounds, *self._products()[1:]
            scales = self.quantizer(input, weight)
            return quantized_linear_of_operands(input, weight, bias, scales, *products)
        return linear_of_operands(input, self.weight, self.bias, *self._products())


# What is converted, by the kinds of `LayerMultipliers`.
_CLASSES: dict[str, tuple[type[nn.Module], type[_Approximate]]] = dict(
    zip(KINDS, ((nn.Conv2d, ApproxConv2d), (nn.Linear, ApproxLinear)), strict=True)
)


def convert(
    model: nn.Module,
    multiplier: Multiplier | LayerMultipliers | Mapping[str, Multiplier | str] | str,
    backward: BackwardLike = "exact",
    quantization: Quantization | None = None,
) -> nn.Module:
    """Turn a model's ``nn.Conv2d`` and ``nn.Linear`` into approximate layers; keep weights, hooks and modes.

    Args:
        model: the model, changed in place, or a single layer. Shared and parametrized layers stay so.
        multiplier: a ``Multiplier`` or its name, for every convolution; ``"exact"`` restores exact products everywhere.
            Or a mapping from layers' names, patterns such as ``"features.*"``, and the kinds ``conv2d`` and ``linear``
            to multipliers, with ``"default"`` for the other convolutions; a layer that nothing names is exact. A shared
            layer goes by any of its names.
        backward: of the gradients of each layer whose multiplier is not exact, as `mbm_cli.conv2d` takes it.
        quantization: of the layers with an integer multiplier, whose scales are kept where the format stays.

    Returns:
        The model.

    Raises:
        ValueError: not a multiplier; a model without layers to convert; a name that matches none of them; or the names
            of a shared one have different multipliers.
        TypeError: a subclass of ``torch.nn.Conv2d`` or ``torch.nn.Linear`` would be converted, whose own computation
            would be lost.
    """
    multiplier = resolve_layers(multiplier)
    if not isinstance(multiplier, LayerMultipliers):
        multiplier = LayerMultipliers.of_mapping({"default": multiplier})
    gradients = resolve_backward(backward)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _kind(module):
            names.setdefault(module, []).append(name)
    kinds = {name: _kind(module) for module, of_module in names.items() for name in of_module}
    if not names:
        raise ValueError(f"the model, a {type(model).__name__}, has no torch.nn.Conv2d or torch.nn.Linear to convert")
    if "conv2d" not in kinds.values() and not multiplier.is_exact and len(multiplier.layers) == 1:
        (only,) = multiplier.layers
        if only[0] == "default":
            raise ValueError(
                f"the model has no convolutions; for its dense layers write the multiplier as {{linear: {only[1]}}}"
            )
    unmatched = multiplier.unmatched(kinds)
    if unmatched:
        raise ValueError(f"no layer is called {unmatched[0]}; those with a multiplier are {', '.join(kinds)}")
    chosen = {module: _of_names(multiplier, of_module, _kind(module)) for module, of_module in names.items()}
    # Dense layers that stay exact stay as they are.
    changed = {
        module: one
        for module, one in chosen.items()
        if isinstance(module, nn.Conv2d | ApproxLinear) or not one.is_exact
    }
    for module in changed:
        original, approximate = _CLASSES[_kind(module)]
        if _plain_class(module) not in (original, approximate):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise TypeError(
                f"{names[module][0] or 'the model'} is a {kind}; only torch.nn.{original.__name__} itself is "
                "converted, because what a subclass computes would be lost"
            )
    for module, one in changed.items():
        _change_class(module, _CLASSES[_kind(module)][1])
        assert isinstance(module, _Approximate)
        module._set_multipliers(one, (EXACT, EXACT) if one.is_exact else gradients.of_layer(one), quantization)
    return model


def _kind(module: nn.Module) -> str:
    """Return the kind of a layer that can have a multiplier, else an empty text."""
    return next((kind for kind, (original, _) in _CLASSES.items() if isinstance(module, original)), "")


def _of_names(multipliers: LayerMultipliers, names: list[str], kind: str) -> Multiplier:
    """Return the multiplier of a layer by all its names: those that are named win over the default."""
    named = dict.fromkeys(one for name in names if (one := multipliers.naming(name, kind)) is not None)
    if len(named) > 1:
        raise ValueError(f"{' and '.join(names)} are one shared layer: name one multiplier for it")
    return next(iter(named), multipliers.of(names[0], kind))


def _plain_class(module: nn.Module) -> type:
    """Return a module's class without what ``parametrize`` adds."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _change_class(module: nn.Module, approximate: type[_Approximate]) -> None:
    """Make a layer an approximate one, which adds attributes and a forward pass, nothing else."""
    if not is_parametrized(module):
        module.__class__ = approximate
    elif not isinstance(module, approximate):
        # parametrize has made a class with the parameters as properties.
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{approximate.__name__}", (approximate,), own)
