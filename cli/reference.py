"""
Writes docs/cli.md from the commands themselves: `python -m cli.reference`.

A test compares the file with what this makes, so that the page cannot grow old.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cli.main import root
from cli.ui.lazy import LazyGroup

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
WIDTH = 100
HELP_NAMES = ["-h", "--help"]

OPENING = """\
# The command line

Made from the commands' own help by `python -m cli.reference`; do not edit it by hand.

Wherever a command takes a JOB, its id or its name will do; a name means the newest job that has it.
`--json` prints facts for programs, errors too (on stderr). `cancel`, `hold`, `release` and `retry` of several
jobs print one array: a job with which it could not be done stands there, too, as `{"job": …, "error": …}`,
and the exit code is that of the first such one. `--debug`, anywhere, shows an error's traceback.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed: an error, or a job that was waited for did not succeed |
| 2 | usage: an option, a value or a setting that cannot work |
| 3 | not found: no such job, checkpoint or path |
| 124 | `ganq wait --timeout`: the time ran out |
| 130 | Ctrl-C |
| 141 | the reader of the output has gone (`ganq status \\| head`) |
| 143 | SIGTERM (`ganq up` and `ganq worker` save the running job, and end with 0) |
"""


def commands(
    group: click.Group = root, path: tuple[str, ...] = ("ganq",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with its full name, groups before what they hold."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def help_page(path: tuple[str, ...], command: click.Command) -> str:
    """A command's help as it prints itself, at a fixed width."""
    parent: click.Context | None = None
    for name in path[:-1]:
        # A command keeps the names of its help option from its first use on, so that they must
        # be right before it is parsed.
        parent = click.Context(
            root, info_name=name, parent=parent, terminal_width=WIDTH, help_option_names=HELP_NAMES
        )
    ctx = command.make_context(path[-1], [], parent=parent, resilient_parsing=True)
    ctx.terminal_width = WIDTH
    return command.get_help(ctx).rstrip()


def page() -> str:
    """The whole of docs/cli.md."""
    parts = [OPENING, f"```\n{help_page(('ganq',), root)}\n```\n"]
    section = None
    for path, command in commands():
        entry = root.entries[path[1]] if isinstance(root, LazyGroup) else None
        if entry is not None and entry.section != section:
            section = entry.section
            parts.append(f"## {section}\n")
        parts.append(f"### {' '.join(path)}\n")
        parts.append(f"```\n{help_page(path, command)}\n```\n")
    return "\n".join(parts)


def main() -> int:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
