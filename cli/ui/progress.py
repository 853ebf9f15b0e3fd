"""A progress bar with ETA for work that this very command does; quiet lines off a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cli.ui import output

LINE_EVERY_S = 10.0

Tick = Callable[[int, int], None]


@contextmanager
def progress(doing: str, unit: str) -> Iterator[Tick]:
    """
    Args:
        doing: the verb, e.g. 'drawing'.
        unit: what is counted, e.g. 'faces'.

    Yields:
        tick(done, total), to be called as often as one likes.
    """
    if sys.stderr.isatty():
        with _bar(doing, unit) as tick:
            yield tick
        return
    said = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            output.notice(f"{doing}: {done} of {total} {unit}")

    yield line


@contextmanager
def _bar(doing: str, unit: str) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{doing} {{task.description}}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task(unit, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
