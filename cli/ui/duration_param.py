"""The option type for a length of time."""

from typing import Any

import click

from jobs import durations


class Duration(click.ParamType[float]):
    """'2h30m' to seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            seconds = durations.parse(str(value))
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        if not 1.0 <= seconds <= 1e9:
            self.fail(f"{str(value)[:40]!r} is less than a second, or more than 30 years", param, ctx)
        return seconds
