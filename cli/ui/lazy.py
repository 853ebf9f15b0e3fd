"""
A click group that imports a subcommand only when it is used.

`ganq --help` prints a static table and imports nothing but click.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import click


class Entry(NamedTuple):
    """A subcommand: its import path and its line in the help of the group."""

    name: str
    target: str  # module:attribute
    help: str
    section: str = "Commands"


class LazyGroup(click.Group):
    """
    A group with a static table of subcommands.

    Args:
        entries: the subcommands, in the order of the help.
        suggestions: frequent mistakes, and the command to suggest instead.
    """

    def __init__(
        self,
        *args: Any,
        entries: Sequence[Entry] = (),
        suggestions: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.entries = {entry.name: entry for entry in entries}
        self.suggestions = dict(suggestions or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self.entries.get(cmd_name)
        return None if entry is None else load(entry)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.entries and not name.startswith("-") and not ctx.resilient_parsing:
            near = self.suggestions.get(name)
            hint = f" Did you mean {near!r}?" if near else ""
            raise click.exceptions.NoSuchCommand(
                name, f"No such command {name[:40]!r}.{hint}", None if near else self.entries, ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.entries), default=0)
        for section in dict.fromkeys(entry.section for entry in self.entries.values()):
            rows = [(e.name.ljust(width), e.help) for e in self.entries.values() if e.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)


def load(entry: Entry) -> click.Command:
    """Import the command of an entry."""
    from importlib import import_module

    module, _, attribute = entry.target.partition(":")
    command: click.Command = getattr(import_module(module), attribute)
    return command


def examples(*lines: str) -> str:
    """Return an epilog with examples, which click does not rewrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
