"""Progress of work in this process: a bar with ETA on a terminal, otherwise occasional lines."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cli.ui import output

LINE_INTERVAL_S = 10.0

ProgressCallback = Callable[[int, int], None]


@contextmanager
def progress(activity: str, unit: str) -> Iterator[ProgressCallback]:
    """
    Show the progress of a block.

    Args:
        activity: e.g. 'drawing'.
        unit: e.g. 'faces'.

    Yields:
        update(done, total), which may be called at any rate.
    """
    if sys.stderr.isatty():
        with _bar(activity, unit) as update:
            yield update
        return
    printed_at = time.monotonic()

    def line(done: int, total: int) -> None:
        nonlocal printed_at
        if time.monotonic() - printed_at >= LINE_INTERVAL_S:
            printed_at = time.monotonic()
            output.notice(f"{activity}: {done} of {total} {unit}")

    yield line


@contextmanager
def _bar(activity: str, unit: str) -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"{activity} {{task.description}}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        task = bars.add_task(unit, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
