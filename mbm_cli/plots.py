"""Figures, as PNG bytes, readable at the width of a paper's column and in greyscale."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# From the palette of Okabe and Ito, with line styles that differ too.
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
