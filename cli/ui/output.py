"""
Print tables, JSON and notices.

rich is imported only if stdout is a terminal; a pipe gets plain columns.
"""

import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import click

from storage.settings import redact
from storage.status.units import clean as clean
from storage.status.units import count as count
from storage.status.units import duration as duration
from storage.status.units import roughly as roughly
from storage.status.units import size as size
from storage.status.units import timestamp as timestamp

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def on_terminal() -> bool:
    """Return whether stdout is a terminal that supports colours, progress bars and redrawing."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def overflow() -> Any:
    """Return how rich truncates a cell: '…' requires a UTF-8 terminal."""
    return "ellipsis" if (sys.stdout.encoding or "").lower().startswith("utf") else "crop"


def notice(text: str) -> None:
    """Print a notice to stderr; an unwritable stderr is ignored."""
    with suppress(OSError):
        click.echo(redact(text), err=True)


def print_json(value: Any) -> None:
    """Print one JSON value."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_json_array(values: Iterable[Any]) -> None:
    """Print a JSON array at constant memory."""
    out = sys.stdout
    out.write("[")
    for index, value in enumerate(values):
        out.write(",\n " if index else "\n ")
        out.write(json.dumps(value, default=str))
    out.write("\n]\n")


def several_users(users: Iterable[str], own: str) -> bool:
    """Return whether a table needs a USER column: some job is not the reader's own."""
    return any(user != own for user in users)


def without_columns(
    headers: Sequence[str], rows: Sequence[Sequence[str]], hidden: Collection[str]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Remove columns from a table."""
    shown = [index for index, name in enumerate(headers) if name not in hidden]
    return [headers[index] for index in shown], [[row[index] for index in shown] for row in rows]


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    hidden: Collection[str] = (),
) -> None:
    """
    Print a table: with rich on a terminal, otherwise as aligned columns.

    Args:
        headers: names of the columns.
        rows: one text per column.
        right: names of the right-aligned columns.
        hidden: names of the columns that are not shown.
    """
    headers, rows = without_columns(headers, rows, hidden)
    if on_terminal():
        from rich.console import Console

        Console(highlight=False).print(rich_table(headers, rows, right=right))
        return
    cells = [list(headers), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    for row in cells:
        line = "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, headers, strict=True)
        )
        click.echo(line.rstrip())


STATE_STYLES = {
    "running": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "dim",
    "cancelling": "yellow",
    "held": "yellow",
    "paused": "yellow",
    "pausing": "yellow",
    "retry": "yellow",
    "unresponsive": "red",
    "queued:": "yellow",
    "failed:": "red",
}


SHRINK = {
    "PROGRESS": 30,
    "OPTIONS": 16,
    "NAME": 6,
    "WORKER": 6,
    "STATE": 10,
    "PATH": 12,
    "HOST": 6,
    "DEVICE": 6,
    "OF": 8,
}
SHRINK |= {"DEVICE": 6, "OF": 8, "SOURCE": 12, "TITLE": 8, "ARTIST": 8}
"""Minimum widths of the columns that are truncated on a narrow terminal."""
DROPPED_COLUMNS = ("OPTIONS", "AGE", "RATE", "KIND", "WORKER", "VERSION", "QUEUES", "IMAGES")
"""Columns that are then dropped, in this order."""


def rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Any:
    """Return the table for a terminal; the first word of a state determines its colour."""
    import shutil

    from rich.table import Table
    from rich.text import Text

    widths = _fit_columns(headers, rows, shutil.get_terminal_size().columns)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, width in widths.items():
        justify: Any = "right" if name in right else "left"
        table.add_column(name, justify=justify, width=width, no_wrap=True, overflow=overflow())
    for row in rows:
        cells = {
            name: Text(_shorten(clean(cell), widths[name]) if name == "NAME" else clean(cell))
            for name, cell in zip(headers, row, strict=True)
            if name in widths
        }
        if "STATE" in cells:
            cells["STATE"].stylize(STATE_STYLES.get(cells["STATE"].plain.split(" ")[0], ""))
        table.add_row(*cells.values())
    return table


def _shorten(name: str, width: int) -> str:
    """Truncate a name in its middle: the ends of the names of a sweep distinguish its jobs."""
    if len(name) <= width or overflow() != "ellipsis":
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


def _fit_columns(headers: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> dict[str, int]:
    """Return the columns that fit into `room` characters, with their widths."""
    widths = {
        name: max([len(name), *(len(clean(row[column])) for row in rows)])
        for column, name in enumerate(headers)
    }

    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - room

    for name, minimum in SHRINK.items():
        if name in widths and excess() > 0:
            widths[name] = max(min(minimum, widths[name]), widths[name] - excess())
    for name in DROPPED_COLUMNS:
        if name in widths and excess() > 0:
            del widths[name]
    return widths
