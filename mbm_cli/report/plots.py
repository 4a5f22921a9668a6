"""Pictures of results, as PNG bytes, readable at the width of a paper's column and in greyscale."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from textwrap import TextWrapper
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mbm_cli.costs import Prices
from mbm_cli.experiments.characterize import Characterization, Characterized, Pairs, TruncationErrors
from mbm_cli.experiments.compare import Comparison
from mbm_cli.experiments.evaluate import Evaluated, Evaluation
from mbm_cli.experiments.fronts import front
from mbm_cli.experiments.members import MULTIPLIER, shown
from mbm_cli.experiments.profile_conv import ConvProfile
from mbm_cli.experiments.profile_epoch import EpochProfile
from mbm_cli.experiments.search import Search
from mbm_cli.experiments.sweep import CombinationResult, Sweep
from mbm_cli.experiments.train import Trained
from mbm_cli.multipliers.float32 import FAMILIES
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.runs import Summary

COLUMN = 8 / 2.54  # inches: the width of a paper's column
# For pictures of that width.
small = rc_context({"font.size": 6.7, **dict.fromkeys(("axes.titlesize", "figure.titlesize", "figure.labelsize"), 7)})
# From the palette of Okabe and Ito, with line styles that differ too.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_LINES = len(COLORS)
MOST_RANGES = 60
MOST_COLUMNS = 12  # of a grid
TRAIN = {"color": "#0072B2", "linestyle": "--", "marker": "o", "markersize": 4}
TEST = {"color": "#D55E00", "linestyle": "-", "marker": "s", "markersize": 4}
# Errors below zero are blue, above it orange; it gets lighter all the way, so that signs survive in greyscale.
ERRORS = LinearSegmentedColormap.from_list("errors", ("#0b2545", "#2f6fb0", "#b0b0b0", "#f2b44b", "#fff3c4"))
ACCURACIES = LinearSegmentedColormap.from_list("accuracies", ("#ffffff", "#0072B2"))
LEGEND_INSIDE = 14  # characters of a name, above which a legend has no room between the lines
FAR_BELOW = 20  # times as far below the best accuracy as the median, a point is left out: others would lie on a line
MAP_ROWS = 6  # multipliers in a column
TRUNCATED = "truncated bits"
NOTE = """Area and power, against an IEEE single-precision
multiplier, as the paper reports (mbm is AFMB there)."""


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
    drawn = [one for one in result.combinations if one.test_accuracy]
    if not drawn or not result.vary:
        return {}
    if all(one.cost is not None for one in drawn) and len({one.cost for one in drawn}) > 1:
        points = [CostPoint(_label(one.values), one.cost or 0.0, one.test_accuracy) for one in drawn]
        return {"sweep.png": cost_front(points, result.costs or "")}
    fields, sizes = list(result.vary), sorted(map(len, result.vary.values()))
    lines, (field, numbers) = _lines(drawn, fields), _numbers(drawn, fields)
    # Of two fields, truncated bits lie along the axis where they have most values, and enough of them for a line.
    least = max([2, *(len(line.accuracies) for line in numbers)]) if len(fields) == 2 else 1
    if lines and max(len(line.accuracies) for line in lines) > least:
        png = sweep_lines(lines, reported())
    elif numbers:
        png = sweep_lines(numbers, {}, field, ", ".join(other for other in fields if other != field))
    elif len(fields) == 2 and sizes[0] <= MOST_COLUMNS and sizes[1] <= MOST_RANGES:
        png = sweep_grid(result.combinations, fields)
    else:
        png = sweep_ranges([(_label(one.values), one.test_accuracy) for one in drawn], ", ".join(fields))
    return {"sweep.png": png}


@pictures.register
def _(result: Search, made: object) -> dict[str, bytes]:
    searched, uniform, chosen = (
        [CostPoint("", one.cost, [one.test_accuracy]) for one in points if one and one.test_accuracy is not None]
        for points in (result.searched, result.uniform, [result.chosen])
    )
    return {"search.png": cost_front(searched, result.costs or "", uniform, chosen)} if searched and uniform else {}


@pictures.register
def _(result: Evaluation, made: Evaluated) -> dict[str, bytes]:
    return {"confusion.png": confusions(made.confusions)}


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


def _numbers(combinations: Sequence[CombinationResult], fields: Sequence[str]) -> "tuple[str, list[SweepLine]]":
    """Return the field with most numbers, and accuracy against it: lines over one field or two, else none."""

    def count(field: str) -> int:
        values = [one.values[field] for one in combinations]
        return len(set(values)) if all(type(value) in (int, float) for value in values) else 0

    field, lines = max(fields, key=count), dict[str, SweepLine]()
    for one in combinations if len(fields) <= 2 and count(field) > 1 else ():
        other = _label({name: value for name, value in one.values.items() if name != field})
        lines.setdefault(other, SweepLine("", other, False, {})).accuracies[one.values[field]] = one.test_accuracy
    return field, list(lines.values()) if len(lines) <= MOST_LINES else []


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(map(shown, values.values()))


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
    figure.suptitle(_wrapped(title, 80), fontsize="medium")
    return _png(figure)


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
            _draw_means(axes, epochs, by_epoch, i, _wrapped(multiplier, 70))
    for axes, label in ((accuracy, "test accuracy (%)"), (loss, "training loss")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    title = f"{result.model}, {result.seeds} seed{'s'[: result.seeds != 1]}"
    if has_room:
        accuracy.legend(title=title)
    else:
        _legend(figure, accuracy, "outside lower center", title=title, fontsize="small")
    return _png(figure)


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
    accuracy.set_yticks(rows, [_wrapped(column.multiplier, 17) for column in others])
    accuracy.set(ylim=(len(others) - 0.5, -0.5), xlabel="test accuracy (%)")
    difference.set_xlabel("difference (points)")
    for axes in (accuracy, difference):
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(3, min_n_ticks=3))
        axes.grid(axis="x", alpha=0.3)
    title = f"{result.model} after one epoch, {result.seeds} seed{'s'[: result.seeds != 1]}"
    figure.legend(loc="outside upper center", ncols=3, title=title, handlelength=1, columnspacing=1, fontsize=6.5)
    return _png(figure)


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
    figure.suptitle("\n".join(_wrapped(line, 58) for line in title.splitlines()))
    return {"profile.png": _png(figure)}


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
    layers.set_title(_wrapped(f"layers, {result.multiplier}", 36), fontsize="medium")
    for axes in (phases, layers):
        axes.set_xlabel("seconds")
        axes.invert_yaxis()
    figure.legend(*layers.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return {"profile.png": _png(figure)}


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
        axes.set_title(f"{_wrapped(multiplier, 31)}: {100 * matrix.trace() / matrix.sum():.2f} %")
    figure.supxlabel("answer of the network")
    figure.supylabel("digit")
    return _png(figure)


@dataclass(frozen=True)
class SweepLine:
    """A line of `sweep_lines`: the test accuracies (fractions) of some seeds, by truncated bits or another number.

    ``rounded``: bits of the result are dropped, too.
    """

    family: str
    label: str
    rounded: bool
    accuracies: dict[float, list[float]]


Reported = Mapping[tuple[str, int], tuple[float, float]]


def reported() -> Reported:
    """Return how many times less area and power float families take by their truncated bits, as publications report."""
    named = [(Multiplier.parse(cost.multiplier), cost.figures) for cost in Prices.load().reported()]
    return {
        (one.family, one.truncate): (1 / figures["area"], 1 / figures["power"])
        for one, figures in named
        if not one.is_integer and {"area", "power"} <= figures.keys()
    }


@small
def sweep_lines(lines: Sequence[SweepLine], reported: Reported, field: str = TRUNCATED, title: str = "") -> bytes:
    """Draw test accuracy against a field's numbers: means over seeds, with bands from the lowest to the highest.

    The exact product alone is a horizontal line; ``reported`` improvements stand below the points that have them. The
    title is the legend's, which a single line without a label does not need.
    """
    figure = Figure(figsize=(COLUMN, 2.3 + 0.17 * len(lines) + 0.6 * bool(reported)), layout="constrained")
    axes = figure.subplots()
    marked: dict[int, dict[str, float]] = {}
    for i, line in enumerate(lines):
        numbers, style, label = sorted(line.accuracies), _style(i), _wrapped(line.label, 44)
        seeds = [100 * np.array(line.accuracies[x]) for x in numbers]
        if line.family == "exact" and numbers == [0]:
            axes.axhspan(seeds[0].min(), seeds[0].max(), color=style["color"], alpha=0.15, linewidth=0)
            axes.axhline(seeds[0].mean(), color=style["color"], linestyle=style["linestyle"], linewidth=1, label=label)
            continue
        _draw_means(axes, numbers, seeds, i, label)
        for t, values in zip(numbers, seeds, strict=True):
            if not line.rounded and (line.family, t) in reported:
                below = marked.setdefault(int(t), {})
                below[line.family] = min(float(values.mean()), below.get(line.family, 100.0))
    axes.margins(x=0.04)
    axes.set(xlabel=_plain(field), ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    _mark_numbers(axes, sorted({x for line in lines for x in line.accuracies}), field == TRUNCATED)
    if marked:
        _write_below(axes, marked, reported)
        axes.text(0, -0.2, NOTE, transform=axes.transAxes, va="top")
    if any(line.label for line in lines):
        _legend(figure, axes, "outside upper center", title=_plain(title) or None)
    return _png(figure)


def _mark_numbers(axes: Axes, numbers: Sequence[float], are_bits: bool) -> None:
    """Set ticks at the numbers if they have room, on a logarithmic axis if they span more than a few doublings."""
    is_logarithmic = not are_bits and 0 < 8 * numbers[0] <= numbers[-1]
    axes.set_xscale("log" if is_logarithmic else "linear")
    places = np.log(numbers) if is_logarithmic else np.array(numbers)
    if len(numbers) > 1 and np.diff(places).min() > 0.1 * np.ptp(places):
        axes.set_xticks(numbers, [f"{x:g}" for x in numbers])
        axes.xaxis.set_minor_locator(NullLocator())
    elif not is_logarithmic:
        axes.xaxis.set_major_locator(MaxNLocator(integer=are_bits, min_n_ticks=1))


def _write_below(axes: Axes, marked: dict[int, dict[str, float]], reported: Reported) -> None:
    """Write improvements below their points, in a part of the axes that is kept free of data."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]
    axes.set(ylim=(low - 0.45 * (high - low), high), yticks=ticks)
    middle = sum(axes.get_xlim()) / 2
    for t, families in marked.items():
        axes.vlines(t, low - 0.03 * (high - low), min(families.values()), color="0.4", linestyle=":", linewidth=0.8)
        text = "\n".join(
            f"{family}: area ÷ {reported[family, t][0]:.3g},\npower ÷ {reported[family, t][1]:.3g}"
            for family in families
        )
        side = "left" if t < middle else "right"
        blank = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(t, low - 0.06 * (high - low), text, ha=side, va="top", linespacing=1.1, bbox=blank)


@dataclass(frozen=True)
class CostPoint:
    """A point of `cost_front`: a cost, and the test accuracies (fractions) of some seeds."""

    label: str
    cost: float
    accuracies: Sequence[float]


@small
def cost_front(
    points: Sequence[CostPoint], costs: str, others: Sequence[CostPoint] = (), chosen: Sequence[CostPoint] = ()
) -> bytes:
    """Draw test accuracy against cost, and the front: the points with no cheaper one that is as accurate.

    Points of a few are named in the legend. ``others`` are uniform assignments of a search.
    """
    is_search, few = bool(others), len(points) <= MOST_LINES
    named = 0 if is_search or not few else len(points)
    figure = Figure(figsize=(COLUMN, 2.9 + 0.16 * named), layout="constrained")
    axes = figure.subplots()
    everything = [(one.cost, 100 * float(np.mean(one.accuracies))) for one in (*points, *others)]
    corners = [everything[i] for i in front(everything)]
    most = max(one[0] for one in everything)
    axes.step(
        *zip(*corners, (most, corners[-1][1]), strict=True), where="post", color="0.4", linewidth=1, label="front"
    )
    for i, one in enumerate(points):
        style = _style(i) if named else {"color": COLORS[2], "marker": "o", "markersize": 4}
        text = _wrapped(one.label, 44) if named else "searched" if is_search and i == 0 else None
        axes.vlines(one.cost, 100 * min(one.accuracies), 100 * max(one.accuracies), color=style["color"], alpha=0.5)
        axes.plot(one.cost, everything[i][1], **{**style, "linestyle": ""}, label=text)
    groups: Sequence[tuple[Sequence[CostPoint], dict[str, Any]]] = (
        (others, {"marker": "s", "color": COLORS[1], "mfc": "none", "markersize": 6, "label": "uniform assignments"}),
        (chosen, {"marker": "*", "color": COLORS[3], "markersize": 10, "label": "chosen"}),
    )
    for group, style in groups:
        if group:
            heights = [100 * float(np.mean(one.accuracies)) for one in group]
            axes.plot([one.cost for one in group], heights, linestyle="", **style)
    if most >= 8 * min(one[0] for one in everything):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=_plain("cost: " + costs.partition(" (")[0]), ylabel="test accuracy (%)")
    axes.margins(x=0.06, y=0.08)
    axes.grid(alpha=0.3)
    means = np.array([mean for _, mean in set(everything)])
    lowest = means.max() - FAR_BELOW * (means.max() - np.median(means))
    if below := int((means < lowest).sum()):
        axes.set_ylim(lowest, means.max() + 0.08 * (means.max() - lowest))
        text = f"{below} point{'s'[: below != 1]} below"
        axes.annotate(text, (0.98, 0.02), xycoords="axes fraction", ha="right")
    _legend(figure, axes, "outside upper center")
    return _png(figure)


@small
def sweep_grid(combinations: Sequence[CombinationResult], fields: Sequence[str]) -> bytes:
    """Draw mean test accuracies over two fields as a heat map, with their standard deviations written in."""
    values = {field: list(dict.fromkeys(shown(one.values[field]) for one in combinations)) for field in fields}
    # Long names stand at the left, where they have room.
    across, down = sorted(fields, key=lambda field: (len(values[field]) > MOST_COLUMNS, max(map(len, values[field]))))
    means = np.full((len(values[down]), len(values[across])), np.nan)
    figure = Figure(figsize=(max(COLUMN, 1.4 + 0.5 * means.shape[1]), 0.8 + 0.3 * len(means)), layout="constrained")
    axes = figure.subplots()
    known = [100 * one.test_accuracy_mean for one in combinations if one.test_accuracy_mean is not None]
    norm = Normalize(min(known) - 0.2 * np.ptp(known) - 0.01, max(known))  # white is what failed, and no mean
    for one in combinations:
        row, column = values[down].index(shown(one.values[down])), values[across].index(shown(one.values[across]))
        text, color = "failed", "black"
        if one.test_accuracy_mean is not None:
            means[row, column] = 100 * one.test_accuracy_mean
            spread = "" if one.test_accuracy_std is None else f"\n± {100 * one.test_accuracy_std:.2f}"
            text, color = f"{means[row, column]:.2f}{spread}", "white" if norm(means[row, column]) > 0.85 else "black"
        axes.text(column, row, text, color=color, ha="center", va="center", linespacing=1.1)
    axes.imshow(means, cmap=ACCURACIES, norm=norm, aspect="auto")
    axes.set_xticks(range(means.shape[1]), [_wrapped(value, 10) for value in values[across]])
    axes.set_yticks(range(len(means)), [_wrapped(value, 22) for value in values[down]])
    axes.tick_params(length=0)
    axes.set(xlabel=_plain(across), ylabel=_plain(down))
    is_spread = any(one.test_accuracy_std is not None for one in combinations)
    figure.suptitle(f"test accuracy (%){', mean ± standard deviation' * is_spread}")
    return _png(figure)


@small
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
    axes.set_yticks(positions, labels)
    axes.set(ylim=(-0.6, len(drawn) - 0.4), xlabel="test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(alpha=0.3)
    some = "" if len(drawn) == len(combinations) else f" (best {len(drawn)} of {len(combinations)})"
    figure.suptitle(_wrapped(f"{title}{some}", 52))
    return _png(figure)


def _plain(text: str) -> str:
    """Escape what Matplotlib would interpret: a file's name may have a $, or bytes that are not text."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def _wrapped(name: str, width: int) -> str:
    """Wrap the name of a multiplier or a combination; drop the folders of files."""
    name = re.sub(r"\b(lut|python|c):(?! )[^,}]*/", r"\1:", name)
    wrapper = TextWrapper(width, max_lines=3, placeholder=" ...")
    wrapper.wordsep_re = re.compile(r"(\s+|(?<=[_:])(?=\w))")  # a long name goes on in the next line after these
    return _plain(wrapper.fill(name))


def _style(i: int) -> dict[str, Any]:
    """Return color, line and marker of the i-th of several lines."""
    color, line, marker = COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
    return {"color": color, "linestyle": line, "marker": marker, "markersize": 4}


def _draw_means(axes: Axes, x: Sequence[float], seeds: Sequence[Any], i: int, label: str) -> None:
    """Draw the i-th line: means over the seeds of each point, and a band from the lowest to the highest."""
    low, mean, high = ([float(f(values)) for values in seeds] for f in (np.min, np.mean, np.max))
    axes.fill_between(x, low, high, color=_style(i)["color"], alpha=0.2, linewidth=0)
    axes.plot(x, mean, label=label, **_style(i))
    if len(x) == 1:
        axes.vlines(x, low, high, color=_style(i)["color"], linewidth=1)


def _legend(figure: Figure, axes: Axes, place: str, **more: Any) -> None:
    """Put a legend outside the axes, in two columns where names are short."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 20 else 1
    figure.legend(handles, labels, loc=place, ncols=columns, handlelength=3, **more)  # type: ignore[call-overload]


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
        where.set(title=_wrapped(one.name, 22), ylabel="fraction of a")
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
    for axes, measure in zip(panels, ("bias", "mean", "peak"), strict=True):
        for i, family in enumerate(dict.fromkeys(row.family for row in rows)):
            points = {row.truncate: getattr(row, measure) for row in rows if row.family == family}
            axes.plot(list(points), list(points.values()), label=family, **_style(i))
        axes.set_ylabel(f"{measure}{' error' * (measure != 'bias')} (%)")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel(TRUNCATED)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels(panels)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=4, columnspacing=1.0, handlelength=1.8, frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
