"""Numbers as text."""

import pytest

from agfsync_jax.data.columns import Column
from agfsync_jax.reports import formats

SHARE, DEFAULT = Column(format="%"), Column()


def interval(low: float, high: float) -> dict:
    return {"mean": (low + high) / 2, "low": low, "high": high}


def test_numbers():
    assert formats.number(SHARE, 0.8149) == "81.5%"
    assert formats.number(SHARE, 1.0) == "100%"
    assert formats.number(SHARE, -0.0161, signed=True) == "−1.6 pt"
    assert formats.number(Column(format=".2f"), 31.254) == "31.25"
    assert formats.number(DEFAULT, 0.5, signed=True) == "+0.500"
    assert formats.between(SHARE, interval(-0.002, 0.02), signed=True) == "−0.2 to +2.0"
    assert formats.between(SHARE, interval(0.8, 0.9)) == "80.0 – 90.0"
    assert formats.duration(59.94) == "59.9 s" and formats.duration(3725) == "1 h 02 min"
    assert formats.count(1, "pair") == "1 pair" and formats.count(1200, "pair") == "1,200 pairs"


def test_direction():
    lower = Column(higher_is_better=False)
    for column, up, down in ((DEFAULT, "better", "worse"), (lower, "worse", "better")):
        assert formats.direction(column, interval(0.1, 0.3)) == up
        assert formats.direction(column, interval(-0.3, -0.1)) == down
        assert formats.direction(column, interval(-0.1, 0.1)) == ""
    assert formats.direction(DEFAULT, interval(0.51, 0.6), 0.5) == "better"
    assert formats.change(lower, interval(0.1, 0.3)).arrow == "▲"  # it rises
    assert formats.change(lower, interval(-0.3, -0.1)) == (
        "−0.200",
        "−0.300 to −0.100",
        "better",
        "▼",
    )


def test_win_rate_of_what_should_be_low():
    often = interval(0.6, 0.8)  # how often the tuned image has the higher number
    assert formats.win_rate(DEFAULT, often) == ("70%", "60.0 – 80.0", "better", "▲")
    lower = Column(higher_is_better=False)
    assert formats.win_rate(lower, often) == ("30%", "20.0 – 40.0", "worse", "▼")


@pytest.mark.parametrize(
    ("form", "delta", "value", "text"),
    [
        (".3f", interval(0.0008, 0.0016), 0.2142, "0.2142"),
        (".3f", interval(0.01, 0.03), 0.2142, "0.214"),
        (".2f", interval(0.0, 0.0), 31.254, "31.25"),  # no difference at all
        (".3f", interval(0.0004, 0.0004), 0.2142, "0.2142"),  # the same for all
        (".3f", interval(1e-12, 3e-12), 0.2142, "0.214200"),  # there is an end to it
        ("%", interval(0.006, 0.026), 0.8149, "81.5%"),
        ("%", interval(0.0001, 0.0003), 0.81494, "81.49%"),
        (".2g", interval(0.0001, 0.0003), 0.81494, "0.81"),  # no place for more
    ],
)
def test_digits_follow_the_difference(form, delta, value, text):
    assert formats.number(formats.with_digits(Column(format=form), delta), value) == text


def test_columns_in_order():
    known = {"referee": SHARE, "vqa": SHARE, "clip": DEFAULT}
    found = formats.describe(["z", "clip", "new/a", "referee"], known)
    assert list(found) == ["referee", "clip", "new/a", "z"]
    assert found["referee"] is SHARE and found["z"] == Column()
