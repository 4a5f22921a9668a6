"""Pictures of results, as PNG bytes, readable at the width of a paper's column and in greyscale."""

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mbm_cli.experiments.characterize import Characterization, Characterized, Pairs, TruncationErrors
from mbm_cli.experiments.compare import Comparison
from mbm_cli.experiments.evaluate import Evaluated, Evaluation
from mbm_cli.experiments.profile_conv import ConvProfile
from mbm_cli.experiments.profile_epoch import EpochProfile
from mbm_cli.experiments.search import Search
from mbm_cli.experiments.sweep import Sweep
from mbm_cli.experiments.train import Trained
from mbm_cli.report import sweep_plots
from mbm_cli.report.drawing import (
    COLORS,
    COLUMN,
    LEGEND_INSIDE,
    TRUNCATED,
    draw_means,
    legend,
    png_of,
    small,
    style_of,
    wrapped,
)
from mbm_cli.runs import Summary

TRAIN = {"color": "#0072B2", "linestyle": "--", "marker": "o", "markersize": 4}
TEST = {"color": "#D55E00", "linestyle": "-", "marker": "s", "markersize": 4}
# Errors below zero are blue, above it orange; it gets lighter all the way, so that signs survive in greyscale.
ERRORS = LinearSegmentedColormap.from_list("errors", ("#0b2545", "#2f6fb0", "#b0b0b0", "#f2b44b", "#fff3c4"))
MAP_ROWS = 6  # multipliers in a column


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
    return {"compare.png": comparison(result) if result.epochs > 1 else seed_by_seed(result)}


@pictures.register
def _(result: Sweep, made: object) -> dict[str, bytes]:
    png = sweep_plots.of_sweep(result)
    return {} if png is None else {"sweep.png": png}


@pictures.register
def _(result: Search, made: object) -> dict[str, bytes]:
    png = sweep_plots.of_search(result)
    return {} if png is None else {"search.png": png}


@pictures.register
def _(result: Evaluation, made: Evaluated) -> dict[str, bytes]:
    return {"confusion.png": confusions(made.confusions)}


@pictures.register
def _(result: Characterization, made: Characterized) -> dict[str, bytes]:
    drawn = {"characterize.png": characterization(made.pairs)}
    if result.sweep:
        drawn["sweep-truncate.png"] = truncation_sweep(result.sweep)
    return drawn


def curves(epochs: Sequence[dict[str, Any]], title: str) -> bytes:
    """Draw loss and accuracy, training and test, over the epochs of a run's metrics."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    numbers = [epoch["epoch"] for epoch in epochs]
    loss, accuracy = figure.subplots(1, 2)
    for axes, field, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        for label, style in (("train", TRAIN), ("test", TEST)):
            axes.plot(numbers, [scale * epoch[f"{label}_{field}"] for epoch in epochs], label=label, **style)
        axes.set(xlabel="epoch", ylabel=f"{field} (%)" if axes is accuracy else field)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(wrapped(title, 80), fontsize="medium")
    return png_of(figure)


def comparison(result: Comparison) -> bytes:
    """Draw test accuracy and training loss over epochs: means over seeds, with bands from the lowest to the highest."""
    multipliers = result.multipliers
    has_room = len(multipliers) <= 4 and max(map(len, multipliers)) <= LEGEND_INSIDE
    figure = Figure(figsize=(6.4, 3.0 if has_room else 3.3 + 0.2 * len(multipliers)), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for i, multiplier in enumerate(multipliers):
        runs = [run["metrics"] for run in result.runs if run["multiplier"] == multiplier]
        epochs = [m["epoch"] for m in runs[0]]
        for axes, field, scale in ((accuracy, "test_accuracy", 100), (loss, "train_loss", 1)):
            by_epoch = [[scale * m[field] for m in epoch] for epoch in zip(*runs, strict=True)]
            draw_means(axes, epochs, by_epoch, i, wrapped(multiplier, 70))
    for axes, label in ((accuracy, "test accuracy (%)"), (loss, "training loss")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    title = f"{result.model}, {result.seeds} seed{'s'[: result.seeds != 1]}"
    if has_room:
        accuracy.legend(title=title)
    else:
        legend(figure, accuracy, "outside lower center", title=title, fontsize="small")
    return png_of(figure)


@small
def seed_by_seed(result: Comparison) -> bytes:
    """Draw each seed's test accuracy, joined to exact's, and the differences with their mean and 95 % interval."""
    exact, *others = result.columns
    figure = Figure(figsize=(COLUMN, 1.0 + max(0.4, 0.1 * result.seeds) * len(others)), layout="constrained")
    accuracy, difference = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(others))
    *offsets, last = np.linspace(-0.32, 0.32, result.seeds + 1) if result.seeds > 1 else (0.0, 0.0)
    y = np.add.outer(rows, offsets).ravel()
    values = 100 * np.array([column.test_accuracy for column in others]).ravel()
    of_exact = 100 * np.tile(exact.test_accuracy, len(others))
    accuracy.hlines(y, of_exact, values, color="0.6", linewidth=1)
    accuracy.plot(of_exact, y, "o", color=COLORS[0], mfc="none", markersize=5, label="exact")
    accuracy.plot(values, y, "s", color=COLORS[1], markersize=3, label="multiplier, same seed")
    difference.plot(values - of_exact, y, "s", color=COLORS[1], markersize=3)
    if result.seeds > 1:  # one has no interval
        intervals = [column.accuracy_difference for column in others]
        low, mean, high = (100 * np.array([getattr(one, end) for one in intervals]) for end in ("low", "mean", "high"))
        style = {"fmt": "D", "color": COLORS[0], "markersize": 3, "capsize": 2, "linewidth": 1.2}
        difference.errorbar(mean, rows + last, xerr=(mean - low, high - mean), label="mean, 95 % interval", **style)
    difference.axvline(0, color="0.4", linestyle=":", linewidth=1)
    accuracy.set_yticks(rows, [wrapped(column.multiplier, 17) for column in others])
    accuracy.set(ylim=(len(others) - 0.5, -0.5), xlabel="test accuracy (%)")
    difference.set_xlabel("difference (points)")
    for axes in (accuracy, difference):
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(3, min_n_ticks=3))
        axes.grid(axis="x", alpha=0.3)
    title = f"{result.model} after one epoch, {result.seeds} seed{'s'[: result.seeds != 1]}"
    figure.legend(loc="outside upper center", ncols=3, title=title, handlelength=1, columnspacing=1, fontsize=6.5)
    return png_of(figure)


@pictures.register
@small
def conv_profile(result: ConvProfile, made: object) -> dict[str, bytes]:
    """Draw the share of the ceiling that each convolution reaches: a bar a shape; nothing where there is none."""
    ceiling, measured = result.ceiling_macs_per_second, [s for s in result.convolutions if s.share_of_ceiling]
    if ceiling is None or not measured:
        return {}
    figure = Figure(figsize=(COLUMN, 0.9 + 0.3 * len(measured)), layout="constrained")
    axes = figure.subplots()
    shares = [100 * (shape.share_of_ceiling or 0.0) for shape in measured]
    labels = [f"{shape.name or 'reference'}, batch {shape.batch}\n{shape.shape}" for shape in measured]
    axes.barh(range(len(shares)), shares, height=0.6, color="#0072B2", tick_label=labels)
    axes.axvline(100, color=COLORS[0], linestyle=":", linewidth=1)
    for y, share in enumerate(shares):
        axes.text(1.03, y, f"{share:.0f} %", va="center", transform=axes.get_yaxis_transform())
    axes.set(xlim=(0, 1.05 * max([100, *shares])), xlabel="share of the ceiling (%)")
    axes.invert_yaxis()
    cpu = f"the CPU ({result.device_name}, threads: {result.threads})"
    where = f"on {cpu if result.device == 'cpu' else result.device_name}"
    title = f"forward, {result.multiplier}\n{where}; ceiling: {ceiling / 1e9:.3g} GMAC/s"
    if result.matrix_ceiling_macs_per_second is not None:
        title += f", of matrix units: {result.matrix_ceiling_macs_per_second / 1e9:.3g}"
    figure.suptitle("\n".join(wrapped(line, 58) for line in title.splitlines()))
    return {"profile.png": png_of(figure)}


@pictures.register
def epoch_profile(result: EpochProfile, made: object) -> dict[str, bytes]:
    """Draw where an epoch's time went: a bar a phase, and two an approximate layer (forward, backward)."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    phases, layers = figure.subplots(1, 2)
    phases.barh(list(result.phases), list(result.phases.values()), color="#0072B2")
    phases.set_title("phases of an epoch", fontsize="medium")
    positions = np.arange(len(result.layers))
    for offset, part, color, hatch in ((-0.2, "forward", "#D55E00", None), (0.2, "backward", "#56B4E9", "//")):
        values = [getattr(layer, f"{part}_seconds") for layer in result.layers]
        layers.barh(positions + offset, values, height=0.4, color=color, hatch=hatch, edgecolor="white", label=part)
    layers.set_yticks(positions, [layer.name for layer in result.layers])
    layers.set_title(wrapped(f"layers, {result.multiplier}", 36), fontsize="medium")
    for axes in (phases, layers):
        axes.set_xlabel("seconds")
        axes.invert_yaxis()
    figure.legend(*layers.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return {"profile.png": png_of(figure)}


@small
def confusions(counts: dict[str, np.ndarray]) -> bytes:
    """Draw a matrix of counts for each multiplier, int (classes, classes), label by answer, at most three in a row."""
    across = 2 if len(counts) == 4 else min(3, len(counts))
    width, down = COLUMN if across == 1 else 2.6, -(-len(counts) // across)
    figure = Figure(figsize=(width * across, 0.9 * width * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for unused in panels[len(counts) :]:
        unused.remove()
    for axes, (multiplier, matrix) in zip(panels, counts.items(), strict=False):
        # Shares of a label's images; the power makes a single mistake visible.
        shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Greys", norm=PowerNorm(0.35, 0, 1), aspect="auto")
        for label, answer in zip(*matrix.nonzero(), strict=True):
            color = "white" if shares[label, answer] > 0.15 else "black"
            axes.text(answer, label, matrix[label, answer], color=color, fontsize=6, ha="center", va="center")
        axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
        axes.tick_params(length=0)
        axes.set_title(f"{wrapped(multiplier, 31)}: {100 * matrix.trace() / matrix.sum():.2f} %")
    figure.supxlabel("answer of the network")
    figure.supylabel("digit")
    return png_of(figure)


@small
def characterization(errors: Sequence[Pairs]) -> bytes:
    """Draw where multipliers are wrong, and by how much: a map over the operands' fractions and a histogram each.

    All maps have one scale, which ends at the largest error of the pairs; all histograms have the same axes.
    """
    blocks = 1 if len(errors) <= MAP_ROWS else 2
    rows = -(-len(errors) // blocks)
    figure = Figure(figsize=(COLUMN * blocks, 0.9 + 1.15 * rows), layout="compressed")
    axes = figure.subplots(rows, 2 * blocks, squeeze=False, width_ratios=[1.0, 1.4] * blocks)
    panels = axes.reshape(-1, 2)
    for unused in panels[len(errors) :].flat:
        unused.remove()
    low, high = (float(f([f(one.error, initial=0) for one in errors])) for f in (np.min, np.max))
    peak = max(-low, high) or 1.0
    exponent = int(np.floor(np.log10(peak)))
    unit, power = ("%", 1.0) if exponent >= -2 else (f"$10^{{{exponent}}}$ %", 10.0**exponent)
    norm = Normalize(-peak / power, peak / power)
    bins = np.linspace(*((low, high) if low < high else (-peak, peak)), 61) / power
    heights = [np.histogram(one.error / power, bins)[0] * (100 / len(one.error)) for one in errors]
    tallest = [height.max() for height in heights]
    top = max(most for most in tallest if most <= 4 * min(tallest))
    for i, (one, height, (where, how_often)) in enumerate(zip(errors, heights, panels, strict=False)):
        values = _error_map(one.a, one.b, one.error / power)
        where.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap=ERRORS, norm=norm, interpolation="nearest")
        for axis in (where.xaxis, where.yaxis):
            axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
        where.set(title=wrapped(one.name, 22), ylabel="fraction of a")
        how_often.stairs(height, bins, fill=True, color="#0072B2")
        how_often.set(ylim=(0, 1.05 * top), ylabel="pairs (%)")
        for axis in (how_often.xaxis, how_often.yaxis):
            axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        at = int(height.argmax())
        if height[at] > top:  # its errors are much alike: the whole bar would flatten the other histograms
            x, side = (bins[at], "right") if at > len(height) // 2 else (bins[at + 1], "left")
            how_often.text(x, top, f" {height[at]:.0f} % ", ha=side, va="top")
        if i + blocks >= len(errors):
            where.set_xlabel("fraction of b")
            how_often.set_xlabel(f"relative error ({unit})")
    scale, ticks = ScalarMappable(norm, ERRORS), [part * peak / power for part in (-1, -0.5, 0, 0.5, 1)]
    bar = figure.colorbar(scale, ax=figure.axes, location="bottom", aspect=40 * blocks, fraction=0.05)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.set_label(f"mean error of a cell ({unit}); scale: ± peak error")
    return png_of(figure)


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
    for axes, measure in zip(panels, ("bias", "mean", "peak"), strict=True):
        for i, family in enumerate(dict.fromkeys(row.family for row in rows)):
            points = {row.truncate: getattr(row, measure) for row in rows if row.family == family}
            axes.plot(list(points), list(points.values()), label=family, **style_of(i))
        axes.set_ylabel(f"{measure}{' error' * (measure != 'bias')} (%)")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(TRUNCATED)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels(panels)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=4, columnspacing=1.0, handlelength=1.8, frameon=False)
    return png_of(figure)
