"""Results of experiments as tables, in at most 100 columns."""

import re
from collections.abc import Callable
from dataclasses import fields
from functools import singledispatch
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from mbm_cli.experiments.characterize import Characterization, Circuit, Errors
from mbm_cli.experiments.compare import Column, Comparison, Interval
from mbm_cli.experiments.doctor import Check
from mbm_cli.experiments.estimate import Estimate
from mbm_cli.experiments.evaluate import Evaluated, Evaluation
from mbm_cli.experiments.lifecycle import Finished
from mbm_cli.experiments.members import shown
from mbm_cli.experiments.profile_conv import ConvProfile, TimedConv
from mbm_cli.experiments.profile_epoch import EpochProfile
from mbm_cli.experiments.search import Point, Search
from mbm_cli.experiments.sweep import Sweep
from mbm_cli.experiments.train import Trained
from mbm_cli.report.runs import epoch_table, layer_table, print_runs
from mbm_cli.report.text import NARROW, TextTable, console, costs_table, percent, table
from mbm_cli.runs import Run


def print_result(made: Finished[Any]) -> None:
    """Print what an experiment made, and where."""
    screen = console()
    if isinstance(made, Trained):
        lines = _result_lines(made)
        if screen.is_terminal:
            screen.print(Panel("\n".join(lines), expand=False))
        else:
            screen.print(*lines, sep="\n", soft_wrap=True)
        return
    screen.print(table_of(made.result))
    notes = made.notes if isinstance(made, Evaluated) else []
    screen.print(*notes, f"run: {made.run.folder}", sep="\n", soft_wrap=True)


def print_estimate(of: Estimate) -> None:
    """Print what a training will do and take."""
    console().print(
        of.what,
        layer_table(of.layers),
        f"{of.steps:,} steps an epoch, {_count(of.epochs, 'epoch')}; {1e3 * of.step_seconds:.2f} ms a step",
        f"about {of.epoch_seconds:.3g} s an epoch with its evaluation, {of.total_seconds:.3g} s in all, start-up aside",
        sep="\n",
    )


def print_run(run: Run) -> None:
    """Print a run: its summary, its result, its epochs, its config."""
    screen, summary, metrics = console(), run.summary(), run.metrics()
    print_runs([run.row()])
    if summary.reason:
        screen.print(f"{summary.status}: {summary.reason}\n", soft_wrap=True)
    if run.has_several:
        for name, kind in {"compare.json": Comparison, "sweep.json": Sweep, "search.json": Search}.items():
            if (run.folder / name).exists():
                screen.print(table_of(run.read(kind, name)))
    if metrics:
        screen.print(epoch_table(metrics, run.config().train.epochs, screen.width))
    screen.print("\n" + run.config_text(), soft_wrap=True)


def _result_lines(made: Trained) -> list[str]:
    summary = made.result
    return [
        f"test accuracy {percent(summary.test_accuracy)} after {_count(summary.epochs, 'epoch')} "
        f"with {summary.multiplier} on {summary.device} (best {percent(summary.best_test_accuracy)})",
        f"{median(summary.epoch_seconds):.2f} s an epoch (median), {summary.total_seconds:.1f} s in all",
        f"run: {made.run.folder}",
    ]


@singledispatch
def table_of(of: Any) -> Any:
    """Return the table, or tables, of a result; without one of its own, a row for each field."""
    rows = [(field.name.replace("_", " "), str(getattr(of, field.name))) for field in fields(of)]
    return table(None, ("", ""), rows)


@table_of.register
def _(of: Comparison) -> Group:
    return Group(paper_table(of), *_costs_note(of), *of.verdicts)


def _costs_note(of: Comparison | Sweep | Search) -> list[str]:
    return [f"cost: {of.costs}"] if of.costs else []


def paper_table(of: Comparison | Sweep) -> TextTable:
    """Return the one table of a comparison or a sweep, as a paper shows it."""
    return _sweep_table(of) if isinstance(of, Sweep) else _comparison_table(of)


def _comparison_table(of: Comparison) -> TextTable:
    def epochs_to(goal: str) -> Callable[[Column], str]:
        return lambda c: ", ".join("-" if count is None else str(count) for count in c.epochs_to[goal])

    measures: list[tuple[str, Callable[[Column], str]]] = [
        ("test accuracy, mean, %", lambda c: f"{100 * c.test_accuracy_mean:.2f}"),
        ("  standard deviation", lambda c: _number(c.test_accuracy_std, "{:.2f}", 100)),
        ("  best", lambda c: f"{100 * c.test_accuracy_best:.2f}"),
        ("  difference to exact (95 %)", lambda c: _interval(c.accuracy_difference, 100, "+.2f")),
        ("training loss, last epoch", lambda c: f"{c.train_loss_mean:.4f}"),
        ("test loss, last epoch", lambda c: f"{c.test_loss_mean:.4f}"),
        *((f"epochs to {100 * float(goal):.0f} %, each seed", epochs_to(goal)) for goal in of.columns[0].epochs_to),
        ("trained with exact, evaluated with this, %", lambda c: f"{100 * mean(c.trained_exact_evaluated_here):.2f}"),
        ("trained with this, evaluated with exact, %", lambda c: f"{100 * mean(c.trained_here_evaluated_exact):.2f}"),
        ("s an epoch, median", lambda c: f"{c.epoch_seconds_median:.3f}"),
        ("  ratio to exact (95 %)", lambda c: _interval(c.epoch_seconds_ratio, 1, ".2f")),
        ("  forward convolutions, %", lambda c: f"{100 * c.convolution_share:.0f}"),
        ("images/s, median", lambda c: f"{c.images_per_second_median:,.0f}"),
        ("peak memory, MiB", lambda c: f"{c.peak_memory_bytes / 2**20:,.0f}"),
    ]
    if of.costs:
        measures.insert(4, ("cost of the products", lambda c: _number(c.cost, "{:.3f}")))
    rows = [(name, *(measure(column) for column in of.columns)) for name, measure in measures]
    title = f"{of.model} on {of.device}, {_count(of.epochs, 'epoch')}, {_count(of.seeds, 'seed')}"
    return table(title, ("", *of.multipliers), rows)


def _interval(interval: Interval | None, scale: float, form: str) -> str:
    if interval is None:
        return "-"
    bounds = [
        format(scale * value, form) for value in (interval.mean, interval.low, interval.high) if value is not None
    ]
    return bounds[0] if len(bounds) == 1 else f"{bounds[0]} ({bounds[1]} to {bounds[2]})"


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(scale * value)


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'s'[: number != 1]}"


@table_of.register
def _(of: Sweep) -> Group:
    return Group(paper_table(of), *_costs_note(of))


def _sweep_table(of: Sweep) -> TextTable:
    fields = list(of.vary)
    short = [field.rpartition(".")[2] for field in fields]
    rows = [
        (
            *map(shown, row.values.values()),
            _number(row.test_accuracy_mean, "{:.2f}", 100),
            _number(row.test_accuracy_std, "{:.2f}", 100),
            _number(row.test_accuracy_best, "{:.2f}", 100),
            *([_number(row.cost, "{:.3f}")] if of.costs else []),
            _number(row.test_loss_mean, "{:.4f}"),
            _number(row.epoch_seconds_median, "{:.2f}"),
            _number(row.train_seconds_median, "{:.3g}"),
            f"{len(row.test_accuracy)}/{len(row.runs)}",
        )
        for row in of.combinations
    ]
    columns = (
        "accuracy, %",
        "std",
        "best",
        *(["cost"] if of.costs else []),
        "test loss",
        "s/epoch",
        "s to train",
        "runs",
    )
    names = short if len(set(short)) == len(short) else fields
    common = [part for part in (of.model, of.device, of.epochs and _count(of.epochs, "epoch")) if part]
    at_once = f", {of.jobs} processes" if of.jobs > 1 else ""
    at_once += "" if of.at_once == 1 else ", runs in turn, whose epochs take longer than alone"
    title = f"{of.config}: {', '.join(common)}, {_count(of.seeds, 'seed')}{at_once}"
    return table(title, (*names, *columns), rows, left=len(fields))


@table_of.register
def _(of: Search) -> Group:
    def row(name: str, point: Point) -> tuple[str, ...]:
        accuracies = f"{100 * point.accuracy:.2f}", _number(point.test_accuracy, "{:.2f}", 100)
        return name, *(_circuit(one) for one in point.multipliers.values()), f"{point.cost:.3f}", *accuracies

    members = [row(str(i), point) for i, point in enumerate(of.front, 1)]
    if of.chosen:
        members.append(row("chosen", of.chosen))
    how = f"{of.strategy}, {_count(of.evaluations, 'evaluation')} on {of.held_out:,} images"
    layers = table(
        f"{of.config}: {of.model} on {of.device}; the front; {how}",
        ("", *of.layers, "cost", "held out, %", "retrained, %"),
        members,
        left=1 + len(of.layers),
    )
    uniform = table(
        "uniform assignments",
        ("multiplier", "cost", "held out, %", "retrained, %"),
        [(name, *row("", point)[-3:]) for name, point in zip(of.candidates, of.uniform, strict=True)],
    )
    volumes = ", ".join(f"{name} {value:.4f}" for name, value in of.hypervolume.items())
    return Group(
        layers,
        uniform,
        "held out: training images, before retraining; retrained: accuracy on the test images",
        f"{of.seconds:.1f} s of evaluations; hypervolumes, retrained: {volumes}",
        *_costs_note(of),
    )


def _circuit(name: str) -> str:
    """Return the name of a candidate, which all have the same operands; of a file without them and its suffix."""
    return re.sub(r"^u?int\d+:|\.\w+$", "", name)


@table_of.register
def _(of: Evaluation) -> Table:
    rows = [
        (
            row.multiplier,
            f"{100 * row.test_accuracy:.2f}",
            f"{row.difference:+.2f}" if i else "trained with it" if of.trained_with else "reference",
            _number(row.test_loss, "{:.4f}"),
        )
        for i, row in enumerate(of.evaluations)
    ]
    columns = ("multiplier", "test accuracy, %", "difference, points", "test loss")
    trained = f", trained with {of.trained_with}" if of.trained_with else ""
    return table(f"{Path(of.run).name}{trained}", columns, rows)


@table_of.register
def _(of: EpochProfile) -> Group:
    on_gpu = of.device == "cuda"
    scale, unit = (1e12, "TMAC/s") if on_gpu else (1e9, "GMAC/s")
    clocked, kernels = of.clocked_epoch_seconds, of.phase_kernels
    lines = [f"an epoch as training runs it: {of.epoch_seconds:.3f} s"]
    if of.busy_seconds is not None:
        how = "replayed from CUDA graphs" if of.cuda_graph else "step by step"
        idle = max(0.0, 1 - of.busy_seconds / of.epoch_seconds)
        lines[0] += f" ({how}; the GPU was idle for {100 * idle:.0f} % of it)"
    if of.cuda_graph:
        lines.append(f"the same step by step: {of.eager_epoch_seconds:.3f} s")
    lines.append(
        f"step by step with a clock at each phase: {clocked:.3f} s ({100 * of.clock_overhead:+.1f} %); "
        "the phases below are of that one"
    )
    phases = [
        (
            name,
            f"{seconds:.3f}",
            f"{100 * seconds / clocked:.1f} %",
            *([f"{kernels[name]:.3f}" if name in kernels else ""] if kernels else []),
        )
        for name, seconds in of.phases.items()
    ]
    layers = [
        (
            layer.name,
            f"{layer.multiplications:,}",
            f"{layer.forward_seconds:.3f}",
            _number(layer.macs_per_second, "{:.2f}", 1 / scale),
            _number(layer.share_of_ceiling, "{:.0f} %", 100),
            f"{layer.backward_seconds:.3f}",
            layer.backward_library,
        )
        for layer in of.layers
    ]
    costliest = [
        (row.name[:60], f"{row.calls:,}", f"{row.seconds:.3f}", f"{100 * row.share:.1f} %") for row in of.costliest
    ]
    return Group(
        f"{of.config}: {of.model} with {of.multiplier} on {of.device_name}",
        *lines,
        table("phases", ("phase", "s", "of the epoch", *(["kernels alone s"] if kernels else [])), phases),
        table(
            "layers" + (" (their kernels)" if on_gpu else ""),
            ("layer", "mults/image", "forward s", unit, "of ceiling", "backward s", "backward by"),
            layers,
        ),
        table(
            f"costliest {'kernels' if on_gpu else 'operators'} of {of.profiled_steps} steps",
            ("name", "calls", "s", "share"),
            costliest,
        ),
    )


@table_of.register
def _(of: ConvProfile) -> Group:
    on_gpu = of.device == "cuda"
    scale, unit = (1e6, "us") if on_gpu else (1e3, "ms")
    rate_scale, rate_unit = (1e12, "TMAC/s") if on_gpu else (1e9, "GMAC/s")
    where = of.device_name if on_gpu else f"the CPU ({of.device_name}, threads: {of.threads})"

    def time(seconds: float) -> str:
        return f"{scale * seconds:,.{1 if on_gpu else 2}f}"

    shapes = [(_layer_name(of, row), row.shape, str(row.batch)) for row in of.convolutions]
    several = any(row.layers > 1 for row in of.convolutions)
    notes = ["xN: N layers of the model have this shape; the first one is named"] if several else []
    if of.ceiling_macs_per_second is None or any(row.quantized_seconds is not None for row in of.convolutions):
        return Group(_integer_profile(of, where, shapes, time, unit, rate_scale, rate_unit), *notes)
    products = f"{of.multiplier} on {where}"
    ceiling = f"{of.ceiling_macs_per_second / rate_scale:.2f} {rate_unit}"
    of_units = of.matrix_ceiling_macs_per_second
    if of_units is None:
        title = f"{products}; ceiling on registers: {ceiling}"
    else:
        title = f"{products}; ceilings: {ceiling} of scalar instructions, "
        title += f"{of_units / rate_scale:.2f} of matrix units (bfloat16, divided by the terms R)"
    forward = [
        (
            time(row.forward_seconds),
            time(row.exact_forward_seconds),
            f"{row.forward_seconds / row.exact_forward_seconds:.2f}",
            f"{row.macs_per_second / rate_scale:.2f}",
            _number(row.share_of_ceiling, "{:.0f} %", 100),
            *([row.path or ""] if of_units else []),
        )
        for row in of.convolutions
    ]
    ways = ("torch_nn_grad", "two_calls", "one_call")
    backward = [[time(row.backward_seconds[way]) for way in ways] for row in of.convolutions if row.backward_seconds]
    convolutions = [shape for shape, row in zip(shapes, of.convolutions, strict=True) if row.backward_seconds]
    gradients = []
    for row in of.convolutions:
        values = []
        for name, seconds in row.gradient_seconds.items():
            share = row.multiplications / seconds / of.ceiling_macs_per_second
            values += [time(seconds), time(row.exact_gradient_seconds[name]), f"{100 * share:.0f}"]
        gradients.append(values)
    columns, by = ("layer", "shape", "batch"), ("by",) if of_units else ()
    return Group(
        table(
            f"forward in {unit}: {title}",
            (*columns, "approx", "exact", "ratio", rate_unit, "share", *by),
            [(*shape, *values) for shape, values in zip(shapes, forward, strict=True)],
            left=2,
        ),
        table(
            f"gradients of input and weight in {unit}, exact ones, and % of the "
            f"{'scalar instructions' if of_units else 'ceiling'}",
            (*columns, "input", "exact", "%", "weight", "exact", "%"),
            [(*shape, *values) for shape, values in zip(shapes, gradients, strict=True)],
            left=2,
        ),
        table(
            f"backward in {unit}, exact, three ways to both gradients; training makes one call",
            (*columns, "torch.nn.grad", "two calls", "one call"),
            [(*shape, *values) for shape, values in zip(convolutions, backward, strict=True)],
            left=2,
        ),
        *notes,
    )


def _layer_name(of: ConvProfile, row: TimedConv) -> str:
    """Return the name of a layer without its model, and how many layers have its shape."""
    return row.name.removeprefix(f"{of.model} ") + (f" x{row.layers}" if row.layers > 1 else "")


def _integer_profile(
    of: ConvProfile,
    where: str,
    shapes: list[tuple[str, str, str]],
    time: Callable[[float], str],
    unit: str,
    rate_scale: float,
    rate_unit: str,
) -> Table:
    rows = [
        (
            *shape,
            time(row.forward_seconds),
            time(row.quantized_seconds or 0.0),
            time(row.exact_forward_seconds),
            f"{row.forward_seconds / row.exact_forward_seconds:.2f}",
            f"{row.macs_per_second / rate_scale:.2f}",
            row.path or "",
            _number(row.share_of_ceiling, "{:.0f} %", 100),
        )
        for shape, row in zip(shapes, of.convolutions, strict=True)
    ]
    names = f"sums {unit}", f"all {unit}", f"exact {unit}", "ratio", rate_unit, "by", "of int8"
    title = f"forward: {of.multiplier} on {where}; sums of quantised operands, all with quantisation"
    if of.ceiling_macs_per_second is None:
        return table(title, ("layer", "shape", "batch", *names[:-1]), [row[:-1] for row in rows], left=2)
    title += f"; int8 matrix units: {of.ceiling_macs_per_second / rate_scale:.0f} {rate_unit}"
    return table(title, ("layer", "shape", "batch", *names), rows, left=2)


@table_of.register
def _(of: Characterization) -> Group:
    def row(m: Errors) -> tuple[str, ...]:
        figures = (_percentage(value) for value in (m.bias, m.mean, m.peak, m.std))
        worst = " x ".join(f"{operand:.8g}" for operand in m.worst)
        return (m.name, *figures, worst, f"{'all ' * m.exhaustive}{m.pairs:,}")

    columns = ("multiplier", "bias", "mean", "peak", "std", "worst pair", "pairs")
    made = table("relative error, %", columns, [row(m) for m in of.multipliers])
    for column in made.columns[1:]:
        column.no_wrap = True  # a long name wraps instead
    drawn = not all(m.exhaustive for m in of.multipliers)
    note = [f"pairs are all there are, or drawn at random with seed {of.seed}"] if drawn else []
    return Group(made, *note, costs_table(of.costs))


def _percentage(value: float) -> str:
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.005 else f"{value:.0e}"


def print_circuit(of: Circuit) -> None:
    """Print what an integer multiplier is, and its errors."""
    rows = [
        ("operands", of.operands),
        *([("file", of.file)] if of.file else []),
        ("mean absolute error", f"{of.mae:.6g}"),
        ("worst-case error", f"{of.wce:,}"),
        ("error probability", f"{of.ep:.2f} %"),
        ("mean relative error (without zeros)", f"{_percentage(of.mre)} %"),
        ("mean error", f"{of.bias:.6g}"),
        ("rank", str(of.rank)),
        ("terms", "none found: products are looked up" if of.terms is None else str(of.terms)),
        ("symmetric", f"no, {_count(of.asymmetric_pairs, 'pair')} differ" if of.asymmetric_pairs else "yes"),
        ("0 x weight", "0" if of.zero_activation else "not always 0"),
        ("activation x 0", "0" if of.zero_weight else "not always 0"),
        *of.costs.items(),
    ]
    screen = console()
    screen.print(table(None, (of.name, "over all pairs of operands"), rows, left=2))
    for warning in of.warnings:
        screen.print(f"warning: {warning}")


def print_check(screen: Console, check: Check) -> None:
    """Print a line of `mbm doctor`."""
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
