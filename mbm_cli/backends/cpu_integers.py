"""The CPU backend of integer multipliers: the C++ kernels of kernels/integer_simd.cpp."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# After torch, as in backends/cpu.py.
from mbm_cli import _cpu
from mbm_cli.backends.geometry import Geometry
from mbm_cli.backends.integers import IntegerOperators
from mbm_cli.multipliers.factor import Terms, factorize

# Nanoseconds, measured like the costs in kernels/integer_simd.cpp: to prepare a table for look-ups; to pack a weight,
# and each of its terms.
_TABLE, _WEIGHT, _TERM_OF_WEIGHT = 50_000, 0.7, 0.3
_VECTOR = 16  # output channels that are looked up at once
_terms = WeakTensorKeyDictionary()
_MOST_POSITIONS, _LEAST_POSITIONS = 2048, 8  # that share a step's table; that are computed at once


def chosen_path(geometry: Geometry, table: Tensor) -> str:
    """Return the path that "auto" takes."""
    return faster_path(geometry, terms_of(table))


def terms_of(table: Tensor) -> Terms | None:
    """Return the terms of an operator's table, found when it is first used, for as long as it lives."""
    if table not in _terms:
        _terms[table] = factorize(table.numpy())
    found: Terms | None = _terms[table]
    return found


def faster_path(geometry: Geometry, terms: Terms | None) -> str:
    """Return the faster path, "terms" or "lookup", by measured costs."""
    if terms is None:
        return "lookup"
    g = geometry
    lanes, term, vector, table, each = _cpu.integer_costs()
    positions = g.batch * math.prod(g.out_size)
    weights = g.groups * g.out_channels * g.steps
    columns = g.groups * g.steps * math.ceil(g.out_channels / lanes) * lanes
    by_terms = max(positions, _LEAST_POSITIONS) * columns * terms.count * term
    by_terms += weights * (_WEIGHT + _TERM_OF_WEIGHT * terms.count)
    vectors = g.groups * g.steps * math.ceil(g.out_channels / _VECTOR)
    tables = math.ceil(positions / _MOST_POSITIONS)
    by_lookup = min(weights * positions * each, _TABLE + vectors * (positions * vector + tables * table))
    return "terms" if by_terms <= by_lookup else "lookup"


def run(
    geometry: Geometry, input: Tensor, weight: Tensor, output: Tensor, table: Tensor, padding_code: int, path: str
) -> None:
    """Compute the sums of the entries of an operator's table, int32 (256, 256). Otherwise as `compute`."""
    terms = None if path == "lookup" else terms_of(table)
    compute(geometry, input, weight, output, table.numpy(), terms, padding_code, path)


def compute(
    geometry: Geometry,
    input: Tensor,
    weight: Tensor,
    output: Tensor,
    table: NDArray[np.int32],
    terms: Terms | None,
    padding_code: int,
    path: str,
) -> None:
    """Compute the sums of table entries into ``output``.

    Padding contributes the products of its code.

    Args:
        input, weight: 8-bit codes, whose bytes are the table's indices; the weight is contiguous.
        output: int32, contiguous.
        table: int32 (256, 256), contiguous, of the input's code and the weight's.
        terms: of the table, or None.
        path: "terms", "lookup" or "auto", the faster one.

    Raises:
        ValueError: "terms" without terms, or an unknown path.
    """
    if path == "auto":
        path = faster_path(geometry, terms)
    elif path not in ("terms", "lookup"):
        raise ValueError(f"unknown path {path!r}: the paths are auto, terms and lookup")
    factors, count = (0, 0, 0, 0), 0
    if path == "terms":
        if terms is None:
            raise ValueError("the table has no terms: take the path lookup or auto")
        u, v = np.ascontiguousarray(terms.u), np.ascontiguousarray(terms.v)
        f, g = np.ascontiguousarray(terms.f), np.ascontiguousarray(terms.g)
        count = u.shape[1]
        if count == 0:  # the table is a sum of f and g
            u, v, count = np.zeros((256, 1), np.int8), np.zeros((1, 256), np.int8), 1
        factors = (u.ctypes.data, v.ctypes.data, f.ctypes.data, g.ctypes.data)
    if output.numel() == 0 or geometry.steps == 0:
        output.zero_()
        return
    g_ = geometry
    _cpu.integer_conv2d(
        input.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        table.ctypes.data,
        factors,
        count,
        (g_.batch, g_.groups, g_.channels, g_.out_channels),
        g_.size,
        g_.kernel,
        g_.out_size,
        g_.stride,
        g_.padding,
        g_.dilation,
        g_.input_strides,
        g_.output_strides,
        padding_code & 255,
        torch.get_num_threads(),
    )


IntegerOperators("cpu", run)
