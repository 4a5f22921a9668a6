"""`mbm characterize`: how wrong multipliers are, and where."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbm_cli.device import choose_device, environment
from mbm_cli.errors import Interrupted, RequestError
from mbm_cli.experiments import lifecycle
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.multipliers.content import resolve
from mbm_cli.multipliers.float32 import BIAS, FAMILIES, FRACTION_BITS
from mbm_cli.multipliers.integer import IntegerMultiplier, decompose
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.ops import multiply
from mbm_cli.runs import Run

DEFAULT_SAMPLES = 1 << 24
CHUNK = 1 << 18  # pairs at a time, which fit a processor's caches
PICTURED = 1 << 20  # so many of the first pairs are kept for a picture
EXHAUSTIVE_BITS = 8  # all pairs of integers of so many bits are measured

AnyMultiplier = Multiplier | IntegerMultiplier


@dataclass(frozen=True)
class Errors:
    """A multiplier's relative errors in percent of the exact product.

    Attributes:
        bias, mean, peak, std: mean, mean absolute, largest absolute, standard deviation.
        worst: the pair of operands that has the peak.
        pairs, exhaustive: how many pairs were measured, and whether they are all there are.
    """

    name: str
    bias: float
    mean: float
    peak: float
    std: float
    worst: list[float]
    pairs: int
    exhaustive: bool


@dataclass(frozen=True)
class TruncationErrors(Errors):
    """The errors of a family with so many truncated bits."""

    family: str
    truncate: int


@dataclass(frozen=True)
class Characterization:
    """``characterize.json``: a row a multiplier, in the order asked for; ``sweep`` over truncations if asked for."""

    seed: int
    device: str
    multipliers: list[Errors]
    sweep: list[TruncationErrors] | None = None


@dataclass(frozen=True)
class Pairs:
    """Measured pairs to draw: the operands' fractions in [0, 1) (NaN for zero) and the errors in percent, float64."""

    name: str
    a: np.ndarray
    b: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Characterized(Finished[Characterization]):
    """The folder, its result, and pairs of each multiplier."""

    pairs: list[Pairs]


def characterize(
    names: Sequence[str],
    output: Path,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    sweep_truncate: bool = False,
    watch: Watch | None = None,
    stopped: Stopped = never,
) -> Characterized:
    """Measure the relative errors of multipliers.

    Products are those of ``mbm_cli.multiply``, or of ``IntegerMultiplier``; errors are computed in float64.
    Floating-point operands are drawn uniformly from [1, 2), 16-bit integers from 0 to 65,535; all 65,536 pairs of 8-bit
    integers are measured. Operands depend on the seed, not on the device.

    Args:
        names: what ``Multiplier.parse`` or ``IntegerMultiplier.parse`` takes.
        output: where the run folder with ``characterize.json`` is created.
        samples: pairs drawn for each multiplier.
        seed: decides them.
        device: where products and errors are computed.
        threads: CPU threads.
        sweep_truncate: measure also the named families over all their truncations.
        stopped: called before each chunk of pairs.

    Raises:
        RequestError: a name is not a multiplier, a file is wrong, or there is no such device; nothing is written.
        Interrupted: ``stopped`` returned true; nothing is kept.
    """
    watch = watch or Watch()
    place = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    parsed = {name: _parse(name, place) for name in dict.fromkeys(names)}
    multipliers = [parsed[name] for name in names]
    families = [m.family for m in multipliers if isinstance(m, Multiplier) and m.family in FAMILIES]
    if sweep_truncate and not families:
        raise RequestError(f"--sweep-truncate is for {', '.join(FAMILIES)}: name one of them")
    run = Run.create(output, "characterize")
    with run.kept_if_complete():
        run.write_json("environment.json", environment(place))
        measured = [
            _measure(name, m, samples, seed, place, watch, stopped) for name, m in zip(names, multipliers, strict=True)
        ]
        sweep = None
        if sweep_truncate:
            swept = [Multiplier(f, t) for f in dict.fromkeys(families) for t in FAMILIES[f].truncations]
            sweep = [
                TruncationErrors(
                    **asdict(_measure(str(m), m, samples, seed, place, watch, stopped)[0]),
                    family=m.family,
                    truncate=m.truncate,
                )
                for m in swept
            ]
        result = Characterization(seed, place.type, [errors for errors, _ in measured], sweep)
        run.write_json("characterize.json", result)
    return Characterized(run, result, [pairs for _, pairs in measured])


def _parse(name: str, device: torch.device) -> AnyMultiplier:
    """Resolve a name: of an integer multiplier (``mbm-int8``), or of a floating-point one."""
    integers = ":" not in name and "-int" in name
    try:
        if integers:
            return IntegerMultiplier.parse(name)
        multiplier = resolve(name)
        lifecycle.check_function(multiplier, device)
        return multiplier
    except ValueError as error:
        raise RequestError(str(error)) from None


def _measure(
    name: str,
    multiplier: AnyMultiplier,
    samples: int,
    seed: int,
    device: torch.device,
    watch: Watch,
    stopped: Stopped,
) -> tuple[Errors, Pairs]:
    if isinstance(multiplier, IntegerMultiplier) and multiplier.bits <= EXHAUSTIVE_BITS:
        exhaustive, pairs, chunks = True, 1 << (2 * multiplier.bits), _all_pairs(multiplier.bits)
    else:
        exhaustive, pairs, chunks = False, samples, _random_pairs(multiplier, samples, seed)
    done, bias, mean, square, peak = 0, 0.0, 0.0, 0.0, -1.0
    worst, pictured = [], []
    for a, b in chunks:
        if stopped():
            raise Interrupted("interrupted")
        watch.status(f"{multiplier}: {100 * done // pairs} % of {pairs:,} pairs")
        errors = 100 * _relative_errors(multiplier, a.to(device), b.to(device))
        sizes = errors.abs()
        bias, mean, square = bias + errors.sum().item(), mean + sizes.sum().item(), square + (errors**2).sum().item()
        largest = sizes.max().item()
        if not math.isfinite(largest):
            i = int((~errors.isfinite()).nonzero()[0])
            raise RequestError(f"{multiplier} is not a multiplier: {a[i]:.9g} x {b[i]:.9g} is not a finite number")
        if largest > peak:
            # The first of several that are as large; argmax would return any of them.
            i = int((sizes == largest).nonzero()[0])
            peak, worst = largest, [a[i].item(), b[i].item()]
        if done < PICTURED:
            pictured.append((_fractions(multiplier, a), _fractions(multiplier, b), errors.cpu()))
        done += len(a)
    bias, mean = bias / pairs, mean / pairs
    std = math.sqrt(max(0.0, square / pairs - bias**2))
    drawn = (torch.cat(parts).numpy() for parts in zip(*pictured, strict=True))
    return Errors(name, bias, mean, peak, std, worst, pairs, exhaustive), Pairs(name, *drawn)


def _all_pairs(bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    numbers = torch.arange(1 << bits)
    yield numbers.repeat_interleave(1 << bits), numbers.repeat(1 << bits)


def _random_pairs(multiplier: AnyMultiplier, samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw int64 integers, or float32 numbers in [1, 2), on the CPU, so that they are the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, CHUNK):
        size = (2, min(CHUNK, samples - start))
        if isinstance(multiplier, IntegerMultiplier):
            a, b = torch.randint(0, 1 << multiplier.bits, size, generator=generator)
        else:
            # Bit patterns: torch.rand has other steps than the float32 numbers in [1, 2).
            fractions = torch.randint(0, 1 << FRACTION_BITS, size, generator=generator, dtype=torch.int32)
            a, b = (fractions | (BIAS << FRACTION_BITS)).view(torch.float32)
        yield a, b


def _relative_errors(multiplier: AnyMultiplier, a: Tensor, b: Tensor) -> Tensor:
    """Return float64 errors; where the exact product is zero, so is the multiplier's, and the error counts as zero."""
    if isinstance(multiplier, IntegerMultiplier):
        exact, product = (a * b).double(), multiplier.multiply(a, b).double()
    else:
        exact, product = a.double() * b.double(), multiply(a, b, multiplier).double()
    return torch.where(exact == 0, 0.0, (product - exact) / exact)


def _fractions(multiplier: AnyMultiplier, operands: Tensor) -> Tensor:
    """Return the operands' fractions in [0, 1), float64; NaN for zero, which has none."""
    if not isinstance(multiplier, IntegerMultiplier):
        return operands.double() - 1
    _, fractions = decompose(operands, multiplier.bits)
    return torch.where(operands == 0, torch.nan, fractions.double() / (1 << (multiplier.bits - 1)))
