"""Durations as users write them: '2h30m', '90min', '1.5d'."""

import re

UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}
_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)\s*(d|h|min|m|s)\s*")
_WHOLE = re.compile(rf"(?:{_PART.pattern})+")


def parse(text: str) -> float:
    """
    Parse a duration.

    Args:
        text: numbers with units: d, h, min or m, s.

    Returns:
        Seconds.

    Raises:
        ValueError: it is not a duration; a number without a unit is ambiguous.
    """
    text = text.strip().lower()
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a duration; e.g. 2h30m, 90min, 1d")
    return sum(float(number) * UNITS[unit] for number, unit in _PART.findall(text))


def in_words(seconds: float) -> str:
    """Return e.g. '2h30m', which parse() accepts; rounded to seconds if it is at least one second."""
    whole = round(seconds)
    if whole < 1:
        return f"{seconds:.3g}s"
    parts = ((whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "m"), (whole % 60, "s"))
    return "".join(f"{count}{unit}" for count, unit in parts if count)
