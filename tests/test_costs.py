"""What multipliers cost: figures with their sources, of the package, of circuits' files and of users."""

import re
from pathlib import Path

import pytest
from commands import EPOCH, SILENT, made, mbm
from test_integer_files import BODY, PUBLISHED

from mbm_cli.costs import Figure, Prices
from mbm_cli.errors import RequestError
from mbm_cli.multipliers.content import resolve

MINE = """
mine:
  source: measured by us
  technology: 28 nm
  operands: int8
  exact: {power: 2 mW, delay: 1 ns, where: "table 1"}
  multipliers:
    drum-int8-k4: {power: 0.5 mW, where: "table 1"}
    "int8:t.npy": {power: 1 mW, delay: 0.5 ns, where: "table 2"}
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prices(text: str, quantity: str = "power") -> Prices:
    Path("costs.yaml").write_text(text)
    return Prices.load(Path("costs.yaml"), quantity)


def test_every_figure_of_the_package_has_its_source():
    for source in Prices.load().sources:
        assert source.source
        assert source.technology
        assert source.exact.where
        assert all(re.search(r"p\. \d", figures.where) for figures in source.multipliers.values())
        assert all(Prices((source,)).of(resolve(name)) for name in source.multipliers if "16" not in name)


@pytest.mark.parametrize("missing", ["source: measured by us\n  ", ', where: "table 2"', ', where: "table 1"'])
def test_figure_without_source_is_refused(missing):
    with pytest.raises(RequestError, match=r"^--costs costs.yaml: .*(source|where)"):
        prices(MINE.replace(missing, ""))


def test_costs_are_ratios_to_the_exact_of_the_source():
    mine = prices(MINE)
    assert mine.of(resolve("drum-int8-k4"))[0].figures == {"power": 0.25}
    assert mine.of(resolve("exact-int8"))[0].figures == {"power": 1, "delay": 1}
    assert [cost.figures for cost in mine.of(resolve("mbm"))] == [{"power": 0.06211, "area": 0.08547}]
    assert mine.of(resolve("drum-uint8-k4")) == []


def test_circuit_is_compared_with_the_exact_one_of_its_library():
    Path("m.c").write_text(PUBLISHED + f"int16_t f(int8_t A, int8_t B) {BODY}")
    Path("foreign.c").write_text("// power = 0.3 mW\n" + f"int16_t f(int8_t A, int8_t B) {BODY}".replace("ONE", "1"))
    (cost,) = Prices.load().of(resolve("int8:m.c"))
    assert cost.figures == pytest.approx({"power": 0.301 / 0.425, "area": 558.9 / 729.8, "delay": 1.36 / 1.48})
    assert Prices.load().of(resolve("int8:foreign.c")) == []


def test_costs_of_several_come_from_one_source():
    mine = prices(MINE)
    assert mine.common([resolve(name) for name in ("exact-int8", "drum-int8-k4")])[1] == [1, 0.25]
    with pytest.raises(RequestError, match="no source has the power of mbm-int8 beside the others"):
        mine.common([resolve(name) for name in ("exact-int8", "mbm-int8")])
    networks = [{resolve("exact-int8"): 3, resolve("drum-int8-k4"): 1}, {resolve("mbm"): 1}, {resolve("mitchell"): 1}]
    of_what, costs = mine.of_networks(networks)
    assert (of_what, costs) == ("power, exact = 1 (measured by us; 28 nm)", [pytest.approx(13 / 16), None, None])


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("0.5 mW", "500 uW", "drum-int8-k4: power is in uW, but the exact one's is in mW"),
        ("0.5 mW", "-1 mW", "mine.multipliers.drum-int8-k4.power: a figure is a number above 0"),
        ("drum-int8-k4", "drum-uint8-k4", "mine: drum-uint8-k4 multiplies uint8, not int8"),
        ("drum-int8-k4", "dram", "mine: unknown multiplier family 'dram'"),
        ("power: 0.5 mW", "energy: 3", "drum-int8-k4: energy is in no unit, but the exact one's is missing"),
        ("technology", "tecnology", "mine.technology: Field required"),
    ],
)
def test_wrong_file_of_costs_is_one_line(right, wrong, message):
    Path("costs.yaml").write_text(MINE.replace(right, wrong))
    answer = mbm("multipliers", "list", "--costs", "costs.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert re.fullmatch(f"mbm: --costs costs.yaml: .*{message}.*\n", answer.err)


@pytest.mark.parametrize("text", ["0", "nan mW", "1.2.3 mW", "mW", "1 m W", True])
def test_figure_is_a_number_above_zero(text):
    with pytest.raises(ValueError, match="a figure is a number above 0"):
        Figure.of(text)


def test_commands_show_costs():
    Path("costs.yaml").write_text(MINE)
    listed = mbm("multipliers", "list", "--costs", "costs.yaml", "--json").json["costs"]
    assert {"drum-int8-k4", "int8:t.npy", "mbm", "mbm-t20"} <= {cost["multiplier"] for cost in listed}
    assert all(cost["source"] and cost["where"] for cost in listed)
    assert "[1] AFMB" in mbm("multipliers", "show", "mbm").out
    assert mbm("characterize", "mbm-t20", "mitchell", "--samples", 100, "--json").json["costs"][0]["figures"] == {
        "power": 0.01754,
        "area": 0.03571,
    }


def test_networks_cost_their_products():
    """LeNet's convolutions have 357,600 of 416,520 products of an image."""
    vary = ["--vary", "model.multiplier=exact,mbm-t20,mitchell", "--quantity", "area", *EPOCH]
    assert mbm("sweep", *vary, "--quiet") == SILENT
    result = made().read_json("sweep.json")
    assert result["costs"].startswith("area, exact = 1 (H. Saadat")
    of_mbm = (58_920 + 357_600 * 0.03571) / 416_520
    assert [one["cost"] for one in result["combinations"]] == [1, pytest.approx(of_mbm), None]
    compared = mbm("compare", "exact-vs-mbm", "--seeds", 1, "--multiplier", "mbm-t20", "--quantity", "area", *EPOCH)
    assert " cost of the products" in compared.out
