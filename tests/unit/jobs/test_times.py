"""Points in time as users write them."""

from datetime import UTC, date, datetime, time, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import SpecError
from jobs.times import read_time

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("given_", "later_s"),
    [
        ("now", 0),
        ("now+2h", 7200),
        ("now + 1h30m", 5400),
        ("+90s", 90),
        (timedelta(minutes=3), 180),
        (datetime.fromtimestamp(NOW + 60, UTC), 60),
        (datetime.fromtimestamp(NOW + 60, timezone(timedelta(hours=5))).isoformat(), 60),
        (datetime.fromtimestamp(NOW + 60).isoformat(" "), 60),
        (datetime.fromtimestamp(NOW - 60).isoformat(), -60),
    ],
)
def test_each_form_is_read(given_: Any, later_s: float) -> None:
    assert read_time(given_, NOW) == pytest.approx(NOW + later_s)


@given(at=st.times(), now=st.floats(1.6e9, 2e9))
def test_a_time_of_the_day_is_the_next_one(at: time, now: float) -> None:
    found = read_time(at.replace(microsecond=0).strftime("%H:%M:%S"), now)
    assert 0 < found - now <= 25 * 3600
    assert datetime.fromtimestamp(found).time() == at.replace(microsecond=0)


def test_a_date_is_its_midnight() -> None:
    day = date.fromtimestamp(NOW + 86400)
    assert read_time(day, NOW) == datetime.combine(day, time()).timestamp()


@pytest.mark.parametrize("text", ["", "soon", "now+x", "25:00", "2026-13-01", "22:00 tomorrow", "9" * 50])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_time(text, NOW)
    assert "now+2h" in (caught.value.hint or "")


def test_a_year_is_the_limit() -> None:
    with pytest.raises(SpecError, match="more than a year"):
        read_time("now+400d", NOW)
