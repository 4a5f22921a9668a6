"""Pictures of results, by the Matplotlib figures that are saved."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from mbm_cli.experiments.characterize import Characterization, Pairs
from mbm_cli.experiments.compare import Column, Comparison, Interval
from mbm_cli.experiments.evaluate import Evaluation
from mbm_cli.experiments.profile_conv import ConvProfile, TimedConv
from mbm_cli.experiments.sweep import CombinationResult, Sweep
from mbm_cli.report.plots import pictures

LONG = "lut:/a/very/long/path/to/the/tables/of_a_truncated_multiplier.npy"
BY_LAYER = "{conv1: exact, default: mbm-t8}"
NAMES = ("mbm", "mbm-t8", LONG, BY_LAYER, "mitchell", "drum-k6", "mbm-t16-r7", "c:/home/me/my_multiplier.h:product")


@pytest.fixture
def draw(monkeypatch):
    """Draw a result's only picture and return its figure, after checking that nothing leaves it."""
    save, figures = Figure.savefig, []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: figures.append(figure) or save(figure, *a, **k))

    def drawn(result, **made) -> Figure:
        (png,) = pictures(result, SimpleNamespace(**made)).values()
        assert png.startswith(b"\x89PNG")
        figure = figures.pop()
        box, page = figure.get_tightbbox(), figure.bbox_inches
        assert box.x0 > -0.02
        assert box.y0 > -0.02
        assert box.x1 < page.width + 0.02
        assert box.y1 < page.height + 0.02
        return figure

    return drawn


def characterized(draw, **errors) -> Figure:
    x = np.linspace(0.1, 0.9, 10)
    return draw(Characterization(0, "cpu", []), pairs=[Pairs(name, x, x, np.array(e)) for name, e in errors.items()])


def test_error_maps_share_a_scale_to_the_peak(draw):
    """The mean of a cell is 4 % and the largest error 5 %: the scale ends at 5 %, also for the smaller errors."""
    pairs = [
        Pairs("mbm", np.array([0.2, 0.2]), np.array([0.2, 0.2]), np.array([-5.0, -3.0])),
        Pairs("exact", np.array([0.2, 0.7]), np.array([0.2, 0.7]), np.array([0.5, 1.0])),
    ]
    figure = draw(Characterization(0, "cpu", []), pairs=pairs)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in images] == [(-5, 5)] * 2
    assert images[0].norm is images[1].norm
    assert np.nanmin(images[0].get_array()) == -4
    bars = [axes.get_xlabel() for axes in figure.axes if "cell" in axes.get_xlabel()]
    assert bars == ["mean error of a cell (%); scale: ± peak error"]


def test_histograms_of_errors_share_their_axes(draw):
    figure = characterized(draw, mbm=range(-5, 5), exact=[0.0] * 10)
    histograms = [axes for axes in figure.axes if axes.get_ylabel() == "pairs (%)"]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in histograms}) == 1
    # All errors in one bar, which is cut and labelled, so that it leaves the others room.
    assert [text.get_text().strip() for axes in histograms for text in axes.texts] == ["100 %"]


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_error_maps_of_one_to_eight_multipliers(draw, count):
    figure = characterized(draw, **{name: [i / 10] * 10 for i, name in enumerate(NAMES[:count])})
    assert len([axes for axes in figure.axes if axes.images]) == count


def swept(fields, seeds=2) -> Sweep:
    combinations = []
    for i, chosen in enumerate(product(*fields.values())):
        accuracies = [0.9 + i / 1000 + seed / 500 for seed in range(seeds)]
        std = 0.01 if seeds > 1 else None
        values = dict(zip(fields, chosen, strict=True))
        combinations.append(CombinationResult(values, accuracies, float(np.mean(accuracies)), std, 1, 1, 1, 0, []))
    return Sweep("lenet-mbm", {name: [str(v) for v in of] for name, of in fields.items()}, seeds, 1, combinations, [])


def test_two_fields_of_a_sweep_are_a_grid(draw):
    result = swept({"model.multiplier": NAMES[:4], "optimizer.name": ["sgd", "adam"]})
    failed = replace(result.combinations[1], test_accuracy=[], test_accuracy_mean=None, test_accuracy_std=None)
    result.combinations[1] = failed
    (axes,) = draw(result).axes
    assert axes.images[0].get_array().shape == (4, 2)
    texts = [text.get_text() for text in axes.texts]
    assert texts[:3] == ["90.10\n± 1.00", "failed", "90.30\n± 1.00"]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("model.multiplier", "optimizer.name")


def test_a_numeric_field_gives_lines(draw):
    rates = [0.001, 0.003, 0.01]
    figure = draw(swept({"model.multiplier": ["exact", BY_LAYER], "optimizer.lr": rates}))
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["exact", BY_LAYER]
    assert [list(line.get_xdata()) for line in axes.lines] == [rates] * 2
    assert len({line.get_linestyle() for line in axes.lines}) == 2
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.003", "0.01"]
    assert figure.legends[0].get_title().get_text() == "model.multiplier"


def test_many_truncations_stay_along_the_axis(draw):
    names = ["mbm", "mbm-t4", "mbm-t8", "mbm-t16"]
    (axes,) = draw(swept({"model.multiplier": names, "optimizer.lr": [0.001, 0.003]})).axes
    assert axes.get_xlabel() == "truncated bits"
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 4, 8, 16]] * 2


@pytest.mark.parametrize("more", [{"optimizer.name": ["sgd"], "data.batch_size": [1, 2]}, {}])
def test_other_sweeps_stay_a_list(draw, more):
    (axes,) = draw(swept({"model.multiplier": NAMES, **more})).axes
    assert len(axes.get_yticklabels()) == 8 * (2 if more else 1)


@pytest.mark.parametrize(
    ("count", "grid"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (2, 3)), (8, (3, 3))]
)
def test_confusions_are_a_grid_of_three_columns(draw, count, grid):
    matrix = np.diag([980] * 10) + np.eye(10, k=1, dtype=int)
    figure = draw(Evaluation("run", "mbm", []), confusions=dict.fromkeys(NAMES[:count], matrix))
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == count
    assert shown[0].get_gridspec().get_geometry() == grid
    assert figure.bbox_inches.width * 200 <= 1600
    assert sum(text.get_text() == "1" for text in shown[0].texts) == 9  # single mistakes are written, and not white
    assert shown[0].images[0].norm(1 / 981) > 0.05


def test_shares_of_the_ceiling_are_bars(draw):
    shapes = [
        TimedConv(name, "1->6 5x5 28x28", 64, 1, 1.0, 1.0, {}, {}, {}, 1.0, share)
        for name, share in (("lenet conv1", 0.45), ("", 1.06))
    ]
    figure = draw(ConvProfile(LONG, "cpu", "avx512", 2, 5.32e9, shapes))
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [45, 106]
    assert [text.get_text() for text in axes.texts] == ["45 %", "106 %"]
    assert axes.yaxis_inverted()
    assert "ceiling: 5.32 GMAC/s" in figure.get_suptitle()


def compared(names, seeds) -> Comparison:
    """Return a comparison of one epoch, of which each multiplier is 1 point below exact but for the last seed."""
    exact = [0.9 + seed / 100 for seed in range(seeds)]
    columns = []
    for name in ("exact", *names):
        accuracies = [a - 0.01 * (name != "exact" and seed < 2) for seed, a in enumerate(exact)]
        interval = Interval(-0.01, *((-0.02, 0.005) if seeds > 1 else (None, None))) if name != "exact" else None
        columns.append(Column(name, accuracies, 0.9, None, 0.9, 1, 1, {}, 1, 1, 1, 1, [], [], interval))
    return Comparison("lenet-mbm", "lenet", "cpu", ["exact", *names], seeds, 1, columns, [], [])


def test_one_epoch_joins_the_dots_of_a_seed(draw):
    accuracy, difference = draw(compared(["mbm"], 3)).axes
    (joined,) = accuracy.collections
    ends = [sorted(segment[:, 0]) for segment in joined.get_segments()]
    np.testing.assert_allclose(ends, [[89, 90], [90, 91], [92, 92]])
    np.testing.assert_allclose(difference.lines[0].get_xdata(), [-1, -1, 0], atol=1e-9)
    (interval,) = difference.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(interval[:, 0], [-2, 0.5])


@pytest.mark.parametrize("count", [1, 3, 8])
def test_one_seed_has_dots_without_an_interval(draw, count):
    accuracy, difference = draw(compared(NAMES[:count], 1)).axes
    assert [len(line.get_xdata()) for line in accuracy.lines] == [count, count]
    assert not difference.containers


def test_long_names_lose_folders_and_are_wrapped(draw):
    accuracy, _ = draw(compared([LONG, BY_LAYER, "{conv1: exact, default: " + LONG + "}"], 2)).axes
    labels = [label.get_text() for label in accuracy.get_yticklabels()]
    assert labels[:2] == ["lut:of_a_\ntruncated_\nmultiplier.npy", "{conv1: exact,\ndefault: mbm-t8}"]
    assert "/" not in labels[2]
