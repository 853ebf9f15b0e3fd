"""
Run benchmarks and write their results: `python -m benchmarks [NAME …]`.

Each ratio is to a named peer in the same run. Nothing else should run on the machine; the A/A
column shows the noise. `python -m benchmarks fleet` simulates many workers, with options of its own.
"""

import argparse
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import report, stack
from benchmarks.neighbours import Watch

NAMES = (
    "startup", "dispatch", "throughput", "crowd", "million", "memory", "generate", "workers", "warm", "train",
    "gpu", "web", "api",
)  # fmt: skip

QUICK_ROUNDS = 2


def main() -> int:
    if sys.argv[1:2] == ["fleet"]:
        return int(importlib.import_module("benchmarks.fleet").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure ganq against its peers."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument(
        "--rounds", type=int, help="rounds of each alternation (default: the benchmark's own)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two rounds of each: coarser, in a few minutes",
    )
    parser.add_argument(
        "--work", type=Path, help="folder for data sets and jobs; kept, so the next run is faster"
    )
    parser.add_argument("--no-write", action="store_true", help="only print")
    parser.add_argument(
        "--others", type=float, default=0.1, help="share of the processors that others may take (default 0.1)"
    )
    parser.add_argument(
        "--patience", type=float, default=15, help="minutes a benchmark waits for that, in all (default 15)"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    work = options.work.absolute() if options.work else Path(tempfile.mkdtemp(prefix="ganq-bench-"))
    work.mkdir(parents=True, exist_ok=True)
    short = []
    try:
        for name in options.names or NAMES:
            short += _one(
                name,
                work,
                options.rounds or (QUICK_ROUNDS if options.quick else None),
                Watch(options.others, options.patience * 60),
                write=not options.no_write,
            )
    finally:
        stack.clear()
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    for one in short:
        print(f"short of its bar: {one}")
    return 0


def _one(name: str, work: Path, rounds: int | None, watch: Watch, *, write: bool) -> list[str]:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    print(f"{name}: {time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}", flush=True)
    ratios, raw = benchmark.run(work, rounds, watch)
    for one in ratios:
        aa = f"  A/A {one.aa_median:.2f} ({one.aa_low:.2f}–{one.aa_high:.2f})" if one.aa_median else ""
        print(
            f"{one.what} / {one.against}, {one.metric}: {one.median:.2f} ({one.low:.2f}–{one.high:.2f}){aa}"
            f"  [{one.value:.4g} / {one.peer_value:.4g}]  {one.bar} {'' if one.met is not False else 'SHORT'}"
        )
    if write and ratios:
        path = report.write(name, benchmark.DESCRIPTION, ratios, raw, _others(raw))
        print(f"written: benchmarks/results/{path.name}")
    return [f"{one.what} / {one.against}: {one.median:.2f}, {one.bar}" for one in ratios if one.met is False]


def _others(raw: object) -> float | None:
    """Return the median fraction of CPU time that other processes used, over all valid pieces."""
    found: list[float] = []

    def collect(value: object) -> None:
        if isinstance(value, dict):
            found.extend(value.get("others", ()))
            for one in value.values():
                collect(one)

    collect(raw)
    return statistics.median(found) if found else None


if __name__ == "__main__":
    sys.exit(main())
