"""Progress of an experiment on a terminal, or as lines of a log."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status

from mbm_cli.experiments.lifecycle import Unit, Watch
from mbm_cli.models import Layer
from mbm_cli.report.runs import epoch_table, layer_table
from mbm_cli.report.text import console, percent
from mbm_cli.training import Progress as StepProgress


def watch(json: bool, quiet: bool) -> Watch:
    """Return what shows progress: a live display on a terminal, else lines; with JSON only what is being done."""
    if quiet:
        return Watch()
    screen = console(quiet=json)
    return Live(screen) if screen.is_terminal and not json else Lines(screen)


class Lines(Watch):
    """Prints a line an epoch or a run, and on standard error what is being done."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.spinner: Status | None = None

    def status(self, doing: str) -> None:
        if self.spinner is None:
            self.spinner = console(stderr=True).status(doing)
            self.spinner.start()
        self.spinner.update(doing)

    def note(self, text: str) -> None:
        console(stderr=True).print(f"note: {text}", soft_wrap=True)

    def close(self) -> None:
        if self.spinner is not None:
            self.spinner.stop()
            self.spinner = None

    def begin(self, what: str, unit: Unit, total: int, done: int = 0, layers: Sequence[Layer] = ()) -> None:
        Lines.close(self)  # a bar has the terminal to itself
        self.unit, self.total, self.finished = unit, total, done
        already = f"; {done} of {total} {unit}s are done" if done and unit != "epoch" else ""
        self.screen.print(f"{what}{already}", soft_wrap=True)
        if layers:
            self.screen.print(layer_table(layers))

    def done(self, label: str, row: Any) -> None:
        self.finished += 1
        text = {"epoch": _epoch_line, "run": _run_line, "evaluation": _evaluation_line}[self.unit](row)
        number = label if self.unit == "epoch" else f"{self.unit} {self.finished}/{self.total}: {label}"
        self.screen.print(f"{number}: {text}", soft_wrap=True)


def _epoch_line(m: dict[str, Any]) -> str:
    return (
        f"train loss {m['train_loss']:.4f}, accuracy {percent(m['train_accuracy'])}; "
        f"test loss {m['test_loss']:.4f}, accuracy {percent(m['test_accuracy'])}; "
        f"{m['train_seconds']:.2f} s train, {m['eval_seconds']:.2f} s eval, {m['images_per_second']:,.0f} images/s"
    )


def _run_line(row: Any) -> str:
    if row.status != "completed":
        return f"{row.status}: {row.reason}"
    return f"test accuracy {percent(row.test_accuracy)}, {row.epoch_seconds:.2f} s an epoch"


def _evaluation_line(row: Any) -> str:
    return f"cost {row.cost:.3f}, accuracy {percent(row.accuracy)}"


class Live(Lines):
    """Shows a bar: for the current epoch, below a table that grows by a row an epoch, or for all runs, below lines."""

    bar: Progress | None = None

    def begin(self, what: str, unit: Unit, total: int, done: int = 0, layers: Sequence[Layer] = ()) -> None:
        super().begin(what, unit, total, done, layers)
        self.heading = True
        self.parts: dict[str, float] = {}
        text = "{task.percentage:>3.0f} %" if unit == "epoch" else "{task.completed:.1f}/{task.total:.0f} " + f"{unit}s"
        columns = [TextColumn("{task.fields[what]}"), BarColumn(bar_width=None), TextColumn(text)]
        facts = [TextColumn("{task.fields[facts]}")] if unit == "epoch" else []
        self.bar = Progress(
            *columns, *facts, TimeRemainingColumn(compact=True), console=self.screen, transient=True, expand=True
        )
        what_now = f"epoch {min(done + 1, total)}/{total}" if unit == "epoch" else ""
        self.task = self.bar.add_task(
            "",
            total=1.0 if unit == "epoch" else total,
            completed=0 if unit == "epoch" else done,
            what=what_now,
            facts="",
        )
        self.bar.start()

    def progress(self, label: str, fraction: float, step: StepProgress | None = None) -> None:
        assert self.bar is not None
        if self.unit == "epoch":
            self.bar.update(self.task, completed=fraction, what=label, facts=self._facts(step))
            return
        self.parts[label] = fraction
        self._update_runs()

    def done(self, label: str, row: Any) -> None:
        assert self.bar is not None
        if self.unit != "epoch":
            self.parts.pop(label, None)
            super().done(label, row)
            self._update_runs()
            return
        self.finished += 1
        if self.finished < self.total:
            self.bar.reset(self.task, what=f"epoch {self.finished + 1}/{self.total}", facts="")
        else:
            self.bar.stop()
        self.screen.print(epoch_table([row], self.total, self.screen.width, heading=self.heading))
        self.heading = False

    def close(self) -> None:
        super().close()
        if self.bar is not None:
            with suppress(OSError):  # a terminal that was closed
                self.bar.stop()

    def _facts(self, step: StepProgress | None) -> str:
        if step is None:
            return ""
        more = f"  accuracy {percent(step.accuracy)}  {step.images_per_second:,.0f} images/s"
        return f"loss {step.loss:.4f}{more if self.screen.width >= 80 else ''}"

    def _update_runs(self) -> None:
        assert self.bar is not None
        first, *others = [*self.parts, ""]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        self.bar.update(self.task, completed=self.finished + sum(self.parts.values()), what=f"{first}{more}")
