"""GPU indices as users type them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flare.errors import ConfigError
from flare.gpus.selection import (
    parse_gpu_ids,
)
from flare.index_ranges import format_ranges


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ("0,1,2,3", [0, 1, 2, 3]),
        ("0-3", [0, 1, 2, 3]),
        ("0 1 4 5", [0, 1, 4, 5]),
        (["0", "1", "4", "5"], [0, 1, 4, 5]),
        ([0, 1, 4, 5], [0, 1, 4, 5]),
        (["0-1,4", "6"], [0, 1, 4, 6]),
        ("0，1、2", [0, 1, 2]),  # a Chinese keyboard's commas
        (" 3 , 1 ", [3, 1]),
        (7, [7]),
        (list(range(200)), list(range(200))),
    ],
)
def test_ids_are_understood_as_people_type_them(value, ids):
    assert parse_gpu_ids(value) == ids


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "--gpu_ids is empty; give numbers like 0,1"),
        ([], "--gpu_ids is empty"),
        (" , ", "is empty"),
        ("a", '--gpu_ids must be numbers like 0,1 or 0-3, got "a"'),
        ("-1", 'got "-1"'),
        ("0,-1", 'got "-1"'),
        ("0,0", "GPU 0 listed twice in --gpu_ids 0,0"),
        ("0-3,2", "GPU 2 listed twice in --gpu_ids 0-3,2"),
        ("3-0", "the range 3-0 is reversed; write 0-3"),
        ("1.5", 'got "1.5"'),
        ("²", "must be numbers"),
        ("0-", 'got "0-"'),
        ("0-99999999999", "must be numbers"),
        ([True], 'got "True"'),
        (None, 'got "None"'),
        ([[0, 1]], "must be numbers"),
        ("x\ny" * 1000, "must be numbers"),
    ],
)
def test_wrong_ids_are_one_line_that_names_them(value, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse_gpu_ids(value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_error_names_the_key_that_the_user_typed():
    with pytest.raises(ConfigError, match=re.escape("training_args.gpu_ids must be numbers")):
        parse_gpu_ids(["x"], flag="training_args.gpu_ids")


@given(st.sets(st.integers(0, 300), min_size=1))
def test_listed_indices_read_back_as_the_same_set(ids):
    assert parse_gpu_ids(format_ranges(ids)) == sorted(ids)
