"""Several runs in turn in one process: each comes to what it comes to alone, bit for bit."""

from pathlib import Path

import pytest
import torch
from commands import after
from stress.runs import check_same, state

from mbm_cli import turns
from mbm_cli.config import Config, load
from mbm_cli.errors import Interrupted
from mbm_cli.experiments.lifecycle import Watch, never
from mbm_cli.experiments.train import resume_in_turns, train, train_in_turns
from mbm_cli.runs import Run, list_runs
from mbm_cli.turns import take_turns

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_EACH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])])
# Dropout, batch norm, quantisation, other lengths, other settings of PyTorch's arithmetic.
RUNS = {
    "dropout": ("cnn3-mbm", ["train.epochs=2"]),
    "exact": ("cnn3-exact", ["seed=5", "data.batch_size=24"]),
    "quantised": ("lenet-int8", ["data.train_limit=75"]),
    "longer": ("lenet-exact", ["train.epochs=2"]),
    "any-algorithm": ("lenet-exact", ["train.deterministic=false"]),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(turns, "STEPS", 4)  # of some ten


def config_of(device: str, name: str, *more: str) -> Config:
    base, fields = RUNS[name]
    few = ["data.train_limit=100", "data.test_limit=50", "data.batch_size=16", "train.epochs=1", "train.threads=1"]
    return load(base, [*few, f"name={name}", f"device={device}", *fields, *more])


def alone(config: Config) -> dict:
    return state(train(config, Path("alone")).run.folder)


def in_turns(configs: list[Config], stopped=never, at_once: int = 3) -> dict[str, str | None]:
    """Train in turn; return the reason for which each run that has ended failed."""
    ended: dict[str, str | None] = {}

    def begin(config: Config):
        return train_in_turns(config, Path("turns"), Watch(), stopped)

    take_turns(configs, begin, at_once, lambda config, reason: ended.update({config.name: reason}))
    return ended


def made(name: str) -> Run:
    return next(run for run in list_runs(Path("turns")) if run.config().name == name)


@ON_EACH
def test_runs_in_turn_come_to_what_they_do_alone(device):
    configs = [config_of(device, name) for name in RUNS]
    assert in_turns(configs) == dict.fromkeys(RUNS)
    for config in configs:
        if config.train.deterministic:
            check_same(made(config.name).folder, alone(config))


def test_settings_of_pytorch_belong_to_a_computation():
    seen = []

    def begin(threads: int):
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = threads == 1
        for _ in range(9):
            yield
            seen.append((threads, torch.get_num_threads(), torch.backends.cudnn.deterministic))

    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    take_turns([1, 2], begin, 2, lambda threads, reason: None)
    assert set(seen) == {(1, 1, True), (2, 2, False)}
    assert (torch.get_num_threads(), torch.backends.cudnn.deterministic) == before


@ON_EACH
def test_a_failing_run_takes_no_other_with_it(device):
    configs = [
        config_of(device, "exact"),
        config_of(device, "longer", "optimizer.lr=1e30"),
        config_of(device, "dropout"),
    ]
    ended = in_turns(configs)
    assert "lower optimizer.lr" in str(ended.pop("longer"))
    assert ended == {"exact": None, "dropout": None}
    for config in (configs[0], configs[2]):
        check_same(made(config.name).folder, alone(config))
    assert made("longer").summary().status == "failed"


@ON_EACH
def test_interrupted_runs_are_resumed_in_other_company(device):
    configs = [config_of(device, name) for name in ("dropout", "quantised", "longer")]
    with pytest.raises(Interrupted):
        in_turns(configs, after(14))
    runs = [made(config.name) for config in configs]
    assert {run.summary().status for run in runs} == {"interrupted"}
    ended = []

    def begin(run: Run):
        return resume_in_turns(run, None, Watch(), never, None)

    take_turns([runs[1], runs[0]], begin, 2, lambda run, reason: ended.append(reason))
    take_turns([runs[2]], begin, 2, lambda run, reason: ended.append(reason))
    assert ended == [None] * 3
    for config, run in zip(configs, runs, strict=True):
        check_same(run.folder, alone(config))
