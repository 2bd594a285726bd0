import numpy as np
import pytest

from wallx_jax.config.ranges import parse_ranges, select


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", [3]),
        ("0:3", [0, 1, 2]),
        (":2,8:", [0, 1, 8, 9]),
        (" 1 , 4:6,5", [1, 4, 5]),
        (":", list(range(10))),
    ],
)
def test_selection(text, expected):
    assert np.flatnonzero(select(text, range(10))).tolist() == expected


def test_numbers_with_gaps():
    assert select("0:6", [0, 1, 5, 9]).tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is neither NUMBER nor START:STOP"),
        ("1,", "'' is neither"),
        ("a:b", "'a:b' is neither"),
        ("-1", "'-1' is neither"),
        ("1:2:3", "'1:2:3' is neither"),
        ("5:5", "'5:5' holds no number: it starts at 5 and stops before 5"),
        ("6:2", "'6:2' holds no number"),
    ],
)
def test_what_is_no_range(text, message):
    with pytest.raises(ValueError, match=message):
        parse_ranges(text)


def test_a_range_that_selects_nothing():
    with pytest.raises(ValueError, match="'12:' selects none of 0..9"):
        select("0,12:", range(10))
    with pytest.raises(ValueError, match="'3' selects none of none"):
        select("3", [])
