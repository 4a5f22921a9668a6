"""Tables for tests: random ones, in which nothing can be recognised, and those of built-in multipliers."""

from pathlib import Path

import numpy as np

from mbm_cli import lut
from mbm_cli.lut import Table
from mbm_cli.multipliers import Multiplier, Source, export


def random_table(bits: int) -> Multiplier:
    """A table that is the same in every process, known to this one by its key."""
    entries = np.random.default_rng(bits).integers(0, 2 << bits, (1 << bits, 1 << bits)).astype(np.uint16)
    return Multiplier("lut", source=Source(f"lut:random{bits}.npy", Table(bits, entries)))


def exported(family: str, bits: int, path: Path) -> tuple[Multiplier, Multiplier]:
    """A built-in of that many fraction bits in operands and product, and its table, written and read back."""
    built_in = Multiplier(family, 23 - bits, bits)
    lut.write(export(built_in, bits), path)
    return built_in, Multiplier.parse(f"lut:{path}")
