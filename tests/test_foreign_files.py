"""Files of other tools: tables of ApproxTrain and of integers, functions in C, MNIST where users have it."""

import gzip
import hashlib
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import EPOCH, mbm

import mbm_cli
import mbm_cli.errors
from mbm_cli import data
from mbm_cli.multipliers import content, tables

# ---- Tables

PUBLISHED = {("mbm", 1): "8d65a89d", ("mbm", 5): "8f47b617", ("mitchell", 3): "c1bbddc8"}


@pytest.mark.parametrize(("family", "bits"), PUBLISHED)
def test_published_tables_are_written_and_read(family, bits, tmp_path):
    name, path = f"{family}-t{23 - bits}-r{bits}", tmp_path / "table.bin"
    assert mbm("multipliers", "export", name, path, "--bits", bits).code == 0
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(PUBLISHED[family, bits])
    a, b = torch.rand(2, 4096, generator=torch.Generator().manual_seed(0)) + 1
    assert torch.equal(mbm_cli.multiply(a, b, f"lut:{path}"), mbm_cli.multiply(a, b, name))


def test_the_carry_is_in_bit_7_whatever_the_width(tmp_path):
    path = tmp_path / "table.bin"
    path.write_bytes(bytes.fromhex("80808080"))
    two = mbm_cli.multiply(torch.tensor([1.0, 1.5]), torch.tensor([1.0, 1.5]), f"lut:{path}")
    assert torch.equal(two, torch.tensor([2.0, 2.0]))
    assert "exists already" in mbm("multipliers", "export", "mbm-t18-r5", path, "--bits", 5).err
    path.unlink()
    mbm("multipliers", "export", "mbm-t18-r5", path, "--bits", 5)
    assert path.read_bytes()[1023] == 0x9F


def test_files_of_earlier_versions_are_read(tmp_path):
    table = content.export(mbm_cli.resolve("mbm-t18-r5"), 5)
    (tmp_path / "old.bin").write_bytes(table.entries.astype(np.uint8).tobytes())  # the carry in bit 5
    assert tables.read(tmp_path / "old.bin") == table


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (lambda a: np.outer(a, a) >> 8, r"looks like a table of unsigned integer products \(a \* b >> 8\)"),
        (lambda a: (np.outer(a - 256 * (a > 127), a - 256 * (a > 127)) >> 8) & 255, "signed integer products"),
        (lambda a: 0 * np.outer(a, a), "they would be wrong by -52 % on average"),
    ],
)
def test_other_tables_are_recognised(entries, words, tmp_path):
    np.save(tmp_path / "table.npy", entries(np.arange(256)).astype(np.uint16))
    with pytest.raises(ValueError, match=words):
        mbm_cli.resolve(f"lut:{tmp_path / 'table.npy'}")


def test_a_file_of_another_size_is_named_with_its_size(tmp_path):
    (tmp_path / "table.bin").write_bytes(bytes(131_072))
    with pytest.raises(ValueError, match=r"131,072 bytes.*256 x 256 table of 16-bit integers\?"):
        mbm_cli.resolve(f"lut:{tmp_path / 'table.bin'}")


# ---- Functions in C

MULTIPLY = "float f(float a, float b) {\n  return a * b;\n}\n"


def function(text: str, folder: Path) -> str:
    (folder / "f.h").write_text(text)
    return f"c:{folder / 'f.h'}:f"


def test_a_function_of_floats_is_taken_as_it_is(tmp_path):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    name = function(MULTIPLY, tmp_path)
    assert torch.equal(mbm_cli.multiply(a, b, name), a * b)
    assert mbm("characterize", name, "--samples", 1000, "--output", tmp_path).code == 0


@pytest.mark.parametrize(
    "text",
    [
        "double f(double a, double b) { return a * b; }",
        "int f(int a) { return a; }",
        "/* float f(float a, float b) { */ float g(float a) { return a; }",
    ],
)
def test_another_signature_is_refused_with_both(text, tmp_path):
    with pytest.raises(ValueError, match=r"uint32_t f\(uint32_t a, uint32_t b\).*or float f\(float a, float b\)"):
        mbm_cli.resolve(function(text, tmp_path))


def test_a_compilers_error_has_the_users_line(tmp_path):
    name = function(MULTIPLY.replace("a * b", "a * c"), tmp_path)
    with pytest.raises(ValueError, match=r"f does not compile: line 2: .*c"):
        mbm_cli.multiply(torch.ones(1), torch.ones(1), name)


def test_a_function_is_tabulated(tmp_path):
    name = function(MULTIPLY, tmp_path)
    assert mbm("multipliers", "export", name, tmp_path / "x.bin", "--bits", 7).code == 0
    assert tables.read(tmp_path / "x.bin") == content.export(mbm_cli.resolve("exact"), 7)
    a, b = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) + 1
    assert torch.equal(mbm_cli.multiply(a, b, f"{name}@7"), mbm_cli.multiply(a, b, f"lut:{tmp_path / 'x.bin'}"))
    answer = mbm("train", *EPOCH, "--multiplier", name, "--bits", 5, "--output", tmp_path, "--json")
    assert answer.json["multiplier"] == f"{name}@5"


# ---- MNIST


@pytest.fixture
def mnist(monkeypatch) -> data.Published:
    """Make four small files the verified ones, in no place yet; refuse to fetch."""
    small = replace(data.MNIST, md5={name: hashlib.md5(content_of(name)).hexdigest() for name in data.MNIST.md5})

    def refused(*arguments: object) -> dict[str, bytes]:
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(data.Published, "_fetch", refused)
    return small


def content_of(name: str) -> bytes:
    shape = (3, 28, 28) if "images" in name else (3,)
    return struct.pack(f">{len(shape) + 1}I", 0x800 | len(shape), *shape) + bytes(math.prod(shape))


@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
@pytest.mark.parametrize("spelling", ["{}", "{}.gz", "idx"])
def test_files_are_found_where_users_have_them(folder, spelling, mnist, tmp_path):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in mnist.md5:
        spelt = name.replace("-idx", ".idx") if spelling == "idx" else spelling.format(name)
        (tmp_path / folder / spelt).write_bytes(
            gzip.compress(content_of(name)) if spelt.endswith("gz") else content_of(name)
        )
    before = sorted(tmp_path.rglob("*"))
    train, test = mnist.load("cpu", tmp_path)
    assert (len(train), len(test)) == (3, 3)
    assert mnist.fetch(tmp_path) == tmp_path / folder
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_files_are_fetched_beside_the_others(mnist, tmp_path, monkeypatch):
    first, *others = mnist.md5
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / first).write_bytes(content_of(first))
    asked = []

    def fetched(self: object, wanted: list[str], folder: Path, faults: list[str]) -> dict[str, bytes]:
        asked.append((wanted, folder))
        return {name: content_of(name) for name in wanted}

    monkeypatch.setattr(data.Published, "_fetch", fetched)
    mnist.load("cpu", tmp_path)
    assert asked == [(others, tmp_path / "raw")]


def test_what_does_not_serve_is_named(mnist, tmp_path):
    for name in mnist.md5:
        (tmp_path / name).write_bytes(content_of(name))
    damaged = tmp_path / next(iter(mnist.md5))
    damaged.write_bytes(b"other")
    with pytest.raises(mbm_cli.errors.RunError, match=f"{damaged} has other content"):
        mnist.load("cpu", tmp_path)


def test_nothing_is_made_where_nothing_was_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    answer = mbm("data", "fetch", "--root", tmp_path / "new")
    assert answer.code == 1
    assert answer.err.splitlines()[-1].startswith("Put the files train-images-idx3-ubyte, ")
    assert "\\n" not in answer.err
    assert not (tmp_path / "new").exists()
