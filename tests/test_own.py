"""A network and a data set of one's own: trained, resumed, evaluated and compared; what is wrong with them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CPU, SILENT, after, made, mbm
from safetensors.torch import save_file
from stress.runs import check_same, state

from mbm_cli.config import load
from mbm_cli.errors import RequestError
from mbm_cli.experiments import compare, profile_conv
from mbm_cli.experiments.lifecycle import load_data
from mbm_cli.own_data import OwnFile

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.shared(x))
        x = x + torch.relu(self.norm(self.shared(x)))
        return self.head(x.mean((2, 3)))

def net(input_shape, classes):
    return Net(input_shape[0], classes)

def raises(input_shape, classes):
    return 1 / 0

def a_number(input_shape, classes):
    return 3

def other_images(input_shape, classes):
    return Net(input_shape[0] + 1, classes)

def other_classes(input_shape, classes):
    return Net(input_shape[0], classes + 1)

def plain(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3, classes))

class Mine(nn.Conv2d):
    pass

def subclass(input_shape, classes):
    return nn.Sequential(Mine(2, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
OWN = ["--set", "model.name=python:net.py:net", "--set", "data.dataset=images.npz"]
FEW = [*CPU, "--set", "data.batch_size=16", "--multiplier", "{conv2d: mbm, linear: mbm-t8}"]
TRAIN = ["train", *OWN, *FEW, "--epochs", 2, "--set", "data.crop=1", "--set", "data.flip=true"]


def images(**changed: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of a data set: 2 channels, 10 x 12 pixels, 3 classes."""
    random = np.random.default_rng(0)
    arrays = {
        "train_images": random.integers(0, 256, (60, 2, 10, 12), np.uint8),
        "train_labels": random.integers(0, 3, 60),
        "test_images": random.integers(0, 256, (30, 2, 10, 12), np.uint8),
        "test_labels": np.arange(30) % 3,
    }
    return {**arrays, **changed}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    np.savez("images.npz", **images())


def test_own_network_and_images_go_through_every_command(monkeypatch):
    monkeypatch.setattr(compare, "convolution_seconds", lambda config, device: 0.001)
    assert mbm(*TRAIN, "--quiet", "--output", "whole") == SILENT
    assert mbm(*TRAIN, stopped=after(6)).code == 130  # within the second epoch
    run = made()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert mbm("resume", ".." / run.folder, "--trust", "--quiet") == SILENT
    monkeypatch.chdir("..")
    check_same(run.folder, state(made("whole").folder))
    rows = mbm("eval", run.folder, "--multiplier", "exact,mbm-int8", "--trust", "--json").json["evaluations"]
    assert rows[0]["test_accuracy"] == run.summary().test_accuracy
    compared = mbm("compare", "exact-vs-mbm", *OWN, *CPU, "--seeds", 1, "--epochs", 1, "--output", "compared", "--json")
    assert (compared.code, compared.json["model"]) == (0, "python:net.py:net")
    swept = mbm("sweep", *OWN, *CPU, "--seeds", 2, "--epochs", 1, "--jobs", 2, "--output", "swept", "--json")
    assert [one["failed"] for one in swept.json["combinations"]] == [0]
    monkeypatch.setattr(profile_conv, "REFERENCE_SHAPES", ())
    monkeypatch.setattr(profile_conv, "measure_ceiling", lambda *_: 1e12)
    profiled = mbm("profile", "conv", *OWN, *CPU, "--output", "profiled", "--json").json["convolutions"]
    assert [one["shape"] for one in profiled[:2]] == ["2->8 3x3 p1 10x12", "8->8 3x3 p1 g2 10x12"]


def line_of(text: str) -> int:
    return 1 + NETWORK[: NETWORK.index(text)].count("\n")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", f"net.py, line {line_of('1 / 0')}, raises ZeroDivisionError: division by zero"),
        ("a_number", f"net.py, line {line_of('def a_number')}, returns int, not a torch.nn.Module"),
        (
            "other_images",
            f"net.py, line {line_of('x = torch.relu(self.stem')}, fails for two images (2, 10, 12): RuntimeError: ",
        ),
        ("plain", f"net.py, line {line_of('def plain')}, fails for two images (2, 10, 12): RuntimeError: "),
        (
            "other_classes",
            f"net.py, line {line_of('def other_classes')}, maps two images to torch.float32 (2, 4), not to ",
        ),
        ("none", "net.py has no function none"),
    ],
)
def test_wrong_network_is_one_line_with_its_line(function, message):
    answer = mbm("train", *OWN, *CPU, "--set", f"model.name=python:net.py:{function}")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"mbm: model.name: {message}")
    assert answer.err.count("\n") == 1
    assert not Path("runs").exists()


def test_layer_that_cannot_be_converted_is_named():
    answer = mbm("train", *OWN, *CPU, "--set", "model.name=python:net.py:subclass")
    assert answer.code == 2
    assert answer.err.startswith("mbm: model.multiplier: 0 is a ")


@pytest.mark.parametrize(("text", "line"), [("\n\n1 / 0\n", 3), ("\nx = (\n", 2)], ids=["raises", "syntax"])
def test_file_that_cannot_be_run_is_named_with_its_line(text, line):
    Path("net.py").write_text(text)
    answer = mbm("train", *OWN, *CPU)
    assert answer.code == 2
    assert f"model.name: net.py, line {line}, cannot be run: " in answer.err


@pytest.mark.parametrize(("file", "kind"), [("net.py", "network"), ("images.npz", "data")])
def test_changed_file_is_refused(file, kind):
    assert mbm(*TRAIN, stopped=after(6)).code == 130
    if file == "net.py":
        Path(file).write_text(NETWORK + "\n# changed\n")
    else:
        np.savez(file, **images(test_labels=np.zeros(30, np.int64) + 2))
    answer = mbm("resume", made().folder, "--trust")
    assert answer.code == 1
    assert f"{file}" in answer.err
    assert f"differs from the {kind} that " in answer.err


# Images


def test_pixels_are_standardised_and_floats_kept():
    train, test = OwnFile("images.npz").load("cpu")
    assert (OwnFile("images.npz").shape, train.classes, len(test)) == ((2, 10, 12), 3, 30)
    torch.testing.assert_close(train.images.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.images.std((0, 2, 3), correction=0), torch.ones(2))
    pixels = torch.from_numpy(images()["train_images"])
    torch.testing.assert_close(train.images[pixels == 0], train.black.expand_as(train.images)[pixels == 0])
    floats = np.random.default_rng(1).random((2, 5, 7, 6), np.float32)
    labels = np.zeros(5, np.uint8)
    np.savez("f.npz", train_images=floats[0], train_labels=labels, test_images=floats[1], test_labels=labels + 4)
    train, test = OwnFile("f.npz").load("cpu", train_limit=4)
    assert (OwnFile("f.npz").shape, OwnFile("f.npz").classes) == ((1, 7, 6), 5)
    assert torch.equal(train.images, torch.from_numpy(floats[0][:4, None]))
    assert torch.equal(test.labels, torch.full((5,), 4))


def test_held_out_images_replace_the_test_images():
    fields = ["data.dataset=images.npz", "data.validation=20", "data.train_limit=30"]
    train, held_out = load_data(load("lenet-mbm", fields).data, torch.device("cpu"))
    whole, _ = OwnFile("images.npz").load("cpu")
    assert torch.equal(train.images, whole.images[:30])
    assert torch.equal(held_out.images, whole.images[40:])
    assert torch.equal(held_out.labels, whole.labels[40:])
    assert mbm("train", *OWN, *CPU, "--set", "data.validation=60").code == 2


WRONG = {
    "no array test_labels": {"test_labels": None},
    "train_images is float64 (60, 2, 10, 12): images are uint8 or float32": {"train_images": np.zeros((60, 2, 10, 12))},
    "test_images is uint8 (30, 2): images are": {"test_images": np.zeros((30, 2), np.uint8)},
    "train_labels is int64 (59,): labels are integers from 0 on, (60,)": {"train_labels": np.zeros(59, np.int64)},
    "test_labels is int64 (30,): labels are integers from 0 on": {"test_labels": np.arange(30) - 1},
    "training images are uint8 (2, 10, 12), but test images uint8 (2, 9, 12)": {
        "test_images": np.zeros((30, 2, 9, 12), np.uint8)
    },
    "Object arrays cannot be loaded when allow_pickle=False": {"train_labels": np.array([None] * 60)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arrays_are_named(message):
    np.savez("images.npz", **{name: array for name, array in images(**WRONG[message]).items() if array is not None})
    answer = mbm("train", *OWN, *CPU)
    assert (answer.code, answer.out) == (2, "")
    assert f"data.dataset: images.npz: {message}" in answer.err.replace("has no", "no")


def test_damaged_and_missing_files_are_named():
    content = Path("images.npz").read_bytes()
    for damaged in (content[:-30], b"", b"PK text"):
        Path("images.npz").write_bytes(damaged)
        answer = mbm("train", *OWN, *CPU)
        assert answer.code == 2
        assert answer.err.startswith("mbm: data.dataset: images.npz")
        assert answer.err.count("\n") == 1
    os.unlink("images.npz")
    assert "images.npz cannot be read (No such file" in mbm("train", *OWN, *CPU).err
    floats = np.full((60, 2, 10, 12), np.nan, np.float32)
    np.savez("images.npz", **images(train_images=floats, test_images=floats[:30]))
    with pytest.raises(RequestError, match="train_images has values that are not finite"):
        OwnFile("images.npz").load("cpu")


# Weights without a run


@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_weights_in_a_file_are_evaluated(file):
    assert mbm(*TRAIN, "--quiet") == SILENT
    weights = made().checkpoint()["model"]
    torch.save(weights, file) if file == "w.pt" else save_file(weights, file)
    command = ["eval", "--weights", file, "--multiplier", "exact,{conv2d: mbm, linear: mbm-t8}"]
    model = ["--model", "python:net.py:net", "--set", "data.dataset=images.npz", "--device", "cpu", "--threads", 1]
    answer = mbm(*command, *model, "--output", "evaluated", "--json")
    assert answer.code == 0, answer.err
    result = answer.json
    assert (result["run"], result["trained_with"]) == (str(Path(file).absolute()), None)
    assert [row["multiplier"] for row in result["evaluations"]] == ["exact", "{conv2d: mbm, linear: mbm-t8}"]
    assert result["evaluations"][1]["test_loss"] == made().metrics()[-1]["test_loss"]
    answer = mbm("eval", "--weights", file, "--multiplier", "exact", *model, "--model", "mlp")
    assert f"--weights: {file} does not fit the network: fc1.weight is missing; " in answer.err
