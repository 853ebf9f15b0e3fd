"""Dispatch latency: from submit to a running job on an idle warm worker, compared with Celery."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import bare_celery, stack
from benchmarks.measure import Ratio, alternate, compare, quantile
from benchmarks.neighbours import Watch
from jobs.specs import GenerateSpec, TrainSpec
from storage.volume.layout import Volume
from tests.services import Postgres, Redis, postgres_binaries, redis_binary

DESCRIPTION = """\
Milliseconds. For ganq from just before the row is inserted until the claim has written it
(`running`: the job is durable, and has its lease as soon as that transaction, which began after
the notification, commits: one more sync), and until the first report of the warm runner
(`begun`: its spec.json is written). For bare Celery from just before apply_async until the task's body
starts: only the message is recorded. One job at a time, with random pauses of 0.1 to 0.3 s; client
processes are warm. Lines named p95 compare the 95th percentiles of all rounds and have no spread of their
own."""


@contextmanager
def bare_worker(redis_url: str, log: Path) -> Iterator[None]:
    """Start a plain Celery worker and wait until it is ready."""
    from celery import Celery

    environment = stack.clean_environment(BENCH_REDIS_URL=redis_url)
    with open(log, "ab") as file:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "benchmarks.bare_celery", "worker"),
                *("--concurrency", "1", "--loglevel", "WARNING"),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        probe = Celery(broker=redis_url)
        deadline = time.monotonic() + 30
        while not probe.control.ping(timeout=0.5):
            if worker.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"bare Celery did not start: {log.read_text()[-1000:]}")
        yield
    finally:
        worker.terminate()
        worker.wait(timeout=30)


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Raises:
        RuntimeError: redis-server or Postgres is not installed.
    """
    redis_program, binaries = redis_binary(), postgres_binaries()
    if redis_program is None or binaries is None:
        raise RuntimeError("dispatch needs redis-server and Postgres (the dev packages carry both)")
    with ExitStack() as stage:
        redis = stage.enter_context(Redis(redis_program))
        # With fsync and synchronous commits, as in production.
        postgres = stage.enter_context(Postgres(binaries, fsync=True))
        url = postgres.url(postgres.create())
        stage.enter_context(bare_worker(redis.url, work / "bare-celery.log"))
        pieces = {"bare Celery": _celery(redis.url)}
        for number, (name, database) in enumerate((("SQLite", None), ("Postgres", url)), start=1):
            urls = {"GANQ_REDIS_URL": redis.url.removesuffix("0") + str(number)}
            if database:
                urls["GANQ_DATABASE_URL"] = database
            queue = stage.enter_context(stack.Queue(work / f"dispatch-{name.lower()}", env=urls))
            pieces[f"ganq on {name}"] = _ganq(queue, _tiny_model(work, queue))
        series = alternate(pieces, rounds or 60, watch=watch, warm_up=3, say=lambda line: None)
    return _ratios(series.values), series.values


def _tiny_model(work: Path, queue: stack.Queue) -> int:
    data = stack.faces(work)
    spec = TrainSpec.create(data=str(data), recipe="dcgan", size=16, ngf=2, ndf=2, epochs=1, device="cpu")
    return queue.wait(queue.submit(spec)).id


def _pause() -> None:
    time.sleep(random.uniform(0.1, 0.3))


def _celery(redis_url: str) -> Any:
    send, answers = bare_celery.client(redis_url)

    def piece() -> dict[str, float]:
        _pause()
        send()
        answer = answers.blpop([bare_celery.ANSWERS], timeout=10)
        assert answer is not None
        sent, began = map(float, answer[1].split())
        return {"running": (began - sent) * 1000}

    return piece


def _ganq(queue: stack.Queue, source: int) -> Any:
    spec = GenerateSpec.create(source=source, count=1, micro_batch=1, grid=0, device="cpu")

    def piece() -> dict[str, float]:
        _pause()
        sent = time.time()
        job = queue.submit(spec)
        submitted = time.time()
        job = queue.wait(job, every_s=0.005)
        assert job.started_at is not None
        assert job.finished_at is not None
        begun = (Volume(queue.settings.volume).job(job.id) / "spec.json").stat().st_mtime
        return {
            "submit": (submitted - sent) * 1000,
            "running": (job.started_at - sent) * 1000,
            "begun": (begun - sent) * 1000,
            "done": (job.finished_at - sent) * 1000,
        }

    return piece


def _ratios(values: dict[str, dict[str, list[float]]]) -> list[Ratio]:
    peer = values["bare Celery"]["running"]
    lines = []
    for name in ("ganq on SQLite", "ganq on Postgres"):
        for what in ("running", "begun"):
            mine = values[name][what]
            most = (2.0, 3.0) if what == "running" else (None, None)
            titles = f"dispatch, {name}: {what}", "bare Celery: task body"
            lines.append(compare(*titles, "p50, ms", mine, peer, at_most=most[0]))
            high = [quantile(mine, 0.95)], [quantile(peer, 0.95)]
            lines.append(compare(*titles, "p95, ms", *high, at_most=most[1]))
    return lines
