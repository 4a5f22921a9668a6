"""Figures, as PNG bytes, readable at the width of a paper's column and in greyscale."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# From the palette of Okabe and Ito, with line styles that differ too.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
TRAIN = {"color": "#0072B2", "linestyle": "--", "marker": "o", "markersize": 4}
TEST = {"color": "#D55E00", "linestyle": "-", "marker": "s", "markersize": 4}
# Errors below zero are blue, above it orange; it gets lighter all the way, so that signs survive in greyscale.
ERRORS = LinearSegmentedColormap.from_list("errors", ("#0b2545", "#2f6fb0", "#b0b0b0", "#f2b44b", "#fff3c4"))
MAP_ROWS = 6  # multipliers below one another


def curves(epochs: Sequence[dict[str, Any]], title: str) -> bytes:
    """Loss and accuracy, training and test, over the epochs of a run's metrics."""
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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize="medium")
    return _png(figure)


def comparison(result: dict[str, Any]) -> bytes:
    """Test accuracy and training loss over epochs: the mean over seeds, with a band from the lowest to the highest."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for i, multiplier in enumerate(result["multipliers"]):
        runs = [run["metrics"] for run in result["runs"] if run["multiplier"] == multiplier]
        epochs = [m["epoch"] for m in runs[0]]
        color, line, marker = COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        for axes, field, scale in ((accuracy, "test_accuracy", 100), (loss, "train_loss", 1)):
            values = np.array([[scale * m[field] for m in metrics] for metrics in runs])
            axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
            axes.plot(
                epochs, values.mean(axis=0), color=color, linestyle=line, marker=marker, markersize=4, label=multiplier
            )
    accuracy.set_ylabel("test accuracy (%)")
    loss.set_ylabel("training loss")
    for axes in (accuracy, loss):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    accuracy.legend(title=f"{result['model']}, {result['seeds']} seed{'s'[: result['seeds'] != 1]}")
    return _png(figure)


def epoch_profile(result: dict[str, Any]) -> bytes:
    """Where an epoch's time went: a bar a phase, and a bar a convolution (forward, backward)."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    phases, layers = figure.subplots(1, 2)
    names = list(result["phases"])[::-1]
    phases.barh(names, [result["phases"][name] for name in names], color="#0072B2")
    phases.set_xlabel("seconds")
    phases.set_title("phases of an epoch", fontsize="medium")
    labels = [layer["name"] for layer in result["layers"]][::-1]
    positions = np.arange(len(labels))
    for offset, part, color, hatch in ((0.2, "forward", "#D55E00", None), (-0.2, "backward", "#56B4E9", "//")):
        values = [layer[f"{part}_seconds"] for layer in result["layers"]][::-1]
        layers.barh(positions + offset, values, height=0.4, color=color, hatch=hatch, edgecolor="white", label=part)
    layers.set_yticks(positions, labels)
    layers.set_xlabel("seconds")
    layers.set_title(f"convolutions, {result['multiplier']}", fontsize="medium")
    figure.legend(*layers.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return _png(figure)


def characterization(errors: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]) -> bytes:
    """Where multipliers are wrong, and how often by how much: for each a map over the operands' fractions, a histogram.

    Args:
        errors: for each multiplier its name, the fractions of a and of b (in [0, 1); NaN for an operand without one)
            and the relative errors of their products in percent.
    """
    blocks = 1 if len(errors) <= MAP_ROWS else 2
    rows = -(-len(errors) // blocks)
    figure = Figure(figsize=(5.0 * blocks, 2.1 * rows + 0.1), layout="constrained")
    axes = figure.subplots(rows, 2 * blocks, squeeze=False, width_ratios=[1.0, 1.1] * blocks)
    for unused in axes.reshape(-1, 2)[len(errors) :].flat:
        unused.remove()
    for (name, x, y, error), (where, how_often) in zip(errors, axes.reshape(-1, 2), strict=False):
        unit, power = "%", 1.0
        if 0 < np.abs(error).max() < 0.01:
            exponent = int(np.floor(np.log10(np.abs(error).max())))
            unit, power = f"$10^{{{exponent}}}$ %", 10.0**exponent
        values = _error_map(x, y, error / power)
        limit = np.nanmax(np.abs(values), initial=0.0) or 1.0
        image = where.imshow(
            values, origin="lower", extent=(0, 1, 0, 1), cmap=ERRORS, vmin=-limit, vmax=limit, interpolation="nearest"
        )
        where.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        where.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        where.set_title(_shortened(name), fontsize="medium", parse_math=False)  # a file may have a $ in its name
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
    """Mean errors over the cells of the unit square, x from row to row; NaN where no pair lies."""
    known = ~(np.isnan(x) | np.isnan(y))
    # As many cells as can have a few pairs each, and no more than an 8-bit integer's fractions.
    cells = 1 << min(7, max(1, int(np.log2(max(known.sum(), 1)) - 2) // 2))
    edges = np.linspace(0, 1, cells + 1)
    total, _, _ = np.histogram2d(x[known], y[known], edges, weights=error[known])
    count, _, _ = np.histogram2d(x[known], y[known], edges)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _shortened(name: str) -> str:
    """Files by their last part, and no more of a name than has room above a map."""
    kind, colon, reference = name.partition(":")
    short = f"{kind}{colon}{reference.rpartition('/')[2]}"
    return short if len(short) <= 26 else f"{short[:25]}…"


def truncation_sweep(rows: Sequence[dict[str, Any]]) -> bytes:
    """Bias, mean and peak error of families against truncated bits (figure 8 a to c of the multipliers' paper)."""
    figure = Figure(figsize=(4.2, 5.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    families = list(dict.fromkeys(row["family"] for row in rows))
    for i, family in enumerate(families):
        points = [row for row in rows if row["family"] == family]
        color, line, marker = COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        for axes, measure in zip(panels, ("bias", "mean", "peak"), strict=True):
            truncated, values = zip(*((point["truncate"], point[measure]) for point in points), strict=True)
            axes.plot(truncated, values, color=color, linestyle=line, marker=marker, markersize=4, label=family)
    for axes, label in zip(panels, ("bias (%)", "mean error (%)", "peak error (%)"), strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("truncated bits")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(panels)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=4, columnspacing=1.0, handlelength=1.8, frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
