"""Multipliers from files: random tables, which equal no family's, tables of built-ins, and the examples."""

from pathlib import Path

import numpy as np

from mbm_cli.multipliers import tables
from mbm_cli.multipliers.content import export, resolve
from mbm_cli.multipliers.names import Multiplier
from mbm_cli.multipliers.tables import Table

EXAMPLES = Path(__file__).parent.parent / "examples"
IN_PYTHON = f"python:{EXAMPLES / 'four_bits.py'}:product"
IN_C = f"c:{EXAMPLES / 'mbm.h'}:mbm"


def random_table(bits: int) -> Multiplier:
    """Return a table that is the same in every process."""
    entries = np.random.default_rng(bits).integers(0, 2 << bits, (1 << bits, 1 << bits)).astype(np.uint16)
    return Multiplier("lut", file=f"random{bits}.npy", content=Table(bits, entries))


def exported(family: str, bits: int, path: Path) -> tuple[Multiplier, Multiplier]:
    """Return a built-in with that many fraction bits in operands and product, and its table, written and read back."""
    built_in = Multiplier(family, 23 - bits, bits)
    tables.write(export(built_in, bits), path)
    return built_in, resolve(f"lut:{path}")
