"""Tables: the results of experiments as a person reads them, in at most 100 columns."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table

from mbm_cli.models import Layer

WIDTH = 100
NARROW = 40  # columns, below which a row is written as lines

# Heading, width, value of an epoch's metrics; all of them fit 80 columns.
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
# Those for fewer columns than the number.
_FEWER_EPOCH_COLUMNS = {NARROW: (0, 4), 80: (0, 1, 4, 5)}


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads what is printed: Rich would end the process past everyone who has something to put in order."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise BrokenPipeError from None


def console(stderr: bool = False) -> Console:
    """A console on standard output (or error) that never goes beyond 100 columns."""
    made = _Console(stderr=stderr, highlight=False, markup=False, soft_wrap=False)
    if made.width > WIDTH or not made.is_terminal:
        made.width = WIDTH
    return made


class _Table(Table):
    """Where its columns would become unreadable, a line for each cell, and an empty one between rows."""

    narrow = NARROW

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= self.narrow:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield self.title
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for column, cell in zip(self.columns, row, strict=True):
                if cell:
                    yield f"{column.header}: {cell}" if column.header else cell
            yield ""


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> _Table:
    """A table of ready text; the first ``left`` columns are words, the others numbers."""
    made = _Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def layer_table(layers: Sequence[Layer]) -> Table:
    def shape(sizes: tuple[int, ...]) -> str:
        return "x".join(map(str, sizes))

    rows = [
        (
            layer.name,
            layer.kind,
            layer.arithmetic,
            f"{shape(layer.input_shape)} -> {shape(layer.output_shape)}",
            f"{layer.parameters:,}",
            f"{layer.multiplications:,}",
        )
        for layer in layers
    ]
    rows.append(
        ("", "all", "", "", f"{sum(x.parameters for x in layers):,}", f"{sum(x.multiplications for x in layers):,}")
    )
    columns = ("layer", "kind", "multiplier", "shape", "parameters", "mults/image")
    return table(None, columns, rows, left=4)


def epoch_table(metrics: Sequence[dict[str, Any]], epochs: int, width: int, heading: bool = True) -> Table:
    """Rows of finished epochs in columns of fixed width, so that rows printed one by one stand below one another."""
    made = Table(box=box.SIMPLE_HEAD, show_header=heading, show_edge=False, pad_edge=False)
    fewer = next((columns for below, columns in _FEWER_EPOCH_COLUMNS.items() if width < below), None)
    columns = _EPOCH_COLUMNS if fewer is None else [_EPOCH_COLUMNS[i] for i in fewer]
    for name, size, _ in columns:
        made.add_column(name, justify="right", width=size, no_wrap=True)
    for m in metrics:
        made.add_row(*(value(m, epochs) for _, _, value in columns))
    return made


def epoch_profile_tables(result: dict[str, Any]) -> Group:
    """The result of `mbm profile epoch`."""
    on_gpu = result["device"] == "cuda"
    scale, unit = (1e12, "TMAC/s") if on_gpu else (1e9, "GMAC/s")
    clocked = result["clocked_epoch_seconds"]
    lines = [f"an epoch as training runs it: {result['epoch_seconds']:.3f} s"]
    if result["busy_seconds"] is not None:
        how = "replayed from CUDA graphs" if result["cuda_graph"] else "step by step"
        idle = max(0.0, 1 - result["busy_seconds"] / result["epoch_seconds"])
        lines[0] += f" ({how}; the GPU was idle for {100 * idle:.0f} % of it)"
    if result["cuda_graph"]:
        lines.append(f"the same step by step: {result['eager_epoch_seconds']:.3f} s")
    lines.append(
        f"step by step with a clock at each phase: {clocked:.3f} s ({100 * result['clock_overhead']:+.1f} %); "
        "the phases below are of that one"
    )
    kernels = result["phase_kernels"]
    phases = [
        (
            name,
            f"{seconds:.3f}",
            f"{100 * seconds / clocked:.1f} %",
            *([f"{kernels[name]:.3f}" if name in kernels else ""] if kernels else []),
        )
        for name, seconds in result["phases"].items()
    ]
    phase_columns = ("phase", "s", "of the epoch", *(["kernels alone s"] if kernels else []))

    def optional(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    layers = [
        (
            layer["name"],
            f"{layer['multiplications']:,}",
            f"{layer['forward_seconds']:.3f}",
            optional(layer["macs_per_second"] and layer["macs_per_second"] / scale, "{:.2f}"),
            optional(layer["share_of_ceiling"] and 100 * layer["share_of_ceiling"], "{:.0f} %"),
            f"{layer['backward_seconds']:.3f}",
            layer["backward_library"],
        )
        for layer in result["layers"]
    ]
    costliest = [
        (row["name"][:60], f"{row['calls']:,}", f"{row['seconds']:.3f}", f"{100 * row['share']:.1f} %")
        for row in result["costliest"]
    ]
    return Group(
        f"{result['config']}: {result['model']} with {result['multiplier']} on {result['device_name']}",
        *lines,
        table("phases", phase_columns, phases),
        table(
            "convolutions" + (" (their kernels)" if on_gpu else ""),
            ("layer", "mults/image", "forward s", unit, "of ceiling", "backward s", "backward by"),
            layers,
        ),
        table(
            f"costliest {'kernels' if on_gpu else 'operators'} of {result['profiled_steps']} steps",
            ("name", "calls", "s", "share"),
            costliest,
        ),
        "is it the backward pass, the forward pass, or the hardware?",
        *(f"{number}. {answer}" for number, answer in enumerate(result["answers"], 1)),
    )


def comparison_table(result: dict[str, Any]) -> Table:
    """A column for each multiplier, means over seeds."""

    def interval(values: dict[str, Any] | None, scale: float, digits: int, sign: str = "") -> str:
        if values is None:
            return "-"
        mean = f"{scale * values['mean']:{sign}.{digits}f}"
        if values["low"] is None:
            return mean
        return f"{mean} ({scale * values['low']:{sign}.{digits}f} to {scale * values['high']:{sign}.{digits}f})"

    def epochs_to(counts: Sequence[int | None]) -> str:
        return ", ".join("-" if count is None else str(count) for count in counts)

    def spread(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    measures: list[tuple[str, Any]] = [
        ("test accuracy, mean, %", lambda c: f"{100 * c['test_accuracy_mean']:.2f}"),
        ("  standard deviation", lambda c: spread(c["test_accuracy_std"])),
        ("  best", lambda c: f"{100 * c['test_accuracy_best']:.2f}"),
        ("  difference to exact (95 %)", lambda c: interval(c.get("accuracy_difference"), 100, 2, "+")),
        ("training loss, last epoch", lambda c: f"{c['train_loss_mean']:.4f}"),
        ("test loss, last epoch", lambda c: f"{c['test_loss_mean']:.4f}"),
        *(
            (f"epochs to {100 * float(goal):.0f} %, each seed", lambda c, g=goal: epochs_to(c["epochs_to"][g]))
            for goal in result["columns"][0]["epochs_to"]
        ),
        ("trained exact, evaluated so, %", lambda c: f"{100 * _mean(c['trained_exact_evaluated_here']):.2f}"),
        ("trained so, evaluated exact, %", lambda c: f"{100 * _mean(c['trained_here_evaluated_exact']):.2f}"),
        ("s an epoch, median", lambda c: f"{c['epoch_seconds_median']:.3f}"),
        ("  ratio to exact (95 %)", lambda c: interval(c.get("epoch_seconds_ratio"), 1, 2)),
        ("  forward convolutions, %", lambda c: f"{100 * c['convolution_share']:.0f}"),
        ("images/s, median", lambda c: f"{c['images_per_second_median']:,.0f}"),
        ("peak memory, MiB", lambda c: f"{c['peak_memory_bytes'] / 2**20:,.0f}"),
    ]
    rows = [(name, *(measure(column) for column in result["columns"])) for name, measure in measures]
    epochs, seeds = (f"{result[what]} {what[: -1 if result[what] == 1 else None]}" for what in ("epochs", "seeds"))
    title = f"{result['model']} on {result['device']}, {epochs}, {seeds}"
    return table(title, ("", *result["multipliers"]), rows)


def print_comparison(screen: Console, result: dict[str, Any]) -> None:
    """The result of `mbm compare exact-vs-mbm`."""
    screen.print(comparison_table(result))
    for verdict in result["verdicts"]:
        screen.print(verdict, soft_wrap=True)


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(scale * value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def evaluation_table(result: dict[str, Any]) -> Table:
    """The result of `mbm eval`: a row a multiplier, the one of the training first."""
    rows = [
        (
            row["multiplier"],
            f"{100 * row['test_accuracy']:.2f}",
            "trained with it" if i == 0 else f"{row['difference']:+.2f}",
            _number(row["test_loss"], "{:.4f}"),
        )
        for i, row in enumerate(result["evaluations"])
    ]
    columns = ("multiplier", "test accuracy, %", "difference, points", "test loss")
    return table(f"{Path(result['run']).name}, trained with {result['trained_with']}", columns, rows)


def shown(value: Any) -> str:
    """A config's value as a person writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def sweep_table(result: dict[str, Any]) -> Table:
    """The result of `mbm sweep`: a row a combination, means over the seeds whose runs were completed."""
    fields = list(result["vary"])
    short = [field.rpartition(".")[2] for field in fields]
    rows = [
        (
            *map(shown, row["values"].values()),
            _number(row["test_accuracy_mean"], "{:.2f}", 100),
            _number(row["test_accuracy_std"], "{:.2f}", 100),
            _number(row["test_accuracy_best"], "{:.2f}", 100),
            _number(row["test_loss_mean"], "{:.4f}"),
            _number(row["epoch_seconds_median"], "{:.2f}"),
            f"{len(row['test_accuracy'])}/{len(row['runs'])}",
        )
        for row in result["combinations"]
    ]
    columns = ("accuracy, %", "std", "best", "test loss", "s/epoch", "runs")
    names = short if len(set(short)) == len(short) else fields
    common = [str(result[part]) for part in ("model", "device") if part in result]
    if "epochs" in result:
        common.append(f"{result['epochs']} epoch{'s'[: result['epochs'] != 1]}")
    at_once = f", {result['jobs']} runs at once" if result["jobs"] > 1 else ""
    title = f"{result['config']}: {', '.join(common)}, {result['seeds']} seed{'s'[: result['seeds'] != 1]}{at_once}"
    return table(title, (*names, *columns), rows, left=len(fields))


def print_sweep(screen: Console, result: dict[str, Any]) -> None:
    """The result of `mbm sweep`."""
    screen.print(sweep_table(result))


def run_table(runs: Sequence[dict[str, Any]], width: int) -> Table:
    """Summaries of runs, each with its folder under ``run``; a damaged run has little more than that.

    Names are there to be copied: where there is no room for everything, the other columns go.
    """
    rows = [
        (
            Path(run["run"]).name,
            run["status"],
            run.get("multiplier", "-"),
            run.get("device", "-"),
            str(run.get("epochs", "-")),
            percent(run.get("test_accuracy")),
            f"{median(run['epoch_seconds']):.2f}" if run.get("epoch_seconds") else "-",
        )
        for run in runs
    ]
    columns = ("run", "status", "multiplier", "device", "epochs", "test acc", "s/epoch")
    widths = [2 + max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    widths[2] = min(widths[2], 12)  # multipliers can be broken
    everything, most = range(len(columns)), (0, 1, 5)
    fits = next((shown for shown in (everything, most) if 1 + sum(widths[i] for i in shown) <= width), None)
    shown = fits or most
    made = table(None, [columns[i] for i in shown], [[row[i] for i in shown] for row in rows], min(4, len(shown) - 1))
    for column in made.columns:
        column.no_wrap = column.header != columns[2]
    made.narrow = 0 if fits else width + 1
    return made


def conv_tables(result: dict[str, Any]) -> Group:
    """The result of `mbm profile conv`, as far as it has come."""
    name, on_gpu = result["multiplier"], result["device"] == "cuda"
    scale, unit = (1e6, "us") if on_gpu else (1e3, "ms")
    rate_scale, rate_unit = (1e12, "TMAC/s") if on_gpu else (1e9, "GMAC/s")
    ceiling = f"{result['ceiling_macs_per_second'] / rate_scale:.2f} {rate_unit}"
    where = result["device_name"] if on_gpu else f"the CPU ({result['device_name']}, threads: {result['threads']})"

    def time(seconds: float) -> str:
        return f"{scale * seconds:,.{1 if on_gpu else 2}f}"

    shapes = [(row["name"], row["shape"], str(row["batch"])) for row in result["convolutions"]]
    forward = [
        (
            f"{row['multiplications'] / 1e6:,.1f}",
            time(row["forward_seconds"]),
            time(row["exact_forward_seconds"]),
            f"{row['forward_seconds'] / row['exact_forward_seconds']:.2f}",
            f"{row['macs_per_second'] / rate_scale:.2f}",
            f"{100 * row['share_of_ceiling']:.0f} %",
        )
        for row in result["convolutions"]
    ]
    ways = ("torch_nn_grad", "two_calls", "one_call")
    backward = [[time(row["backward_seconds"][way]) for way in ways] for row in result["convolutions"]]
    columns = ("layer", "convolution", "batch")
    return Group(
        table(
            f"forward: {name} on {where}; ceiling on registers: {ceiling}",
            (*columns, "M mults", f"approx {unit}", f"exact {unit}", "ratio", rate_unit, "of that"),
            [(*shape, *values) for shape, values in zip(shapes, forward, strict=True)],
            left=2,
        ),
        table(
            "backward, exact, three ways to both gradients; training makes one call",
            (*columns, f"torch.nn.grad {unit}", f"two calls {unit}", f"one call {unit}"),
            [(*shape, *values) for shape, values in zip(shapes, backward, strict=True)],
            left=2,
        ),
    )


def error_table(result: dict[str, Any]) -> Group:
    """The result of `mbm characterize`."""

    def figure(value: float) -> str:
        return f"{value:.2f}" if value == 0 or abs(value) >= 0.005 else f"{value:.0e}"

    rows = [
        (
            m["name"],
            *(figure(m[measure]) for measure in ("bias", "mean", "peak", "std")),
            " x ".join(f"{operand:.8g}" for operand in m["worst"]),
            f"{'all ' * m['exhaustive']}{m['pairs']:,}",
        )
        for m in result["multipliers"]
    ]
    made = table("relative error, %", ("multiplier", "bias", "mean", "peak", "std", "worst pair", "pairs"), rows)
    for column in made.columns[1:]:
        column.no_wrap = True  # a long name is what gives way
    drawn = not all(m["exhaustive"] for m in result["multipliers"])
    return Group(
        made,
        *([f"pairs are all there are, or drawn at random with seed {result['seed']}"] if drawn else []),
    )


def print_check(screen: Console, check: Any) -> None:
    """A line of `mbm doctor`."""
    if screen.width < NARROW:
        screen.print(f"{'PROBLEM' if check.problem else 'ok'} {check.name}: {check.found}")
        if check.problem:
            screen.print(check.problem)
        return
    made = Table.grid(padding=(0, 2))
    made.add_column(width=7)
    made.add_column(width=16)
    made.add_column(overflow="fold")
    made.add_row("PROBLEM" if check.problem else "ok", check.name, check.found)
    if check.problem:
        made.add_row("", "", check.problem)
    screen.print(made)


def result_lines(summary: dict[str, Any], folder: Path) -> list[str]:
    epochs = summary["epochs"]
    return [
        f"test accuracy {percent(summary['test_accuracy'])} after {epochs} epoch{'s'[: epochs != 1]} "
        f"with {summary['multiplier']} on {summary['device']} (best {percent(summary['best_test_accuracy'])})",
        f"{median(summary['epoch_seconds']):.2f} s an epoch, {summary['total_seconds']:.1f} s in all",
        f"run: {folder}",
    ]
