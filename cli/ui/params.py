"""Option types that are stricter than click's own, and say in plain words what is wrong."""

import math
from typing import Any

import click


class NamedPath(click.Path):
    """A path that is not empty: `--out "$UNSET"` would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("it is empty; name a path, or . for the current folder", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.ParamType[float]):
    """A number of seconds that come to an end: those of nan and inf never do."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= 1e9:
            self.fail(f"{str(value)[:40]!r} is no number of seconds; e.g. 3600", param, ctx)
        return seconds


class Whole(click.IntRange):
    """A whole number within bounds; click's own says of 1.5 that it is no valid integer range."""

    name = "integer"


class User(click.ParamType[str]):
    """
    The name of a user as the job table knows it.

    Args:
        everybody: '*' is accepted, too.
    """

    name = "user"

    def __init__(self, *, everybody: bool = False) -> None:
        self.everybody = everybody

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from storage.users import USER_HINT, is_user_name, user_name

        name = user_name(str(value))
        if not is_user_name(name) and not (self.everybody and name == "*"):
            self.fail(f"{name[:70]!r} cannot be a user's name: {USER_HINT}", param, ctx)
        return name
