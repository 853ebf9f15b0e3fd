"""
A click group that imports a subcommand when it is used, not before.

`ganq --help` reads the table below it: names and one line each. So help costs the
import of click and nothing else, however heavy the commands are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import click


class Entry(NamedTuple):
    """One subcommand: where it is, and what help says of it before it is loaded."""

    name: str
    target: str  # module:attribute
    help: str
    section: str = "Commands"


class LazyGroup(click.Group):
    """
    A group over a static table of Entry rows.

    Args:
        entries: the subcommands, in the order of the help.
        meant: words that people try, and what they are called here.
    """

    def __init__(
        self,
        *args: Any,
        entries: Sequence[Entry] = (),
        meant: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.entries = {entry.name: entry for entry in entries}
        self.meant = dict(meant or {})

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
            raise click.UsageError(f"there is no command {name[:40]!r}{self._near(name)}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def _near(self, name: str) -> str:
        from difflib import get_close_matches

        if name in self.meant:
            return f"; did you mean {self.meant[name]}?"
        near = get_close_matches(name, self.entries, n=2, cutoff=0.5)
        return f"; did you mean {' or '.join(near)}?" if near else ""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.entries), default=0)
        for section in dict.fromkeys(entry.section for entry in self.entries.values()):
            rows = [(e.name.ljust(width), e.help) for e in self.entries.values() if e.section == section]
            with formatter.section(section):
                formatter.write_dl(rows)


def load(entry: Entry) -> click.Command:
    """Import what an entry names."""
    from importlib import import_module

    module, _, attribute = entry.target.partition(":")
    command: click.Command = getattr(import_module(module), attribute)
    return command


def examples(*lines: str) -> str:
    """An epilog of examples; click keeps its lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
