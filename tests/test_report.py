"""Tables and progress: whole words and numbers on terminals of any width, and lines of a log elsewhere."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import EPOCH, SMALL, SWEEP, made, mbm
from pseudo_terminal import on_terminal

from mbm_cli import training
from mbm_cli.experiments.characterize import Characterization, Errors
from mbm_cli.experiments.compare import Column, Comparison, Interval
from mbm_cli.experiments.doctor import Check
from mbm_cli.experiments.evaluate import Evaluation, Row
from mbm_cli.experiments.lifecycle import Finished
from mbm_cli.experiments.profile_conv import ConvProfile, TimedConv
from mbm_cli.experiments.profile_epoch import Costly, EpochProfile, LayerTimes
from mbm_cli.experiments.sweep import CombinationResult, Sweep
from mbm_cli.models import Layer
from mbm_cli.multipliers.names import NAMES
from mbm_cli.report import progress, tables
from mbm_cli.report import text as text_module
from mbm_cli.report.runs import layer_table, print_runs
from mbm_cli.report.text import console, print_table
from mbm_cli.runs import Run
from mbm_cli.training import PHASES

MULTIPLIERS = ["exact", "mbm-t16-r7", "{conv1: exact, default: mbm}"]
FILE = f"lut:{'folder/' * 20}table.bin"
SHARE = Interval(-0.0123, -0.0234, 0.0345)


FIGURES = (0.975, 0.007, 0.98, 0.1234, 0.5678, {"0.98": [12, None], "0.99": [None, None]}, 12.345, 0.45, 45678.9, 2**27)
COLUMNS = [Column(m, [0.98], *FIGURES, [0.91], [0.92], SHARE, Interval(1.23, 1.12, 1.34)) for m in MULTIPLIERS]
VALUES = [{"model.multiplier": multiplier, "optimizer.lr": 0.001} for multiplier in MULTIPLIERS]
COMBINATIONS = [CombinationResult(v, [0.98, 0.97], 0.975, 0.0071, 0.981, 0.1234, 12.34, 1, ["a"] * 3) for v in VALUES]
ROWS = [Row(name, 0.9812, 0.1234, -12.34) for name in [*MULTIPLIERS, FILE]]
WORST = [1.23456789, 1.87654321]
ERRORS = [Errors(m, -13.456, 22.345, 100.0, 10.0, WORST, 2**24, False) for m in ("mitchell-int16-t8", FILE)]
SECONDS = {"torch_nn_grad": 0.0123, "two_calls": 0.0112, "one_call": 0.0101}
GRADIENTS = {"input": 0.0042, "weight": 0.0051}
CONV = TimedConv(
    "lenet conv2", "6->16 5x5 14x14", 256, 61_440_000, 0.00412, 0.00123, SECONDS, GRADIENTS, GRADIENTS, 1.5e10, 0.8
)
ON_UNITS = replace(CONV, name="lenet conv3", layers=4, share_of_ceiling=0.31, path="matrix units")
FLOATS_ON_GPU = ConvProfile(
    *("drum-k6", "cuda", "NVIDIA H100", 2, 2.74e13, [replace(CONV, layers=1, path="scalar"), ON_UNITS], 2.7e14, "lenet")
)
INTEGERS = replace(
    CONV, backward_seconds={}, gradient_seconds={}, exact_gradient_seconds={}, quantized_seconds=0.005, path="terms"
)
INTEGERS_ON_GPU = ConvProfile("mbm-int8", "cuda", "NVIDIA H100", 2, 1.3e15, [INTEGERS], model="lenet")
LAYER = LayerTimes("conv1", "mbm", 117_600, 0.123, 0.234, 1.2e12, 0.45, "cuDNN")
KERNEL = Costly("void cutlass::Kernel2<" + "cutlass_80_" * 9, 12345, 0.123, 0.3)
RUN = {"run": "runs/20260101T000000Z-lenet-mbm-0001", "status": "interrupted", "multiplier": ", ".join(MULTIPLIERS)}
RUN |= {"device": "cuda", "epochs": 12, "test_accuracy": 0.9876, "epoch_seconds": [1.23]}
RESULTS: dict[str, Any] = {
    "compare": Comparison("x", "lenet", "cpu", MULTIPLIERS, 2, 2, COLUMNS, [], ["as noise"]),
    "sweep": Sweep("x", dict(VALUES[0]), 3, 2, COMBINATIONS, []),
    "eval": Evaluation("runs/x", "mbm", ROWS),
    "profile conv": ConvProfile("mbm-t16-r7", "cpu", "avx512", 2, 1.2e10, [CONV]),
    "profile conv on matrix units": FLOATS_ON_GPU,
    "profile conv of integers": INTEGERS_ON_GPU,
    "profile epoch": EpochProfile(
        *("x", "lenet", "mbm", "cuda", "NVIDIA H100", 2, 938, True, 1.234, 1.1, 2.345, 2.456, 0.031),
        *(dict.fromkeys(PHASES, 0.123), dict.fromkeys(PHASES, 0.112), [LAYER], 50, [KERNEL], {}),
    ),
    "characterize": Characterization(7, "cpu", ERRORS),
}
PRINT = {
    name: lambda result=result: tables.print_result(Finished(Run(Path("runs/x")), result))
    for name, result in RESULTS.items()
}
PRINT |= {
    "layers": lambda: console().print(
        layer_table([Layer("conv1", "Conv2d", (1, 28, 28), (6, 28, 28), 156, 117_600, MULTIPLIERS[1])])
    ),
    "runs": lambda: print_runs([RUN]),
    "multipliers": lambda: print_table(("name", "what it is", "for example"), NAMES),
    "doctor": lambda: tables.print_check(console(), Check("cpu kernels", "avx512 (PyTorch: AVX512)", "update it")),
}  # fmt: skip


@pytest.fixture
def printed(monkeypatch, capsys):
    """Return what prints on a terminal of some columns, without its codes."""
    for name, value in (("TERM", "xterm"), ("FORCE_COLOR", "1"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)

    def on(columns, show) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        show()
        return plain(capsys.readouterr().out)

    return on


def words(text: str) -> set[str]:
    return {word.rstrip(":}") for word in text.replace("─", "").split()}


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.parametrize("columns", [100, 80, 40, 20])
@pytest.mark.parametrize("name", PRINT)
def test_tables_are_readable_at_any_width(name, columns, printed, monkeypatch):
    """No line is too long, no word or number is broken, but for long names, of which no character is lost."""
    text = printed(columns, PRINT[name])
    assert max(map(len, text.splitlines())) <= columns
    monkeypatch.setattr(text_module, "WIDTH", 1000)
    whole = words(printed(1000, PRINT[name]))
    if name == "runs":  # whose other columns go
        whole = {Path(RUN["run"]).name.partition("-")[2], "interrupted", "98.76"}
    assert [word for word in whole - words(text) if len(word) <= 12] == []
    assert Counter("".join(whole)) <= Counter(text)


# Progress


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_log_has_a_line_an_epoch(own_folder):
    answer = mbm("train", *SMALL, "--epochs", 3)
    assert (answer.code, answer.err) == (0, "")
    assert "\x1b" not in answer.out
    lines = answer.out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "60 training and 50 test images" in lines[0]
    for words_of_line in ("conv2 mbm 240,000", "fc3 exact 840", "all 61,706 416,520"):
        assert any(words(words_of_line) <= words(line) for line in lines)
    assert re.match(r"test accuracy \d+\.\d\d % after 3 epochs with mbm on cpu", lines[-3])
    assert lines[-1] == f"run: {made().folder}"


def test_log_has_a_line_a_run(own_folder):
    answer = mbm(*SWEEP, *EPOCH, "--seed", 5)
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0] == "lenet-mbm: lenet, 2 combinations of model.multiplier, 1 seed"
    assert re.match(r"run 1/2: mbm, seed 5: test accuracy \d+\.\d\d %, \d+\.\d\d s an epoch$", lines[1])
    assert re.match(r"run 2/2: mbm-t20, seed 5: ", lines[2])
    assert lines[-1] == f"run: {made().folder}"


@pytest.mark.parametrize("columns", [100, 80, 40])
def test_terminal_shows_a_bar_and_a_table(columns, own_folder, monkeypatch, capfd):
    monkeypatch.setattr(training, "REPORT_INTERVAL", 0)
    monkeypatch.setenv("TERM", "xterm")
    # An epoch takes longer than a redrawing of the bar, which happens ten times a second.
    more = ["--set", "data.train_limit=2000", "--set", "data.batch_size=64", "--epochs", "3"]
    text = on_terminal(columns, ["train", *SMALL, *more], monkeypatch)
    assert capfd.readouterr().err == ""
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is given back
    lines = plain(text.replace("\r", "\n")).splitlines()
    assert any(re.match(r"epoch 2/3 .* %.* loss \d\.\d{4}", line) for line in lines)
    assert [line.split()[0] for line in lines if re.match(r" *\d/3 ", line)] == ["1/3", "2/3", "3/3"]
    assert max(map(len, lines[1:])) <= columns
    assert "…" not in text


def test_bar_of_a_sweep_counts_parts_of_runs(printed):
    def show() -> None:
        with progress.watch(json=False, quiet=False) as live:
            live.begin("what", "run", 4, 1)
            live.progress("mbm, seed 0", 0.5)
            live.progress("mbm, seed 1", 0.25)
            live.bar.refresh()
            live.done("mbm, seed 0", SimpleNamespace(status="completed", test_accuracy=0.5, epoch_seconds=1.0))
            live.bar.refresh()

    shown = printed(80, show)
    assert "what; 1 of 4 runs are done" in shown
    assert re.search(r"mbm, seed 0 and 1 more .* 1\.8/4 runs", shown)
    assert "run 2/4: mbm, seed 0: test accuracy 50.00 %" in shown
    assert re.search(r"mbm, seed 1 .* 2\.2/4 runs", shown)


def test_floats_on_matrix_units_have_two_ceilings(printed):
    text = printed(100, PRINT["profile conv on matrix units"])
    title, _, table = text.partition("\n layer")
    assert one_line(title) == (
        "forward in us: drum-k6 on NVIDIA H100; ceilings: 27.40 TMAC/s of scalar instructions, 270.00 of matrix "
        "units (bfloat16, divided by the terms R)"
    )
    header, _, first, second, *_ = table.splitlines()
    assert one_line(header) == "shape batch approx exact ratio TMAC/s share by"
    assert one_line(first) == "conv2 6->16 5x5 14x14 256 4,120.0 1,230.0 3.35 0.01 80 % scalar"
    assert one_line(second) == "conv3 x4 6->16 5x5 14x14 256 4,120.0 1,230.0 3.35 0.01 31 % matrix units"
    assert "int8" not in text


def test_integers_show_sums_and_share_of_int8(printed):
    title, _, table = printed(100, PRINT["profile conv of integers"]).partition("\n layer")
    assert one_line(title) == (
        "forward: mbm-int8 on NVIDIA H100; sums of quantised operands, all with quantisation; "
        "int8 matrix units: 1300 TMAC/s"
    )
    assert one_line(table.splitlines()[0]) == "shape batch sums us all us exact us ratio TMAC/s by of int8"


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_layers_of_one_shape_are_one_row_with_their_number(printed):
    text = printed(100, PRINT["profile conv on matrix units"])
    assert "\n conv3 x4  6->16 5x5 14x14 " in text
    assert text.rstrip().endswith("xN: N layers of the model have this shape; the first one is named\nrun: runs/x")
    assert "xN" not in printed(100, PRINT["profile conv"])
