"""Quantisation of a layer's operands: ranges, scales, their calibration, and how training changes them.

Signed codes are symmetric, unsigned ones affine (docs/integers.md). Learned scales are those of S. K. Esser et al.,
"Learned Step Size Quantization", ICLR 2020, but they begin with the least square error, and their logarithms are the
parameters, so that steps are relative.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mbm_cli.backends.integers import NotFiniteError, code_range, scale_of
from mbm_cli.errors import did_you_mean
from mbm_cli.multipliers.integer import Operands

MOMENTUM = 0.01  # of the running range of activations while training
PERCENTILE = 0.999  # of the activations that ``percentile`` does not clip, at each end
_PACE = 10  # of learned scales: a step of Adam changes one by ten times the learning rate, 1 %
ACTIVATIONS = ("max", "percentile", "mse", "lsq")
WEIGHTS = ("max", "mse", "lsq")
_FRACTIONS = range(20, 101, 5)  # of the range, in percent, of which ``mse`` takes the best

Scale = tuple[Tensor, Tensor]  # scale and zero point, float32 of one element or of one for each output channel


class Quantization(NamedTuple):
    """How the scales of activations and weights are found.

    Attributes:
        activations: ``max``, ``percentile`` (99.9), ``mse`` or ``lsq``: of one range for a tensor.
        weights: ``max``, ``mse`` or ``lsq``: of one range for each output channel.
    """

    activations: str = "max"
    weights: str = "max"

    def check(self) -> None:
        """Raise ValueError for other names."""
        for field, allowed in (("activations", ACTIVATIONS), ("weights", WEIGHTS)):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(
                    f"quantize.{field} is {value!r}, not {' | '.join(allowed)}{did_you_mean(value, allowed)}"
                )


class Quantizer(nn.Module):
    """Scales and zero points of a layer's input and weight.

    Activations have a range, from calibration, of which training keeps a running mean; with ``lsq``, a learned scale.
    Weights have the scales of their current values, or learned ones. What is not known yet is NaN.

    Args:
        operands: the format of the codes.
        rows: output channels.
        quantization: how scales are found.
        device: of the state.

    Raises:
        ValueError: an unknown way to find scales.
    """

    format: Tensor
    input_range: Tensor
    weight_zero: Tensor
    _observed: list[Tensor] | None

    def __init__(self, operands: Operands, rows: int, quantization: Quantization, device: Any = None) -> None:
        super().__init__()
        quantization.check()
        self.operands, self.quantization = operands, quantization
        self._is_known, self._observed = False, None
        format = [*operands, ACTIVATIONS.index(quantization.activations)]
        self.register_buffer("format", torch.tensor(format, dtype=torch.int64, device=device))
        self.register_buffer("input_range", torch.full((2,), torch.nan, device=device))
        if quantization.activations == "lsq":
            self.log_input_scale = nn.Parameter(torch.full((1,), torch.nan, device=device))
        if quantization.weights == "lsq":
            self.log_weight_scale = nn.Parameter(torch.full((rows,), torch.nan, device=device))
            self.register_buffer("weight_zero", torch.zeros(rows, device=device))

    @property
    def is_calibrated(self) -> bool:
        """Whether all scales are known. A device is asked until they are."""
        if not self._is_known:
            values = [self.input_range, *self.parameters()]
            self._is_known = not values[0].is_meta and all(bool(one.isfinite().all()) for one in values)
        return self._is_known

    def forward(self, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return scale and zero point of input and weight; while training, update the range of activations.

        Raises:
            RuntimeError: in evaluation, before any calibration or training.
            NotFiniteError: in the first batch of training, which calibrates.
        """
        method = self.quantization.activations
        if not (self.is_calibrated or input.is_meta):
            if not self.training or input.numel() == 0:
                raise RuntimeError(
                    "the scales of a quantised layer are unknown: calibrate it (mbm_cli.calibrate(model, images)), "
                    f"train it, or load a state_dict with scales for {self.operands}"
                )
            self.calibrate(input.detach(), weight.detach())
        elif self.training and method == "max":
            both = torch.ops.mbm.update_range(input.detach(), self.input_range, MOMENTUM, *self.operands)
            return both[:1], both[1:], *self._of_weight(weight)
        elif self.training and method != "lsq" and input.numel() > 0:
            with torch.no_grad():
                self.input_range.add_((self._range(input) - self.input_range).mul_(MOMENTUM))
        return *self._of_input(input), *self._of_weight(weight)

    @torch.no_grad()
    def calibrate(self, input: Tensor, weight: Tensor) -> None:
        """Set all state from a layer's inputs and its weight.

        Raises:
            ValueError: there are no inputs.
            NotFiniteError: inputs that are not finite.
        """
        if input.numel() == 0:
            raise ValueError("calibration needs at least one image")
        found = self._range(input)
        if not torch.compiler.is_compiling() and not found.isfinite().all():
            raise NotFiniteError
        self.input_range.copy_(found)
        if self.quantization.activations == "lsq":
            self.log_input_scale.copy_(scale_of(found[:1], found[1:], self.operands)[0].log() / _PACE)
        if self.quantization.weights == "lsq":
            rows = weight.flatten(1)
            scale, zero = scale_of(*_least_square(rows, *_ends(rows), self.operands), self.operands)
            self.log_weight_scale.copy_(scale.log() / _PACE)
            self.weight_zero.copy_(zero)
        self._is_known = True

    def _range(self, input: Tensor) -> Tensor:
        """Return the least and the greatest number that a batch's codes reach, float32 (2,)."""
        values, method = input.detach().flatten(), self.quantization.activations
        if method == "percentile":
            count = values.numel()
            last = max(1, round(count * (1 - PERCENTILE)))
            low, high = values.kthvalue(last).values, values.kthvalue(count + 1 - last).values
            return torch.stack([low, high])
        ends = torch.stack(values.aminmax())
        if method in ("mse", "lsq"):  # where learning begins
            low, high = _least_square(values[None], ends[:1], ends[1:], self.operands)
            return torch.cat([low, high])
        return ends

    def _of_input(self, input: Tensor) -> Scale:
        scale, zero = scale_of(self.input_range[:1], self.input_range[1:], self.operands)
        if self.quantization.activations == "lsq":
            scale = _learned(self.log_input_scale, math.prod(input.shape[1:]), self.operands)
        return scale, zero

    def _of_weight(self, weight: Tensor) -> Scale:
        if self.quantization.weights == "lsq":
            return _learned(self.log_weight_scale, weight[0].numel(), self.operands), self.weight_zero
        rows = weight.detach().flatten(1)
        if self.quantization.weights == "mse":
            return scale_of(*_least_square(rows, *_ends(rows), self.operands), self.operands)
        scale, zero = torch.ops.mbm.row_scales(rows, *self.operands)
        return scale, zero

    @property
    def is_observing(self) -> bool:
        """Whether the layer is being calibrated: it then computes in floats and shows its inputs to `observe`."""
        return self._observed is not None

    def observe(self, input: Tensor) -> None:
        """Keep what the calibration that is going on needs of a layer's input."""
        assert self._observed is not None
        if input.numel() > 0:
            values = input.detach().flatten()
            self._observed.append(torch.stack(values.aminmax()) if self.quantization.activations == "max" else values)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Load scales of this format, found in this way. Without any, what is known stays, or stays unknown."""
        format = state.get(f"{prefix}format")
        if format is None or format.tolist() != self.format.tolist():
            for name in [name for name in state if name.startswith(prefix)]:
                del state[name]
            return
        super()._load_from_state_dict(state, prefix, *rest)
        self._is_known = False
        self._is_known = self.is_calibrated  # now, because a device is asked

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move scales, but keep their type."""

        def move(x: Tensor) -> Tensor:
            moved = fn(x)
            return moved if moved.dtype == x.dtype else x.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.operands}, activations={self.quantization.activations}, weights={self.quantization.weights}"


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high = rows.aminmax(dim=1)
    return low, high


def _least_square(rows: Tensor, low: Tensor, high: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    """Return the fractions of the ranges (n,) whose codes have the least square error over the rows (n, ...)."""
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for percent in _FRACTIONS:
        some_low, some_high = low * (percent / 100), high * (percent / 100)
        scale, zero = scale_of(some_low, some_high, operands)
        codes = torch.ops.mbm.fake_quantize(rows, scale, zero, *operands)
        error = (codes - rows).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, some_low, best_low), torch.where(better, some_high, best_high)
    return best_low, best_high


def _learned(logarithm: Tensor, count: int, operands: Operands) -> Tensor:
    """Return a learned scale, whose gradient is scaled for the number of values that it quantises."""
    factor = (max(1, count) * code_range(*operands)[1]) ** -0.5
    scale = (_PACE * logarithm).exp()
    return scale.detach() + factor * (scale - scale.detach())


def quantizers(model: nn.Module) -> Iterator[tuple[str, Tensor, Quantizer]]:
    """Yield names and weights of a model's quantised layers with their quantizers."""
    for name, module in model.named_modules():
        quantizer = getattr(module, "quantizer", None)
        if isinstance(quantizer, Quantizer):
            assert isinstance(module.weight, Tensor)
            yield name, module.weight, quantizer


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor | Iterable[Any], again: bool = True) -> None:
    """Set the scales of a model's quantised layers from a forward pass in floats, in evaluation mode.

    Args:
        model: with layers whose multiplier is of integers; others compute as always.
        images: a batch, or several, such as a ``DataLoader`` gives: what the model takes, or tuples that begin with it.
        again: also set scales that are known already.

    Raises:
        ValueError: no images, or a layer that they do not reach.
        NotFiniteError: activations that are not finite.
    """
    layers = [layer for layer in quantizers(model) if again or not layer[-1].is_calibrated]
    if not layers:
        return
    modes = {module: module.training for module in model.modules()}
    with observing(model):
        model.eval()
        try:
            for batch in [images] if isinstance(images, Tensor) else images:
                model(batch[0] if isinstance(batch, list | tuple) else batch)
        finally:
            for module, training in modes.items():
                module.training = training
        for name, weight, quantizer in layers:
            seen = quantizer._observed
            if not seen:
                raise ValueError(f"calibration needs at least one image, but {name or 'the layer'} has seen none")
            quantizer.calibrate(torch.cat(seen), weight.detach())


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Let quantised layers compute in floats, and show their inputs to `Quantizer.observe`."""
    found = [quantizer for *_, quantizer in quantizers(model)]
    for quantizer in found:
        quantizer._observed = []
    try:
        yield
    finally:
        for quantizer in found:
            quantizer._observed = None
