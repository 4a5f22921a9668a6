"""Pictures of sweeps and searches: accuracy against what was varied, or against cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mbm_cli.costs import Prices
from mbm_cli.experiments.fronts import front
from mbm_cli.experiments.members import MULTIPLIER, shown
from mbm_cli.experiments.search import Search
from mbm_cli.experiments.sweep import CombinationResult, Sweep
from mbm_cli.multipliers.float32 import FAMILIES
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.report.drawing import (
    COLORS,
    COLUMN,
    TRUNCATED,
    draw_means,
    legend,
    plain,
    png_of,
    small,
    style_of,
    wrapped,
)

MOST_LINES = len(COLORS)
MOST_RANGES = 60
MOST_COLUMNS = 12  # of a grid
ACCURACIES = LinearSegmentedColormap.from_list("accuracies", ("#ffffff", "#0072B2"))
FAR_BELOW = 20  # times as far below the best accuracy as the median, a point is left out: others would lie on a line
NOTE = """Area and power, against an IEEE single-precision
multiplier, as the paper reports (mbm is AFMB there)."""


def of_sweep(result: Sweep) -> bytes | None:
    """Draw accuracy against cost, truncated bits, numbers or names, whichever suits what was varied."""
    drawn = [one for one in result.combinations if one.test_accuracy]
    if not drawn or not result.vary:
        return None
    if all(one.cost is not None for one in drawn) and len({one.cost for one in drawn}) > 1:
        points = [CostPoint(_label(one.values), one.cost or 0.0, one.test_accuracy) for one in drawn]
        return cost_front(points, result.costs or "")
    fields, sizes = list(result.vary), sorted(map(len, result.vary.values()))
    lines, (field, numbers) = _lines(drawn, fields), _numbers(drawn, fields)
    # Of two fields, truncated bits lie along the axis where they have most values, and enough of them for a line.
    least = max([2, *(len(line.accuracies) for line in numbers)]) if len(fields) == 2 else 1
    if lines and max(len(line.accuracies) for line in lines) > least:
        return sweep_lines(lines, reported())
    if numbers:
        return sweep_lines(numbers, {}, field, ", ".join(other for other in fields if other != field))
    if len(fields) == 2 and sizes[0] <= MOST_COLUMNS and sizes[1] <= MOST_RANGES:
        return sweep_grid(result.combinations, fields)
    return sweep_ranges([(_label(one.values), one.test_accuracy) for one in drawn], ", ".join(fields))


def of_search(result: Search) -> bytes | None:
    """Draw accuracy against cost: uniform assignments, what was searched, and what was chosen."""
    searched, uniform, chosen = (
        [CostPoint("", one.cost, [one.test_accuracy]) for one in points if one and one.test_accuracy is not None]
        for points in (result.searched, result.uniform, [result.chosen])
    )
    return cost_front(searched, result.costs or "", uniform, chosen) if searched and uniform else None


Reported = Mapping[tuple[str, int], tuple[float, float]]


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


@dataclass(frozen=True)
class SweepLine:
    """A line of `sweep_lines`: the test accuracies (fractions) of some seeds, by truncated bits or another number.

    ``rounded``: bits of the result are dropped, too.
    """

    family: str
    label: str
    rounded: bool
    accuracies: dict[float, list[float]]


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
        numbers, style, label = sorted(line.accuracies), style_of(i), wrapped(line.label, 44)
        seeds = [100 * np.array(line.accuracies[x]) for x in numbers]
        if line.family == "exact" and numbers == [0]:
            axes.axhspan(seeds[0].min(), seeds[0].max(), color=style["color"], alpha=0.15, linewidth=0)
            axes.axhline(seeds[0].mean(), color=style["color"], linestyle=style["linestyle"], linewidth=1, label=label)
            continue
        draw_means(axes, numbers, seeds, i, label)
        for t, values in zip(numbers, seeds, strict=True):
            if not line.rounded and (line.family, t) in reported:
                below = marked.setdefault(int(t), {})
                below[line.family] = min(float(values.mean()), below.get(line.family, 100.0))
    axes.margins(x=0.04)
    axes.set(xlabel=plain(field), ylabel="test accuracy (%)")
    axes.grid(alpha=0.3)
    _mark_numbers(axes, sorted({x for line in lines for x in line.accuracies}), field == TRUNCATED)
    if marked:
        _write_below(axes, marked, reported)
        axes.text(0, -0.2, NOTE, transform=axes.transAxes, va="top")
    if any(line.label for line in lines):
        legend(figure, axes, "outside upper center", title=plain(title) or None)
    return png_of(figure)


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
        style = style_of(i) if named else {"color": COLORS[2], "marker": "o", "markersize": 4}
        text = wrapped(one.label, 44) if named else "searched" if is_search and i == 0 else None
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
    axes.set(xlabel=plain("cost: " + costs.partition(" (")[0]), ylabel="test accuracy (%)")
    axes.margins(x=0.06, y=0.08)
    axes.grid(alpha=0.3)
    means = np.array([mean for _, mean in set(everything)])
    lowest = means.max() - FAR_BELOW * (means.max() - np.median(means))
    if below := int((means < lowest).sum()):
        axes.set_ylim(lowest, means.max() + 0.08 * (means.max() - lowest))
        text = f"{below} point{'s'[: below != 1]} below"
        axes.annotate(text, (0.98, 0.02), xycoords="axes fraction", ha="right")
    legend(figure, axes, "outside upper center")
    return png_of(figure)


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
    axes.set_xticks(range(means.shape[1]), [wrapped(value, 10) for value in values[across]])
    axes.set_yticks(range(len(means)), [wrapped(value, 22) for value in values[down]])
    axes.tick_params(length=0)
    axes.set(xlabel=plain(across), ylabel=plain(down))
    is_spread = any(one.test_accuracy_std is not None for one in combinations)
    figure.suptitle(f"test accuracy (%){', mean ± standard deviation' * is_spread}")
    return png_of(figure)


@small
def sweep_ranges(combinations: Sequence[tuple[str, Sequence[float]]], title: str) -> bytes:
    """Draw test accuracies of combinations (fractions, by seed): the mean, and a bar from the lowest to the highest.

    Of more than MOST_RANGES combinations those with the highest means are drawn.
    """
    best = sorted(combinations, key=lambda one: -np.mean(one[1]))[:MOST_RANGES]
    drawn = [one for one in combinations if one in best]
    labels = [wrapped(name, 28) for name, _ in drawn]
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
    figure.suptitle(wrapped(f"{title}{some}", 52))
    return png_of(figure)
