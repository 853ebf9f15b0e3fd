"""Throughput: no-op jobs per second on one warm worker, compared with Celery, RQ, Huey and Procrastinate."""

import json
import secrets
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import bare_celery, stack
from benchmarks.dispatch import bare_worker
from benchmarks.measure import Ratio, alternate, compare
from benchmarks.neighbours import Watch
from benchmarks.noop.kind import NoopSpec, install
from jobs.kinds import SPEC_VERSION
from storage.db.queries import Filter
from tests.services import Postgres, Redis, postgres_binaries, redis_binary
from worker.celery_bridge.notify import try_notify

DESCRIPTION = """\
No-op jobs per second on one worker, from the first body to the last; all were enqueued before. ganq
records each with its attempt and its events, synced to the disk (SQLite: FULL; Postgres: fsync on), runs
it in its warm runner, writes its folder and its log, and commits its result with the fencing token. Bare
Celery (prefork, concurrency 1, no results), RQ (a fork for each job) and Huey (a thread) store only the
message in Redis. Procrastinate stores a row in the same Postgres."""

JOBS = 200


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Raises:
        RuntimeError: redis-server or Postgres is not installed.
    """
    redis_program, binaries = redis_binary(), postgres_binaries()
    if redis_program is None or binaries is None:
        raise RuntimeError("throughput needs redis-server and Postgres (the dev packages carry both)")
    install()
    noop = str(Path(__file__).parent / "noop")
    with ExitStack() as stage:
        redis = stage.enter_context(Redis(redis_program))
        postgres = stage.enter_context(Postgres(binaries, fsync=True))
        stage.enter_context(bare_worker(redis.url, work / "bare-celery.log"))
        pieces = {"bare Celery": _celery(redis.url)}
        base = redis.url.removesuffix("0")
        for number, name in enumerate(("SQLite", "Postgres"), start=1):
            urls = {"GANQ_REDIS_URL": f"{base}{number}", "PYTHONPATH": noop}
            if name == "Postgres":
                urls["GANQ_DATABASE_URL"] = postgres.url(postgres.create())
            queue = stage.enter_context(stack.Queue(work / f"throughput-{name.lower()}", env=urls))
            pieces[f"ganq on {name}"] = _ganq(queue)
        pieces["RQ"] = _peer("rq", lambda: f"{base}3")
        pieces["Huey"] = _peer("huey", lambda: f"{base}4")
        pieces["Procrastinate"] = _peer("procrastinate", lambda: postgres.url(postgres.create()))
        series = alternate(pieces, rounds or 7, watch=watch, warm_up=1, say=lambda line: None)
    lines = []
    for name in ("ganq on SQLite", "ganq on Postgres"):
        for peer in ("bare Celery", "RQ", "Huey", "Procrastinate"):
            mine, theirs = series.of(name, "jobs_per_s"), series.of(peer, "jobs_per_s")
            bar = 0.5 if peer == "bare Celery" else None
            lines.append(compare(f"no-op jobs, {name}", peer, "jobs/s", mine, theirs, at_least=bar))
    return lines, series.values


def _celery(redis_url: str) -> Any:
    send, answers = bare_celery.client(redis_url)

    def piece() -> dict[str, float]:
        for _ in range(JOBS):
            send()
        began: list[float] = []
        while len(began) < JOBS:
            answer = answers.blpop([bare_celery.ANSWERS], timeout=30)
            assert answer is not None
            began.append(float(answer[1].split()[1]))
        # The first jobs ran while the last were being sent, so only the second half is measured.
        half = sorted(began)[JOBS // 2 :]
        return {"jobs_per_s": (len(half) - 1) / (half[-1] - half[0])}

    return piece


def _ganq(queue: stack.Queue) -> Any:
    def piece() -> dict[str, float]:
        sweep = queue.store.submit_sweep(
            [NoopSpec().to_json()] * JOBS,
            names=[f"noop-{place}" for place in range(JOBS)],
            submit_key=secrets.token_hex(16),
            kind="noop",
            spec_version=SPEC_VERSION,
            user="benchmark",
            will_notify=JOBS,
        )
        try_notify(queue.settings, sweep.job_ids[0], "default", queue.database.installation)
        deadline = time.monotonic() + 120
        while queue.queries.counts(sweep=sweep.id)["succeeded"] < JOBS:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no-op jobs hang: {queue.queries.counts(sweep=sweep.id)}")
            time.sleep(0.1)
        jobs = list(queue.queries.stream(Filter(sweep=sweep.id)))
        began = min(one.started_at or 0.0 for one in jobs)
        ended = max(one.finished_at or 0.0 for one in jobs)
        return {"jobs_per_s": JOBS / (ended - began)}

    return piece


def _peer(name: str, url: Any) -> Any:
    def piece() -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peer_queues", name, url(), str(JOBS)],
            env=stack.clean_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-800:]}")
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    return piece
