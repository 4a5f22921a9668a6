"""Pictures of results, as PNG bytes, readable at the width of a paper's column and in greyscale."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mbm_cli.experiments.characterize import Characterization, Characterized, Pairs, TruncationErrors
from mbm_cli.experiments.compare import Comparison
from mbm_cli.experiments.evaluate import Evaluated, Evaluation
from mbm_cli.experiments.profile_epoch import EpochProfile
from mbm_cli.experiments.sweep import MULTIPLIER, CombinationResult, Sweep, shown
from mbm_cli.experiments.train import Trained
from mbm_cli.multipliers.float32 import FAMILIES
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.runs import Summary

COLUMN = 8 / 2.54  # inches: the width of a paper's column
# From the palette of Okabe and Ito, with line styles that differ too.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_LINES = len(COLORS)
MOST_RANGES = 60
TRAIN = {"color": "#0072B2", "linestyle": "--", "marker": "o", "markersize": 4}
TEST = {"color": "#D55E00", "linestyle": "-", "marker": "s", "markersize": 4}
# Errors below zero are blue, above it orange; it gets lighter all the way, so that signs survive in greyscale.
ERRORS = LinearSegmentedColormap.from_list("errors", ("#0b2545", "#2f6fb0", "#b0b0b0", "#f2b44b", "#fff3c4"))
LEGEND_INSIDE = 14  # characters of a name, above which a legend has no room between the lines
MAP_ROWS = 6  # multipliers in a column
# Improvements of area and power over an IEEE 754 single-precision multiplier, by family and truncated bits, as reported
# in the multipliers' paper (H. Saadat et al., IEEE TCAD 37(11), 2018; mitchell is AFMA there).
REPORTED = {("mbm", 0): (11.7, 16.1), ("mitchell", 0): (13.6, 19.2), ("mbm", 20): (28.0, 57.0)}


@singledispatch
def pictures(result: Any, made: Any) -> dict[str, bytes]:
    """Draw what an experiment made; return PNG files by name, none for results without a picture."""
    return {}


@pictures.register
def _(result: Summary, made: Trained) -> dict[str, bytes]:
    config = made.run.config()
    return {"curves.png": curves(made.metrics, f"{config.name}: {config.model.name}, {result.multiplier}")}


@pictures.register
def _(result: Comparison, made: object) -> dict[str, bytes]:
    return {"compare.png": comparison(result)}


@pictures.register
def _(result: Sweep, made: object) -> dict[str, bytes]:
    drawn = [one for one in result.combinations if one.test_accuracy]
    if not drawn:
        return {}
    lines = _lines(drawn, list(result.vary))
    if lines:
        return {"sweep.png": sweep_lines(lines, REPORTED)}
    ranges = [(_label(one.values), one.test_accuracy) for one in drawn]
    return {"sweep.png": sweep_ranges(ranges, ", ".join(result.vary))}


@pictures.register
def _(result: Evaluation, made: Evaluated) -> dict[str, bytes]:
    return {"confusion.png": confusions(made.confusions)}


@pictures.register
def _(result: EpochProfile, made: object) -> dict[str, bytes]:
    return {"profile.png": epoch_profile(result)}


@pictures.register
def _(result: Characterization, made: Characterized) -> dict[str, bytes]:
    drawn = {"characterize.png": characterization(made.pairs)}
    if result.sweep:
        drawn["sweep-truncate.png"] = truncation_sweep(result.sweep)
    return drawn


def _lines(combinations: Sequence[CombinationResult], fields: Sequence[str]) -> "list[SweepLine] | None":
    """Return accuracy against truncated bits, a line a family, if the sweep varies little else; else ``None``."""
    if MULTIPLIER not in fields:
        return None
    lines: dict[tuple[str, bool, str], SweepLine] = {}
    for one in combinations:
        try:
            multiplier = Multiplier.parse(one.values[MULTIPLIER])
        except ValueError:  # several, by layer
            return None
        family, rounded = multiplier.family, multiplier.result_bits is not None
        others = _label({field: value for field, value in one.values.items() if field != MULTIPLIER})
        name = ", ".join(filter(None, (f"{family}-tT-rR" if rounded else family, others)))
        line = lines.setdefault((family, rounded, others), SweepLine(family, name, rounded, {}))
        # Multipliers from files have no truncated bits, and some differ in the result's bits alone.
        if family not in FAMILIES or multiplier.truncate in line.accuracies:
            return None
        line.accuracies[multiplier.truncate] = one.test_accuracy
    has_line = any(len(line.accuracies) > 1 for line in lines.values())
    return list(lines.values()) if has_line and len(lines) <= MOST_LINES else None


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(map(shown, values.values()))


def curves(epochs: Sequence[dict[str, Any]], title: str) -> bytes:
    """Draw loss and accuracy, training and test, over the epochs of a run's metrics."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    numbers = [epoch["epoch"] for epoch in epochs]
    for label, style in (("train", TRAIN), ("test", TEST)):
        loss.plot(numbers, [epoch[f"{label}_loss"] for epoch in epochs], label=label, **style)
        accuracy.plot(numbers, [100 * epoch[f"{label}_accuracy"] for epoch in epochs], label=label, **style)
    loss.set_ylabel("loss")
    accuracy.set_ylabel("accuracy (%)")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(_plain(title), fontsize="medium")
    return _png(figure)


def comparison(result: Comparison) -> bytes:
    """Draw test accuracy and training loss over epochs: means over seeds, with bands from the lowest to the highest."""
    multipliers = result.multipliers
    one_epoch = result.epochs == 1  # then bands have no width: multipliers stand side by side, with bars
    are_short = max(map(len, multipliers)) <= LEGEND_INSIDE
    has_room = are_short and not one_epoch
    figure = Figure(figsize=(6.4, 3.0 if has_room else 3.3 + 0.2 * len(multipliers)), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for i, multiplier in enumerate(multipliers):
        runs = [run["metrics"] for run in result.runs if run["multiplier"] == multiplier]
        epochs = [i] if one_epoch else [m["epoch"] for m in runs[0]]
        color, line, marker = COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        style = {"color": color, "linestyle": line, "marker": marker, "markersize": 4, "label": _plain(multiplier)}
        for axes, field, scale in ((accuracy, "test_accuracy", 100), (loss, "train_loss", 1)):
            values = np.array([[scale * m[field] for m in metrics] for metrics in runs])
            if one_epoch:
                axes.vlines(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.4, linewidth=3)
            else:
                axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
            axes.plot(epochs, values.mean(axis=0), **style)
    accuracy.set_ylabel("test accuracy (%)")
    loss.set_ylabel("training loss")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
        if one_epoch:
            axes.set_xlabel("after one epoch")
            axes.set_xticks([])
            axes.set_xlim(-0.7, len(multipliers) - 0.3)
        else:
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    title = f"{result.model}, {result.seeds} seed{'s'[: result.seeds != 1]}"
    if has_room:
        accuracy.legend(title=title)
    else:
        legend = accuracy.get_legend_handles_labels()
        columns = 2 if are_short else 1
        figure.legend(*legend, title=title, loc="outside lower center", fontsize="small", ncols=columns)
    return _png(figure)


def epoch_profile(result: EpochProfile) -> bytes:
    """Draw where an epoch's time went: a bar a phase, and two a convolution (forward, backward)."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    phases, layers = figure.subplots(1, 2)
    names = list(result.phases)[::-1]
    phases.barh(names, [result.phases[name] for name in names], color="#0072B2")
    phases.set_xlabel("seconds")
    phases.set_title("phases of an epoch", fontsize="medium")
    labels = [layer.name for layer in result.layers][::-1]
    positions = np.arange(len(labels))
    for offset, part, color, hatch in ((0.2, "forward", "#D55E00", None), (-0.2, "backward", "#56B4E9", "//")):
        values = [getattr(layer, f"{part}_seconds") for layer in result.layers][::-1]
        layers.barh(positions + offset, values, height=0.4, color=color, hatch=hatch, edgecolor="white", label=part)
    layers.set_yticks(positions, labels)
    layers.set_xlabel("seconds")
    layers.set_title(_plain(f"convolutions, {result.multiplier}"), fontsize="medium")
    figure.legend(*layers.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return _png(figure)


def confusions(counts: dict[str, np.ndarray]) -> bytes:
    """Draw a matrix of counts for each multiplier, int (classes, classes), label by answer, below one another."""
    figure = Figure(figsize=(COLUMN, 2.9 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), squeeze=False)[:, 0]
    for axes, (multiplier, matrix) in zip(panels, counts.items(), strict=True):
        classes = range(len(matrix))
        # Shares of a label's images; the power makes a single mistake visible.
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Greys", norm=PowerNorm(0.35, 0, 1), aspect="auto")
        for label, answer in zip(*matrix.nonzero(), strict=True):
            color = "white" if shares[label, answer] > 0.3 else "black"
            axes.text(answer, label, matrix[label, answer], color=color, fontsize=6, ha="center", va="center")
        axes.set_xticks(classes)
        axes.set_yticks(classes)
        axes.tick_params(length=0, labelsize=7)
        axes.set_ylabel("digit", fontsize=7)
        axes.set_title(f"{_wrapped(multiplier, 42)}: {100 * matrix.trace() / matrix.sum():.2f} %", fontsize=8)
    axes.set_xlabel("answer of the network", fontsize=7)
    return _png(figure)


@dataclass(frozen=True)
class SweepLine:
    """A line of `sweep_lines`: the test accuracies (fractions) of some seeds, by truncated bits.

    ``rounded``: bits of the result are dropped, too.
    """

    family: str
    label: str
    rounded: bool
    accuracies: dict[int, list[float]]


def sweep_lines(lines: Sequence[SweepLine], reported: Mapping[tuple[str, int], tuple[float, float]]) -> bytes:
    """Draw test accuracy against truncated bits: means over seeds, with bands from the lowest to the highest.

    Args:
        lines: at most MOST_LINES. The exact product alone is a horizontal line across the figure.
        reported: improvements of area and power by family and truncated bits, written below the points that have them.
    """
    figure = Figure(figsize=(COLUMN, 3.2), layout="constrained")
    axes = figure.subplots()
    marked: dict[int, dict[str, float]] = {}
    for i, line in enumerate(lines):
        color, style, marker = COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        truncated = sorted(line.accuracies)
        seeds = [100 * np.array(line.accuracies[t]) for t in truncated]
        low, mean, high = ([float(f(values)) for values in seeds] for f in (np.min, np.mean, np.max))
        if line.family == "exact" and truncated == [0]:
            axes.axhspan(low[0], high[0], color=color, alpha=0.15, linewidth=0)
            axes.axhline(mean[0], color=color, linestyle=style, linewidth=1, label=_plain(line.label))
            continue
        axes.fill_between(truncated, low, high, color=color, alpha=0.2, linewidth=0)
        label = _plain(line.label)
        axes.plot(truncated, mean, color=color, linestyle=style, marker=marker, markersize=4, label=label)
        if len(truncated) == 1:
            axes.vlines(truncated, low, high, color=color, linewidth=1)
        if not line.rounded:
            for t, value in zip(truncated, mean, strict=True):
                if (line.family, t) in reported:
                    marked.setdefault(t, {}).setdefault(line.family, value)
                    marked[t][line.family] = min(value, marked[t][line.family])
    axes.margins(x=0.04)
    axes.set_xlabel("truncated bits", fontsize=8)
    axes.set_ylabel("test accuracy (%)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    if marked:
        _write_below(axes, marked, reported)
        note = (
            "Area and power, against an IEEE single-precision\n"
            "multiplier, as the paper reports (mbm is AFMB there,\n"
            "mitchell AFMA)."
        )
        axes.text(0, -0.2, note, transform=axes.transAxes, fontsize=6.5, va="top")
    figure.legend(loc="outside upper center", ncols=2 if len(lines) > 1 else 1, fontsize=7)
    return _png(figure)


def _write_below(
    axes: Axes, marked: dict[int, dict[str, float]], reported: Mapping[tuple[str, int], tuple[float, float]]
) -> None:
    """Write improvements below their points, in a part of the axes that is kept free of data."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]
    floor = low - 0.45 * (high - low)
    axes.set_ylim(floor, high)
    axes.set_yticks(ticks)
    middle = sum(axes.get_xlim()) / 2
    for t, families in marked.items():
        axes.vlines(t, low - 0.03 * (high - low), min(families.values()), color="0.4", linestyle=":", linewidth=0.8)
        text = "\n".join(
            f"{family}: area ÷ {reported[family, t][0]:g},\npower ÷ {reported[family, t][1]:g}" for family in families
        )
        side = "left" if t < middle else "right"
        blank = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(t, low - 0.06 * (high - low), text, fontsize=6.5, ha=side, va="top", linespacing=1.1, bbox=blank)


def sweep_ranges(combinations: Sequence[tuple[str, Sequence[float]]], title: str) -> bytes:
    """Draw test accuracies of combinations (fractions, by seed): the mean, and a bar from the lowest to the highest.

    Of more than MOST_RANGES combinations those with the highest means are drawn.
    """
    best = sorted(combinations, key=lambda one: -np.mean(one[1]))[:MOST_RANGES]
    drawn = [one for one in combinations if one in best]
    labels = [_wrapped(name, 28) for name, _ in drawn]
    lines = 1 + max(label.count("\n") for label in labels)
    figure = Figure(figsize=(COLUMN, 0.8 + (0.07 + 0.12 * lines) * len(drawn)), layout="constrained")
    axes = figure.subplots()
    positions = range(len(drawn))[::-1]
    seeds = [100 * np.array(accuracies) for _, accuracies in drawn]
    axes.hlines(positions, [s.min() for s in seeds], [s.max() for s in seeds], color="#0072B2", linewidth=2, alpha=0.6)
    axes.plot([s.mean() for s in seeds], positions, "o", color="#000000", markersize=4)
    axes.set_yticks(positions, labels, fontsize=7)
    axes.set_ylim(-0.6, len(drawn) - 0.4)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("test accuracy (%)", fontsize=8)
    some = "" if len(drawn) == len(combinations) else f" (best {len(drawn)} of {len(combinations)})"
    figure.suptitle(_plain(fill(f"{title}{some}", 52)), fontsize=7)
    axes.grid(alpha=0.3)
    return _png(figure)


def _plain(text: str) -> str:
    """Escape what Matplotlib would interpret: a file's name may have a $, or bytes that are not text."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def _wrapped(name: str, width: int) -> str:
    """Wrap the name of a multiplier or a combination; drop the folder of a file."""
    if re.match(r"(lut|python|c):", name):
        kind, _, reference = name.partition(":")
        name = f"{kind}:{reference.rpartition('/')[2]}"
    return fill(_plain(name), width, max_lines=3, placeholder=" ...")


def characterization(errors: Sequence[Pairs]) -> bytes:
    """Draw where multipliers are wrong, and by how much: a map over the operands' fractions and a histogram each."""
    blocks = 1 if len(errors) <= MAP_ROWS else 2
    rows = -(-len(errors) // blocks)
    figure = Figure(figsize=(5.0 * blocks, 2.1 * rows + 0.1), layout="constrained")
    axes = figure.subplots(rows, 2 * blocks, squeeze=False, width_ratios=[1.0, 1.1] * blocks)
    for unused in axes.reshape(-1, 2)[len(errors) :].flat:
        unused.remove()
    for one, (where, how_often) in zip(errors, axes.reshape(-1, 2), strict=False):
        name, error = one.name, one.error
        unit, power = "%", 1.0
        if 0 < np.abs(error).max() < 0.01:
            exponent = int(np.floor(np.log10(np.abs(error).max())))
            unit, power = f"$10^{{{exponent}}}$ %", 10.0**exponent
        values = _error_map(one.a, one.b, error / power)
        limit = np.nanmax(np.abs(values), initial=0.0) or 1.0
        image = where.imshow(
            values, origin="lower", extent=(0, 1, 0, 1), cmap=ERRORS, vmin=-limit, vmax=limit, interpolation="nearest"
        )
        where.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        where.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        title = _wrapped(name, 22)
        where.set_title(title, fontsize="medium" if len(title) <= 16 else "small")
        bar = figure.colorbar(image, ax=where, fraction=0.05)
        bar.locator = MaxNLocator(4, steps=[1, 2, 5, 10])
        bar.update_ticks()
        bar.ax.set_title(unit, fontsize="medium")
        where.set_xlabel("fraction of b")
        where.set_ylabel("fraction of a")
        how_often.hist(error / power, bins=50, weights=np.full(len(error), 100 / len(error)), color="#0072B2")
        how_often.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        how_often.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        how_often.set_xlabel(f"relative error ({unit})")
        how_often.set_ylabel("pairs (%)")
    return _png(figure)


def _error_map(x: np.ndarray, y: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return mean errors over the cells of the unit square, x along the rows; NaN where there is no pair."""
    known = ~(np.isnan(x) | np.isnan(y))
    # As many cells as can have a few pairs each, and no more than an 8-bit integer's fractions.
    cells = 1 << min(7, max(1, int(np.log2(max(known.sum(), 1)) - 2) // 2))
    edges = np.linspace(0, 1, cells + 1)
    total, _, _ = np.histogram2d(x[known], y[known], edges, weights=error[known])
    count, _, _ = np.histogram2d(x[known], y[known], edges)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def truncation_sweep(rows: Sequence[TruncationErrors]) -> bytes:
    """Draw bias, mean and peak error of families against truncated bits (figure 8 a to c of the multipliers' paper)."""
    figure = Figure(figsize=(4.2, 5.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    families = list(dict.fromkeys(row.family for row in rows))
    for i, family in enumerate(families):
        points = [row for row in rows if row.family == family]
        color, line, marker = COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        for axes, measure in zip(panels, ("bias", "mean", "peak"), strict=True):
            truncated, values = zip(*((point.truncate, getattr(point, measure)) for point in points), strict=True)
            axes.plot(truncated, values, color=color, linestyle=line, marker=marker, markersize=4, label=family)
    for axes, label in zip(panels, ("bias (%)", "mean error (%)", "peak error (%)"), strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("truncated bits")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels(panels)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=4, columnspacing=1.0, handlelength=1.8, frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
