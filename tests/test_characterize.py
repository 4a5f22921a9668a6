"""`mbm characterize`, mostly on few pairs."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from mbm_cli import multiply, plots
from mbm_cli.cli import main
from mbm_cli.errors import Interrupted, RequestError
from mbm_cli.experiments import characterize as experiment
from mbm_cli.experiments.characterize import characterize
from mbm_cli.integer import IntegerMultiplier
from mbm_cli.multipliers import FAMILIES
from mbm_cli.tables import error_table

FIELDS = ["name", "bias", "mean", "peak", "std", "worst", "pairs", "exhaustive"]
FEW = ["--samples", "20000", "--device", "cpu"]
MBM = str(Path(sys.executable).with_name("mbm"))
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def mbm(monkeypatch, capfd):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mbm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capfd.readouterr())

    return call


# The figures


def test_the_published_figures(tmp_path, monkeypatch):
    """Table I of the paper (its 16-bit rows are samples) and those of the floating-point forms."""
    published = {
        "mbm-int8": (0.05, 2.69, 7.81),
        "mitchell-int8": (-3.76, 3.76, 11.11),
        "mbm-int16": (-0.09, 2.58, 7.81),
        "mbm-int16-t8": (-0.08, 2.60, 9.36),
        "mbm": (-0.10, 2.58, 7.81),
        "mitchell": (-3.85, 3.85, 11.11),
        "mbm-t20": (-3.85, 6.91, 24.95),
    }
    peak_within = {"mbm-int16": 0.03, "mbm-int16-t8": 0.03, "mbm-t20": 0.1}
    monkeypatch.setattr(plots, "characterization", lambda errors: b"")
    _, result = characterize(list(published), tmp_path, samples=1 << 22, device="cpu")
    assert [m["name"] for m in result["multipliers"]] == list(published)
    for figures, (bias, mean, peak) in zip(result["multipliers"], published.values(), strict=True):
        name = figures["name"]
        within = 0.005 if name.endswith("int8") else 0.01  # the last printed digit, or sampled
        assert figures["bias"] == pytest.approx(bias, abs=within)
        assert figures["mean"] == pytest.approx(mean, abs=within)
        assert figures["peak"] == pytest.approx(peak, abs=peak_within.get(name, within))
        assert figures["exhaustive"] == name.endswith("int8")
        assert figures["pairs"] == (65_536 if name.endswith("int8") else 1 << 22)


def test_the_figures_are_of_the_errors_of_all_pairs(tmp_path):
    """8-bit integers, from the definitions; the first of the worst pairs."""
    _, result = characterize(["mitchell-int8"], tmp_path, samples=5, device="cpu")
    (figures,) = result["multipliers"]
    a, b = np.divmod(np.arange(65_536), 256)
    products = IntegerMultiplier("mitchell", 8).multiply(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    errors = 100 * (products - a * b) / np.maximum(a * b, 1)
    assert figures["bias"] == pytest.approx(errors.mean())
    assert figures["mean"] == pytest.approx(np.abs(errors).mean())
    assert figures["std"] == pytest.approx(errors.std())
    assert figures["peak"] == np.abs(errors).max() == pytest.approx(100 / 9)
    assert figures["worst"] == [3, 3]


def test_the_worst_pair_has_the_peak_error(tmp_path):
    _, result = characterize(["mbm-t16-r7"], tmp_path, samples=300_000, seed=5, device="cpu")
    (figures,) = result["multipliers"]
    a, b = figures["worst"]
    assert 1 <= min(a, b) <= max(a, b) < 2
    product = multiply(torch.tensor(a), torch.tensor(b), "mbm-t16-r7").item()
    assert abs(100 * (product / (a * b) - 1)) == pytest.approx(figures["peak"])


def test_the_seed_decides_the_pairs_and_their_number_does_not_change_them(tmp_path, monkeypatch):
    """Nor does how many are computed at a time matter but for rounding."""

    def figures(**arguments) -> dict:
        return characterize(["mbm"], tmp_path, device="cpu", **arguments)[1]["multipliers"][0]

    first = figures(samples=10_000, seed=1)
    assert figures(samples=10_000, seed=1) == first
    assert figures(samples=10_000, seed=2)["bias"] != first["bias"]
    monkeypatch.setattr(experiment, "CHUNK", 999)
    assert figures(samples=10_001, seed=1)["pairs"] == 10_001
    assert figures(samples=10_001, seed=1)["mean"] == pytest.approx(first["mean"], rel=0.05)


def test_zeros_count_with_an_error_of_zero(tmp_path):
    _, result = characterize(["mbm-int16"], tmp_path, samples=1 << 20, device="cpu")
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 65_536, (2, experiment.CHUNK), generator=generator)
    assert (drawn == 0).any()
    assert result["multipliers"][0]["mean"] == pytest.approx(2.58, abs=0.03)


def test_tables_and_functions_have_figures_too(tmp_path):
    """A table of 7-bit fractions loses 16 bits of the operands and of the product; a function in C loses none."""
    Path("mine.py").write_text("def product(a, b):\n    return a * b\n")
    Path("mine.h").write_text(
        "#include <cstring>\nstatic inline uint32_t product(uint32_t a, uint32_t b) {\n"
        "    float x, y;\n    std::memcpy(&x, &a, 4);\n    std::memcpy(&y, &b, 4);\n    x *= y;\n"
        "    std::memcpy(&a, &x, 4);\n    return a;\n}\n"
    )
    np.zeros(16_384, np.uint8).tofile("ones.bin")
    names = ["lut:ones.bin", "python:mine.py:product", "c:mine.h:product", "exact-t16-r7", "exact"]
    _, result = characterize(names, tmp_path, samples=20_000, device="cpu")
    ones, table, code, truncated, exact = result["multipliers"]
    assert [m["name"] for m in result["multipliers"]] == names
    assert 70 < ones["peak"] < 75  # 1 * 1 for almost 2 * 2
    assert {**table, "name": ""} == {**truncated, "name": ""}
    assert {**code, "name": ""} == {**exact, "name": ""}
    assert exact["peak"] < 1e-5


def test_a_sweep_goes_over_all_truncations_of_the_families_named(tmp_path):
    run, result = characterize(
        ["mbm-t3", "drum-k6", "mbm", "mbm-int8"], tmp_path, samples=2000, device="cpu", sweep_truncate=True
    )
    rows = result["sweep"]
    expected = [(family, t) for family in ("mbm", "drum") for t in FAMILIES[family].truncations]
    assert [(row["family"], row["truncate"]) for row in rows] == expected
    assert all(row.keys() == {"family", "truncate", *FIELDS} for row in rows)
    measured = {m["name"]: m for m in result["multipliers"]}
    for row in rows:
        figures = {field: row[field] for field in FIELDS}
        assert measured.get(row["name"], figures) == figures
    assert {"mbm", "mbm-t3", "mbm-t22", "drum-k6", "drum-k23", "drum-k2"} <= {row["name"] for row in rows}
    assert (run.folder / "sweep-truncate.png").read_bytes().startswith(PNG)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_figures_of_the_cpu(tmp_path):
    """The same pairs and products; sums differ in their last bits."""
    names = ["mbm", "mitchell-t5", "exact", "mbm-int8", "mbm-int16-t3", "mitchell-int16"]
    _, gpu = characterize(names, tmp_path, samples=1 << 20, device="cuda")
    _, cpu = characterize(names, tmp_path, samples=1 << 20, device="cpu")
    for on_gpu, on_cpu in zip(gpu["multipliers"], cpu["multipliers"], strict=True):
        exactly = ("name", "peak", "worst", "pairs", "exhaustive")
        assert [on_gpu[field] for field in exactly] == [on_cpu[field] for field in exactly]
        assert [on_gpu[field] for field in ("bias", "mean", "std")] == pytest.approx(
            [on_cpu[field] for field in ("bias", "mean", "std")], rel=1e-9, abs=1e-14
        )


# The command


def test_json_is_one_object_in_the_order_asked_for(mbm):
    code, out, err = mbm("characterize", "mitchell", "mbm-int8", "mbm", *FEW, "--seed", 7, "--threads", 1, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    (folder,) = Path("runs").iterdir()
    assert folder.name.split("-")[1] == "characterize"
    assert result.pop("run") == str(folder)
    assert json.loads((folder / "characterize.json").read_text()) == result
    assert {path.name for path in folder.iterdir()} == {"characterize.json", "characterize.png", "environment.json"}
    assert (folder / "characterize.png").read_bytes().startswith(PNG)
    assert json.loads((folder / "environment.json").read_text())["threads"] == 1
    assert (result["seed"], result["device"]) == (7, "cpu")
    assert [m["name"] for m in result["multipliers"]] == ["mitchell", "mbm-int8", "mbm"]
    assert [list(m) for m in result["multipliers"]] == [FIELDS] * 3
    assert [m["pairs"] for m in result["multipliers"]] == [20_000, 65_536, 20_000]
    assert [m["exhaustive"] for m in result["multipliers"]] == [False, True, False]


def test_the_table_says_what_was_tried(mbm):
    code, out, _ = mbm("characterize", "mbm", "mbm-int8", *FEW, "--output", "a/b")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    rows = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.startswith(" mbm")}
    assert rows["mbm-int8"] == "mbm-int8 0.05 2.69 7.81 3.31 1 x 64 all 65,536"
    assert rows["mbm"].endswith(" 20,000")
    assert "drawn at random with seed 0" in out
    (folder,) = Path("a/b").iterdir()
    assert f"run: a/b/{folder.name}" in out
    assert "drawn" not in mbm("characterize", "mbm-int8", *FEW)[1]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits_the_terminal(width, capsys):
    result = {"name": "mitchell-int16-t8", "bias": -13.456, "mean": 22.345, "peak": 100.0, "std": 10.0, "pairs": 2**24}
    result |= {"worst": [1.23456789, 1.87654321], "exhaustive": False}
    Console(width=width).print(error_table({"seed": 0, "multipliers": [result]}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if "mitchell" in line)
    assert all(word in row for word in ("-13.46", "100.00", "1.2345679 x 1.8765432", "16,777,216"))


def test_quiet_prints_nothing(mbm):
    assert mbm("characterize", "mbm", *FEW, "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mbm", "nbm"], "'nbm'"),
        (["mbm-int9"], "8 or 16"),
        (["mbm-int8-t7"], "0 to 6"),
        (["lut:nothing.bin"], "nothing.bin"),
        (["c:wrong.h:f"], "does not compile"),
        (["c:minus.h:f"], "c:minus.h:f is no multiplier"),
        (["python:raises.py:f"], "raises ZeroDivisionError"),
        (["mbm-int8", "--sweep-truncate"], "exact, mitchell, mbm"),
        (["mbm", "--samples", "0"], "--samples"),
        (["mbm", "--device", "cuda"], "no CUDA device"),
        ([], "NAME"),
    ],
)
def test_a_wrong_request_writes_nothing(arguments, told, mbm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("wrong.h").write_text("uint32_t f(uint32_t a, uint32_t b) { return c; }\n")
    Path("minus.h").write_text("static inline uint32_t f(uint32_t a, uint32_t b) { return a - b; }\n")
    Path("raises.py").write_text("def f(a, b):\n    return 1 / 0\n")
    code, out, err = mbm("characterize", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_product_that_is_no_number_is_named_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "multiply", lambda a, b, multiplier: a * torch.where(b < 1.5, b, torch.nan))
    with pytest.raises(RequestError, match=r"mbm is no multiplier: 1\.\d+ x 1\.\d+ "):
        characterize(["mbm"], tmp_path / "runs", samples=1000, device="cpu")
    assert not list((tmp_path / "runs").iterdir())


def test_an_interrupt_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "CHUNK", 1000)
    asked = iter([False] * 4)
    with pytest.raises(Interrupted):
        characterize(["mbm"], tmp_path, samples=10_000, device="cpu", stopped=lambda: next(asked, True))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_with_130_and_leaves_no_folder():
    command = [MBM, "characterize", "mbm", "--samples", str(2**40), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not Path("runs").exists() or not list(Path("runs").glob("*/environment.json")):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert not list(Path("runs").iterdir())


# The pictures


def test_a_picture_of_any_number_of_multipliers_and_pairs(tmp_path):
    for names, samples in ((["mbm"], 1), (["exact"], 2), (["mbm", "mitchell", "exact-t1"], 50), (["mbm-t22"] * 7, 9)):
        run, _ = characterize(names, tmp_path, samples=samples, device="cpu")
        assert (run.folder / "characterize.png").read_bytes().startswith(PNG)


def test_a_file_s_name_is_drawn_as_it_is(tmp_path):
    name = "$\\frac$-with-a-name-that-is-longer-than-its-room.bin"
    np.zeros(4, np.uint8).tofile(name)
    run, _ = characterize([f"lut:{name}"], tmp_path / "runs", samples=50, device="cpu")
    assert (run.folder / "characterize.png").read_bytes().startswith(PNG)


def test_a_map_s_cells_are_mean_errors():
    x, y = (np.array(values) for values in ([0.1, 0.1, 0.9, 0.9, np.nan], [0.1, 0.2, 0.1, 0.9, 0.5]))
    cells = plots._error_map(x, y, np.array([1.0, 3.0, 5.0, 7.0, 9.0]))
    np.testing.assert_array_equal(cells, [[2.0, np.nan], [5.0, 7.0]])


def test_signs_of_errors_survive_in_greyscale():
    red, green, blue, _ = plots.ERRORS(np.linspace(0, 1, 256)).T
    assert (np.diff(0.299 * red + 0.587 * green + 0.114 * blue) > 0).all()
