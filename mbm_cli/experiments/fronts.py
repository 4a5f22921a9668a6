"""Fronts of cost and accuracy: which points are on one, how much it covers, and which assignments may be on it."""

from collections.abc import Mapping, Sequence

import numpy as np

STEPS = 10_000  # into which the largest cost of a network is divided: costs are rounded to these


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, accuracy) that no other beats, by rising cost; the first of equals."""
    indices: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not indices or points[i][1] > points[indices[-1]][1]:
            indices.append(i)
    return indices


def hypervolume(points: Sequence[tuple[float, float]], cost: float, accuracy: float) -> float:
    """Return the area that points (cost, accuracy) dominate up to a reference point, the worst cost and accuracy."""
    area, height = 0.0, accuracy
    for i in front(points):
        if points[i][0] < cost and points[i][1] > height:
            area += (cost - points[i][0]) * (points[i][1] - height)
            height = points[i][1]
    return area


def additive_front(
    costs: Mapping[str, Mapping[str, float]], losses: Mapping[str, Mapping[str, float]]
) -> list[dict[str, str]]:
    """Return the assignments of candidates to layers that no other beats in the sums of costs and of losses.

    This is the multiple-choice knapsack problem, solved exactly for every budget at once: layer by layer, the best loss
    for each total cost is kept (dynamic programming over non-dominated states; Nemhauser and Ullmann, Management
    Science 15(9), 1969). Costs are rounded to 1 / STEPS of the sum of each layer's largest, which bounds the states.

    Args:
        costs, losses: by layer and candidate.

    Returns:
        From the cheapest to the one with the least loss.
    """
    unit = sum(max(of_layer.values()) for of_layer in costs.values()) / STEPS
    totals, sums = np.zeros(1, np.int64), np.zeros(1)
    choices = np.zeros((1, 0), np.int64)
    for layer, of_layer in costs.items():
        names = list(of_layer)
        steps = np.array([round(of_layer[name] / unit) for name in names])
        more = np.array([losses[layer][name] for name in names])
        totals, sums = np.add.outer(totals, steps).ravel(), np.add.outer(sums, more).ravel()
        chosen = np.tile(np.arange(len(names)), len(choices))
        choices = np.column_stack([choices.repeat(len(names), axis=0), chosen])
        order = np.lexsort((sums, totals))
        best = np.minimum.accumulate(sums[order])
        kept = order[np.concatenate([[True], best[1:] < best[:-1]])]
        totals, sums, choices = totals[kept], sums[kept], choices[kept]
    return [
        {layer: list(of_layer)[i] for (layer, of_layer), i in zip(costs.items(), row, strict=True)}
        for row in choices.tolist()
    ]
