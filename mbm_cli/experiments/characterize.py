"""`mbm characterize`: how wrong multipliers are, and where."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mbm_cli import plots
from mbm_cli.device import choose_device
from mbm_cli.environment import environment
from mbm_cli.errors import Interrupted, RequestError
from mbm_cli.experiments import setup
from mbm_cli.integer import IntegerMultiplier, decompose
from mbm_cli.multipliers import BIAS, FAMILIES, FRACTION_BITS, Multiplier
from mbm_cli.ops import multiply
from mbm_cli.runs import Run

DEFAULT_SAMPLES = 1 << 24
CHUNK = 1 << 18  # pairs at a time: what a processor's caches hold
PICTURED = 1 << 20  # the picture is drawn from the first of the pairs
EXHAUSTIVE_BITS = 8  # integers of so many bits are tried in all pairs

AnyMultiplier = Multiplier | IntegerMultiplier


def characterize(
    names: Sequence[str],
    output: Path,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    sweep_truncate: bool = False,
    report: Callable[[str], None] = lambda doing: None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[Run, dict[str, Any]]:
    """Measure the relative errors of multipliers, and draw them.

    Products are those of ``mbm_cli.multiply``, or of ``IntegerMultiplier``; errors are computed in float64, in percent
    of the exact product. Floating-point operands are drawn uniformly from [1, 2), 16-bit integers from 0 to 65,535; of
    8-bit integers all 65,536 pairs are tried. Operands depend on the seed, not on the device.

    Args:
        names: what ``Multiplier.parse`` or ``IntegerMultiplier.parse`` takes.
        output: where the run folder with ``characterize.json`` and the pictures is made.
        samples: pairs that are drawn for each multiplier.
        seed: decides them.
        device: where products and errors are computed.
        threads: CPU threads.
        sweep_truncate: measure also the families that are named, over all their truncations.
        report: told, in words, what is being measured.
        stopped: asked before each chunk of pairs.

    Returns:
        The run, and ``seed``, ``device`` and ``multipliers``: for each, in the order of ``names``, its ``name``,
        ``bias`` (mean), ``mean`` (mean absolute), ``peak`` (largest absolute) and ``std`` (standard deviation) of the
        relative error, the pair ``worst`` that has the peak, how many ``pairs``, and whether they are ``exhaustive``.
        With ``sweep_truncate`` also ``sweep``: the same for each family and truncation, with ``family`` and
        ``truncate``.

    Raises:
        RequestError: a name that is none, a multiplier at fault, a device that is not there; nothing is written.
        Interrupted: ``stopped`` said so; nothing is kept then.
    """
    multipliers = [parse(name) for name in names]
    families = [m.family for m in multipliers if isinstance(m, Multiplier) and m.family in FAMILIES]
    if sweep_truncate and not families:
        raise RequestError(f"--sweep-truncate is for {', '.join(FAMILIES)}: name one of them")
    place = choose_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    _check_code(multipliers, place)
    run = Run.create(output, "characterize")
    with run.kept_if_complete():
        run.write_json("environment.json", environment(place))
        measured = [_measure(m, samples, seed, place, report, stopped) for m in multipliers]
        result: dict[str, Any] = {
            "seed": seed,
            "device": place.type,
            "multipliers": [{"name": name, **figures} for name, (figures, _) in zip(names, measured, strict=True)],
        }
        if sweep_truncate:
            result["sweep"] = [
                {"family": m.family, "truncate": m.truncate, "name": str(m)}
                | _measure(m, samples, seed, place, report, stopped)[0]
                for family in dict.fromkeys(families)
                for m in (Multiplier(family, t) for t in FAMILIES[family].truncations)
            ]
            run.write("sweep-truncate.png", plots.truncation_sweep(result["sweep"]))
        report("drawing")
        errors = [(name, *pictured) for name, (_, pictured) in zip(names, measured, strict=True)]
        run.write("characterize.png", plots.characterization(errors))
        run.write_json("characterize.json", result)
    return run, result


def parse(name: str) -> AnyMultiplier:
    """The multiplier of a name: of integers where it says so (``mbm-int8``), else of floating-point numbers.

    Raises:
        RequestError: it is none, or a file is at fault.
    """
    integers = ":" not in name and "-int" in name
    try:
        return IntegerMultiplier.parse(name) if integers else Multiplier.parse(name)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _check_code(multipliers: Sequence[AnyMultiplier], device: torch.device) -> None:
    for multiplier in multipliers:
        if isinstance(multiplier, Multiplier):
            try:
                setup.check_code(multiplier, device)
            except ValueError as error:
                raise RequestError(str(error)) from None


def _measure(
    multiplier: AnyMultiplier,
    samples: int,
    seed: int,
    device: torch.device,
    report: Callable[[str], None],
    stopped: Callable[[], bool],
) -> tuple[dict[str, Any], tuple[Any, Any, Any]]:
    """The figures of the relative error in percent; both operands' fractions and the errors of the first pairs."""
    if isinstance(multiplier, IntegerMultiplier) and multiplier.bits <= EXHAUSTIVE_BITS:
        exhaustive, pairs, chunks = True, 1 << (2 * multiplier.bits), _all_pairs(multiplier.bits)
    else:
        exhaustive, pairs, chunks = False, samples, _random_pairs(multiplier, samples, seed)
    done, bias, mean, square, peak = 0, 0.0, 0.0, 0.0, -1.0
    worst, pictured = [], []
    for a, b in chunks:
        if stopped():
            raise Interrupted("interrupted")
        report(f"{multiplier}: {100 * done // pairs} % of {pairs:,} pairs")
        errors = 100 * _relative_errors(multiplier, a.to(device), b.to(device))
        sizes = errors.abs()
        bias, mean, square = bias + errors.sum().item(), mean + sizes.sum().item(), square + (errors**2).sum().item()
        largest = sizes.max().item()
        if not math.isfinite(largest):
            i = int((~errors.isfinite()).nonzero()[0])
            raise RequestError(f"{multiplier} is no multiplier: {a[i]:.9g} x {b[i]:.9g} is not a finite number")
        if largest > peak:
            # The first one, where several are as large: argmax would give any of them.
            i = int((sizes == largest).nonzero()[0])
            peak, worst = largest, [a[i].item(), b[i].item()]
        if done < PICTURED:
            pictured.append((_fractions(multiplier, a), _fractions(multiplier, b), errors.cpu()))
        done += len(a)
    bias, mean = bias / pairs, mean / pairs
    figures = {
        "bias": bias,
        "mean": mean,
        "peak": peak,
        "std": math.sqrt(max(0.0, square / pairs - bias**2)),
        "worst": worst,
        "pairs": pairs,
        "exhaustive": exhaustive,
    }
    x, y, errors_of_them = (torch.cat(parts).numpy() for parts in zip(*pictured, strict=True))
    return figures, (x, y, errors_of_them)


def _all_pairs(bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    numbers = torch.arange(1 << bits)
    yield numbers.repeat_interleave(1 << bits), numbers.repeat(1 << bits)


def _random_pairs(multiplier: AnyMultiplier, samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """int64 for integers, float32 in [1, 2) otherwise; drawn on the CPU, so that they are the same on every device."""
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
    """float64; where the exact product is zero, so is the multiplier's, and its error counts as zero."""
    if isinstance(multiplier, IntegerMultiplier):
        exact, product = (a * b).double(), multiplier.multiply(a, b).double()
    else:
        exact, product = a.double() * b.double(), multiply(a, b, multiplier).double()
    return torch.where(exact == 0, 0.0, (product - exact) / exact)


def _fractions(multiplier: AnyMultiplier, operands: Tensor) -> Tensor:
    """In [0, 1), float64; zero has none, and NaN."""
    if not isinstance(multiplier, IntegerMultiplier):
        return operands.double() - 1
    _, fractions = decompose(operands, multiplier.bits)
    return torch.where(operands == 0, torch.nan, fractions.double() / (1 << (multiplier.bits - 1)))
