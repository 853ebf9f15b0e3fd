"""
Generate docs/cli.md from the help of the commands: `python -m cli.reference`.

A test compares the file with the output of this module.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from cli.main import root
from cli.ui.lazy import LazyGroup

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
OPENAPI = PAGE.with_name("openapi.json")
WIDTH = 100
HELP_NAMES = ["-h", "--help"]

OPENING = """\
# The command line

Generated from the help of the commands by `python -m cli.reference`; do not edit.

A JOB is an id or a name; a name refers to the newest job that has it. With `--json`, commands print JSON, and
errors are JSON on stderr. `cancel`, `hold`, `release` and `retry` of several jobs print one array; a job that
could not be changed is an entry `{"job": …, "error": …}`, and the exit code is that of the first error.
`--debug`, at any position, prints the traceback of an error.

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | an error, or a job that was waited for did not succeed |
| 2 | usage error: an invalid option, value or setting |
| 3 | not found: no such job, checkpoint or path |
| 124 | `ganq wait --timeout` expired |
| 130 | Ctrl-C |
| 141 | the reader of the output has closed it (`ganq status \\| head`) |
| 143 | SIGTERM (`ganq up` and `ganq worker` save the running job and exit with 0) |
"""


def commands(
    group: click.Group = root, path: tuple[str, ...] = ("ganq",)
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield every command with its full name, groups before their commands."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def help_page(path: tuple[str, ...], command: click.Command) -> str:
    """Return the help of a command at a fixed width."""
    parent: click.Context | None = None
    for name in path[:-1]:
        # A command caches its help option at the first parse, so it must have the right names by then.
        parent = click.Context(
            root, info_name=name, parent=parent, terminal_width=WIDTH, help_option_names=HELP_NAMES
        )
    ctx = command.make_context(path[-1], [], parent=parent, resilient_parsing=True)
    ctx.terminal_width = WIDTH
    return command.get_help(ctx).rstrip()


def page() -> str:
    """Return the contents of docs/cli.md."""
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
    """Write the files."""
    from web.api.openapi import as_text
    from web.api.routes import endpoints

    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    OPENAPI.write_text(as_text(endpoints()), encoding="utf-8")
    print(f"{PAGE} and {OPENAPI} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
