"""The option type for a length of time."""

from typing import Any

import click

from jobs import durations


class Duration(click.ParamType[float]):
    """
    '2h30m' to seconds.

    Args:
        unit: of a number without one, which is refused by default.
    """

    name = "duration"

    def __init__(self, unit: str = "") -> None:
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        try:
            seconds = durations.parse(text if text[-1:].isalpha() else text + self.unit)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        if not 1.0 <= seconds <= 1e9:
            self.fail(f"{str(value)[:40]!r} is less than a second, or more than 30 years", param, ctx)
        return seconds
