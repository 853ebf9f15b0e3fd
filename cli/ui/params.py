"""Option types that are stricter than click's own, and say in plain words what is wrong."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import click

from jobs.renamed import FIELDS, VALUES


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


class RenamedChoice(click.Choice[str]):
    """
    A choice that also accepts the names of ganq 0.2, with a notice.

    Args:
        field: of the spec, whose values may have had other names.
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
    An option that is accepted under its name of ganq 0.2, too; the help shows the new one alone.

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
