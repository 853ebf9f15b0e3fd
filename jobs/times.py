"""Points in time as users write them: '22:00', '2026-12-01T06:30', 'now+2h'."""

from datetime import date, datetime, time, timedelta

from jobs import durations
from jobs.errors import SpecError

HINT = "e.g. 22:00, 2026-12-01T06:30 (local time), 2026-12-01T06:30+00:00, or now+2h"
MAX_FUTURE_S = 366 * 86400.0


def read_time(given: str | datetime | date | time | timedelta, now: float) -> float:
    """
    Return a point in time.

    Args:
        given: text, or the types of datetime; without a time zone in that of this machine. A time of the day
            is the next one.
        now: seconds since 1970, to which 'now' refers.

    Returns:
        Seconds since 1970.

    Raises:
        SpecError: it is none, or more than a year away.
    """
    at = _seconds(given.strip() if isinstance(given, str) else given, now)
    if at is None:
        raise SpecError(f"--begin {str(given)[:40]!r} is not a time", hint=HINT)
    if at - now > MAX_FUTURE_S:
        raise SpecError(f"--begin {str(given)[:40]} is more than a year away", hint=HINT)
    return at


def _seconds(given: str | datetime | date | time | timedelta, now: float) -> float | None:
    try:
        if isinstance(given, timedelta):
            return now + given.total_seconds()
        if isinstance(given, str):
            word, _, later = given.replace(" ", "").lower().partition("+")
            if word in ("now", ""):
                return now + (durations.parse(later) if later or not word else 0.0)
            given = time.fromisoformat(given) if _is_time_of_day(given) else datetime.fromisoformat(given)
        here = datetime.fromtimestamp(now).astimezone()
        if isinstance(given, time):
            today = datetime.combine(here.date(), given)
            return next(at for day in range(3) if (at := (today + timedelta(days=day)).timestamp()) > now)
        if not isinstance(given, datetime):
            given = datetime.combine(given, time())
        return given.timestamp()
    except (ValueError, OverflowError, OSError, StopIteration):
        return None


def _is_time_of_day(text: str) -> bool:
    return len(text) <= 8 and ":" in text
