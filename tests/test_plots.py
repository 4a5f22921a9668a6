"""Pictures: what is drawn, whatever multipliers are called and however many there are."""

from dataclasses import replace

import numpy as np
import pytest
from commands import PNG
from matplotlib.figure import Figure

from mbm_cli.experiments.characterize import Pairs
from mbm_cli.experiments.compare import Comparison
from mbm_cli.experiments.sweep import CombinationResult, Sweep
from mbm_cli.report import drawing, plots, sweep_plots


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Collect figures in the place of writing them."""
    collected = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: collected.append(figure))
    return collected


def pairs(name: str, a: object, b: object, error: object) -> Pairs:
    return Pairs(name, *(np.array(values, dtype=float) for values in (a, b, error)))


@pytest.mark.parametrize("name", ["lut:$\\frac$b_^-with-a-long-name.bin", "lut:\udcc3é.bin"])
def test_any_name_is_drawn(name):
    """A $ would begin mathematics; no font has the characters of a name that is not UTF-8."""
    epoch = dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy"), 0.5)
    drawn = [
        plots.curves([{"epoch": 1, **epoch}], name),
        plots.confusions({name: np.eye(10, dtype=int)}),
        sweep_plots.sweep_ranges([(name, [0.5])], name),
        sweep_plots.sweep_lines([sweep_plots.SweepLine("mbm", name, False, {0: [0.5], 8: [0.25]})], {}),
        plots.characterization([pairs(name, [0.25, 0.5], [0.25, 0.5], [0.25, 0.5])]),
    ]
    assert all(picture.startswith(PNG) for picture in drawn)


# Comparisons


@pytest.mark.parametrize("multiplier", ["mbm", "{conv1: mbm-t20, default: exact}"])
def test_legend_of_a_comparison_hides_nothing(multiplier, figures):
    """It lies beside the axes, or between the lines where there is room."""
    metrics = [{"epoch": e + 1, "test_accuracy": 0.9 + e / 20, "train_loss": 0.3 - e / 5} for e in range(2)]
    names = ["exact", multiplier]
    runs = [{"multiplier": name, "metrics": metrics} for name in names for _ in range(2)]
    result = Comparison("x", "lenet", "cpu", names, seeds=2, epochs=2, columns=[], runs=runs, verdicts=[])
    assert plots.pictures(result, None).keys() == {"compare.png"}
    (figure,) = figures
    figure.draw_without_rendering()
    if multiplier != "mbm":
        legend = figure.legends[0].get_window_extent()
        assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)
        assert figure.bbox.containsx(legend.x0)
        assert figure.bbox.containsx(legend.x1)
    else:
        (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
        assert legend.get_window_extent().width < figure.axes[0].bbox.width


# Sweeps


def swept(*names: str, **others: list[float]) -> Sweep:
    """Return a sweep over multipliers and perhaps another field."""
    fields = {"model.multiplier": list(names)} if names else {}
    fields |= {field.replace("__", "."): values for field, values in others.items()}
    choices = [{}]
    for field, values in fields.items():
        choices = [{**choice, field: value} for choice in choices for value in values]
    none = CombinationResult({}, [0.9, 0.91], None, None, None, None, None, 0, [])
    return Sweep("x", fields, 2, 1, [replace(none, values=choice) for choice in choices], [])


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_names_of_files_lack_their_folders():
    name = "{conv1: int8:/a/b.npy, conv2: lut:c/d.bin, default: exact}, seed 3"
    assert drawing.wrapped(name, 80) == "{conv1: int8:b.npy, conv2: lut:d.bin, default: exact}, seed 3"


def test_accuracy_is_drawn_against_truncated_bits(figures):
    names = ["exact", "mbm", "mbm-t20", "mitchell", "mbm-t16-r7", "mbm-t20-r3", "drum-k4"]
    assert plots.pictures(swept(*names), None).keys() == {"sweep.png"}
    plots.pictures(swept("mbm", "mbm-t8", optimizer__lr=[0.1, 0.2]), None)
    assert labels(figures[0]) == ["exact", "mbm", "mitchell", "mbm-tT-rR", "drum"]
    assert labels(figures[1]) == ["mbm", "mbm-t8"]  # against the rate
    (mbm,) = (line for line in figures[0].axes[0].lines if line.get_label() == "mbm")
    assert list(mbm.get_xdata()) == [0, 20]
    assert mbm.get_ydata() == pytest.approx([90.5, 90.5])


@pytest.mark.parametrize(
    "sweep",
    [
        swept("exact", "mbm"),
        swept("exact", "mbm-t20"),
        swept("mbm-t8-r7", "mbm-t8-r6", "mbm"),
        swept("{conv1: exact, default: mbm}", "mbm", "mbm-t8"),
        swept(optimizer__name=["sgd", "adam"]),
    ],
)
def test_other_combinations_are_drawn_one_by_one(sweep, figures):
    plots.pictures(sweep, None)
    drawn = [text.get_text() for text in figures[0].axes[0].get_yticklabels()]
    assert drawn == [str(next(iter(one.values.values()))) for one in sweep.combinations]


def texts(figure: Figure) -> dict[str, object]:
    figure.draw_without_rendering()
    return {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}


def test_reported_figures_stand_below_their_points(figures):
    """Each text lies below all points, and none on another."""
    line = sweep_plots.SweepLine
    sweep_plots.sweep_lines(
        [
            line("mbm", "mbm", False, {0: [0.98, 0.985], 8: [0.98], 20: [0.90]}),
            line("mitchell", "mitchell", False, {0: [0.97], 20: [0.5]}),
            line("mbm", "mbm-tT-rR", True, {20: [0.3]}),
        ],
        sweep_plots.reported(),
    )
    shown = texts(figures[0])
    found = " ".join(" ".join(shown).split())
    for words in (
        "mbm: area ÷ 11.7, power ÷ 16.1",
        "mbm: area ÷ 28, power ÷ 57",
        "against an IEEE single-precision multiplier, as the paper reports",
    ):
        assert words in found
    boxes = list(shown.values())
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    lowest = figures[0].axes[0].transData.transform((0, 30))[1]
    assert all(box.y1 < lowest for box in boxes)
    sweep_plots.sweep_lines([line("drum", "drum", False, {3: [0.9], 5: [0.8]})], sweep_plots.reported())
    assert texts(figures[1]) == {}


def test_sweep_with_costs_draws_accuracy_against_them(figures):
    sweep = swept("exact", "mbm", "mbm-t20", "mitchell")
    costs, accuracies = [1.0, 0.2, 0.15, 0.16], [[0.99, 0.97], [0.98, 0.98], [0.9, 0.9], [0.85, 0.85]]
    combinations = [
        replace(one, cost=cost, test_accuracy=of_seeds)
        for one, cost, of_seeds in zip(sweep.combinations, costs, accuracies, strict=True)
    ]
    plots.pictures(replace(sweep, combinations=combinations, costs="power, exact = 1 (who; what)"), None)
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "cost: power, exact = 1"
    front = next(line for line in axes.lines if line.get_label() == "front")
    assert [*zip(*front.get_data(), strict=True)] == [(0.15, 90), (0.2, 98), (1.0, 98)]
    combinations[0] = replace(combinations[0], cost=None)  # then truncated bits are what there is
    plots.pictures(replace(sweep, combinations=combinations), None)
    assert figures[1].axes[0].get_xlabel() == drawing.TRUNCATED


def test_best_of_many_combinations_are_drawn(figures):
    sweep_plots.sweep_ranges([(f"name {i}", [i / 1000, i / 900]) for i in range(500)], "optimizer.lr")
    drawn = [text.get_text() for text in figures[0].axes[0].get_yticklabels()]
    assert drawn == [f"name {i}" for i in range(440, 500)]
    assert "best 60 of 500" in figures[0].get_suptitle()


# Errors


@pytest.mark.parametrize(("multipliers", "count"), [(1, 1), (7, 9)])
def test_any_number_of_errors_is_drawn(multipliers, count):
    drawn = np.random.default_rng(0).random((3, count))
    others = [pairs("mbm", *drawn)] * (multipliers - 1)
    assert plots.characterization([pairs("exact", *drawn[:2], np.zeros(count)), *others]).startswith(PNG)


def test_cells_of_a_map_are_mean_errors(figures):
    a, b = [0.1, 0.1, 0.9, 0.9, np.nan], [0.1, 0.2, 0.1, 0.9, 0.5]
    plots.characterization([pairs("mbm", a, b, [1, 3, 5, 7, 9])])
    cells = figures[0].axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(cells, [[2.0, np.nan], [5.0, 7.0]])


def test_signs_of_errors_survive_in_greyscale():
    red, green, blue, _ = plots.ERRORS(np.linspace(0, 1, 256)).T
    assert (np.diff(0.299 * red + 0.587 * green + 0.114 * blue) > 0).all()
