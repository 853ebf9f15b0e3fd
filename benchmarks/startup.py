"""Start-up: `ganq --help`, and `ganq status` on 100,000 jobs, compared with their imports."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, alternate, compare
from benchmarks.neighbours import Watch
from benchmarks.tables import fill
from storage.settings import Settings

DESCRIPTION = """\
Milliseconds of a whole process, from start to exit, output into a pipe. `wall` is elapsed
time, `cpu` is user and system time, which depends less on other processes."""

JOBS = 100_000


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """Run the benchmark; return the table's lines, and all values by command and round."""
    home = work / "startup"
    environment = stack.clean_environment(GANQ_HOME=str(home))
    fill(Settings.load(environment), JOBS)
    ganq = str(Path(sys.executable).parent / "ganq")
    commands = {
        "import click": [sys.executable, "-c", "import click"],
        "ganq --help": [ganq, "--help"],
        "import click, sqlalchemy": [sys.executable, "-c", "import click, sqlalchemy"],
        f"ganq status, {JOBS:,} jobs": [ganq, "status"],
    }
    pieces = {name: lambda command=command: timed(command, environment) for name, command in commands.items()}
    series = alternate(pieces, rounds or 41, watch=watch, warm_up=3, say=lambda line: None)
    lines = []
    names = list(commands)
    for mine, peer, most in ((names[1], names[0], 2.0), (names[3], names[2], 2.0)):
        for metric, bar in (("wall", most), ("cpu", most)):
            lines.append(
                compare(
                    mine, peer, f"{metric}, ms", series.of(mine, metric), series.of(peer, metric), at_most=bar
                )
            )
    return lines, series.values


def timed(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """
    Run a process.

    Returns:
        wall and cpu, in ms.

    Raises:
        RuntimeError: it failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    said = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"{command[-2:]} ended with {process.returncode}: {said.decode()[-500:]}")
    return {"wall": wall * 1000, "cpu": (usage.ru_utime + usage.ru_stime) * 1000}
