"""Figures: whatever a multiplier is called, it can be drawn."""

import numpy as np
import pytest

from mbm_cli import plots


@pytest.mark.parametrize("name", ["lut:a$b$_^.bin", "lut:$.bin", "lut:\\.bin", "lut:\udcc3é.bin", "lut:_.bin"])
def test_a_name_is_drawn_as_it_is(name):
    """A $ would begin mathematics; a name that is not UTF-8 has characters that no font knows."""
    epoch = dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy"), 0.5)
    error = np.array([0.25, 0.5])
    drawn = [
        plots.curves([{"epoch": 1, **epoch}], name),
        plots.confusions({name: np.eye(10, dtype=int)}),
        plots.sweep_ranges([(name, [0.5])], name),
        plots.sweep_lines([plots.SweepLine("mbm", name, False, {0: [0.5], 8: [0.25]})], {}),
        plots.characterization([(name, error, error, error)]),
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in drawn)
