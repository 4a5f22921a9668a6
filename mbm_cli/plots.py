"""Figures, as PNG bytes, readable at the width of a paper's column and in greyscale."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# From the palette of Okabe and Ito, with line styles that differ too.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
TRAIN = {"color": "#0072B2", "linestyle": "--", "marker": "o", "markersize": 4}
TEST = {"color": "#D55E00", "linestyle": "-", "marker": "s", "markersize": 4}


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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
