"""Displays: what a person sees of an experiment while it runs, on a terminal, in a log, or not at all."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mbm_cli.models import Layer
from mbm_cli.tables import (
    console,
    epoch_table,
    layer_table,
    percent,
    print_comparison,
    print_sweep,
    result_lines,
)
from mbm_cli.training import Progress as StepProgress


class Display:
    """Shows nothing; its children show an experiment to a person or to a log."""

    def start(self, what: str, layers: Sequence[Layer], epochs: int) -> None:
        """Before the first epoch: one line that says what is run, and the network."""

    def progress(self, epoch: int, progress: StepProgress) -> None:
        """A few times a second within an epoch."""

    def epoch(self, metrics: dict[str, Any]) -> None:
        """After an epoch."""

    def finish(self, summary: dict[str, Any], folder: Path) -> None:
        """After the last epoch."""

    def close(self) -> None:
        """Whatever happened; the terminal is given back."""


class PlainDisplay(Display):
    """For a log or a pipe: one line an epoch."""

    def __init__(self) -> None:
        self.console = console()

    def start(self, what: str, layers: Sequence[Layer], epochs: int) -> None:
        self.epochs = epochs
        self.console.print(what, soft_wrap=True)
        self.console.print(layer_table(layers))

    def epoch(self, metrics: dict[str, Any]) -> None:
        m = metrics
        self.console.print(
            f"epoch {m['epoch']}/{self.epochs}: "
            f"train loss {m['train_loss']:.4f}, accuracy {percent(m['train_accuracy'])}; "
            f"test loss {m['test_loss']:.4f}, accuracy {percent(m['test_accuracy'])}; "
            f"{m['train_seconds']:.2f} s train, {m['eval_seconds']:.2f} s eval, {m['images_per_second']:,.0f} images/s",
            soft_wrap=True,
        )

    def finish(self, summary: dict[str, Any], folder: Path) -> None:
        for line in result_lines(summary, folder):
            self.console.print(line, soft_wrap=True)


class LiveDisplay(PlainDisplay):
    """For a terminal: a bar for the epoch at hand, below a table that grows by a row an epoch."""

    def start(self, what: str, layers: Sequence[Layer], epochs: int) -> None:
        super().start(what, layers, epochs)
        self.heading = True
        narrow = self.console.width < 80
        text = "{task.fields[loss]}" if narrow else "{task.fields[loss]}  {task.fields[accuracy]}  {task.fields[speed]}"
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn(text),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            expand=True,
        )
        self.task = self.bar.add_task("", total=1.0, **self._blank(1))
        self.bar.start()

    def _blank(self, epoch: int) -> dict[str, Any]:
        return {"epoch": f"{epoch}/{self.epochs}", "loss": "", "accuracy": "", "speed": ""}

    def progress(self, epoch: int, progress: StepProgress) -> None:
        self.bar.update(
            self.task,
            completed=progress.step / progress.steps,
            epoch=f"{epoch}/{self.epochs}",
            loss=f"loss {progress.loss:.4f}",
            accuracy=f"accuracy {percent(progress.accuracy)}",
            speed=f"{progress.images_per_second:,.0f} images/s",
        )

    def epoch(self, metrics: dict[str, Any]) -> None:
        if metrics["epoch"] < self.epochs:
            self.bar.reset(self.task, **self._blank(metrics["epoch"] + 1))
        else:
            self.bar.stop()
        self.bar.console.print(epoch_table([metrics], self.epochs, self.console.width, heading=self.heading))
        self.heading = False

    def finish(self, summary: dict[str, Any], folder: Path) -> None:
        self.close()
        self.console.print(Panel("\n".join(result_lines(summary, folder)), expand=False))

    def close(self) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


class CompareDisplay:
    """Shows nothing of a comparison; its children show it to a log or on a terminal."""

    def start(self, what: str, runs: int) -> None:
        """Before the first of so many runs."""

    def run(self, what: str, epochs: int) -> Display:
        """Before each run; what it returns watches that run."""
        return Display()

    def run_done(self, run: dict[str, Any]) -> None:
        """After each run."""

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        """After the last run."""

    def close(self) -> None:
        """Whatever happened; the terminal is given back."""


class PlainCompareDisplay(CompareDisplay):
    """For a log or a pipe: one line a run, then the table."""

    def __init__(self) -> None:
        self.console = console()

    def start(self, what: str, runs: int) -> None:
        self.runs, self.done = runs, 0
        self.console.print(what, soft_wrap=True)

    def run_done(self, run: dict[str, Any]) -> None:
        self.done += 1
        self.console.print(
            f"run {self.done}/{self.runs}: seed {run['seed']}, {run['multiplier']}: "
            f"test accuracy {percent(run['test_accuracy'])}, {median(run['epoch_seconds']):.2f} s an epoch",
            soft_wrap=True,
        )

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        print_comparison(self.console, result)
        self.console.print(f"run: {folder}", soft_wrap=True)


class LiveCompareDisplay(PlainCompareDisplay):
    """For a terminal: a bar for the whole comparison below the lines."""

    def start(self, what: str, runs: int) -> None:
        super().start(what, runs)
        self.bar = _runs_bar(self.console)
        self.task = self.bar.add_task("", total=runs, what="")
        self.bar.start()

    def run(self, what: str, epochs: int) -> Display:
        return _RunOfComparison(self, what, epochs)

    def run_done(self, run: dict[str, Any]) -> None:
        super().run_done(run)
        self.bar.update(self.task, completed=self.done)

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        self.close()
        super().finish(result, folder)

    def close(self) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


class _RunOfComparison(Display):
    """Moves the comparison's bar by a run's steps."""

    def __init__(self, whole: LiveCompareDisplay, what: str, epochs: int) -> None:
        self.whole, self.what, self.epochs = whole, what, epochs

    def progress(self, epoch: int, progress: StepProgress) -> None:
        done = self.whole.done + (epoch - 1 + progress.step / progress.steps) / self.epochs
        self.whole.bar.update(
            self.whole.task, completed=done, what=f"{self.what}, epoch {epoch}/{self.epochs}, loss {progress.loss:.4f}"
        )


class SweepDisplay:
    """Shows nothing of a sweep; its children show it to a log or on a terminal."""

    def start(self, what: str, runs: int, done: int) -> None:
        """Before the first of so many runs that are not done."""

    def progress(self, run: str, part: float) -> None:
        """A few times a second within each run, of which there may be several at once; ``part`` is 0 to 1."""

    def run_done(self, run: str, row: dict[str, Any]) -> None:
        """After each run, whether it was completed or failed."""

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        """After the last run."""

    def close(self) -> None:
        """Whatever happened; the terminal is given back."""


class PlainSweepDisplay(SweepDisplay):
    """For a log or a pipe: one line a run, then the table."""

    def __init__(self) -> None:
        self.console = console()

    def start(self, what: str, runs: int, done: int) -> None:
        self.runs, self.done = runs, done
        self.console.print(f"{what}{f'; {done} of {runs} runs are done' if done else ''}", soft_wrap=True)

    def run_done(self, run: str, row: dict[str, Any]) -> None:
        self.done += 1
        if row["status"] == "completed":
            became = f"test accuracy {percent(row['test_accuracy'])}, {row['epoch_seconds']:.2f} s an epoch"
        else:
            became = f"{row['status']}: {row['reason']}"
        self.console.print(f"run {self.done}/{self.runs}: {run}: {became}", soft_wrap=True)

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        print_sweep(self.console, result)
        self.console.print(f"run: {folder}", soft_wrap=True)


class LiveSweepDisplay(PlainSweepDisplay):
    """For a terminal: a bar for the whole sweep below the lines."""

    def start(self, what: str, runs: int, done: int) -> None:
        super().start(what, runs, done)
        self.parts: dict[str, float] = {}
        self.bar = _runs_bar(self.console)
        self.task = self.bar.add_task("", total=runs, completed=done, what="")
        self.bar.start()

    def progress(self, run: str, part: float) -> None:
        self.parts[run] = part
        self._update()

    def run_done(self, run: str, row: dict[str, Any]) -> None:
        self.parts.pop(run, None)
        super().run_done(run, row)
        self._update()

    def _update(self) -> None:
        first, *others = [*self.parts, ""]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        self.bar.update(self.task, completed=self.done + sum(self.parts.values()), what=f"{first}{more}")

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        self.close()
        super().finish(result, folder)

    def close(self) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def _runs_bar(screen: Console) -> Progress:
    """A bar over runs, which can be done in part; its task has a field ``what``."""
    return Progress(
        TextColumn("{task.fields[what]}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.1f}/{task.total:.0f} runs"),
        TimeRemainingColumn(compact=True),
        console=screen,
        transient=True,
        expand=True,
    )
