"""The exact factorisation of an integer multiplier's table into few outer products of int8 vectors.

With ``table[a, b] = sum over r of u[a, r] * v[r, b] + f[a] + g[b]`` in integers, a sum of K products is an integer
matrix product of length K * R over looked-up operands, plus two sums of looked-up operands, as the zero points of
quantised products are. It runs on int8 matrix units, and is exact in any order of summation.

The search:

1. Subtract the exact product, one term, where that shrinks the entries. Move f and g out.
2. Write the rows in generators of their lattice: the monomials in the bits of the row's number (by the Moebius
   transform), of which a circuit has few, or the distinct rows.
3. Make a basis of the generators' lattice, so that all coordinates are integers. Its length is the rank, and no
   factorisation has fewer terms.
4. Where the factors do not fit int8, balance them, or split them into digits, a term each.

The plain alternative, for tables of few distinct rows or of high rank, is to select rows by one-hot vectors.

Source of the balancing: M. Seysen, "Simultaneous reduction of a lattice basis and its reciprocal basis",
Combinatorica 13(3), 1993.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from time import thread_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Pair = tuple[Integers, Integers]

BUDGET = 0.8  # seconds of this thread for a table: what else the machine does changes nothing
SPAN = 255  # of an int8 vector, from its least to its largest element: constants move into f and g
MOST_DIGITS = 4
WIDEST = 1 << 32  # of elements on the way: rounding errors of larger ones are no longer far below FRACTION
MOST_STEPS = 400  # of Euclid's algorithm
SWEEPS = 20  # of balancing: the first gain the most
MOST_RANK = 100  # of a table worth a thorough search: looking products of others up is faster
FRACTION = 1e-4  # a coordinate so close to an integer is one: rounding errors are far smaller


@dataclass(frozen=True)
class Terms:
    """A table as outer products: ``table[a, b] = sum over r of u[a, r] * v[r, b] + f[a] + g[b]``, in integers.

    Attributes:
        u: int8 (n, R).
        v: int8 (R, n).
        f, g: int64 (n,).
    """

    u: NDArray[np.int8]
    v: NDArray[np.int8]
    f: Integers
    g: Integers

    @property
    def count(self) -> int:
        """R, the number of outer products."""
        return int(self.u.shape[1])


@dataclass(frozen=True)
class _Factors:
    """``u @ v`` in integers of any size."""

    u: Integers
    v: Integers

    @property
    def transposed(self) -> "_Factors":
        return _Factors(self.v.T, self.u.T)


def rank(table: NDArray[np.integer]) -> int:
    """Return the rank of a table."""
    return int(np.linalg.matrix_rank(table.astype(np.float64)))


def factorize(table: NDArray[np.integer]) -> Terms | None:
    """Return the fewest terms found for an (n, n) table, verified on all its entries; None if that takes more than n.

    The search ends after about a second. The latest results are kept, by the tables' contents.

    Args:
        table: integers below 2^32 in magnitude; n is a power of two.
    """
    entries = np.ascontiguousarray(table, dtype=np.int64)
    return _kept(entries.tobytes(), len(entries))


@lru_cache(maxsize=64)
def _kept(content: bytes, n: int) -> Terms | None:
    table = np.frombuffer(content, np.int64).reshape(n, n)
    deadline = thread_time() + BUDGET
    least = rank(_centred(table))
    best, most = None, n
    for factors in _candidates(table, thorough=least <= MOST_RANK, deadline=deadline):
        found = _int8(factors, most)
        terms = None if found is None else _verified(table, found)
        if terms is not None:
            best, most = terms, terms.count - 1
        if most < least or thread_time() > deadline:
            break
    return best


def _candidates(table: Integers, thorough: bool, deadline: float) -> Iterator[_Factors]:
    """Yield integer factors of a table, up to f and g: the most promising and the cheapest first."""
    remainders = _remainders(table)
    for head, rest in remainders:
        yield _joined(head, _one_hot(rest))
        yield _joined(head, _one_hot(rest.T).transposed)
    bases = []
    for generate in (_monomials, _one_hot) if thorough else (_monomials,):
        for head, rest in remainders:
            centred = _centred(rest)
            sides = [(generate(centred), False), (generate(centred.T), True)]
            for generators, transposed in sorted(sides, key=lambda side: len(side[0].v)):
                basis = _skeleton(generators, min(deadline, thread_time() + BUDGET / 2))
                if basis is not None:
                    bases.append((head, basis.transposed if transposed else basis))
                    yield _joined(*bases[-1])
    for head, basis in bases if thorough else []:
        yield _joined(head, _Factors(*_balanced(basis.u, basis.v)))


def _joined(a: _Factors, b: _Factors) -> _Factors:
    return _Factors(np.hstack([a.u, b.u]), np.vstack([a.v, b.v]))


def _centred(table: Integers) -> Integers:
    """Subtract f and g, so that the first row and the first column are zero."""
    rest: Integers = table - table[:1] - table[:, :1] + table[0, 0]
    return rest


def _remainders(table: Integers) -> list[tuple[_Factors, Integers]]:
    """Return the table, and the table less the exact product, each with the factors subtracted: the smaller first.

    The product is that of unsigned or of two's complement operands, whichever leaves less.
    """
    n = len(table)
    codes = np.arange(n)
    nothing = _Factors(np.zeros((n, 0), np.int64), np.zeros((0, n), np.int64))
    rests = []
    for numbers in (codes, (codes + n // 2) % n - n // 2):
        product = _Factors(numbers[:, None], numbers[None])
        rests.append((product, table - product.u @ product.v))

    def size(pair: tuple[_Factors, Integers]) -> int:
        return int(np.abs(_centred(pair[1])).sum())

    return sorted([min(rests, key=size), (nothing, table)], key=size)


def _monomials(table: Integers) -> _Factors:
    """Write rows as sums of monomials in the bits of the row's number.

    Row a is the sum of the monomials of all subsets of a's bits; the Moebius transform returns them. A circuit adds
    few products of bits, so that most monomials are zero.
    """
    n = len(table)
    subsets, monomials = np.ones((1, 1), np.int64), table.copy()
    while len(subsets) < n:
        half = len(subsets)
        subsets = np.kron(np.array([[1, 0], [1, 1]]), subsets)
        pairs = monomials.reshape(n // (2 * half), 2, half, n)
        pairs[:, 1] -= pairs[:, 0]
    used = monomials.any(axis=1)
    return _Factors(subsets[:, used], monomials[used])


def _one_hot(table: Integers) -> _Factors:
    """Select rows among the distinct ones."""
    rows, which = np.unique(table, axis=0, return_inverse=True)
    used = rows.any(axis=1)
    return _Factors(np.eye(len(rows), dtype=np.int64)[which.ravel()][:, used], rows[used])


def _skeleton(generators: _Factors, deadline: float) -> _Factors | None:
    """Write a table's rows as integer combinations of rank-many rows, which are a basis of their lattice.

    The basis starts as independent generators, the shortest first. A generator with fractional coordinates replaces,
    less its integral part, the basis row of the largest fraction (a step of Euclid's algorithm): the lattice of the
    basis grows by the inverse of that fraction, at least twice, so that few steps make all coordinates integers.
    """
    rows = generators.v
    basis = rows[_independent(rows)]
    coordinates = rows @ np.linalg.pinv(basis)
    for step in range(1, MOST_STEPS):
        whole = np.rint(coordinates)
        fractions = coordinates - whole
        fractional = np.flatnonzero(np.abs(fractions).max(axis=1, initial=0) > FRACTION)
        if not len(fractional):
            break
        k = fractional[np.abs(fractions[fractional]).max(axis=1).argmax()]
        i = np.abs(fractions[k]).argmax()
        basis[i] = rows[k] - whole[k].astype(np.int64) @ basis
        if not basis[i].any():
            return None
        if step % 4:
            column = coordinates[:, i] / fractions[k, i]
            coordinates -= np.outer(column, fractions[k])
            coordinates[:, i] = column
        else:  # against long rows and the updates' rounding errors
            basis = _balanced(np.linalg.pinv(basis), basis)[1]
            coordinates = rows @ np.linalg.pinv(basis)
        if max(np.abs(basis).max(), np.abs(coordinates).max()) > WIDEST or thread_time() > deadline:
            return None
    u: Integers = np.rint(rows @ np.linalg.pinv(basis)).astype(np.int64)
    if not np.array_equal(
        u.astype(np.float64) @ basis, rows
    ):  # the steps were too few or the rounding errors too large
        return None
    return _Factors(generators.u @ u, basis)


def _independent(rows: Integers) -> list[int]:
    """Return the numbers of linearly independent rows, the shortest first, as many as there are."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    directions = np.zeros(rows.shape)  # orthonormal
    chosen: list[int] = []
    for i in np.argsort(lengths, kind="stable"):
        known = directions[: len(chosen)]
        rest = rows[i].astype(np.float64)
        for _ in range(2):  # the second time for the rounding errors of the first
            rest = rest - known.T @ (known @ rest)
        length = np.linalg.norm(rest)
        if length > 1e-7 * lengths[i]:
            directions[len(chosen)] = rest / length
            chosen.append(int(i))
        if len(chosen) == rows.shape[1]:
            break
    return chosen


def _balanced(u: NDArray[Any], v: Integers) -> tuple[NDArray[Any], Integers]:
    """Shorten basis rows and coordinates together: add c v_j to v_i, and subtract c u_i from u_j.

    Seysen's c lowers |u_i|^2 |v_i|^2 + |u_j|^2 |v_j|^2 the most, of centred vectors, as constants are free. Each sweep
    takes the best of all pairs, then the best of those that share no vector with it, and so on.
    """
    u, v = u.copy(), v.copy()
    for _ in range(SWEEPS):
        centred_u, centred_v = u - u.mean(axis=0), v - v.mean(axis=1, keepdims=True)
        uu, vv = centred_u.T @ centred_u, centred_v @ centred_v.T
        lengths_u, lengths_v = np.diag(uu)[:, None], np.diag(vv)
        if not (lengths_u.all() and lengths_v.all()):
            break
        c = np.rint((uu / lengths_u - vv / lengths_v) / 2).clip(-WIDEST, WIDEST)
        np.fill_diagonal(c, 0)
        change = (2 * c * vv + c * c * lengths_v) * lengths_u + (c * c * lengths_u - 2 * c * uu) * lengths_v
        scale = np.sqrt(np.outer(lengths_u, lengths_u) * np.outer(lengths_v, lengths_v))
        order = np.argsort(change, axis=None)
        worth = order[change.ravel()[order] < -1e-6 * scale.ravel()[order]]
        if not len(worth):
            break
        taken: set[int] = set()
        for i, j in zip(*np.unravel_index(worth[: 8 * len(v)], c.shape), strict=True):
            if not taken & {i, j}:
                taken |= {i, j}
                v[i] += int(c[i, j]) * v[j]
                u[:, j] -= int(c[i, j]) * u[:, i]
    return u, v


def _int8(factors: _Factors, most: int) -> list[Pair] | None:
    """Return the factors in vectors of int8's span, no more terms than ``most``; None if they do not fit."""
    found: list[Pair] = []
    for i, (x, y) in enumerate(zip(factors.u.T, factors.v, strict=True)):
        terms = _split(x, y)
        if terms is None or len(found) + len(terms) + len(factors.v) - 1 - i > most:
            return None
        found += terms
    return found


def _split(x: Integers, y: Integers, whole: bool = True) -> list[Pair] | None:
    """Return one outer product, up to f and g, as the fewest terms found of int8's span; None if there are too many.

    One vector is kept and the other split into digits; where both are wide (``whole``), one is first cut in two.
    """
    x, y = x - x.min(), y - y.min()
    in_x, in_y = max(int(np.gcd.reduce(x)), 1), max(int(np.gcd.reduce(y)), 1)
    choices = [_digits(x // in_x, y * in_x), _swapped(_digits(y // in_y, x * in_y))]
    if whole and choices == [None, None]:
        for bits in (4, 6, 7, 8):
            for p, q, swap in ((x, y, False), (y, x, True)):
                high = (p + (1 << bits >> 1)) >> bits << bits
                parts = [_split(high, q, whole=False), _split(p - high, q, whole=False)]
                terms = None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
                choices.append(_swapped(terms) if swap else terms)
    return min((terms for terms in choices if terms is not None), key=len, default=None)


def _swapped(terms: list[Pair] | None) -> list[Pair] | None:
    return None if terms is None else [(q, p) for p, q in terms]


def _digits(x: Integers, y: Integers) -> list[Pair] | None:
    """Split y into digits, the high ones in units of m so large that m x has int8's span; None if x is too wide."""
    terms: list[Pair] = []
    for _ in range(MOST_DIGITS):
        x, y = x - x.min(), y - y.min()
        if not (x.any() and y.any()):
            return terms
        dealt = _dealt(x, y)
        if dealt is not None:
            return [*terms, dealt]
        m = SPAN // int(x.max())
        if m == 0:
            return None
        high = np.minimum(y // m, SPAN)
        terms.append((m * x, high))
        y = y - m * high
    return None


def _dealt(x: Integers, y: Integers) -> Pair | None:
    """Deal the common factor of vectors from 0 between them, so that both have int8's span; None if impossible."""
    in_x, in_y = int(np.gcd.reduce(x)), int(np.gcd.reduce(y))
    x, y, common = x // in_x, y // in_y, in_x * in_y
    widest_x, widest_y = int(x.max()), int(y.max())
    if common * widest_x * widest_y > SPAN * SPAN:
        return None
    for d in range(1, min(common, SPAN // widest_x) + 1):
        if common % d == 0 and common // d * widest_y <= SPAN:
            return d * x, common // d * y
    return None


def _verified(table: Integers, terms: list[Pair]) -> Terms | None:
    """Return the terms as int8, with f and g, if they are the table on all its entries."""
    n = len(table)
    u = np.array([_shifted(x) for x, _ in terms], np.int8).reshape(-1, n).T
    v = np.array([_shifted(y) for _, y in terms], np.int8).reshape(-1, n)
    rest = table - (u.astype(np.float64) @ v.astype(np.float64)).astype(np.int64)
    f, g = rest[:, 0].copy(), rest[0] - rest[0, 0]
    return Terms(np.ascontiguousarray(u), v, f, g) if (rest == f[:, None] + g).all() else None


def _shifted(x: Integers) -> Integers:
    """Shift a vector of int8's span into int8's range, only if it is outside."""
    return x if x.min() >= -128 and x.max() <= 127 else x - x.min() - 128
