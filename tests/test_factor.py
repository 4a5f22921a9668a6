"""The exact factorisation of tables: every entry, in few terms, within a second."""

import time

import numpy as np
import pytest

from mbm_cli.multipliers.factor import Terms, factorize, rank
from mbm_cli.multipliers.integer import Operands, tabulate


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def codes(bits: int, signed: bool = False) -> np.ndarray:
    n = 1 << bits
    numbers = np.arange(n)
    return (numbers + n // 2) % n - n // 2 if signed else numbers


def broken_array(bits: int, least: int) -> np.ndarray:
    """Return the products of an array multiplier without the partial products a_i b_j of i + j < least."""
    numbers = codes(bits)
    table = np.zeros((1 << bits, 1 << bits), np.int64)
    for i in range(bits):
        for j in range(max(least - i, 0), bits):
            table += np.outer(numbers >> i & 1, numbers >> j & 1) << (i + j)
    return table


def restored(terms: Terms) -> np.ndarray:
    """Return the table that terms stand for, after checking their formats."""
    n = len(terms.f)
    assert (terms.u.dtype, terms.v.dtype, terms.f.dtype, terms.g.dtype) == (np.int8, np.int8, np.int64, np.int64)
    assert terms.u.shape == (n, terms.count)
    assert terms.v.shape == (terms.count, n)
    assert terms.g.shape == (n,)
    return terms.u.astype(np.int64) @ terms.v.astype(np.int64) + terms.f[:, None] + terms.g


def count(table: np.ndarray) -> int:
    """Return the number of terms of a table, after checking all its entries."""
    terms = factorize(table)
    assert terms is not None
    np.testing.assert_array_equal(restored(terms), table)
    return terms.count


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_exact_products_take_one_term(bits: int, signed: bool) -> None:
    numbers = codes(bits, signed)
    table = np.outer(numbers, numbers)
    assert count(table) == 1
    assert count(table + 1000) == 1
    assert rank(table) == 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_truncated_operands_take_one_term(bits: int) -> None:
    kept = codes(bits) & ~1
    assert count(np.outer(kept, kept)) == 1
    assert count(np.outer(kept, codes(bits)) >> 1) == 1


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("dropped", [1, 2, 3])
def test_dropped_partial_products_take_a_term_each_bit(bits: int, dropped: int) -> None:
    assert count(broken_array(bits, dropped)) == min(rank(broken_array(bits, dropped)), 1 + dropped)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_all_integer_types_are_accepted(dtype: type) -> None:
    assert count(broken_array(8, 4).astype(dtype)) == 5


def test_functions_of_one_operand_take_no_term(random: np.random.Generator) -> None:
    assert count(np.zeros((256, 256), np.int32)) == 0
    assert count(np.full((16, 16), -(2**31))) == 0
    assert count(random.integers(-(2**31), 2**31, 64)[:, None] + random.integers(-(2**31), 2**31, 64)) == 0


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_asymmetric_tables(bits: int) -> None:
    numbers = codes(bits)
    table = np.outer(numbers & ~3, numbers | 1) + 7 * (numbers[:, None] >> 1) - 1
    assert count(table) == 1
    assert count(table.T) == 1


def test_bitwise_and_takes_a_term_each_bit() -> None:
    numbers = codes(8)
    assert count(numbers[:, None] & numbers) == 8


def test_few_wrong_rows_or_columns_take_a_term_each(random: np.random.Generator) -> None:
    table = np.outer(codes(8), codes(8))
    table[[3, 77, 200]] = random.integers(0, 128, (3, 256))
    assert count(table) == 4
    assert count(table.T) == 4


def test_signed_products_with_wrong_rows(random: np.random.Generator) -> None:
    table = np.outer(codes(8, True), codes(8, True))
    table[[3, 77, 200]] += random.integers(-60, 60, (3, 256))
    assert count(table) == 4


@pytest.mark.parametrize(("family", "bits", "signed", "terms"), [("mbm", 6, False, 17), ("mitchell", 6, True, 8)])
def test_truncated_logarithmic_products_reach_the_rank(family: str, bits: int, signed: bool, terms: int) -> None:
    table = tabulate(family, Operands(bits, signed), truncate=2).entries
    assert count(table) == rank(table) == terms


def test_sums_of_small_products_reach_the_rank(random: np.random.Generator) -> None:
    table = random.integers(-2, 3, (256, 7)) @ random.integers(-20, 20, (7, 256))
    assert count(table) == rank(table) == 7


def test_bases_are_those_of_the_rows_lattice(random: np.random.Generator) -> None:
    # The rows 2 v, 3 v and v + w: no two of them generate the others with integer coordinates.
    v, w = random.integers(-40, 40, (2, 64))
    rows = np.stack([0 * v, 2 * v, 3 * v, v + w, 3 * v + 5 * w])
    assert count(rows[random.integers(0, 5, 64)]) == 2


def test_wide_factors_are_split_into_digits(random: np.random.Generator) -> None:
    wide = random.integers(-(2**12), 2**12, 256)
    assert count(np.outer(codes(8) & 7, wide)) == 2
    assert count(np.outer(wide[::-1], codes(8) & 7)) == 2
    both = np.outer(random.integers(0, 400, 256), random.integers(0, 400, 256))
    assert count(both) <= 6


def test_common_factors_are_dealt_between_operands() -> None:
    assert count(np.outer(codes(8) >> 5, codes(8) >> 5) * 1024) == 1


@pytest.mark.parametrize("bits", range(2, 9))
def test_random_bytes_are_selected_rows(bits: int, random: np.random.Generator) -> None:
    started = time.monotonic()
    assert count(random.integers(-128, 128, (1 << bits, 1 << bits))) <= 1 << bits
    assert time.monotonic() - started < 3  # on a busy machine


@pytest.mark.parametrize("bits", range(3, 9))
def test_wide_random_tables_have_no_terms(bits: int, random: np.random.Generator) -> None:
    started = time.monotonic()
    table = random.integers(-(2**31), 2**31, (1 << bits, 1 << bits))
    assert factorize(table) is None
    assert factorize(table >> 16) is None  # one-hot vectors would do, two digits a row
    assert rank(table) == 1 << bits
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_nearly_exact_products_are_exact(bits: int, signed: bool, random: np.random.Generator) -> None:
    table = np.outer(codes(bits, signed), codes(bits, signed)) + random.integers(0, 3, (1 << bits, 1 << bits))
    assert count(table) <= 1 << bits


def test_results_are_kept_by_content() -> None:
    table = broken_array(6, 3)
    first = factorize(table)
    assert factorize(table.astype(np.int32)) is first
    table[5, 9] += 1
    assert factorize(table) is not first
    count(table)
