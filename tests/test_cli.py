"""The commands as a user runs them, on a part of MNIST: what they keep, print and refuse."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import COMPARE, CPU, EPOCH, KINDS, PNG, SILENT, SMALL, SWEEP, after, contents, made, mbm
from stress import runs as processes
from stress.runs import check_same, state

from mbm_cli import __version__
from mbm_cli.config import load, parse
from mbm_cli.data import data_root
from mbm_cli.experiments import doctor, profile_conv, profile_epoch
from mbm_cli.experiments.profile_conv import ConvShape
from mbm_cli.report.progress import Lines
from mbm_cli.runs import list_runs
from mbm_cli.shipped import shipped, shipped_text

METRICS = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "epoch_seconds"]
METRICS += ["train_seconds", "eval_seconds", "images_per_second"]
SUMMARY = ["status", "multiplier", "device", "epochs", "test_accuracy", "best_test_accuracy"]
SUMMARY += ["epoch_seconds", "train_seconds", "total_seconds", "peak_memory_bytes", "reason", "note"]
FILES = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "curves.png"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profile_conv, "REFERENCE_SHAPES", (ConvShape.square("", 4, 8, 16, 3, 1, 14),))
    monkeypatch.setattr(profile_epoch, "measure_ceiling", lambda *_: 1e12)
    monkeypatch.setattr(doctor, "CHECKED", ["mbm"])


# A training run


def test_run_folder_holds_what_was_done():
    """Flags win over --set."""
    flags = ["--set", "train.epochs=9", "--set", "seed=9", "--epochs", 2, "--multiplier", "mbm-t8", "--seed", 3]
    result, run = mbm("train", *SMALL, *flags, "--json", draw=True).json, made()
    assert {path.name for path in run.folder.iterdir()} == FILES
    assert re.fullmatch(r"\d{8}T\d{6}Z-lenet-mbm-[0-9a-f]{4}", run.name)
    limits = ["data.train_limit=60", "data.batch_size=16", "data.test_limit=50", "train.threads=1", "device=cpu"]
    assert run.config() == load("lenet-mbm", [*limits, "train.epochs=2", "model.multiplier=mbm-t8", "seed=3"])

    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [METRICS] * 2
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert min(line["train_accuracy"], line["test_accuracy"]) >= 0
        assert max(line["train_accuracy"], line["test_accuracy"]) <= 1
        assert line["epoch_seconds"] == line["train_seconds"] + line["eval_seconds"]
        assert line["images_per_second"] == pytest.approx(60 / line["train_seconds"], rel=0.01)

    summary = run.read_json("summary.json")
    assert list(summary) == SUMMARY
    assert (summary["status"], summary["multiplier"], summary["device"]) == ("completed", "mbm-t8", "cpu")
    assert (summary["epochs"], summary["reason"]) == (2, None)
    assert summary["test_accuracy"] == lines[-1]["test_accuracy"]
    assert summary["best_test_accuracy"] == max(line["test_accuracy"] for line in lines)
    for field in ("epoch_seconds", "train_seconds"):
        assert summary[field] == [line[field] for line in lines]
    assert summary["total_seconds"] > sum(summary["epoch_seconds"])
    assert result == {"run": str(run.folder), **summary}

    environment = run.environment()
    assert environment.keys() >= {"git_commit", "python", "torchvision", "cpu", "cpu_count"}
    assert (environment["mbm"], environment["torch"]) == (__version__, torch.__version__)
    assert (environment["device"], environment["threads"]) == ("cpu", 1)

    checkpoint = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert checkpoint.keys() >= {"epoch", "model", "optimizer", "random"}
    assert checkpoint["epoch"] == 2
    (group,) = checkpoint["optimizer"]["param_groups"]
    assert float(group["lr"]) == pytest.approx(0.001 / 8)  # of the last of eight steps
    assert (run.folder / "curves.png").read_bytes().startswith(PNG)


def test_network_learns():
    """With any of four seeds to 88 % or more; 10 % would be guessing."""
    limits = ["--set", "data.train_limit=6000", "--set", "data.test_limit=2000", "--set", "optimizer.lr=0.003"]
    assert mbm("train", *CPU, *limits, "--epochs", 1, "--json").json["test_accuracy"] >= 0.85


def test_seed_decides_the_bits_in_any_process(tmp_path):
    assert processes.mbm("train", *EPOCH, "--output", "other", "--quiet", folder=tmp_path) == processes.DONE
    torch.rand(7)
    assert mbm("train", *EPOCH, "--quiet", draw=True) == SILENT
    check_same(made().folder, state(made("other").folder))


def test_seed_and_multiplier_change_the_weights():
    flags = [["--seed", 1], *(["--multiplier", name] for name in ("mbm", "mbm-t16-r7", "exact"))]
    for i, more in enumerate(flags):
        assert mbm("train", *EPOCH, *more, "--output", str(i), "--quiet") == SILENT
    weights = {made(str(i)).checkpoint()["model"]["conv1.weight"].numpy().tobytes() for i in range(len(flags))}
    assert len(weights) == len(flags)


def test_runs_config_repeats_the_run():
    Path("mine.yaml").write_text(shipped_text("lenet-exact").replace("lenet-exact", "mine"))
    assert "-mine-" in mbm("train", *EPOCH, "--config", "mine.yaml", "--output", "a/b", "--json").json["run"]
    run = made("a/b")
    assert mbm("train", "--config", run.folder / "config.yaml", "--quiet") == SILENT
    check_same(made().folder, state(run.folder))


# Results

RESULTS = {
    "train": (["train", *EPOCH], "summary.json"),
    "compare": (KINDS["compare"], "compare.json"),
    "sweep": (KINDS["sweep"], "sweep.json"),
    "eval": (["eval", "one", "--multiplier", "exact"], "eval.json"),
    "profile conv": (["profile", "conv", *SMALL], "profile.json"),
    "profile epoch": (["profile", "epoch", *SMALL], "profile.json"),
    "characterize": (["characterize", "mbm", "mbm-int8", *CPU, "--samples", "1000"], "characterize.json"),
    "resume": (["resume", "one", "--epochs", "2"], "summary.json"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_json_is_one_object_and_quiet_is_silent(name, capfd):
    """Standard error says at most what is being done, and with both flags nothing."""
    command, file = RESULTS[name]
    if "one" in command:
        assert mbm("train", *EPOCH, "--quiet") == SILENT
        made().folder.rename("one")
    assert mbm(*command, "--output", "quiet", "--quiet") == SILENT
    answer = mbm(*command, "--json", "--quiet")
    assert (answer.code, answer.err) == (0, "")
    assert capfd.readouterr() == ("", "")
    (path,) = [Path("one", file)] if name == "resume" else Path().glob(f"runs/*/{file}")
    assert answer.json == {"run": str(path.parent), **json.loads(path.read_text())}


def test_doctor_prints_json_or_nothing(capfd):
    assert mbm("doctor", "--quiet") == SILENT
    answer = mbm("doctor", "--json", "--quiet")
    assert (answer.code, answer.err, answer.json["passed"]) == (0, "", True)
    assert capfd.readouterr() == ("", "")


# Interrupts and failures

MEASUREMENTS = {
    "eval": (["eval", "one", "--multiplier", "exact,mbm-t20", "--output", "out"], 1),
    "profile conv": (["profile", "conv", *SMALL, "--output", "out"], 1),
    "profile epoch": (["profile", "epoch", *SMALL, "--output", "out"], 2),
    "characterize": (["characterize", "mbm", *CPU, "--samples", 2**22, "--output", "out"], 4),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_interrupted_measurement_leaves_nothing(name):
    if name == "eval":
        assert mbm("train", *EPOCH, "--quiet") == SILENT
        made().folder.rename("one")
    command, steps = MEASUREMENTS[name]
    answer = mbm(*command, stopped=after(steps))
    assert (answer.code, answer.out) == (130, "")
    assert answer.err.endswith("mbm: interrupted; nothing was kept\n")
    assert not list(Path().glob("out/*"))


@pytest.mark.parametrize("name", KINDS)
def test_unexpected_failure_is_recorded(name, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("broken")

    monkeypatch.setattr(Lines, "begin", fail)
    answer = mbm(*KINDS[name])
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == "mbm: OSError: broken\nThis is unexpected; --debug shows where it happened.\n"
    assert (made().summary().status, made().summary().reason) == ("failed", "OSError: broken")


def test_failure_keeps_the_epochs_before():
    answer = mbm(*KINDS["train"], stopped=([False] * 6).pop)  # an epoch has 4 steps
    assert (answer.code, answer.err.splitlines()[0]) == (1, "mbm: IndexError: pop from empty list")
    assert (made().summary().status, made().summary().epochs, made().checkpoint()["epoch"]) == ("failed", 1, 1)


def test_infinite_loss_fails_the_run_and_keeps_it():
    answer, run = mbm("train", *EPOCH, "--set", "optimizer.lr=1e30"), made()
    assert answer.code == 1
    assert re.fullmatch(rf"mbm: epoch 1 of 1: the loss of step \d of 4 is (nan|inf).*{run.name}\)\n", answer.err)
    assert (run.summary().status, run.summary().epochs) == ("failed", 0)
    assert "epoch 1" in run.summary().reason
    assert run.name in mbm("runs", "list").out
    assert "failed: epoch 1 of 1: the loss of step" in mbm("runs", "show", run.name).out


@pytest.mark.parametrize("name", ["compare", "sweep"])
def test_failed_member_does_not_stop_the_others(name):
    """A sweep has a result nevertheless; a comparison lacks its pairs."""
    huge = (
        ["sweep", "--vary", "optimizer.lr=1e30,0.001"] if name == "sweep" else [*COMPARE, "--set", "optimizer.lr=1e30"]
    )
    answer, run = mbm(*huge, *EPOCH), made()
    assert answer.code == 1
    failed, resume = answer.err.splitlines()
    count = 1 if name == "sweep" else 2
    assert failed.startswith(f"mbm: {count} of 2 runs failed, the first one: epoch 1 of 1: the loss of step ")
    assert resume == f"To resume: mbm resume {run.folder}"
    assert (run.summary().status, len(list_runs(run.folder))) == ("failed", 2)
    assert run.summary().reason in failed
    again = mbm("resume", run.folder, "--json")
    assert (again.code, again.err) == (1, answer.err)
    if name == "sweep":
        assert answer.out.endswith(f"run: {run.folder}\n")
        assert [row["status"] for row in again.json["runs"]] == ["failed", "completed"]
        assert again.json == {"run": str(run.folder), **run.read_json("sweep.json")}
    else:
        assert f"run: {run.folder}\n" not in answer.out
        assert (again.out, (run.folder / "compare.json").exists()) == ("", False)


@pytest.mark.parametrize("command", [["train"], SWEEP, ["profile", "epoch"]])
def test_damaged_data_starts_nothing(command):
    path = Path("root/MNIST/raw/train-images-idx3-ubyte")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    before = contents()
    answer = mbm(*command, "--set", "data.root=root")
    assert (answer.code, answer.out) == (1, "")
    assert str(path) in answer.err
    assert contents() == before


def test_debug_shows_the_traceback():
    assert "Traceback" not in mbm("train", "--config", "nowhere").err
    answer = mbm("train", "--config", "nowhere", "--debug")
    assert answer.code == 2
    assert "Traceback" in answer.err
    assert answer.err.splitlines()[-1].startswith("mbm: config 'nowhere'")


# Requests that are wrong

EXPERIMENTS = ("train", "compare exact-vs-mbm", "sweep --vary optimizer.lr=0.1,0.2", "profile conv", "profile epoch")
# With what each experiment refuses them; more fields and values are in test_config.py.
EVERYWHERE = {
    "--config nowhere.yaml": "config 'nowhere.yaml'.* no such file",
    "--config not.yaml": "not.yaml .*YAML.*line ",
    "--set nonsense": "--set 'nonsense'.*section.field=value",
    "--set optimizer.lrr=1": "'optimizer.lrr'.* did you mean optimizer.lr?",
    "--set model.multiplier=nbm": "model.multiplier.*'nbm'.*did you mean mbm?",
    "--set model.multiplier=lut:nowhere.bin": "model.multiplier: .*nowhere.bin: no such file",
    "--multiplier nbm": "'nbm'.*exact, mitchell, mbm",
    "--multiplier ''": "''",
    "--multiplier mbm-t23": "truncate is 23.*0 to 22",
    "--bits 5": "--bits belongs to a function",
    "--device gpu": "--device.*auto.*cpu.*cuda.*'gpu'",
    "--device cuda": "no CUDA device",
    "--seed -1": "--seed.*0",
    "--seed 9223372036854775808": "--seed.*9223372036854775807",
    "--threads 0": "--threads.*1",
    "--threads 1000000000000": "--threads",
    "--no-such": "No such option.*--no-such",
    "extra": "extra",
}
REFUSED = {f"{command} {flags}": message for command in EXPERIMENTS for flags, message in EVERYWHERE.items()} | {
    "trian": "'trian'.*train",
    "train --epochs 0": "--epochs.*1",
    "train --epoch 3": "--epoch.*--epochs",
    "train --resume x": "No such option.*--resume",
    "train --trust": "No such option.*--trust",
    # evaluations
    "eval --multiplier mbm": "name a run, or the network and its weights: --model lenet --weights FILE",
    "eval x --weights w.pt --multiplier mbm": "name a run, or the network",
    "eval x --set seed=1 --multiplier mbm": "--set belongs to --weights",
    "eval --weights w.pt --model lenett --multiplier mbm": "model.name: must be lenet .*did you mean lenet?",
    "eval --weights w.pt --multiplier mbn": "--multiplier: .*did you mean mbm?",
    "eval --weights nowhere.pt --multiplier mbm": "--weights: nowhere.pt cannot be read .No such file",
    "eval x --model cnn3 --multiplier mbm": "name a run, or the network and its weights",
    # data
    "data fetch mnits": "no data set is called 'mnits': there are mnist, fashion-mnist",
    "train --set data.validation=60000": "data.validation is 60000, but there are only 60000 training images",
    # comparisons
    "compare exact-vs-mbm --multiplier exact": "exact is compared with something else.*--multiplier mbm",
    "compare exact-vs-mbm --multiplier mbm,exact": "exact is compared with something else",
    "compare exact-vs-mbm --multiplier mbm,": "--multiplier.*''",
    "compare exact-vs-mbm --seed 9223372036854775807 --seeds 2": "beyond the last",
    # sweeps
    "sweep": "nothing is varied.*--vary model.multiplier=mbm,mbm-t8",
    "sweep --vary nonsense": "--vary 'nonsense'.*section.field=A,B",
    "sweep --vary optimizer.lrr=1,2": "--vary.*'optimizer.lrr'.*did you mean optimizer.lr?",
    "train --multiplier exact --backward mbm": "model.backward: mbm acts on no layer.*--backward exact",
    "train --multiplier '{linear: exact, default: mbm}' --config mlp-mbm --backward mbm": "acts on no layer",
    "train --backward mbn": "--backward: .*'mbn'.*did you mean mbm?",
    "train --backward mbm-int8": "--backward: mbm-int8: gradients take a float multiplier",
    "train --backward '{bias: mbm}'": "--backward: unknown gradient 'bias'",
    "train --backward '{weight: lut:nowhere.bin}'": "model.backward: nowhere.bin",
    "train --multiplier '{fc9: mbm}'": "no layer is called fc9.*fc1",
    "train --config mlp-mbm --multiplier mbm": "no convolutions.*{linear: mbm}",
    "compare exact-vs-mbm --backward exact,mbn": "--backward: .*'mbn'",
    "sweep --vary model.backward=exact,mbm --multiplier exact": "model.backward: mbm acts on no layer",
    "sweep --vary model.backward=mbm,mbn": "--vary: model.backward.*'mbn'",
    "sweep --vary optimizer.lr=0.001,-1": "--vary: optimizer.lr must be.*-1",
    "sweep --vary model.multiplier=mbm,nbm": "--vary: model.multiplier.*'nbm'.*did you mean mbm?",
    "sweep --vary 'model.multiplier={conv9: mbm, default: exact},mbm'": "conv9",
    "sweep --vary model=lenet": "--vary: model must be a section",
    "sweep --vary optimizer.name=sgd,adam --vary optimizer.momentum=0.9": "belongs to the optimizer sgd, not to adam",
    "sweep --vary seed=1,2": "--vary seed.*--seeds",
    "sweep --vary name=a,b": "--vary name",
    "sweep --vary optimizer.lr=1 --vary optimizer.lr=2": "--vary optimizer.lr is given twice",
    "sweep --vary optimizer.lr=0.001,1e-3": "optimizer.lr=1e-3 is the same as optimizer.lr=0.001",
    "sweep --vary model.multiplier=mbm,mbm-t0": "mbm-t0 is the same as",
    "sweep --vary optimizer.lr=1,2 --jobs 0": "--jobs.*1",
    # measurements
    "profile conv --config lenet-exact": "the multiplier is exact.*--multiplier mbm",
    "profile conv --multiplier '{conv1: mbm, default: exact}'": "profile conv times one multiplier.*--multiplier mbm",
    "characterize": "NAME",
    "characterize mbm nbm": "'nbm'",
    "characterize mbm-int9": "2 to 8 bits, not 9",
    "characterize mbm-int8-t7": "0 to 6",
    "characterize lut:nowhere.bin": "nowhere.bin",
    "characterize c:wrong.h:f": "does not compile",
    "characterize c:minus.h:f": "c:minus.h:f is not a multiplier",
    "characterize python:raises.py:f": "raises ZeroDivisionError",
    "characterize mbm-int8 --sweep-truncate": "--sweep-truncate is for exact, mitchell, mbm",
    "characterize mbm --samples 0": "--samples.*1",
    # runs
    "resume zzz": "no run 'zzz'.*mbm runs list",
    "resume": "RUN",
    "resume one --jobs 2": "--jobs, --on and --at-once are for several runs: runs/one is a training run",
    "resume one --at-once 2": "--jobs, --on and --at-once are for several runs: runs/one is a training run",
    "sweep --vary optimizer.lr=1,2 --set optimizer.lr=3": "--vary optimizer.lr: --set gives it a value, too",
    "sweep --vary model.multiplier=mbm --multiplier exact": "--vary model.multiplier: --multiplier gives it a value",
    "sweep --vary model.multiplier=mbm,mbm": "--vary model.multiplier names mbm twice",
    "train --name a/b": "--name: name must be a text of at most 64 letters",
    "sweep --vary optimizer.lr=1,2 --at-once 0": "--at-once 0: write auto, or a number from 1 to 1024",
    "sweep --vary optimizer.lr=1,2 --on slurm": "--on slurm: write local, or slurm://PARTITION",
    "sweep --vary optimizer.lr=1,2 --on slurm://a?gpu=1": "--on .*: write local, or slurm://PARTITION",
    "sweep --vary optimizer.lr=1,2 --on slurm://a?cpus=0": "--on .*: write local, or slurm://PARTITION",
    "compare exact-vs-mbm --on slurm://a/b": "--on .*: write local, or slurm://PARTITION",
    "resume compared --epochs 2": "--epochs is for a training run, but runs/compared is a comparison",
    "resume swept --epochs 2": "--epochs is for a training run, but runs/swept is a sweep",
    "resume swept --multiplier mbm": "No such option.*--multiplier",
    "eval swept --multiplier mbm": "runs/swept holds several runs: name one of them, for example .*-1-mbm-seed0-",
    "runs show one-or-two": "did you mean one?",
    "runs list --output not.yaml": "not.yaml is not a folder",
    "eval nothing --multiplier mbm": "no run 'nothing'",
    "eval one": "--multiplier",
    "eval one --multiplier mbm --device gpu": "--device.*'gpu'",
    "eval one --multiplier mbm,nbm": "--multiplier: .*'nbm'.*did you mean mbm?",
    "eval one --multiplier ''": "--multiplier: ''",
    "eval one --multiplier lut:nowhere.bin": "--multiplier: nowhere.bin",
    "eval one --multiplier '{conv9: mbm, default: exact}'": "no layer is called conv9",
    # files
    "configs copy lenet-mbn": "did you mean lenet-mbm?",
    "configs copy lenet-mbm not.yaml": "not.yaml.*exists",
    "configs copy lenet-mbm nowhere/mine.yaml": "nowhere/mine.yaml",
    "configs check seed.yaml": "seed.yaml: seed must be a whole number.*-1",
    "configs check lenet-mbm --set 'model.multiplier={conv9: mbm, default: exact}'": "no layer is called conv9",
    "multipliers export nbm x.bin": "'nbm'",
    "multipliers export mbm x.bin --bits 8": "at most 7 bits",
    "multipliers export mbm x.txt": "name a .bin",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder_of_requests(tmp_path_factory):
    """Make the files that requests name."""
    folder = tmp_path_factory.mktemp("requests")
    assert mbm("train", *EPOCH, "--output", folder / "runs", "--quiet") == SILENT
    made(folder / "runs").folder.rename(folder / "runs" / "one")
    for name in ("compare", "sweep"):
        assert mbm(*KINDS[name], "--output", folder, stopped=after(1)).code == 130
        made(folder).folder.rename(folder / "runs" / ("swept" if name == "sweep" else "compared"))
    (folder / "not.yaml").write_text("name: [")
    (folder / "seed.yaml").write_text("name: x\nseed: -1\n")
    (folder / "wrong.h").write_text("uint32_t f(uint32_t a, uint32_t b) { return c; }\n")
    (folder / "minus.h").write_text("static inline uint32_t f(uint32_t a, uint32_t b) { return a - b; }\n")
    (folder / "raises.py").write_text("def f(a, b):\n    return 1 / 0\n")
    return folder


@pytest.mark.parametrize("line", REFUSED)
def test_wrong_request_is_answered_and_changes_nothing(line, folder_of_requests, monkeypatch):
    monkeypatch.chdir(folder_of_requests)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = contents()
    answer = mbm(*shlex.split(line))
    assert (answer.code, answer.out) == (2, "")
    assert re.match(f"mbm: .*{REFUSED[line]}", answer.err)
    assert answer.err.count("\n") == 1
    assert contents() == before


# Configs, data and runs


def test_configs_are_listed_copied_and_checked():
    listed = mbm("configs", "list").out
    assert [name for name in shipped() if name not in listed] == []
    answer = mbm("configs", "copy", "lenet-mbm")
    assert (answer.code, answer.err) == (0, "")
    assert "lenet-mbm.yaml: edit it" in answer.out
    assert Path("lenet-mbm.yaml").read_text() == shipped_text("lenet-mbm")
    assert mbm("configs", "copy", "lenet-exact", "mine.yaml").code == 0
    answer = mbm("configs", "check", "mine.yaml", "--set", "optimizer.lr=0.5")
    assert (answer.code, answer.err) == (0, "")
    assert parse(answer.out, "x") == load("mine.yaml", ["optimizer.lr=0.5"])


def test_copied_config_is_whole_or_absent():
    command = f"ulimit -f 0; {sys.executable} -m mbm_cli configs copy lenet-mbm"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mbm: cannot write lenet-mbm.yaml (File too large): name another file\n"
    assert not Path("lenet-mbm.yaml").exists()


def test_fetch_says_where_the_data_is():
    answer = mbm("data", "fetch")
    assert (answer.code, answer.err) == (0, "")
    assert str(data_root(None)) in answer.out


def test_runs_are_listed_and_shown():
    assert "no runs" in mbm("runs", "list").out
    assert mbm("runs", "list", "--json").json == {"runs": []}
    # Names have whole seconds: within one the list is in order of the configs' names.
    assert mbm(*KINDS["train"], "--config", "lenet-exact", "--quiet") == mbm("train", *EPOCH, "--quiet") == SILENT
    first, second = runs = list_runs(Path("runs"))
    listed = mbm("runs", "list").out
    assert listed.index(first.name) < listed.index(second.name)
    expected = [{"run": str(run.folder), **run.read_json("summary.json")} for run in runs]
    assert mbm("runs", "list", "--json").json == {"runs": [{**one, "kind": "training"} for one in expected]}
    shown = mbm("runs", "show", first.name)
    assert shown.code == 0
    assert "2/2" in shown.out
    assert first.config_text().strip() in shown.out
    assert mbm("runs", "show", first.folder, "--json").json == {**expected[0], "metrics": first.metrics()}


@pytest.mark.parametrize("name", ["compare", "sweep"])
def test_comparison_and_sweep_are_shown_with_their_table(name):
    result = mbm(*KINDS[name]).out.rpartition(" s an epoch\n")[2]
    assert result.rpartition("run: ")[0] in mbm("runs", "show", made().name).out
