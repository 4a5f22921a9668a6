"""`mbm characterize`: how wrong multipliers are, and where."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbm_cli.costs import Cost, Prices
from mbm_cli.device import choose_device, environment
from mbm_cli.errors import Interrupted, RequestError
from mbm_cli.experiments import lifecycle
from mbm_cli.experiments.lifecycle import Finished, Stopped, Watch, never
from mbm_cli.multipliers.content import resolve
from mbm_cli.multipliers.float32 import BIAS, FAMILIES, FRACTION_BITS
from mbm_cli.multipliers.integer import WIDTHS, IntegerTable, Operands, decompose, product
from mbm_cli.multipliers.names import IntegerMultiplier, Multiplier
from mbm_cli.ops import multiply
from mbm_cli.runs import Run

DEFAULT_SAMPLES = 1 << 24
CHUNK = 1 << 18  # pairs at a time, which fit a processor's caches
PICTURED = 1 << 20  # so many of the first pairs are kept for a picture
# A quadrant is worth a warning if its relative error is so many times that of any other, or if one of its products with
# the wrong sign is so large, as a fraction of the largest exact product: good circuits have small ones.
MANY_TIMES = 4
FAR = 1 / 16


@dataclass(frozen=True)
class Errors:
    """A multiplier's relative errors in percent of the exact product.

    Where both products are zero the error is zero. Where the exact one alone is zero, as a table can have it, there is
    no relative error: such pairs are left out of the figures.

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
    """``characterize.json``: a row a multiplier, in the order asked for; ``sweep`` over truncations if asked for.

    ``costs`` are those that a source reports.
    """

    seed: int
    device: str
    multipliers: list[Errors]
    sweep: list[TruncationErrors] | None = None
    costs: list[Cost] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """Measured pairs to draw: the operands' fractions in [0, 1) (NaN for zero) and the errors in percent, float64."""

    name: str
    a: np.ndarray
    b: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Circuit:
    """What an integer multiplier is, and its errors over all pairs of operands.

    Attributes:
        operands: their format, for example ``int8``.
        file: its file as written; ``None`` for a built-in multiplier.
        rank, terms: of its table, and the outer products that it is the sum of; ``None`` if none were found.
        mae, wce: mean and largest magnitude of an error.
        ep: pairs with an error, in percent.
        mre: mean relative error in percent, over pairs whose exact product is not zero.
        bias: mean error.
        asymmetric_pairs: pairs a < b of bit patterns for which a x b and b x a differ.
        zero_activation, zero_weight: whether zero times anything, and anything times zero, is zero.
        costs: power, area and delay as the file has them.
        warnings: what speaks against its use.
    """

    name: str
    operands: str
    file: str | None
    rank: int
    terms: int | None
    mae: float
    wce: int
    ep: float
    mre: float
    bias: float
    asymmetric_pairs: int
    zero_activation: bool
    zero_weight: bool
    costs: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


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
    prices: Prices | None = None,
) -> Characterized:
    """Measure the relative errors of multipliers.

    Products are those of ``mbm_cli.multiply``, or of an integer multiplier's table; errors are computed in float64.
    Floating-point operands are drawn uniformly from [1, 2), 16-bit integers from 0 to 65,535; all pairs of integers of
    up to 8 bits are measured. Operands depend on the seed, not on the device.

    Args:
        names: what ``Multiplier.parse`` takes.
        output: where the run folder with ``characterize.json`` is created.
        samples: pairs drawn for each multiplier.
        seed: decides them.
        device: where products and errors are computed.
        threads: CPU threads.
        sweep_truncate: measure also the named families over all their truncations.
        stopped: called before each chunk of pairs.
        prices: the sources of costs; the package's without any.

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
    families = [m.family for m in multipliers if not m.is_integer and m.family in FAMILIES]
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
        costs = [cost for one in parsed.values() for cost in (prices or Prices.load()).of(one)]
        result = Characterization(seed, place.type, [errors for errors, _ in measured], sweep, costs)
        run.write_json("characterize.json", result)
    return Characterized(run, result, [pairs for _, pairs in measured])


def _parse(name: str, device: torch.device) -> Multiplier:
    """Resolve a name; 16-bit integers have no table to read."""
    try:
        multiplier = Multiplier.parse(name)
        if multiplier.operands is not None and multiplier.operands.bits not in WIDTHS:
            return multiplier
        multiplier = resolve(multiplier)
        lifecycle.check_function(multiplier, device)
        return multiplier
    except ValueError as error:
        raise RequestError(str(error)) from None


def _measure(
    name: str,
    multiplier: Multiplier,
    samples: int,
    seed: int,
    device: torch.device,
    watch: Watch,
    stopped: Stopped,
) -> tuple[Errors, Pairs]:
    exhaustive = isinstance(multiplier.content, IntegerTable)
    if isinstance(multiplier.content, IntegerTable):
        pairs, chunks = multiplier.content.entries.size, _all_pairs(multiplier.content.operands)
    else:
        pairs, chunks = samples, _random_pairs(multiplier, samples, seed)
    done, bias, mean, square, peak = 0, 0.0, 0.0, 0.0, -1.0
    worst, pictured = [], []
    for drawn in chunks:
        if stopped():
            raise Interrupted("interrupted")
        watch.status(f"{multiplier}: {100 * done // pairs} % of {pairs:,} pairs")
        a, b, errors = _relative_errors(multiplier, *drawn, device)
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
    bias, mean = bias / done, mean / done
    std = math.sqrt(max(0.0, square / done - bias**2))
    kept = (torch.cat(parts).numpy() for parts in zip(*pictured, strict=True))
    return Errors(name, bias, mean, peak, std, worst, pairs, exhaustive), Pairs(name, *kept)


def _all_pairs(operands: Operands) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all pairs, int64, in the order of their bit patterns: negative operands come last."""
    numbers = torch.from_numpy(operands.numbers())
    yield numbers.repeat_interleave(len(numbers)), numbers.repeat(len(numbers))


def _random_pairs(multiplier: Multiplier, samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw int64 integers, or float32 numbers in [1, 2), on the CPU, so that they are the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, samples, CHUNK):
        size = (2, min(CHUNK, samples - start))
        if multiplier.operands is not None:
            a, b = torch.randint(0, multiplier.operands.most + 1, size, generator=generator)
        else:
            # Bit patterns: torch.rand has other steps than the float32 numbers in [1, 2).
            fractions = torch.randint(0, 1 << FRACTION_BITS, size, generator=generator, dtype=torch.int32)
            a, b = (fractions | (BIAS << FRACTION_BITS)).view(torch.float32)
        yield a, b


def _relative_errors(
    multiplier: Multiplier, a: Tensor, b: Tensor, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return operands, and errors in percent, float64, on the device; zero where both products are zero.

    Where the exact product alone is zero there is no relative error, and the pair is left out.
    """
    x, y = a.to(device), b.to(device)
    if multiplier.operands is None:
        exact, found = x.double() * y.double(), multiply(x, y, multiplier).double()
    else:
        exact, found = (x * y).double(), _integer_products(multiplier, x, y).double()
    errors = 100 * torch.where(exact == 0, 0.0, (found - exact) / exact)
    known = (exact != 0) | (found == 0)
    if known.all():
        return a, b, errors
    return a[known.cpu()], b[known.cpu()], errors[known]


def _integer_products(multiplier: Multiplier, a: Tensor, b: Tensor) -> Tensor:
    """Look products up, or compute those of 16-bit integers, on the CPU."""
    if isinstance(multiplier.content, IntegerTable):
        entries = torch.from_numpy(multiplier.content.entries).to(a.device)
        return entries[a & (len(entries) - 1), b & (len(entries) - 1)]
    assert multiplier.operands is not None
    products = product(
        multiplier.family, multiplier.operands, a.cpu().numpy(), b.cpu().numpy(), truncate=multiplier.truncate
    )
    return torch.from_numpy(products).to(a.device)


def _fractions(multiplier: Multiplier, operands: Tensor) -> Tensor:
    """Return the fractions of the operands' magnitudes in [0, 1), float64; NaN for zero, which has none."""
    if multiplier.operands is None:
        return operands.double() - 1
    bits = multiplier.operands.bits
    _, fractions = decompose(operands.abs().numpy(), bits)
    return torch.where(operands == 0, torch.nan, torch.from_numpy(fractions).double() / (1 << (bits - 1)))


# One integer multiplier


def describe(multiplier: IntegerMultiplier) -> Circuit:
    """Measure the table of a resolved integer multiplier.

    The error figures are those of EvoApproxLib: over all pairs, in units of the product or in percent.
    """
    from mbm_cli.multipliers.factor import factorize, rank

    table: IntegerTable = multiplier.content
    entries, numbers = table.entries.astype(np.int64), table.operands.numbers()
    exact = np.outer(numbers, numbers)
    errors = entries - exact
    terms = factorize(entries)
    return Circuit(
        name=str(multiplier),
        operands=str(table.operands),
        file=multiplier.file or None,
        rank=rank(entries),
        terms=None if terms is None else terms.count,
        mae=float(np.abs(errors).mean()),
        wce=int(np.abs(errors).max()),
        ep=100 * float((errors != 0).mean()),
        mre=_mean_relative(errors, exact, exact != 0),
        bias=float(errors.mean()),
        asymmetric_pairs=int(np.triu(entries != entries.T).sum()),
        zero_activation=not entries[0].any(),
        zero_weight=not entries[:, 0].any(),
        costs=table.costs,
        warnings=_warnings(entries, exact, numbers) if table.operands.signed else [],
    )


def _mean_relative(errors: np.ndarray, exact: np.ndarray, where: np.ndarray) -> float:
    return 100 * float(np.abs(errors[where] / exact[where]).mean())


def _warnings(entries: np.ndarray, exact: np.ndarray, numbers: np.ndarray) -> list[str]:
    """Name the quadrants whose products have the wrong sign, or errors that the other quadrants do not have."""
    errors, signs = entries - exact, {"positive": numbers > 0, "negative": numbers < 0}
    quadrants = {
        (f"both operands {a}" if a == b else f"activation {a}, weight {b}"): np.outer(signs[a], signs[b])
        for a in signs
        for b in signs
    }
    wrong = entries * exact < 0
    far = wrong & (np.abs(entries) > FAR * np.abs(exact).max())
    relative = {name: _mean_relative(errors, exact, where) for name, where in quadrants.items()}
    warnings = []
    for name, where in quadrants.items():
        of_others = max(value for other, value in relative.items() if other != name)
        if (far & where).any():
            a, b = np.unravel_index(np.abs(np.where(far & where, errors, 0)).argmax(), far.shape)
            here = int((wrong & where).sum())
            warnings.append(
                f"{name}: {here:,} products have the wrong sign, for example {numbers[a]} x {numbers[b]} = "
                f"{entries[a, b]}; {int(wrong.sum()) - here or 'none'} elsewhere"
            )
        elif relative[name] > MANY_TIMES * of_others:
            warnings.append(
                f"{name}: the mean relative error is {relative[name]:.3g} %, but at most {of_others:.3g} % for other "
                "signs"
            )
    return warnings
