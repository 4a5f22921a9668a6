"""Multipliers by layer: which layer gets which, in configs, models and commands."""

import pytest
from torch import nn

from mbm_cli import config as configs
from mbm_cli.config import dump, load
from mbm_cli.errors import RequestError
from mbm_cli.layer_multipliers import LayerMultipliers
from mbm_cli.models import describe_layers, lenet
from mbm_cli.multipliers import Multiplier
from mbm_cli.nn import convert

BY_LAYER = {"conv1": "exact", "features.*": "mbm-t8", "features.1?": "drum-k6", "default": "mbm"}


@pytest.mark.parametrize(
    ("layer", "multiplier"),
    [("conv1", "exact"), ("features.3", "mbm-t8"), ("features.10", "mbm-t8"), ("conv2", "mbm"), ("", "mbm")],
)
def test_a_name_then_the_first_pattern_then_the_default(layer, multiplier):
    assert str(LayerMultipliers.of_mapping(BY_LAYER).of(layer)) == multiplier


def test_a_name_wins_over_an_earlier_pattern():
    by_layer = LayerMultipliers.of_mapping({"conv*": "mbm", "conv2": "exact", "default": "mitchell"})
    assert [str(by_layer.of(layer)) for layer in ("conv1", "conv2", "fc")] == ["mbm", "exact", "mitchell"]


def test_convert_takes_a_mapping():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)))
    convert(model, {"1.*": "mbm-t8", "1.1": Multiplier("exact"), "default": "mitchell"})
    assert [str(m.multiplier) for m in model.modules() if isinstance(m, nn.Conv2d)] == ["mitchell", "mbm-t8", "exact"]


def test_a_name_without_a_layer_changes_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match="no convolution is called conv9; those of the model are 0"):
        convert(model, {"conv9": "mbm", "default": "mbm"})
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("mapping", [{"conv1": "mbm"}, {"default": 3}, {"default": "booth"}, {"default": {"a": "mbm"}}])
def test_what_is_no_assignment(mapping):
    with pytest.raises(ValueError, match="multiplier"):
        LayerMultipliers.of_mapping(mapping)


def test_a_config_has_it_and_gives_it_back():
    text = (
        "model.multiplier={conv1: exact, conv2: {family: mbm, truncate: 8}, default: {family: drum, leading_bits: 6}}"
    )
    config = load("lenet-mbm", [text])
    assert str(config.model.multiplier) == "{conv1: exact, conv2: mbm-t8, default: drum-k6}"
    assert configs.parse(dump(config), "again") == config
    assert configs.multiplier(str(config.model.multiplier)) == config.model.multiplier


def test_family_alone_is_one_multiplier():
    assert load("lenet-mbm", ["model.multiplier={family: mbm, truncate: 8}"]).model.multiplier == Multiplier("mbm", 8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{conv1: mbm}", "default: mbm"),
        ("{conv1: booth, default: mbm}", "unknown multiplier family 'booth'"),
        ("{conv1: 3, default: mbm}", "must be a short form"),
        ("{family: drum, leading_bits: 6, truncate: 3}", "leading_bits belongs to drum"),
        ("{family: mbm, leading_bits: 6}", "leading_bits belongs to drum"),
    ],
)
def test_a_config_with_a_wrong_one_is_refused(value, message):
    with pytest.raises(RequestError, match=message):
        load("lenet-mbm", [f"model.multiplier={value}"])


def test_the_layer_table_tells_them():
    layers = describe_layers(lenet(LayerMultipliers.of_mapping({"conv1": "mitchell", "default": "mbm"})), (1, 28, 28))
    assert [layer.arithmetic for layer in layers] == ["mitchell", "mbm", "exact", "exact", "exact"]
