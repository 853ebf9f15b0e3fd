"""Latency of a warm generation of 64 images: `ganq submit generate --count 64 --wait`."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, alternate, limit
from benchmarks.models import trained
from benchmarks.neighbours import Watch

DESCRIPTION = """\
Seconds of a whole process, from start to exit, with the images written, synced and published. Each
round runs the command itself, `ganq --version` (only the start-up of the command line) and the command
with --dry-run (start-up, the spec, a query of the job table). The line is the median of the rounds'
differences to `ganq --version`. The model (ngf 32, 96×96) is warm in the runner."""

LIMIT_S = 0.4


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """Run the benchmark; return the table's lines, and all values by command and round."""
    ganq = str(Path(sys.executable).parent / "ganq")
    asked = [ganq, "submit", "generate", "--count", "64"]
    with stack.Queue(work / "warm") as queue:
        trained(work, queue, 32)
        commands = {
            "submit --wait": [*asked, "--wait"],
            "--version": [ganq, "--version"],
            "submit --dry-run": [*asked, "--dry-run"],
        }
        pieces = {
            name: lambda command=command: {"wall": _wall_s(command, queue.env)}
            for name, command in commands.items()
        }
        series = alternate(pieces, rounds or 25, watch=watch, warm_up=3, say=lambda line: None)
    whole = series.of("submit --wait", "wall")
    lines = []
    for peer in ("--version", "submit --dry-run"):
        above = [a - b for a, b in zip(whole, series.of(peer, "wall"), strict=True)]
        series.values[f"above {peer}"] = {"wall": above}
        what = f"64 images warm, submit --wait over ganq {peer}: p50"
        lines.append(limit(what, f"{LIMIT_S} s", "s", statistics.median(above), LIMIT_S))
    return lines, series.values


def _wall_s(command: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    wall_s = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{command[1:]} ended with {done.returncode}: {os.fsdecode(done.stderr)[-500:]}")
    return wall_s
