"""A table of 1,000,000 jobs: cost of `ganq status`, of paging and of a claim."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.crowd import claims
from benchmarks.measure import Ratio, alternate, compare, limit
from benchmarks.neighbours import Watch
from benchmarks.startup import timed
from benchmarks.tables import full_tables

DESCRIPTION = """\
1,000,000 queued trainings of ten users in one table. Milliseconds of processor time of a whole `ganq status`,
from start to exit, output into a pipe, compared with its imports; and of a claim by one worker, the 99th
percentile."""

JOBS = 1_000_000


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Raises:
        RuntimeError: Postgres is not installed.
    """
    ganq = str(Path(sys.executable).parent / "ganq")
    commands = {
        "import click, sqlalchemy": [sys.executable, "-c", "import click, sqlalchemy"],
        "ganq status": [ganq, "status"],
        "ganq status --before 500000": [ganq, "status", "--before", "500000"],
    }
    peer, *looks = commands
    lines, raw = [], {}
    for name, env in full_tables(work, JOBS, users=10):
        environment = stack.clean_environment(**env)
        pieces = {what: partial(timed, command, environment) for what, command in commands.items()}
        series = alternate(pieces, rounds or 21, watch=watch, warm_up=2, say=lambda line: None)
        raw[name] = {**series.values, "claims": (found := claims(env))}
        for what in looks:
            values = series.of(what, "cpu"), series.of(peer, "cpu")
            lines.append(compare(f"{what}, {name}", peer, "cpu, ms", *values, at_most=2.0))
        lines.append(limit(f"claim, {name}", "10 ms", "p99, ms", found["p99_ms"], 10.0))
    return lines, raw
