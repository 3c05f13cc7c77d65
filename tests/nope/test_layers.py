import pytest
from hypothesis import given
from hypothesis import strategies as st

from flare.errors import ConfigError
from flare.nope.layers import auto_band, format_layers, parse_layers


@pytest.mark.parametrize(
    ("spec", "depth", "layers"),
    [
        ("20-32", 36, list(range(20, 33))),
        (["3", "7", "20-22"], 36, [3, 7, 20, 21, 22]),
        ("3,7", 8, [3, 7]),
        (5, 8, [5]),
        ("every:4", 12, [3, 7, 11]),
        ("none", 12, []),
        ("all", 3, [0, 1, 2]),
        ("auto", 36, list(range(20, 33))),
        ("auto", 28, list(range(16, 26))),
        (["23", "20", "21"], 24, [20, 21, 23]),
    ],
)
def test_spec_names_these_layers(spec: object, depth: int, layers: list[int]) -> None:
    assert parse_layers(spec, depth) == layers


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("40", "layer 40 is out of range; the model has layers 0-35"),
        ("30-40", "layer 40 is out of range"),
        ("5-2", "layer range 5-2 is reversed"),
        ("3 3", "layer 3 is named twice"),
        ("1-4 3", "layer 3 is named twice"),
        ("-1", "cannot read '-1'"),
        ("x", "cannot read 'x'"),
        ("auto 3", "'auto', 'none' and 'all' stand alone"),
        ("every:0", "the N of every:N must be at least 1"),
        ("every:99", "matches no layer"),
        ("", "names no layer"),
    ],
)
def test_wrong_spec_is_one_clear_line(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as error:
        parse_layers(spec, 36)
    assert "\n" not in str(error.value)


@given(st.integers(2, 200))
def test_auto_band_is_inside_every_model(depth: int) -> None:
    band = auto_band(depth)
    assert band
    assert 0 <= band[0] <= band[-1] < depth


@given(st.sets(st.integers(0, 63), min_size=1))
def test_formatted_layers_read_back(layers: set[int]) -> None:
    assert parse_layers(format_layers(sorted(layers)), 64) == sorted(layers)
