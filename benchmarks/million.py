"""A table of 1,000,000 jobs: what looking at it, paging through it and claiming from it cost."""

import secrets
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.crowd import claims
from benchmarks.measure import Ratio, alternate, compare, limit
from benchmarks.neighbours import Watch
from benchmarks.startup import fill, timed
from storage.settings import Settings
from tests.services import Postgres, postgres_binaries

EXPLAINED = """\
1,000,000 queued trainings of ten users in one table. Milliseconds of processor time of a whole `ganq status`,
from start to exit, output into a pipe, beside the imports that it needs; and of a claim by one worker, the
slowest in a hundred."""

JOBS = 1_000_000


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Raises:
        RuntimeError: there is no Postgres here.
    """
    binaries = postgres_binaries()
    if binaries is None:
        raise RuntimeError("million needs Postgres (the dev packages carry it)")
    ganq = str(Path(sys.executable).parent / "ganq")
    peer = [sys.executable, "-c", "import click, sqlalchemy"]
    lines, raw = [], {}
    with ExitStack() as stage:
        postgres = stage.enter_context(Postgres(binaries, fsync=True))
        for name in ("SQLite", "Postgres"):
            env = {"GANQ_HOME": str(work / f"million-{name.lower()}-{secrets.token_hex(3)}")}
            if name == "Postgres":
                env["GANQ_DATABASE_URL"] = postgres.url(postgres.create())
            environment = stack.clean_environment(**env)
            fill(Settings.load(environment), JOBS, users=10)
            commands = {
                "import click, sqlalchemy": peer,
                "ganq status": [ganq, "status"],
                "ganq status --before 500000": [ganq, "status", "--before", "500000"],
            }
            pieces = {what: partial(timed, command, environment) for what, command in commands.items()}
            series = alternate(pieces, rounds or 21, watch=watch, warm_up=2, say=lambda line: None)
            raw[name] = {**series.values, "claims": (found := claims(env))}
            against = "import click, sqlalchemy"
            for what in list(commands)[1:]:
                values = series.of(what, "cpu"), series.of(against, "cpu")
                lines.append(compare(f"{what}, {name}", against, "cpu, ms", *values, at_most=2.0))
            lines.append(limit(f"claim, {name}", "10 ms", "p99, ms", found["p99_ms"], 10.0))
    return lines, raw
