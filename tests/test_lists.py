"""A list that is one argument."""

import pytest

from mbm_cli.lists import split_at_commas


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("mbm", ["mbm"]),
        ("mbm, mbm-t8 ,exact", ["mbm", "mbm-t8", "exact"]),
        ("{conv1: exact, default: mbm},mbm-t8", ["{conv1: exact, default: mbm}", "mbm-t8"]),
        ("[a,[b,c]],d", ["[a,[b,c]]", "d"]),
        ("'a,b',\"c,]d\",e", ["'a,b'", '"c,]d"', "e"]),
        ("{a: 'x}y', b: z},c", ["{a: 'x}y', b: z}", "c"]),
        ("lut:bob's.bin,lut:ann's.bin", ["lut:bob's.bin", "lut:ann's.bin"]),
        ("{a,b", ["{a,b"]),
        ("a,,b,", ["a", "", "b", ""]),
        ("", [""]),
    ],
)
def test_commas_within_brackets_and_quotes_belong_to_the_value(text, values):
    assert split_at_commas(text) == values
