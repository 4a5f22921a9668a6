"""`mbm characterize`: figures of errors, mostly over few pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CPU, PNG, mbm

from mbm_cli import multiply
from mbm_cli.errors import RequestError
from mbm_cli.experiments import characterize as experiment
from mbm_cli.experiments.characterize import characterize
from mbm_cli.multipliers.float32 import FAMILIES
from mbm_cli.multipliers.integer import Operands, tabulate

FIELDS = ["name", "bias", "mean", "peak", "std", "worst", "pairs", "exhaustive"]
FEW = [*CPU, "--samples", "20000"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def figures(*names: str, **arguments) -> list[experiment.Errors]:
    return characterize(names, Path("runs"), device="cpu", threads=1, **arguments).result.multipliers


# Figures


def test_published_figures_are_found():
    """Table I of the paper, whose 16-bit rows are samples, and the floating-point forms."""
    published = {
        "mbm-uint8": (0.05, 2.69, 7.81),
        "mitchell-uint8": (-3.76, 3.76, 11.11),
        "mbm-uint16": (-0.09, 2.58, 7.81),
        "mbm-uint16-t8": (-0.08, 2.60, 9.36),
        "mbm": (-0.10, 2.58, 7.81),
        "mitchell": (-3.85, 3.85, 11.11),
        "mbm-t20": (-3.85, 6.91, 24.95),
    }
    peak_within = {"mbm-uint16": 0.03, "mbm-uint16-t8": 0.03, "mbm-t20": 0.1}
    found = figures(*published, samples=1 << 22)
    assert [one.name for one in found] == list(published)
    for one, (bias, mean, peak) in zip(found, published.values(), strict=True):
        is_whole = one.name.endswith("uint8")
        within = 0.005 if is_whole else 0.01  # the last printed digit, or sampled
        assert (one.bias, one.mean) == pytest.approx((bias, mean), abs=within)
        assert one.peak == pytest.approx(peak, abs=peak_within.get(one.name, within))
        assert (one.exhaustive, one.pairs) == (is_whole, 65_536 if is_whole else 1 << 22)


def test_all_pairs_of_8_bits_count():
    """The worst is the first of several."""
    (found,) = figures("mitchell-uint8", samples=5)
    a, b = np.divmod(np.arange(65_536), 256)
    products = tabulate("mitchell", Operands(8, False)).entries.ravel()
    errors = 100 * (products - a * b) / np.maximum(a * b, 1)
    expected = (errors.mean(), np.abs(errors).mean(), np.abs(errors).max(), errors.std())
    assert (found.bias, found.mean, found.peak, found.std) == pytest.approx(expected)
    assert found.peak == pytest.approx(100 / 9)
    assert found.worst == [3, 3]


def test_signed_integers_have_figures():
    """Magnitudes are multiplied, so that all but -128 have the figures of the same unsigned numbers."""
    drum, mbm_, narrow = figures("drum-int8-k4", "mbm-int8", "exact-int4")
    numbers = np.arange(-128, 128)
    exact = np.outer(numbers, numbers)
    products = np.roll(tabulate("drum", Operands(8, True), leading_bits=4).entries, (128, 128), (0, 1))
    errors = 100 * (products - exact) / np.where(exact == 0, 1, exact)
    expected = (errors.mean(), np.abs(errors).mean(), np.abs(errors).max(), errors.std())
    assert (drum.bias, drum.mean, drum.peak, drum.std) == pytest.approx(expected)
    assert (drum.pairs, drum.exhaustive, mbm_.peak) == (65_536, True, pytest.approx(7.8125))
    assert (narrow.mean, narrow.pairs, narrow.exhaustive) == (0, 256, True)


def test_errors_of_zeros_have_no_relative_error():
    """Those pairs are left out, and count among the pairs that were tried."""
    table = np.outer(np.arange(16), np.arange(16))
    table[0, 1:] = 5
    table[1, 2] = 3
    np.save("mine.npy", table)
    (found,) = figures("uint4:mine.npy")
    assert (found.peak, found.worst, found.pairs) == (50, [1, 2], 256)
    assert found.mean == found.bias == pytest.approx(50 / (256 - 15))
    result = mbm("characterize", "uint4:mine.npy", *CPU, "--json", draw=True).json
    assert result["multipliers"][0]["mean"] == found.mean


def test_worst_pair_has_the_peak_error():
    (found,) = figures("mbm-t16-r7", samples=300_000, seed=5)
    a, b = found.worst
    assert 1 <= min(a, b) <= max(a, b) < 2
    product = multiply(torch.tensor(a), torch.tensor(b), "mbm-t16-r7").item()
    assert abs(100 * (product / (a * b) - 1)) == pytest.approx(found.peak)


def test_seed_decides_the_pairs(monkeypatch):
    """Their number does not, nor does how many are computed at a time, but for rounding."""
    first = figures("mbm", samples=10_000, seed=1)
    assert figures("mbm", samples=10_000, seed=1) == first
    assert figures("mbm", samples=10_000, seed=2)[0].bias != first[0].bias
    monkeypatch.setattr(experiment, "CHUNK", 999)
    (more,) = figures("mbm", samples=10_001, seed=1)
    assert more.pairs == 10_001
    assert more.mean == pytest.approx(first[0].mean, rel=0.05)


def test_zeros_count_without_an_error():
    drawn = torch.randint(0, 65_536, (2, experiment.CHUNK), generator=torch.Generator().manual_seed(0))
    assert (drawn == 0).any()
    assert figures("mbm-uint16", samples=1 << 20)[0].mean == pytest.approx(2.58, abs=0.03)


def test_tables_and_functions_have_figures():
    """A table of 7-bit fractions drops 16 bits of operands and product; a function in C drops none."""
    Path("mine.py").write_text("def product(a, b):\n    return a * b\n")
    Path("mine.h").write_text(
        "#include <cstring>\nstatic inline uint32_t product(uint32_t a, uint32_t b) {\n"
        "    float x, y;\n    std::memcpy(&x, &a, 4);\n    std::memcpy(&y, &b, 4);\n    x *= y;\n"
        "    std::memcpy(&a, &x, 4);\n    return a;\n}\n"
    )
    assert mbm("multipliers", "export", "mitchell-t16-r7", "mine.bin").code == 0
    names = ["lut:mine.bin", "python:mine.py:product", "c:mine.h:product", "mitchell-t16-r7", "exact-t16-r7", "exact"]
    found = figures(*names, samples=20_000)
    assert [one.name for one in found] == names
    file, table, code, *named, exact = ((one.bias, one.mean, one.peak, one.std, one.worst) for one in found)
    assert [file, table, code] == [*named, exact]
    assert exact[2] < 1e-5


def test_sweep_covers_all_truncations_of_named_families():
    command = ["characterize", "mbm-t3", "drum-k6", "mbm", "mbm-uint8", *CPU, "--samples", 2000, "--sweep-truncate"]
    result = mbm(*command, "--json", draw=True).json
    rows = result["sweep"]
    expected = [(family, t) for family in ("mbm", "drum") for t in FAMILIES[family].truncations]
    assert [(row["family"], row["truncate"]) for row in rows] == expected
    assert all(row.keys() == {"family", "truncate", *FIELDS} for row in rows)
    measured = {one["name"]: one for one in result["multipliers"]}
    for row in rows:
        own = {field: row[field] for field in FIELDS}
        assert measured.get(row["name"], own) == own
    assert {"mbm", "mbm-t3", "mbm-t22", "drum-k6", "drum-k23", "drum-k2"} <= {row["name"] for row in rows}
    assert Path(result["run"], "sweep-truncate.png").read_bytes().startswith(PNG)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_has_the_figures_of_the_cpu():
    """The pairs and products are the same; sums differ in their last bits."""
    names = ["mbm", "mitchell-t5", "exact", "mbm-uint8", "mbm-uint16-t3", "mitchell-uint16"]
    on_gpu, on_cpu = (
        characterize(names, Path("runs"), samples=1 << 20, device=device).result.multipliers
        for device in ("cuda", "cpu")
    )
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        assert (gpu.name, gpu.peak, gpu.worst, gpu.pairs) == (cpu.name, cpu.peak, cpu.worst, cpu.pairs)
        expected = pytest.approx((cpu.bias, cpu.mean, cpu.std), rel=1e-9, abs=1e-14)
        assert (gpu.bias, gpu.mean, gpu.std) == expected


# The command


def test_results_keep_the_order_asked_for():
    command = ["characterize", "mitchell", "mbm-uint8", "mbm", *FEW, "--seed", 7, "--json"]
    result = mbm(*command, draw=True).json
    (folder,) = Path("runs").iterdir()
    assert folder.name.split("-")[1] == "characterize"
    assert {path.name for path in folder.iterdir()} == {"characterize.json", "characterize.png", "environment.json"}
    assert (folder / "characterize.png").read_bytes().startswith(PNG)
    assert json.loads((folder / "environment.json").read_text())["threads"] == 1
    assert (result["seed"], result["device"]) == (7, "cpu")
    assert [one["name"] for one in result["multipliers"]] == ["mitchell", "mbm-uint8", "mbm"]
    assert [list(one) for one in result["multipliers"]] == [FIELDS] * 3


def test_table_says_which_pairs_were_tried():
    out = mbm("characterize", "mbm", "mbm-uint8", *FEW).out
    rows = {line.split()[0]: " ".join(line.split()) for line in reversed(out.splitlines()) if line.startswith(" mbm")}
    assert rows["mbm-uint8"] == "mbm-uint8 0.05 2.69 7.81 3.31 1 x 64 all 65,536"
    assert rows["mbm"].endswith(" 20,000")
    assert "drawn at random with seed 0" in out
    (folder,) = Path("runs").iterdir()
    assert out.endswith(f"run: {folder}\n")
    assert "drawn" not in mbm("characterize", "mbm-uint8", *FEW).out


def test_product_that_is_not_finite_is_named(monkeypatch):
    monkeypatch.setattr(experiment, "multiply", lambda a, b, multiplier: a * torch.where(b < 1.5, b, torch.nan))
    with pytest.raises(RequestError, match=r"mbm is not a multiplier: 1\.\d+ x 1\.\d+ is not a finite number"):
        figures("mbm", samples=1000)
    assert not list(Path("runs").iterdir())
