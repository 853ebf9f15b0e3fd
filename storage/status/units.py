"""Format numbers, sizes and times."""

from typing import Any

from storage.settings import redact


def clean(value: Any) -> str:
    """Return one printable line without control characters and passwords; '' for None."""
    return "" if value is None else redact(str(value)).replace("\n", " ").replace("\t", " ")


def duration(seconds: float | None) -> str:
    """Return e.g. '8 s', '12 min', '3 h 05 min', '2 d 4 h'; '' for None."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" if whole >= 600 else f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def roughly(seconds: float) -> str:
    """Return the largest unit only: '8 s', '12 min', '3 h', '2 d'."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def size(count: float) -> str:
    """Return bytes with a decimal unit: '3.6 MB'."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def timestamp(at: float | None) -> str:
    """Return a time of the job table in the local time zone."""
    if at is None:
        return ""
    from datetime import datetime

    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Return e.g. '1 job', '2,000 jobs'."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
