import pytest

from emomerge.reporting.text import decimals, duration, fixed, percent, short


def test_an_unknown_number_is_a_dash():
    assert fixed(None, 2) == short(None) == percent(None) == duration(None) == "–"


def test_minus_sign_and_digits():
    assert fixed(-0.01234, 4) == "−0.0123"
    assert fixed(0.5, 1, signed=True) == "+0.5"
    assert short(-1.234e-7) == "−1.23e−07"
    assert short(12345) == "12 345"
    assert percent(0.9143) == "91.4 %"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.84, "0.8 s"), (41.8, "42 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("values", "places"), [([0.0142, 0.0083], 4), ([3.1, 2.9], 2), ([1234.0], 0), ([0, None], 3), ([1e-12], 7)]
)
def test_a_column_shows_three_digits_of_its_median(values, places):
    assert decimals(values) == places
