"""Lookup tables: their files, and that they multiply as the multipliers that they were made of."""

import numpy as np
import pytest
import torch
from exhaustive_cpu import instruction_set, wild
from tables import exported, random_table

from mbm_cli import _cpu, lut
from mbm_cli.lut import Table
from mbm_cli.multipliers import Multiplier, export, reference_product
from mbm_cli.ops import conv2d, multiply


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def npy_header(shape: str) -> bytes:
    """A file that ends where its numbers should begin."""
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(("bits", "suffix"), [(1, ".bin"), (7, ".bin"), (1, ".npy"), (7, ".npy"), (11, ".npy")])
def test_what_is_written_is_read_back(tmp_path, bits, suffix):
    table = random_table(bits).table
    path = tmp_path / f"table{suffix}"
    lut.write(table, path)
    assert lut.read(path) == table
    assert np.array_equal(lut.read(path).entries, table.entries)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_bytes_of_a_bin_file(tmp_path):
    """Entry (fa << m) | fb is a byte: m fraction bits, and above them the carry."""
    path = tmp_path / "mitchell.bin"
    lut.write(export(Multiplier.parse("mitchell-t21-r2"), 2), path)
    # 1 + fa/4 + fb/4 while that is below 2, then twice the sum of the fractions: Mitchell's product.
    expected = [fa + fb if fa + fb < 4 else 4 | (fa + fb - 4) for fa in range(4) for fb in range(4)]
    assert list(path.read_bytes()) == expected


def test_operands_are_not_exchanged(tmp_path):
    entries = np.zeros((2, 2), np.uint16)
    entries[0, 1] = 1  # 1.0 x 1.5 is 1.5, but 1.5 x 1.0 is 1.0
    lut.write(Table(1, entries), tmp_path / "table.bin")
    name = f"lut:{tmp_path / 'table.bin'}"
    one, more = torch.tensor([1.0]), torch.tensor([1.5])
    assert multiply(one, more, name) == 1.5
    assert multiply(more, one, name) == 1.0
    assert conv2d(one.reshape(1, 1, 1, 1), more.reshape(1, 1, 1, 1), multiplier=name) == 1.5
    assert conv2d(more.reshape(1, 1, 1, 1), one.reshape(1, 1, 1, 1), multiplier=name) == 1.0


@pytest.mark.parametrize("family", ["mbm", "mitchell", "drum", "exact"])
@pytest.mark.parametrize("bits", [1, 3, 5, 7, 9])
def test_a_table_of_a_built_in_gives_its_convolutions(tmp_path, family, bits):
    """At equal t and r, with every instruction set, special values included."""
    built_in, table = exported(family, bits, tmp_path / "table.npy")
    generator = torch.Generator().manual_seed(0)
    input, weight = torch.randn(2, 3, 9, 12, generator=generator), torch.randn(5, 3, 3, 3, generator=generator)
    a, b = wild(20_000, generator), wild(20_000, generator)
    if family == "exact":  # which knows subnormals
        a, b = (torch.where(x.abs() < 2.0**-60, 1.0, x) for x in (a, b))
    for name in _cpu.instruction_sets():
        with instruction_set(name):
            assert same_bits(multiply(a, b, built_in), multiply(a, b, table))
            for special in (1.0, torch.inf):  # with infinity, the image is computed from the definition
                input[0, 0, 0, 0] = special
                assert same_bits(conv2d(input, weight, multiplier=built_in), conv2d(input, weight, multiplier=table))


@pytest.mark.parametrize("bits", [1, 2, 5, 7, 8, 11])
def test_products_of_random_tables(bits):
    table = random_table(bits)
    generator = torch.Generator().manual_seed(0)
    a, b = wild(50_000, generator), wild(50_000, generator)
    expected = reference_product(a, b, table)
    pixels, weights = (torch.randn(n, generator=generator) for n in (300, 33))
    sums = 0.0 + reference_product(pixels, weights.unsqueeze(1), table)
    for name in _cpu.instruction_sets():
        with instruction_set(name):
            assert same_bits(multiply(a, b, table), expected)
            found = conv2d(pixels.reshape(1, 1, 1, -1), weights.reshape(-1, 1, 1, 1), multiplier=table)
            assert same_bits(found.reshape(33, 300), sums)


def test_a_table_with_entries_repeated_is_the_same_multiplier():
    table = random_table(3).table
    again = Table(5, table.repeated(5).entries)
    for fa in (0, 9, 31):
        for fb in (3, 16, 30):
            assert again.entries[fa, fb] == table.entries[fa >> 2, fb >> 2] << 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "is a .bin or a .npy file"),
        ("t.bin", b"", "has 0 entries"),
        ("t.bin", b"\0", "has 1 entries"),
        ("t.bin", bytes(15), "has 15 entries"),
        ("t.bin", bytes(1 << 16), "m from 1 to 7"),
        ("t.bin", b"\0\0\0\4", "entry 3 is 4, but a fraction of 1 bits and a carry are at most 3"),
        ("t.npy", b"", "cannot be read as .npy"),
        ("t.npy", b"\x93NUMPY\x01\x00", "cannot be read as .npy"),
        ("t.npy", b"PK\x03\x04", "cannot be read as .npy"),
        ("t.npy", npy_header("(16")[:80], "cannot be read as .npy"),
        ("t.npy", npy_header("(16"), "cannot be read as .npy"),
        ("t.npy", npy_header("(1152921504606846976,)"), "cannot be read as .npy"),
        ("t.npy", np.zeros(16, np.uint8), "holds uint8"),
        ("t.npy", np.zeros(16, object), "cannot be read as .npy"),
        ("t.npy", np.zeros(15, np.uint16), "has 15 entries"),
        ("t.npy", np.full(16, 8, np.uint16), "entry 0 is 8"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message) as error:
        Multiplier.parse(f"lut:{path}")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_there():
    with pytest.raises(ValueError, match="there is no such file"):
        Multiplier.parse("lut:nowhere.bin")


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("t.bin", 8, "at most 7 bits"),
        ("t.txt", 3, "name a .bin"),
        ("no/t.bin", 3, "written"),
        ("x" * 251 + ".bin", 3, "written"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, bits, message):
    with pytest.raises(ValueError, match=message):
        lut.write(random_table(bits).table, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_changed_file_is_another_multiplier(tmp_path):
    """A name is read anew whenever it is parsed; what was made of the old file stays what it was."""
    path = tmp_path / "table.npy"
    lut.write(random_table(3).table, path)
    before = Multiplier.parse(f"lut:{path}")
    entries = random_table(3).table.entries.copy()
    entries[0, 0] ^= 1
    lut.write(Table(3, entries), path)
    after = Multiplier.parse(f"lut:{path}")
    one = torch.ones(1)
    assert before != after
    assert multiply(one, one, before) != multiply(one, one, after)
    assert same_bits(multiply(one, one, before), reference_product(one, one, random_table(3)))
