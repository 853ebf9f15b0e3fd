"""Throughput of up to 64 workers with no-op jobs on one table of 100,000 queued jobs."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, limit, quantile
from benchmarks.neighbours import Watch
from benchmarks.tables import full_tables
from jobs.kinds import SPEC_VERSION
from storage.db.rows import WorkerIdentity
from storage.db.schema import open_database
from storage.db.store import Claim, JobStore
from storage.settings import Settings

DESCRIPTION = """\
Each worker finishes a job and claims the next in one durable transaction, as a supervisor does, without
notification, runner or volume; a turn is that transaction. Each worker is a process on this machine. The
table has 100,000 queued jobs of three users. The bar is that of the claims of one worker."""

QUEUED = 100_000
WORKERS = (1, 2, 4, 8, 16, 32, 64)
SECONDS = 5.0
WARM_TURNS = 20
"""Before the measurement, because SQLAlchemy compiles and psycopg and Postgres prepare statements once."""


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Raises:
        RuntimeError: Postgres is not installed.
    """
    raw: dict[str, Any] = {}
    lines = []
    for name, env in full_tables(work, QUEUED, users=3):
        raw[name] = {}
        for workers in WORKERS:
            raw[name][str(workers)] = found = _crowd(env, workers)
            print(f"  {name}, {workers} workers: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        raw[name]["claims of one"] = alone = claims(env)
        lines.append(limit(f"claim at {QUEUED:,} queued, {name}", "10 ms", "p99, ms", alone["p99_ms"], 10.0))
    return lines, raw


def claims(env: dict[str, str]) -> dict[str, float]:
    """Measure one worker's claims, each after a finish: p50_ms, p99_ms, jobs_per_s."""
    return _crowd(env, 1, "claim")


def _crowd(env: dict[str, str], workers: int, timed: str = "turn") -> dict[str, float]:
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.crowd", timed, str(place)],
            env=stack.clean_environment(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in range(workers)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()  # it is ready
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    jobs, times = 0.0, []
    for child in children:
        told = json.loads(child.communicate(timeout=120)[0])
        jobs += told["jobs_per_s"]
        times += told["times_ms"]
    return {"jobs_per_s": jobs, "p50_ms": quantile(times, 0.5), "p99_ms": quantile(times, 0.99)}


def _work(timed: str, place: int) -> None:
    database = open_database(Settings.load(), connections=1)
    store = JobStore(database)
    who = WorkerIdentity(f"w{place}", "h", "cpu", "b", 1, 1, ("default",), "0")
    wanted: dict[str, Any] = {"kinds": ("train",), "spec_version": SPEC_VERSION}
    lease = store.claim(who, **wanted)
    for _ in range(WARM_TURNS):
        assert lease is not None
        lease = store.succeed_and_claim(lease, {}, Claim(who, **wanted))
    times: list[float] = []
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.monotonic()
    while time.monotonic() < started + SECONDS and lease is not None:
        began = time.perf_counter()
        if timed == "turn":
            lease = store.succeed_and_claim(lease, {}, Claim(who, **wanted))
        else:
            store.succeed(lease, {})
            began = time.perf_counter()
            lease = store.claim(who, **wanted)
        times.append((time.perf_counter() - began) * 1000)
    print(json.dumps({"jobs_per_s": len(times) / (time.monotonic() - started), "times_ms": times}))
    if lease is not None:
        store.succeed(lease, {})
    database.dispose()


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]))
