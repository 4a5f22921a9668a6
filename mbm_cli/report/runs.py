"""Runs: a list as a table or as CSV, several side by side, the layers and epochs of one. Imports no PyTorch."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from mbm_cli.report.text import NARROW, TextTable, console, percent, table

if TYPE_CHECKING:
    from mbm_cli.models import Layer

# Heading, width, value of an epoch's metrics; together they fit 80 columns.
_EPOCH_COLUMNS = (
    ("epoch", 7, lambda m, epochs: f"{m['epoch']}/{epochs}"),
    ("train\nloss", 7, lambda m, _: f"{m['train_loss']:.4f}"),
    ("train\naccuracy", 8, lambda m, _: percent(m["train_accuracy"])),
    ("test\nloss", 7, lambda m, _: f"{m['test_loss']:.4f}"),
    ("test\naccuracy", 8, lambda m, _: percent(m["test_accuracy"])),
    ("train s", 7, lambda m, _: f"{m['train_seconds']:.2f}"),
    ("eval s", 6, lambda m, _: f"{m['eval_seconds']:.2f}"),
    ("images/s", 9, lambda m, _: f"{m['images_per_second']:,.0f}"),
)
# On terminals with fewer columns than the key.
_FEWER_EPOCH_COLUMNS = {NARROW: (0, 4), 80: (0, 1, 4, 5)}

# Of a run in a list: heading, value; and which of them are shown, the first choice that fits the terminal.
_RUN_COLUMNS = {
    "run": lambda r: Path(r["run"]).name,
    "run (its last part)": lambda r: re.sub(r"^\d{8}T\d{6}Z-", "", Path(r["run"]).name),
    "kind": lambda r: r.get("kind", "-"),
    "status": lambda r: r["status"],
    "multiplier": lambda r: r.get("multiplier", "-"),
    "device": lambda r: r.get("device", "-"),
    "epochs": lambda r: str(r.get("epochs", "-")),
    "test acc": lambda r: percent(r.get("test_accuracy") or r.get("best_test_accuracy")),
    "s/epoch": lambda r: f"{median(r['epoch_seconds']):.2f}" if r.get("epoch_seconds") else "-",
    "note": lambda r: r.get("note") or "",
}
_ALL = ("run", "kind", "status", "multiplier", "device", "epochs", "test acc", "s/epoch", "note")
_CHOICES = (
    _ALL,
    tuple(name for name in _ALL if name != "s/epoch"),
    ("run (its last part)", *_ALL[1:7], "note"),
    ("run (its last part)", "status", "multiplier", "device", "epochs", "test acc", "note"),
    ("run (its last part)", "status", "multiplier", "device", "epochs", "test acc"),
    ("run (its last part)", "status", "test acc"),
)
CSV_FIELDS = (
    *("run", "kind", "status", "multiplier", "device", "epochs", "test_accuracy", "best_test_accuracy"),
    *("epoch_seconds", "total_seconds", "note", "reason"),
)


def print_runs(runs: Sequence[dict[str, Any]]) -> None:
    """Print a list of runs: their rows as `mbm_cli.runs.Run.row` makes them; a damaged run has little more than a name.

    On a narrow terminal names are cut to their last parts, by which runs can be named, too, and columns are left out.
    """
    screen = console()
    made = [_run_table(runs, columns) for columns in _CHOICES]
    screen.print(next((one for one in made if one.least_width() <= screen.width), made[-1]))


def _run_table(runs: Sequence[dict[str, Any]], columns: Sequence[str]) -> TextTable:
    rows = [[_RUN_COLUMNS[column](run) for column in columns] for run in runs]
    if not any(run.get("note") for run in runs) and columns[-1] == "note":
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    headings = [column.partition(" (")[0] for column in columns]
    made = table(None, headings, rows, left=sum(name not in ("epochs", "test acc", "s/epoch") for name in columns))
    for column in made.columns:
        column.no_wrap = column.header not in ("multiplier", "note")
        if column.header in ("epochs", "test acc", "s/epoch"):
            column.justify = "right"
    return made


def csv_of(runs: Sequence[dict[str, Any]]) -> str:
    """Write a line a run: accuracies are fractions, times seconds, an epoch's the median."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for run in runs:
        seconds = run.get("epoch_seconds")
        values = {**run, "epoch_seconds": median(seconds) if seconds else None}
        writer.writerow(["" if values.get(field) is None else values[field] for field in CSV_FIELDS])
    return text.getvalue()


def print_side_by_side(runs: Sequence[dict[str, Any]], configs: Sequence[dict[str, Any]]) -> None:
    """Print runs in columns: their results, then the fields of their configs that differ."""
    results = [
        ("status", [run["status"] for run in runs]),
        ("test accuracy", [percent(run.get("test_accuracy")) for run in runs]),
        ("best", [percent(run.get("best_test_accuracy")) for run in runs]),
        ("epochs", [str(run.get("epochs", "-")) for run in runs]),
        ("s an epoch, median", [_RUN_COLUMNS["s/epoch"](run) for run in runs]),
        ("device", [run.get("device", "-") for run in runs]),
    ]
    fields = list(dict.fromkeys(field for config in configs for field in config))
    differ = [(field, [str(config.get(field, "-")) for config in configs]) for field in fields]
    rows = [(name, *values) for name, values in (*results, *differ) if name == "status" or len(set(values)) > 1]
    console().print(table(None, ("", *(Path(run["run"]).name for run in runs)), rows))


def layer_table(layers: "Sequence[Layer]") -> Table:
    """Make the table of a network's layers."""

    def shape(sizes: tuple[int, ...]) -> str:
        return "x".join(map(str, sizes))

    shows_gradients = any(layer.backward != "exact" for layer in layers)
    rows: list[tuple[str, ...]] = [
        (
            layer.name,
            layer.kind,
            layer.multiplier,
            *([layer.backward] if shows_gradients else []),
            f"{shape(layer.input_shape)} -> {shape(layer.output_shape)}",
            f"{layer.parameters:,}",
            f"{layer.multiplications:,}",
        )
        for layer in layers
    ]
    gradients = ("backward",) if shows_gradients else ()
    sums = f"{sum(x.parameters for x in layers):,}", f"{sum(x.multiplications for x in layers):,}"
    rows.append(("", "all", "", *[""] * len(gradients), "", *sums))
    columns = ("layer", "kind", "multiplier", *gradients, "shape", "parameters", "mults/image")
    return table(None, columns, rows, left=4 + len(gradients))


def epoch_table(metrics: Sequence[dict[str, Any]], epochs: int, width: int, heading: bool = True) -> Table:
    """Make rows of epochs in columns of fixed width, so that rows printed one by one are aligned."""
    made = Table(box=box.SIMPLE_HEAD, show_header=heading, show_edge=False, pad_edge=False)
    fewer = next((columns for below, columns in _FEWER_EPOCH_COLUMNS.items() if width < below), None)
    columns = _EPOCH_COLUMNS if fewer is None else [_EPOCH_COLUMNS[i] for i in fewer]
    for name, size, _ in columns:
        made.add_column(name, justify="right", width=size, no_wrap=True)
    for m in metrics:
        made.add_row(*(value(m, epochs) for _, _, value in columns))
    return made
