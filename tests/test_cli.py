"""The commands as a person runs them, on real MNIST (a small part of it)."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pseudo_terminal import on_terminal

from mbm_cli import __version__, plots, training
from mbm_cli import runs as run_module
from mbm_cli.cli import main
from mbm_cli.config import load, parse, shipped, shipped_text
from mbm_cli.data import data_root
from mbm_cli.errors import Interrupted
from mbm_cli.experiments import train as experiment
from mbm_cli.render import Display
from mbm_cli.runs import Run

CURVES = plots.curves
MBM = str(Path(sys.executable).with_name("mbm"))
# 4 steps an epoch, the last one smaller.
SMALL = ["data.train_limit=200", "data.test_limit=100", "device=cpu"]
SETTINGS = [argument for setting in SMALL for argument in ("--set", setting)]
TRAIN = ["train", "--threads", "1", *SETTINGS]

METRICS = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "epoch_seconds"]
METRICS += ["train_seconds", "eval_seconds", "images_per_second"]
SUMMARY = ["status", "multiplier", "device", "epochs", "test_accuracy", "best_test_accuracy"]
SUMMARY += ["epoch_seconds", "train_seconds", "total_seconds", "peak_memory_bytes"]
FILES = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "curves.png"}


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """An empty current folder; no time is spent on drawing; the number of threads is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "curves", lambda epochs, title: b"")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def mbm(monkeypatch, capfd):
    """Runs a command in this process: importing torch once is enough."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["mbm", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return Answer(end.value.code or 0, *capfd.readouterr())

    return call


def runs(output: Path = Path("runs")) -> list[Path]:
    return sorted(output.iterdir()) if output.exists() else []


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict[str, Any]]:
    return [{key: epoch[key] for key in METRICS[:5]} for epoch in metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def same_state(a: object, b: object) -> bool:
    """Whether two checkpoints, or parts of them, are equal bit for bit, measured times aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        compared = [key for key in a if not str(key).endswith(("seconds", "_per_second"))]
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in compared)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


# A run


def test_a_run_writes_what_it_did(mbm, monkeypatch):
    monkeypatch.setattr(plots, "curves", CURVES)
    answer = mbm(*TRAIN, "--epochs", 2, "--multiplier", "mbm-t8", "--seed", 3, "--json")
    assert (answer.code, answer.err) == (0, "")
    result = json.loads(answer.out)
    (folder,) = runs()
    assert {path.name for path in folder.iterdir()} == FILES
    assert re.fullmatch(r"\d{8}T\d{6}Z-lenet-mbm-[0-9a-f]+", folder.name)

    config = parse((folder / "config.yaml").read_text(), "config.yaml")
    assert config == load("lenet-mbm", [*SMALL, "train.epochs=2", "model.multiplier=mbm-t8", "seed=3"])

    lines = metrics(folder)
    assert [list(line) for line in lines] == [METRICS] * 2
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 <= line["train_accuracy"] <= 1
        assert 0 <= line["test_accuracy"] <= 1
        assert line["epoch_seconds"] == line["train_seconds"] + line["eval_seconds"]
        assert line["images_per_second"] == pytest.approx(200 / line["train_seconds"], rel=0.01)

    summary = read_json(folder / "summary.json")
    assert list(summary) == SUMMARY
    assert summary["status"] == "completed"
    assert (summary["multiplier"], summary["device"], summary["epochs"]) == ("mbm-t8", "cpu", 2)
    assert summary["test_accuracy"] == lines[-1]["test_accuracy"]
    assert summary["best_test_accuracy"] == max(line["test_accuracy"] for line in lines)
    assert summary["epoch_seconds"] == [line["epoch_seconds"] for line in lines]
    assert summary["train_seconds"] == [line["train_seconds"] for line in lines]
    assert summary["total_seconds"] > sum(summary["epoch_seconds"])
    assert result == {**summary, "run": f"runs/{folder.name}"}

    environment = read_json(folder / "environment.json")
    assert environment.keys() >= {"mbm", "git_commit", "python", "torch", "torchvision", "cpu", "cpu_count"}
    assert (environment["mbm"], environment["torch"]) == (__version__, torch.__version__)
    assert (environment["device"], environment["threads"]) == ("cpu", 1)

    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint.keys() >= {"epoch", "model", "optimizer", "random"}
    assert checkpoint["epoch"] == 2
    # The schedule runs over all epochs: this is the last of eight steps.
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert float(group["lr"]) == pytest.approx(0.001 / 8)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_network_learns(mbm):
    """88 % or more with any of four seeds; 10 % would be guessing."""
    limits = ["--set", "data.train_limit=6000", "--set", "data.test_limit=2000", "--set", "optimizer.lr=0.003"]
    answer = mbm("train", "--threads", 1, "--device", "cpu", *limits, "--epochs", 1, "--json")
    assert json.loads(answer.out)["test_accuracy"] >= 0.85


def test_a_seed_decides_the_weights_bit_for_bit(mbm):
    """Across processes, and whatever was computed before in them."""
    command = [MBM, *TRAIN, "--epochs", "1", "--output", "other", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    torch.rand(7)
    for output, seed in (("same", 0), ("different", 1)):
        assert mbm(*TRAIN, "--epochs", 1, "--output", output, "--seed", seed, "--quiet") == (0, "", "")
    found = {name: runs(Path(name))[0] for name in ("other", "same", "different")}
    assert same_state(weights(found["other"]), weights(found["same"]))
    assert untimed(found["other"]) == untimed(found["same"])
    assert not same_state(weights(found["same"]), weights(found["different"]))


def test_a_multiplier_decides_the_weights(mbm):
    for multiplier in ("mbm", "mbm-t16-r7", "exact"):
        assert mbm(*TRAIN, "--epochs", 1, "--multiplier", multiplier, "--output", multiplier, "--quiet").code == 0
    found = [weights(runs(Path(name))[0])["conv1.weight"] for name in ("mbm", "mbm-t16-r7", "exact")]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_flag_wins_over_set(mbm):
    mbm(*TRAIN, "--set", "train.epochs=9", "--set", "seed=9", "--epochs", 1, "--seed", 4, "--quiet")
    config = parse((runs()[0] / "config.yaml").read_text(), "config.yaml")
    assert (config.train.epochs, config.seed) == (1, 4)


def test_a_config_of_ones_own(mbm):
    Path("mine.yaml").write_text(shipped_text("lenet-exact").replace("lenet-exact", "mine"))
    answer = mbm(*TRAIN, "--config", "mine.yaml", "--epochs", 1, "--output", "a/b", "--json")
    assert answer.code == 0
    assert "-mine-" in json.loads(answer.out)["run"]
    (folder,) = runs(Path("a/b"))
    # The run's own config repeats it.
    assert mbm("train", "--threads", 1, "--config", folder / "config.yaml", "--output", "c", "--quiet").code == 0
    assert same_state(weights(folder), weights(runs(Path("c"))[0]))


# What is shown


def test_in_a_log_there_is_one_line_an_epoch(mbm):
    answer = mbm(*TRAIN, "--epochs", 3)
    assert (answer.code, answer.err) == (0, "")
    assert "\x1b" not in answer.out
    lines = answer.out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert "200 training and 100 test images" in lines[0]
    for words in ("conv2 mbm 240,000", "fc3 exact 840", "all 61,706 416,520"):
        assert any(set(words.split()) <= set(line.split()) for line in lines)
    assert lines[-1].endswith(runs()[0].name)
    assert any("test accuracy" in line for line in lines[-3:])


@pytest.mark.parametrize("columns", [100, 80])
def test_on_a_terminal_there_is_a_bar_and_a_table(columns, monkeypatch, capfd):
    """The bar is redrawn below a table that grows by a row an epoch."""
    monkeypatch.setattr(training, "REPORT_INTERVAL", 0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "50")
    monkeypatch.delenv("NO_COLOR", raising=False)
    # Longer than a redrawing of the bar, which happens ten times a second.
    arguments = [*TRAIN, "--set", "data.train_limit=1500", "--epochs", "3"]
    text = on_terminal(columns, arguments, monkeypatch)
    assert capfd.readouterr().err == ""
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor is given back
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\r", "\n")).splitlines()
    assert any(re.match(r"epoch 2/3 .* %.* loss \d\.\d{4}", line) for line in lines)
    assert [line.split()[0] for line in lines if re.match(r" *\d/3 ", line)] == ["1/3", "2/3", "3/3"]
    assert "test accuracy" in text
    assert max(len(line) for line in lines[1:]) <= columns
    assert "…" not in text


def test_json_and_quiet_print_nothing_else(mbm):
    answer = mbm(*TRAIN, "--epochs", 1, "--json", "--quiet")
    assert json.loads(answer.out)["status"] == "completed"
    assert answer.err == ""


# Stopping and going on


def stop_after(steps: int):
    """Says stop when it is asked at that step, counted over all epochs."""
    asked = iter(range(steps))
    return lambda: next(asked, None) is None


LIMITS = ["data.train_limit=50", "data.test_limit=20"]  # 4 steps of an epoch at a batch size of 16, the last smaller
CASES = {
    "cnn3-mbm": [],  # dropout draws random numbers, batch norm keeps statistics
    "lenet-exact": ["optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.schedule=cosine"],
}


@pytest.mark.parametrize("steps", [4, 6])
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_one_that_was_not_stopped(name, steps, mbm):
    """Stopped at the end of the first epoch of two, or within the second, which then starts again."""
    config = load(name, [*SMALL, *CASES[name], "train.epochs=2", "data.batch_size=16", *LIMITS])
    experiment.train(config, Path("whole"), Display(), threads=1)
    with pytest.raises(Interrupted, match=r"epoch 2 of 2.*mbm train --resume runs/"):
        experiment.train(config, Path("runs"), Display(), stop_after(steps), threads=1)
    (folder,), (whole,) = runs(), runs(Path("whole"))
    summary = read_json(folder / "summary.json")
    assert list(summary) == SUMMARY
    assert (summary["status"], summary["epochs"]) == ("interrupted", 1)
    assert untimed(folder) == untimed(whole)[:1]

    torch.rand(7)
    answer = mbm("train", "--resume", folder.name, "--json")
    assert answer.code == 0
    assert json.loads(answer.out) == {**read_json(folder / "summary.json"), "run": f"runs/{folder.name}"}
    assert runs() == [folder]
    assert {path.name for path in folder.iterdir()} == FILES
    assert untimed(folder) == untimed(whole)
    stopped, undisturbed = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (folder, whole))
    assert stopped.pop("total_seconds") > 0
    assert undisturbed.pop("total_seconds") > 0
    assert same_state(stopped, undisturbed)


def test_a_run_that_was_stopped_in_its_first_epoch_starts_again(mbm):
    config = load("lenet-mbm", [*SMALL, "train.epochs=1"])
    with pytest.raises(Interrupted):
        experiment.train(config, Path("runs"), Display(), stop_after(2), threads=1)
    (folder,) = runs()
    summary = read_json(folder / "summary.json")
    assert (summary["status"], summary["epochs"], summary["test_accuracy"]) == ("interrupted", 0, None)
    assert mbm("train", "--resume", folder, "--quiet") == (0, "", "")
    assert mbm(*TRAIN, "--epochs", 1, "--output", "whole", "--quiet").code == 0
    assert same_state(weights(folder), weights(runs(Path("whole"))[0]))


def test_a_complete_run_is_reported_and_left_as_it_is(mbm):
    mbm(*TRAIN, "--epochs", 1, "--quiet")
    (folder,) = runs()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for more in ([], ["--epochs", 1]):
        answer = mbm("train", "--resume", folder.name, *more)
        assert (answer.code, answer.err) == (0, "")
        assert f"runs/{folder.name}" in answer.out
        assert "test accuracy" in answer.out
        assert not any(line.startswith("epoch") for line in answer.out.splitlines())
    answer = mbm("train", "--resume", folder.name, "--json")
    assert json.loads(answer.out) == {**json.loads(before["summary.json"]), "run": f"runs/{folder.name}"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_going_further_with_more_epochs(mbm):
    """Where the learning rate does not depend on the number of epochs, it is as if it had been asked for at once."""
    constant = ["--set", "optimizer.schedule=none"]
    mbm(*TRAIN, *constant, "--epochs", 1, "--quiet")
    (folder,) = runs()
    assert mbm("train", "--resume", folder.name, "--epochs", 2, "--quiet") == (0, "", "")
    assert mbm(*TRAIN, *constant, "--epochs", 2, "--output", "whole", "--quiet").code == 0
    (whole,) = runs(Path("whole"))
    assert untimed(folder) == untimed(whole)
    assert same_state(weights(folder), weights(whole))
    assert (folder / "config.yaml").read_text() == (whole / "config.yaml").read_text()
    assert read_json(folder / "summary.json")["epochs"] == 2
    began, (resumed,) = read_json(folder / "environment.json"), read_json(folder / "environment.json")["resumed"]
    assert resumed["torch"] == began["torch"]
    assert "--resume" in resumed["command"]
    assert "--resume" not in began["command"]


def test_no_epochs_are_taken_back(mbm):
    """Not even the part of one: the weights would be those of another epoch than the summary's."""
    config = load("lenet-mbm", [*SMALL, "train.epochs=3", "train.checkpoint_every=1"])
    with pytest.raises(Interrupted):
        experiment.train(config, Path("runs"), Display(), stop_after(6), threads=1)
    (folder,) = runs()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    answer = mbm("train", "--resume", folder.name, "--epochs", 1)
    assert (answer.code, answer.out) == (2, "")
    assert "has 1 epochs and a part of the next already: --epochs 1 would take some back" in answer.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert mbm("train", "--resume", folder.name, "--epochs", 2, "--quiet") == (0, "", "")


def test_a_run_of_another_kind_of_device_is_not_gone_on_with_unasked(mbm):
    assert mbm(*TRAIN, "--set", "device=auto", "--epochs", 1, "--quiet").code == 0
    (folder,) = runs()
    recorded = read_json(folder / "environment.json")
    before = "cuda" if recorded["device"] == "cpu" else "cpu"
    (folder / "environment.json").write_text(json.dumps({**recorded, "device": f"{before}:0"}))
    answer = mbm("train", "--resume", folder.name, "--epochs", 2)
    assert (answer.code, answer.out) == (2, "")
    assert f"was begun on {before}, not on" in answer.err
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("device: auto", "device: cpu"))
    assert mbm("train", "--resume", folder.name, "--epochs", 2, "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1"],
        ["--set", "seed=1"],
        ["--config", "lenet-mbm"],
        ["--multiplier", "mbm"],
        ["--device", "cpu"],
        ["--threads", "1"],
    ],
)
def test_resume_takes_no_other_flags(flags, mbm):
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/summary.json").write_text("{}")
    answer = mbm("train", "--resume", "r", *flags)
    assert (answer.code, answer.out) == (2, "")
    assert flags[0] in answer.err
    assert "--resume" in answer.err


def test_ctrl_c_ends_at_the_next_step_and_keeps_what_is_done(mbm):
    command = [MBM, *TRAIN, "--epochs", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    (folder,) = runs()
    assert f"mbm train --resume runs/{folder.name}" in err
    assert "Traceback" not in err
    summary = read_json(folder / "summary.json")
    assert summary["status"] == "interrupted"
    assert summary["epochs"] == len(metrics(folder)) >= 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    done = summary["epochs"]
    assert mbm("train", "--resume", folder.name, "--epochs", done + 1, "--quiet") == (0, "", "")
    assert len(metrics(folder)) == done + 1


def test_who_is_refused_because_a_run_is_being_computed_changes_nothing(mbm, monkeypatch):
    monkeypatch.setattr(run_module, "PATIENCE", 0)
    assert mbm(*TRAIN, "--epochs", 1, "--quiet").code == 0
    (folder,) = runs()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with Run(folder).hold():
        answer = mbm("train", "--resume", folder.name, "--epochs", 2)
    assert (answer.code, answer.out) == (2, "")
    assert "another process" in answer.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_does_not_go_on_with_another_table(mbm):
    assert mbm("multipliers", "export", "mbm-t16-r7", "own.bin", "--bits", 4).code == 0
    config = load("lenet-mbm", [*SMALL, "train.epochs=2", "model.multiplier=lut:own.bin"])
    with pytest.raises(Interrupted):
        experiment.train(config, Path("runs"), Display(), stop_after(6), threads=1)
    (folder,) = runs()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole = Path("own.bin").read_bytes()
    Path("own.bin").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    answer = mbm("train", "--resume", folder.name)
    assert (answer.code, answer.out) == (1, "")
    assert f"own.bin is not the multiplier that runs/{folder.name} was trained with" in answer.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    Path("own.bin").write_bytes(whole)
    assert mbm("train", "--resume", folder.name, "--quiet") == (0, "", "")


@pytest.mark.parametrize("command", [["train", "--resume"], ["runs", "show"], ["eval", "--multiplier", "exact"]])
def test_a_damaged_config_of_a_run_is_named(command, mbm):
    assert mbm(*TRAIN, "--epochs", 1, "--quiet").code == 0
    (folder,) = runs()
    (folder / "config.yaml").write_text("name: lenet-mbm\nseed: 0\ndevice")
    answer = mbm(*command, folder.name)
    assert (answer.code, answer.out) in ((1, ""), (2, "")) or command[0] == "runs"
    assert f"runs/{folder.name}/config.yaml " in answer.err
    assert '"status": "damaged"' in mbm("runs", "list", "--json").out


# Where the output goes


@pytest.mark.parametrize("command", [TRAIN, ["sweep", "--vary", "optimizer.lr=0.1", *TRAIN[1:]]])
def test_a_reader_who_leaves_interrupts_a_run(command):
    command = [MBM, *command, "--set", "data.test_limit=10", "--epochs", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 130
    assert re.fullmatch(r"mbm: interrupted .*to go on: mbm \w+ --resume runs/\S+\n", err)
    assert read_json(runs()[0] / "summary.json")["status"] == "interrupted"


def test_a_closed_standard_output_is_nothing_to_stumble_over(mbm, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert mbm("configs", "list") == (0, "", "")


def test_a_full_standard_output_is_named():
    with open("/dev/full", "w") as full:
        done = subprocess.run([MBM, "configs", "list"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "mbm: standard output cannot be written (No space left on device): free space\n"


def test_what_an_encoding_does_not_have_is_written_as_its_number(mbm, monkeypatch):
    assert mbm(*TRAIN, "--epochs", 1, "--quiet").code == 0
    (folder,) = runs()
    (folder / "summary.json").write_text(json.dumps({**read_json(folder / "summary.json"), "multiplier": "lut:é.bin"}))
    with open("out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert mbm("runs", "list") == (0, "", "")
    assert "lut:\\xe9.bin" in Path("out").read_text()


# Bad input


def write_bad_configs() -> None:
    good = shipped_text("lenet-mbm")
    Path("not.yaml").write_text("name: [")
    Path("list.yaml").write_text("- name\n- seed\n")
    Path("unknown.yaml").write_text(good.replace("batch_size:", "batchsize:", 1))
    Path("type.yaml").write_text(good.replace("seed: 0", "seed: zero"))


BAD_INPUT = [
    (["--config", "nowhere.yaml"], ["'nowhere.yaml'", "no such file"]),
    (["--config", "lenet-mbn"], ["'lenet-mbn'", "did you mean lenet-mbm?"]),
    (["--config", "not.yaml"], ["not.yaml", "YAML", "line "]),
    (["--config", "list.yaml"], ["list.yaml", "mapping"]),
    (["--config", "unknown.yaml"], ["'data.batchsize'", "did you mean data.batch_size?"]),
    (["--config", "type.yaml"], ["seed must be a whole number", "'zero'"]),
    (["--config", "."], ["'.'", "folder"]),
    (["--set", "data.batch_size=0"], ["data.batch_size must be", "not 0"]),
    (["--set", "train.epochs=0"], ["train.epochs must be", "not 0"]),
    (["--epochs", "0"], ["--epochs", "1"]),
    (["--epochs", "many"], ["--epochs", "integer"]),
    (["--set", "optimizer.lr=-0.001"], ["optimizer.lr must be", "-0.001"]),
    (["--set", "optimizer.lr=.nan"], ["optimizer.lr must be", "NaN"]),
    (["--set", "model.multiplier={family: mbm, truncate: 23}"], ["truncate", "0 to 22", "23"]),
    (["--multiplier", "mbm-t23"], ["--multiplier", "0 to 22", "23"]),
    (["--multiplier", "nbm"], ["--multiplier", "'nbm'", "exact, mitchell, mbm"]),
    (["--set", "model.multiplier=nbm"], ["model.multiplier", "'nbm'", "did you mean mbm?"]),
    (["--set", "model.name=lenett"], ["model.name", "did you mean lenet?"]),
    (["--set", "optimizer.name=adamx"], ["optimizer.name", "adam | adamw | sgd", "'adamx'"]),
    (["--device", "gpu"], ["--device", "'gpu'", "auto", "cpu", "cuda"]),
    (["--set", "device=gpu"], ["device must be auto | cpu | cuda", "'gpu'"]),
    (["--device", "cuda"], ["cuda", "no CUDA device", "cpu"]),
    (["--set", "optimizer.lrr=1"], ["'optimizer.lrr'", "did you mean optimizer.lr?"]),
    (["--set", "nonsense"], ["--set 'nonsense'", "section.field=value"]),
    (["--seed", "-1"], ["--seed", "0"]),
    (["--seed", str(2**63)], ["seed", str(2**63 - 1)]),
    (["--threads", "0"], ["--threads", "1"]),
    (["--threads", str(10**12)], ["--threads"]),
    (["--resume", "nothing"], ["'nothing'", "mbm runs list"]),
    (["--epoch", "3"], ["--epoch", "--epochs"]),
    (["extra"], ["extra"]),
]


@pytest.mark.parametrize("command", [["train"], ["profile", "conv"]])
def test_bad_input_is_answered_and_nothing_is_written(command, mbm, monkeypatch):
    """Each in one or two lines that name the thing; together, because it is one table."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_bad_configs()
    wrong = []
    for flags, parts in BAD_INPUT:
        if command != ["train"] and flags[0] in ("--epochs", "--resume", "--epoch"):
            continue
        answer = mbm(*command, *flags)
        fine = (
            answer.code == 2
            and answer.out == ""
            and answer.err.startswith("mbm: ")
            and "This is unexpected" not in answer.err
        )
        fine = fine and answer.err.count("\n") <= 2 and all(part in answer.err for part in parts)
        if not fine or "Traceback" in answer.err or Path("runs").exists():
            wrong.append((flags, answer))
    assert wrong == []


def test_an_error_is_shown_as_a_line_whatever_a_name_holds(mbm):
    answer = mbm("runs", "show", "one", "--output", "a\n\nb\x1b[2J\u202e")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(r"mbm: no run 'one', neither as a path nor in a\n\nb\x1b[2J\u202e: ")
    assert answer.err.count("\n") == 1


def test_an_unknown_command(mbm):
    answer = mbm("trian")
    assert (answer.code, answer.out) == (2, "")
    assert "'train'" in answer.err


@pytest.mark.parametrize("arguments", [[], ["runs"], ["configs"], ["data"], ["profile"]])
def test_a_group_without_a_command_shows_its_help(arguments, mbm):
    answer = mbm(*arguments)
    assert (answer.out + answer.err).lstrip().startswith("Usage: ")
    assert "Commands:" in answer.out + answer.err


# Failures


def test_a_damaged_file_in_a_named_root_is_named(mbm, tmp_path):
    name = "train-images-idx3-ubyte"
    path = tmp_path / "root" / "MNIST" / "raw" / name
    path.parent.mkdir(parents=True)
    with (data_root(None) / "MNIST" / "raw" / name).open("rb") as whole:
        path.write_bytes(whole.read(1_000_000))
    for answer in (
        mbm("train", "--set", f"data.root={tmp_path / 'root'}"),
        mbm("data", "fetch", "--root", tmp_path / "root"),
    ):
        assert (answer.code, answer.out) == (1, "")
        assert str(path) in answer.err
        assert answer.err.count("\n") <= 2
    assert runs() == []
    assert path.stat().st_size == 1_000_000


@pytest.mark.parametrize("command", [["train"], ["profile", "conv"]])
def test_an_output_folder_that_cannot_be_made(command, mbm):
    """Below a file, because a folder without permission stops no administrator."""
    Path("file").write_text("")
    answer = mbm(*command, *SETTINGS, "--output", "file/runs")
    assert (answer.code, answer.out) == (1, "")
    assert re.match(r"mbm: cannot make the run folder file/runs/\S+ \(Not a directory\)", answer.err)
    assert "--output" in answer.err
    assert Path("file").read_text() == ""


def test_a_loss_that_is_not_a_number_fails_the_run_and_keeps_it(mbm):
    answer = mbm(*TRAIN, "--epochs", 2, "--set", "optimizer.lr=1e30")
    assert answer.code == 1
    (folder,) = runs()
    assert re.match(rf"mbm: epoch 1 of 2: the loss of step \d of 4 is (nan|inf).*{folder.name}", answer.err)
    assert "Traceback" not in answer.err
    summary = read_json(folder / "summary.json")
    assert (summary["status"], summary["epochs"]) == ("failed", 0)
    assert "epoch 1" in summary["reason"]
    assert (folder / "config.yaml").exists()
    assert folder.name in mbm("runs", "list").out
    assert "the loss of step" in mbm("runs", "show", folder.name).out


def test_a_failure_in_a_later_epoch_keeps_the_earlier_ones(mbm, monkeypatch):
    write_checkpoint = Run.write_checkpoint

    def fail(run: Run, checkpoint: dict[str, Any]) -> None:
        if checkpoint["epoch"] == 2:
            raise RuntimeError("broken")
        write_checkpoint(run, checkpoint)

    monkeypatch.setattr(Run, "write_checkpoint", fail)
    answer = mbm(*TRAIN, "--epochs", 2, "--quiet")
    assert (answer.code, answer.out) == (1, "")
    assert "RuntimeError: broken" in answer.err
    assert "--debug" in answer.err
    (folder,) = runs()
    assert read_json(folder / "summary.json")["status"] == "failed"
    assert read_json(folder / "summary.json")["reason"] == "RuntimeError: broken"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_debug_shows_the_traceback(mbm):
    arguments = ["train", "--config", "nowhere"]
    assert "Traceback" not in mbm(*arguments).err
    answer = mbm(*arguments, "--debug")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert answer.err.splitlines()[-1].startswith("mbm: config 'nowhere'")


# Configs, data and runs


def test_configs_list_copy_and_check(mbm):
    listed = mbm("configs", "list")
    assert listed.code == 0
    assert [name for name in shipped() if name not in listed.out] == []

    answer = mbm("configs", "copy", "lenet-mbm")
    assert answer.code == 0
    assert "lenet-mbm.yaml" in answer.out
    assert Path("lenet-mbm.yaml").read_text() == shipped_text("lenet-mbm")
    answer = mbm("configs", "copy", "lenet-exact", "lenet-mbm.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert "exists" in answer.err
    assert Path("lenet-mbm.yaml").read_text() == shipped_text("lenet-mbm")
    assert mbm("configs", "copy", "lenet-exact", "mine.yaml").code == 0
    assert mbm("configs", "copy", "lenet-exact", "nowhere/mine.yaml").code == 2
    assert "did you mean lenet-mbm?" in mbm("configs", "copy", "lenet-mbn").err

    answer = mbm("configs", "check", "mine.yaml", "--set", "optimizer.lr=0.5")
    assert (answer.code, answer.err) == (0, "")
    assert parse(answer.out, "x") == load("mine.yaml", ["optimizer.lr=0.5"])
    answer = mbm("configs", "check", "mine.yaml", "--set", "model.multiplier={conv9: mbm, default: exact}")
    assert (answer.code, answer.out) == (2, "")
    assert "no convolution is called conv9" in answer.err
    Path("mine.yaml").write_text("name: x\nseed: -1\n")
    answer = mbm("configs", "check", "mine.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert "mine.yaml" in answer.err
    assert "seed" in answer.err


def test_a_copy_of_a_config_is_whole_or_absent():
    command = f"ulimit -f 0; {MBM} configs copy lenet-mbm"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mbm: cannot write lenet-mbm.yaml (File too large): name another file\n"
    assert not Path("lenet-mbm.yaml").exists()


def test_data_fetch_says_where_the_data_is(mbm):
    answer = mbm("data", "fetch")
    assert (answer.code, answer.err) == (0, "")
    assert str(data_root(None)) in answer.out


def test_runs_list_and_show(mbm):
    answer = mbm("runs", "list")
    assert answer.code == 0
    assert "no runs" in answer.out
    assert json.loads(mbm("runs", "list", "--json").out) == {"runs": []}

    # Names have whole seconds: within one the list is in order of the configs' names.
    mbm(*TRAIN, "--epochs", 2, "--config", "lenet-exact", "--quiet")
    mbm(*TRAIN, "--epochs", 1, "--quiet")
    first, second = runs()
    listed = mbm("runs", "list").out
    assert listed.index(first.name) < listed.index(second.name)
    assert max(map(len, listed.splitlines())) <= 100
    expected = [{"run": f"runs/{run.name}", **read_json(run / "summary.json")} for run in (first, second)]
    assert json.loads(mbm("runs", "list", "--json").out) == {"runs": expected}

    shown = mbm("runs", "show", first.name)
    assert shown.code == 0
    assert "2/2" in shown.out
    assert (first / "config.yaml").read_text().strip() in shown.out
    assert json.loads(mbm("runs", "show", first, "--json").out) == {**expected[0], "metrics": metrics(first)}
    answer = mbm("runs", "show", second.name[:-1])
    assert (answer.code, answer.out) == (2, "")
    assert f"did you mean {second.name}?" in answer.err

    (first / "summary.json").write_text('{"status": "comp')
    answer = mbm("runs", "show", first.name)
    assert answer.code == 1
    assert str(Path("runs", first.name, "summary.json")) in answer.err


# Help and version


def test_the_version(mbm):
    assert mbm("--version") == (0, f"mbm {__version__}\n", "")


COMMON = ["--device", "--seed", "--threads", "--output", "--set", "--json", "--quiet", "--debug"]
COMMANDS = {
    "": ["train", "eval", "characterize", "profile", "data", "runs", "configs", "--version"],
    "train": ["--config", "--multiplier", "--epochs", "--resume", *COMMON],
    "eval": ["--multiplier", "--plot", "--device", "--threads", "--output", "--json", "--quiet", "--debug"],
    "characterize": ["NAME...", "--samples", "--sweep-truncate", *(flag for flag in COMMON if flag != "--set")],
    "sweep": ["--vary", "--config", "--multiplier", "--seeds", "--jobs", "--epochs", "--resume", *COMMON],
    "profile": ["conv"],
    "profile conv": ["--config", "--multiplier", *COMMON],
    "data": ["fetch"],
    "data fetch": ["--root"],
    "runs": ["list", "show"],
    "runs list": ["--output", "--json"],
    "runs show": ["--output", "--json"],
    "configs": ["list", "copy", "check"],
    "configs list": [],
    "configs copy": [],
    "configs check": ["--set"],
}


def test_every_command_has_help(mbm):
    for command, words in COMMANDS.items():
        for flag in ("--help", "-h"):
            answer = mbm(*command.split(), flag)
            assert (answer.code, answer.err) == (0, "")
            assert re.match(rf"\s*Usage: .*{command} ", answer.out)
            assert [word for word in words if word not in answer.out] == []


def test_help_is_quick():
    """Importing torch takes seconds, and completion asks for help at every key."""
    code = "import sys; from mbm_cli.cli import main; sys.argv = ['mbm', '--help']\n"
    code += "try: main()\nfinally: print('HEAVY', {'torch', 'matplotlib', 'numpy', 'yaml'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: mbm" in done.stdout
    assert done.stdout.endswith("HEAVY set()\n")
