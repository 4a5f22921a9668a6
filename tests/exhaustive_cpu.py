"""The exhaustive check of the CPU's products: each multiplier below, 10^7 random operands in each layout, bit for bit.

``python tests/exhaustive_cpu.py`` takes some minutes, prints a line for each multiplier, and ends with 1 if a product
differs from the reference. test_cpu.py runs a hundredth of it.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from operands import in_range, wild
from torch import Tensor

from mbm_cli import _cpu, conv2d, multiply
from mbm_cli.multipliers.float32 import FAMILIES, reference_product
from mbm_cli.multipliers.names import Multiplier

MULTIPLIERS = [
    Multiplier(family, t, r)
    for family, t, r in product(FAMILIES, (0, 1, 7, 8, 15, 16, 17, 18, 19, 20, 22), (None, 7))
    if t in FAMILIES[family].truncations
]
ROUNDS, PRODUCTS = 10, 10**6


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Have the kernels use this instruction set."""
    _cpu.use_instruction_set(name)
    try:
        yield
    finally:
        _cpu.use_instruction_set(_cpu.instruction_sets()[0])


class Case(NamedTuple):
    """Random operands in one layout, broadcasting with one another, and how the backend multiplies them."""

    name: str
    compute: Callable[[Multiplier], Tensor]
    a: Tensor
    b: Tensor
    is_sum: bool  # of one product, hence 0.0 + product


def cases(count: int, seed: int) -> Iterator[Case]:
    """Return at least ``count`` products of either kind of operands in each layout."""
    generator = torch.Generator().manual_seed(seed)
    channels, side = count // 100, math.ceil(math.sqrt(count))
    for draw in (wild, in_range):
        a, b = (draw(count, generator) for _ in range(2))
        yield Case(f"{draw.__name__} elementwise", partial(multiply, a, b), a, b, False)
        for layout, shape, weights, groups in (
            ("depthwise", (1, channels, 10, 10), channels, channels),
            ("1x1", (1, 1, 1, side), side, 1),
        ):
            image = draw(math.prod(shape), generator).reshape(shape)
            weight = draw(weights, generator).reshape(-1, 1, 1, 1)
            compute = partial(conv2d, image, weight, None, 1, 0, 1, groups)
            yield Case(f"{draw.__name__} {layout}", compute, image, weight.squeeze(1), True)


def differences(multiplier: Multiplier, case: Case) -> list[str]:
    """Describe how often, and where first, each instruction set differs from the reference."""
    expected, found = reference_product(case.a, case.b, multiplier), []
    if case.is_sum:
        expected = 0.0 + expected
    for name in _cpu.instruction_sets():
        with instruction_set(name):
            actual = case.compute(multiplier)
        differ = actual.view(torch.int32) != expected.view(torch.int32)
        if case.is_sum and multiplier.is_exact:  # PyTorch's own: a zero may be negative, a NaN is any
            differ &= ~((actual == expected) | (actual.isnan() & expected.isnan()))
        if differ.any():
            a, b = torch.broadcast_tensors(case.a, case.b)
            first = f"{a[differ][0].item().hex()} * {b[differ][0].item().hex()}"
            found.append(f"{differ.sum()} {case.name} products on {name}, first {first}")
    return found


def main() -> int:
    drawn = [case for seed in range(ROUNDS) for case in cases(PRODUCTS, seed)]
    layouts = ", ".join(dict.fromkeys(case.name for case in drawn))
    print(f"{ROUNDS * PRODUCTS:,} products each: {layouts}; each on {', '.join(_cpu.instruction_sets())}")
    failed = False
    for multiplier in MULTIPLIERS:
        start = time.perf_counter()
        found = [difference for case in drawn for difference in differences(multiplier, case)]
        failed |= bool(found)
        verdict = f"DIFFERS: {'; '.join(found)}" if found else "none differs"
        print(f"{multiplier!s:16} {time.perf_counter() - start:5.1f} s  {verdict}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
