"""Tables: their files, and that they multiply as the multipliers from which they were made."""

import numpy as np
import pytest
import torch
from exhaustive_cpu import instruction_set
from operands import normal, wild
from sums import same_bits
from tables import exported, random_table

from mbm_cli import _cpu, conv2d, multiply
from mbm_cli.multipliers import tables
from mbm_cli.multipliers.content import export
from mbm_cli.multipliers.float32 import reference_product
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.multipliers.tables import Table


def npy_header(shape: str) -> bytes:
    """Return a .npy file that ends where its numbers should begin."""
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


# Products


@pytest.mark.parametrize("family", ["mbm", "mitchell", "drum", "exact"])
@pytest.mark.parametrize("bits", [1, 3, 5, 7, 9])
def test_products_of_tables_of_built_ins(tmp_path, family, bits):
    built_in, table = exported(family, bits, tmp_path / "table.npy")
    generator = torch.Generator().manual_seed(0)
    input, weight = normal((2, 3, 9, 12), (5, 3, 3, 3))
    a, b = wild(20_000, generator), wild(20_000, generator)
    if family == "exact":  # which knows subnormals
        a, b = (torch.where(x.abs() < 2.0**-60, 1.0, x) for x in (a, b))
    assert same_bits(reference_product(a, b, built_in), reference_product(a, b, table))
    for name in _cpu.instruction_sets():
        with instruction_set(name):
            assert same_bits(multiply(a, b, built_in), multiply(a, b, table))
            for special in (1.0, torch.inf):  # infinity rules the fast path out
                input[0, 0, 0, 0] = special
                assert same_bits(conv2d(input, weight, multiplier=built_in), conv2d(input, weight, multiplier=table))


@pytest.mark.parametrize("bits", [1, 2, 5, 7, 8, 11])
def test_products_of_random_tables(bits):
    table = random_table(bits)
    generator = torch.Generator().manual_seed(0)
    a, b = wild(50_000, generator), wild(50_000, generator)
    pixels, weights = normal((300,), (33,))
    products, sums = reference_product(a, b, table), 0.0 + reference_product(pixels, weights.unsqueeze(1), table)
    for name in _cpu.instruction_sets():
        with instruction_set(name):
            assert same_bits(multiply(a, b, table), products)
            found = conv2d(pixels.reshape(1, 1, 1, -1), weights.reshape(-1, 1, 1, 1), multiplier=table)
            assert same_bits(found.reshape(33, 300), sums)


def test_rows_are_those_of_the_first_operand():
    entries = np.zeros((2, 2), np.uint16)
    entries[0, 1] = 1  # 1.0 x 1.5 is 1.5, but 1.5 x 1.0 is 1.0
    table = Multiplier("lut", content=Table(1, entries))
    one, more = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1.5)
    for product in (lambda a, b: multiply(a, b, table), lambda a, b: conv2d(a, b, multiplier=table)):
        assert [product(one, more).item(), product(more, one).item()] == [1.5, 1.0]


# Files


@pytest.mark.parametrize(("bits", "suffix"), [(1, ".bin"), (7, ".bin"), (1, ".npy"), (7, ".npy"), (11, ".npy")])
def test_written_tables_are_read_back(tmp_path, bits, suffix):
    table, path = random_table(bits).content, tmp_path / f"table{suffix}"
    tables.write(table, path)
    assert tables.read(path) == table
    assert np.array_equal(tables.read(path).entries, table.entries)
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_of_a_bin_file(tmp_path):
    """Entry (fa << m) | fb is a byte: m fraction bits, and the carry in bit 7."""
    path = tmp_path / "mitchell.bin"
    tables.write(export(Multiplier.parse("mitchell-t21-r2"), 2), path)
    # 1 + fa/4 + fb/4 while that is below 2, then twice the sum of the fractions: Mitchell's product.
    expected = [fa + fb if fa + fb < 4 else 128 | (fa + fb - 4) for fa in range(4) for fb in range(4)]
    assert list(path.read_bytes()) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "is a .bin or a .npy file"),
        *[("t.bin", bytes(count), f"has {count} entries") for count in (0, 1, 15)],
        ("t.bin", bytes(1 << 16), "has 65,536 bytes"),
        ("t.bin", b"\0\0\0\4", "entry 3 is 4, but a fraction of 1 bits and a carry are at most 3"),
        *[("t.npy", start, "cannot be read as .npy") for start in (b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04")],
        *[("t.npy", npy_header(shape), "cannot be read as .npy") for shape in ("(16", "(1152921504606846976,)")],
        ("t.npy", npy_header("(16")[:80], "cannot be read as .npy"),
        ("t.npy", np.zeros(16, object), "cannot be read as .npy"),
        ("t.npy", np.zeros(16, np.uint8), "holds uint8"),
        ("t.npy", np.zeros(15, np.uint16), "has 15 entries"),
        ("t.npy", np.full(16, 8, np.uint16), "entry 0 is 8"),
    ],
)
def test_other_files_are_rejected(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message) as error:
        tables.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("t.bin", 8, "at most 7 bits"),
        ("t.txt", 3, "name a .bin"),
        *[(name, 3, "cannot be written") for name in ("no/t.bin", "x" * 251 + ".bin", "folder.bin")],
    ],
)
def test_failed_writes_leave_no_file(tmp_path, name, bits, message):
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(ValueError, match=message):
        tables.write(random_table(bits).content, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.bin"]


@pytest.mark.parametrize("entries", [np.zeros((2, 2), np.int16), np.zeros((4, 4), np.uint16), np.zeros(4, np.uint16)])
def test_entries_of_other_shapes_are_rejected(entries):
    with pytest.raises(ValueError, match=r"not uint16 \(2, 2\)"):
        Table(1, entries)
