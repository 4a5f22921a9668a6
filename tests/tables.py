"""Tables for tests: random ones, in which nothing can be recognised."""

import numpy as np

from mbm_cli.lut import Table
from mbm_cli.multipliers import Multiplier, Source


def random_table(bits: int) -> Multiplier:
    """A table that is the same in every process, known to this one by its key."""
    entries = np.random.default_rng(bits).integers(0, 2 << bits, (1 << bits, 1 << bits)).astype(np.uint16)
    return Multiplier("lut", source=Source(f"lut:random{bits}.npy", Table(bits, entries)))
