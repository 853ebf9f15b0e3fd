"""
How facts reach a person or a program: tables, JSON, and the words for times and sizes.

Rich is imported on a terminal only; a pipe gets plain columns.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
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

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def on_terminal() -> bool:
    """Whether a person looks at stdout: only then colours, bars and tables that redraw."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def overflow() -> Any:
    """Return how rich shortens a cell: '…' has the width of one character only where there is one."""
    return "ellipsis" if (sys.stdout.encoding or "").lower().startswith("utf") else "crop"


def notice(text: str) -> None:
    """A remark for the person, on stderr: it is no part of the answer, nor does it fail for want of room."""
    with suppress(OSError):
        click.echo(redact(text), err=True)


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_json_array(values: Iterable[Any]) -> None:
    """A JSON array, written as the values come: memory does not grow with their number."""
    out = sys.stdout
    out.write("[")
    for number, value in enumerate(values):
        out.write(",\n " if number else "\n ")
        out.write(json.dumps(value, default=str))
    out.write("\n]\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """
    A table: rich on a terminal, aligned columns otherwise.

    Args:
        headers: the columns' names.
        rows: text, one cell for each header.
        right: names of the columns that hold numbers.
    """
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
    "retry": "yellow",
    "silent": "red",
}


SHRINK = {"NAME": 6, "WORKER": 6, "STATE": 10, "PATH": 12, "HOST": 6, "DEVICE": 6, "OF": 12}
SHRINK |= {"SOURCE": 12, "TITLE": 8, "ARTIST": 8}
"""Columns that give way on a narrow terminal, down to so many characters."""
DROP = ("AGE", "RATE", "KIND", "WORKER", "VERSION", "QUEUES", "MADE")
"""Columns that then go, in this order: a table with broken lines tells less."""


def rich_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> Any:
    """The same table for a terminal; a state is coloured by its first word."""
    import shutil

    from rich.table import Table
    from rich.text import Text

    widths = _fit(headers, rows, shutil.get_terminal_size().columns)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, width in widths.items():
        justify: Any = "right" if name in right else "left"
        table.add_column(name, justify=justify, width=width, no_wrap=True, overflow=overflow())
    for row in rows:
        cells = {name: Text(clean(cell)) for name, cell in zip(headers, row, strict=True) if name in widths}
        if "STATE" in cells:
            cells["STATE"].stylize(STATE_STYLES.get(cells["STATE"].plain.split(" ")[0], ""))
        table.add_row(*cells.values())
    return table


def _fit(headers: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> dict[str, int]:
    """The columns that fit, with their widths in characters."""
    widths = {
        name: max([len(name), *(len(clean(row[place])) for row in rows)])
        for place, name in enumerate(headers)
    }

    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - room

    for name, least in SHRINK.items():
        if name in widths and excess() > 0:
            widths[name] = max(min(least, widths[name]), widths[name] - excess())
    for name in DROP:
        if name in widths and excess() > 0:
            del widths[name]
    return widths
