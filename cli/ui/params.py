"""Option types that are stricter than those of click, or have clearer error messages."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import click

from jobs import durations
from jobs.renamed import FIELDS, VALUES


class NonEmptyPath(click.Path):
    """A path that is not empty: `--out "$UNSET"` would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("the path is empty; use . for the current folder", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.ParamType[float]):
    """A finite number of seconds."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= 1e9:
            self.fail(f"{str(value)[:40]!r} is not a number of seconds; e.g. 3600", param, ctx)
        return seconds


class Duration(click.ParamType[float]):
    """
    A length of time, e.g. '2h30m', as seconds.

    Args:
        minimum: in seconds.
        unit: of a number without a unit, which is an error by default.
    """

    name = "duration"

    def __init__(self, minimum: float = 1.0, unit: str = "") -> None:
        self.minimum = minimum
        self.unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value)
        try:
            seconds = durations.parse(text if text[-1:].isalpha() else text + self.unit)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)
        if not self.minimum <= seconds <= 1e9:
            self.fail(f"{str(value)[:40]!r} is less than a second, or more than 30 years", param, ctx)
        return seconds


class BoundedInt(click.IntRange):
    """An integer within bounds; the error message of IntRange for 1.5 mentions an 'integer range'."""

    name = "integer"


class Time(click.ParamType[str]):
    """A point in time: '22:00', '2026-12-01T06:30', 'now+2h'."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        import time

        from jobs.errors import SpecError
        from jobs.times import read_time

        try:
            read_time(str(value), time.time())
        except SpecError as exc:
            self.fail(f"{exc.message}; {exc.hint}", param, ctx)
        return str(value)


class User(click.ParamType[str]):
    """
    A user name, normalised as in the job table.

    Args:
        wildcard: also accept '*'.
    """

    name = "user"

    def __init__(self, *, wildcard: bool = False) -> None:
        self.wildcard = wildcard

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from storage.users import USER_HINT, is_user_name, user_name

        name = user_name(str(value))
        if not is_user_name(name) and not (self.wildcard and name == "*"):
            self.fail(f"{name[:70]!r} is not a valid user name: {USER_HINT}", param, ctx)
        return name


class RenamedChoice(click.Choice[str]):
    """
    A choice that also accepts the names of ganq 0.2, with a notice.

    Args:
        field: the field of the spec whose values were renamed.
    """

    def __init__(self, choices: Iterable[str], *, field: str) -> None:
        super().__init__([*choices])
        self.field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        new = VALUES.get(self.field, {}).get(str(value))
        if new is None:
            return super().convert(value, param, ctx)
        from cli.ui.output import notice
        from jobs.specs import option_of

        old = {new: old for old, new in FIELDS.items()}.get(self.field, self.field)
        notice(f"notice: {option_of(old)} {value} is now {option_of(self.field)} {new}")
        return new


class RenamedOption(click.Option):
    """
    An option that is also accepted under its name of ganq 0.2; the help shows only the new name.

    Args:
        old: the flag of ganq 0.2.
    """

    def __init__(self, param_decls: Sequence[str], *, old: str, **attributes: Any) -> None:
        super().__init__([*param_decls, old], **attributes)
        self.old = old

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.opts.remove(self.old)
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts.append(self.old)
