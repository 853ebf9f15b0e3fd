"""
Rows of docs/fault-matrix.md that have no file of their own: Redis, submits, claims, the long queue.

Each test is called after its row: test_f12_… is row F12.
"""

import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import redis
from chaos.invariants import assert_invariants
from chaos.proxy import Proxy
from machine import Ganq, part, until
from messages import envelope, notification
from results import add_model
from sqlalchemy import Connection, func, insert, select, text
from tables import Claimer, claim_all, job_row

from jobs.kinds import SPEC_VERSION
from storage.db.engine import Database
from storage.db.store import JobStore
from storage.db.tables import attempt, event, job
from storage.settings import Settings
from storage.volume.layout import Volume
from worker.celery_bridge.app import make_app, queue_key

if TYPE_CHECKING:
    from services import Redis

    from storage.db.rows import WorkerIdentity

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

KEY = queue_key("default")
TINY = {"source": 1, "count": 4, "micro_batch": 4, "grid": 0}


def submit_many(store: JobStore, number: int) -> list[int]:
    """Small generations, with a notification as a client sends it; the dispatcher sends none soon."""
    from jobs.specs import GenerateSpec

    spec = GenerateSpec.create(**TINY).to_json()
    return [
        store.submit(
            kind="generate",
            spec=spec,
            spec_version=SPEC_VERSION,
            submit_key=secrets.token_hex(16),
            user="tester",
            will_notify=True,
        ).id
        for _ in range(number)
    ]


def all_succeeded(database: Database, jobs: list[int]) -> bool:
    rows = database.read(
        lambda conn: conn.execute(select(job.c.state).where(job.c.id.in_(jobs))).scalars().all()
    )
    return len(rows) == len(jobs) and set(rows) == {"succeeded"}


def attempts_of(database: Database, jobs: list[int]) -> int:
    query = select(func.count()).where(attempt.c.job_id.in_(jobs))
    return int(database.read(lambda conn: conn.execute(query).scalar_one()))


def slow(seconds: float) -> dict[str, str]:
    """Environment of a worker that draws each micro-batch slowly."""
    return {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": f"generate.drawn=sleep:{seconds}@1+"}


# --- Redis --------------------------------------------------------------------------------------


@sqlite_only
def test_f12_redis_killed_and_empty_with_twenty_queued_loses_none(
    ganq: Ganq, redis_server: "Redis", redis_url: str, database: Database, store: JobStore, settings: Settings
) -> None:
    add_model(settings)
    jobs = submit_many(store, 20)
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(KEY, *(notification(one, one) for one in jobs))
    worker = ganq.start_worker(**slow(0.05))
    until(lambda: attempts_of(database, jobs) >= 3, what="a few of them done")
    assert redis_server.process is not None
    redis_server.process.kill()
    redis_server.process.wait()
    redis_server.restart()
    until(lambda: all_succeeded(database, jobs), what="all twenty")
    assert attempts_of(database, jobs) == 20
    assert worker.poll() is None
    assert_invariants(database, Volume(settings.volume))


@pytest.mark.tier2
@sqlite_only
def test_f13_a_redis_that_hangs_stops_neither_submit_nor_worker_nor_drain(
    ganq: Ganq, redis_server: "Redis", redis_url: str, database: Database, settings: Settings
) -> None:
    """SIGSTOP: connections are accepted by the kernel, and nobody answers."""
    add_model(settings)
    worker = ganq.start_worker()
    until(lambda: part(worker, "worker.runner.main"), what="the worker")
    assert redis_server.process is not None
    process = psutil.Process(redis_server.process.pid)
    process.suspend()
    try:
        began = time.monotonic()
        job_id = int(ganq.json("submit", "generate", "--from", "m", "--count", "4")["id"])
        took = time.monotonic() - began
        assert took < 10 * slower_than_usual(), f"a submit took {took:.1f} s because Redis hangs"
        until(lambda: all_succeeded(database, [job_id]), what="the job, by polling")
        worker.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert worker.wait(120) in (0, -signal.SIGTERM)
        print(f"F13: submit {took:.1f} s, drain {time.monotonic() - began:.1f} s with a Redis that hangs")
    finally:
        process.resume()
    assert_invariants(database, Volume(settings.volume))


@pytest.mark.tier2
@sqlite_only
def test_f13_half_open_connections_are_survived_and_notifications_work_again(
    ganq: Ganq, redis_server: "Redis", redis_url: str, database: Database, store: JobStore, settings: Settings
) -> None:
    add_model(settings)
    with Proxy(redis_server.port) as proxy:
        ganq.env["GANQ_REDIS_URL"] = f"redis://127.0.0.1:{proxy.port}/0"
        ganq.env["GANQ_POLL_SECONDS"] = "1"
        ganq.start_worker()
        first = int(ganq.json("submit", "generate", "--from", "m", "--count", "4")["id"])
        until(lambda: all_succeeded(database, [first]), what="the first")
        proxy.hole()
        during = int(ganq.json("submit", "generate", "--from", "m", "--count", "4")["id"])
        until(lambda: all_succeeded(database, [during]), what="one while the line is dead")
        time.sleep(20)
        proxy.heal()
        after = int(ganq.json("submit", "generate", "--from", "m", "--count", "4")["id"])
        until(lambda: all_succeeded(database, [after]), what="one afterwards")
        with redis.Redis.from_url(redis_url) as client:
            until(lambda: client.llen(KEY) == 0, within_s=90, what="notifications fetched again")
        assert attempts_of(database, [first, during, after]) == 3
    assert_invariants(database, Volume(settings.volume))


@sqlite_only
def test_f15_duplicates_of_queued_running_and_ended_jobs_run_each_once(
    ganq: Ganq, redis_url: str, database: Database, store: JobStore, settings: Settings
) -> None:
    add_model(settings)
    ended, running, queued = submit_many(store, 3)
    ganq.start_worker("w1", **slow(1.0))
    ganq.start_worker("w2", **slow(1.0))
    with redis.Redis.from_url(redis_url) as client:
        for _ in range(5):
            for one in (queued, ended, running):  # the other way round than they were submitted
                client.lpush(KEY, notification(one, secrets.randbelow(10**9)))
        until(lambda: all_succeeded(database, [ended]), what="the first end")
        for _ in range(5):
            for one in (ended, running, queued, 10**6):
                client.lpush(KEY, notification(one, secrets.randbelow(10**9)))
        until(lambda: all_succeeded(database, [ended, running, queued]), what="all three")
        until(lambda: client.llen(KEY) == 0, what="all notifications fetched")
    assert attempts_of(database, [ended, running, queued]) == 3
    assert_invariants(database, Volume(settings.volume))


def flood(
    ganq: Ganq, redis_url: str, database: Database, store: JobStore, settings: Settings, notifications: int
) -> tuple[float, float]:
    """
    Returns:
        Seconds until so many duplicate notifications of an ended job were fetched, and seconds in
        which a job submitted meanwhile began.
    """
    add_model(settings)
    (first,) = submit_many(store, 1)
    ganq.start_worker()
    until(lambda: all_succeeded(database, [first]), what="the job that they all are for")
    with redis.Redis.from_url(redis_url) as client:
        began = time.monotonic()
        for start in range(0, notifications, 1000):
            client.lpush(
                KEY, *(notification(first, n) for n in range(start, min(start + 1000, notifications)))
            )
        (between,) = submit_many(store, 1)
        asked = time.monotonic()
        until(lambda: job_row(database, between)["attempt"] == 1, what="a job meanwhile")
        answered = time.monotonic() - asked
        until(lambda: client.llen(KEY) == 0, within_s=240, what="all notifications fetched")
        drained = time.monotonic() - began
    until(lambda: all_succeeded(database, [between]), what="its end")
    assert attempts_of(database, [first]) == 1
    assert_invariants(database, Volume(settings.volume))
    return drained, answered


@sqlite_only
def test_f15_three_hundred_duplicate_notifications_run_nothing_twice(
    ganq: Ganq, redis_url: str, database: Database, store: JobStore, settings: Settings
) -> None:
    flood(ganq, redis_url, database, store, settings, 300)


@pytest.mark.tier2
@sqlite_only
def test_f15_ten_thousand_duplicate_notifications_run_nothing_twice(
    ganq: Ganq, redis_url: str, database: Database, store: JobStore, settings: Settings
) -> None:
    drained, answered = flood(ganq, redis_url, database, store, settings, 10_000)
    print(f"F15: 10,000 notifications in {drained:.0f} s; a job began in {answered:.2f} s")


LATE = """
import worker.celery_bridge.app as app
app.VISIBILITY_TIMEOUT_S = 1
make = app.make_app
def late(*args, **how):
    made = make(*args, **how)
    made.conf.task_acks_late = True
    made.conf.broker_transport_options["visibility_timeout"] = 1
    return made
app.make_app = late
from cli.main import main
main()
"""


@pytest.mark.tier2
@sqlite_only
def test_f16_a_visibility_timeout_shorter_than_the_job_runs_nothing_twice(
    ganq: Ganq, redis_url: str, database: Database, store: JobStore, settings: Settings
) -> None:
    """With late acknowledgement Redis delivers the notification to both workers while the job runs."""
    add_model(settings)
    script = ganq.folder / "late.py"
    script.write_text(LATE)
    for name in ("w1", "w2"):
        with open(ganq.folder / f"{name}.log", "ab") as log:
            ganq.workers.append(
                subprocess.Popen(
                    [sys.executable, "-P", str(script), "worker", "--gpus", "none", "--name", name],
                    env={**ganq.env, **slow(8.0)},
                    cwd=ganq.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    (only,) = submit_many(store, 1)
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(KEY, notification(only))
        until(lambda: all_succeeded(database, [only]), what="the job")
    assert attempts_of(database, [only]) == 1
    assert_invariants(database, Volume(settings.volume))


# --- submits ------------------------------------------------------------------------------------


def test_f37_one_key_from_fifty_threads_is_one_job(database: Database, store: JobStore) -> None:
    start = threading.Barrier(50)
    ids: list[int] = []

    def submit() -> None:
        start.wait()
        ids.append(
            store.submit(
                kind="generate", spec=TINY, spec_version=SPEC_VERSION, submit_key="one-key", user="tester"
            ).id
        )

    threads = [threading.Thread(target=submit) for _ in range(50)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(ids) == 50
    assert len(set(ids)) == 1
    assert database.read(lambda conn: conn.execute(select(func.count()).select_from(job)).scalar_one()) == 1
    submitted = select(func.count()).select_from(event).where(event.c.type == "submitted")
    assert database.read(lambda conn: conn.execute(submitted).scalar_one()) == 1


@pytest.mark.parametrize(("point", "accepted"), [("submit.inserted", False), ("submit.committed", True)])
def test_f38_a_submit_that_is_killed_is_absent_or_accepted_and_repeated_it_is_one_job(
    ganq: Ganq, database: Database, settings: Settings, point: str, accepted: bool
) -> None:
    add_model(settings)
    # Many rows, so that there is a moment between the insert and the commit on Postgres, too.
    command = ["submit", "generate", "--from", "m", "--count", "4", "--submit-key", "again"]
    command += ["--shard-size", "2", "--micro-batch", "2"]
    calm = dict(ganq.env)
    ganq.env |= {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": f"{point}=kill"}
    done = ganq.run(*command)
    assert done.returncode == -signal.SIGKILL
    assert "accepted" not in done.stdout
    ganq.env = calm
    assert [one["id"] for one in ganq.json("status") if one["kind"] == "generate"] == (
        [2] if accepted else []
    )
    again = int(ganq.json(*command)["id"])
    assert again == int(ganq.json(*command)["id"])
    assert [one["id"] for one in ganq.json("status") if one["kind"] == "generate"] == [again]
    assert_invariants(database, Volume(settings.volume))


# --- many claims, long queues -------------------------------------------------------------------


def bulk_insert(database: Database, number: int, users: int = 1) -> None:
    """Queued jobs, faster than one submit each."""

    def row(n: int) -> dict[str, object]:
        return {
            "submit_key": f"bulk-{n}",
            "kind": "train",
            "queue": "default",
            "user": f"u{n % users}",
            "priority": n % 3,
            "spec": {"data": "/pictures"},
            "spec_version": SPEC_VERSION,
            "state": "queued",
            "created_at": time.time(),
        }

    def insert_some(conn: Connection, start: int) -> None:
        conn.execute(insert(job), [row(n) for n in range(start, min(start + 5000, number))])

    for start in range(0, number, 5000):
        database.write(partial(insert_some, start=start))
    analyze = "ANALYZE" if database.is_sqlite else "ANALYZE job"
    with database.engine.connect() as conn:
        conn.exec_driver_sql(analyze)


def claimed_by_all(
    database: Database,
    settings: Settings,
    make_identity: "Callable[..., WorkerIdentity]",
    tmp_path: Path,
    processes: int,
    jobs: int,
) -> float:
    """Let processes claim everything at once; returns the seconds that it took."""
    bulk_insert(database, jobs, users=3)
    spawn = multiprocessing.get_context("spawn")
    sinks = [tmp_path / f"sink{n}" for n in range(processes)]
    workers = [
        spawn.Process(target=claim_all, args=(settings, make_identity(f"p{n}"), sink))
        for n, sink in enumerate(sinks)
    ]
    began = time.monotonic()
    for one in workers:
        one.start()
    for one in workers:
        one.join(timeout=600)
        assert one.exitcode == 0
    took = time.monotonic() - began
    got = [line.split() for sink in sinks for line in sink.read_text().splitlines()]
    assert len(got) == jobs
    assert len({number for number, _, _ in got}) == jobs, "a job was claimed twice"
    assert {number for _, number, _ in got} == {"1"}
    assert database.read(lambda c: c.execute(select(func.count()).select_from(attempt)).scalar_one()) == jobs
    return took


def test_f42_four_processes_claim_each_job_once(
    database: Database, settings: Settings, make_identity: "Callable[..., WorkerIdentity]", tmp_path: Path
) -> None:
    claimed_by_all(database, settings, make_identity, tmp_path, processes=4, jobs=200)


@pytest.mark.tier2
@pytest.mark.timeout(900)
def test_f42_eight_processes_claim_sixteen_thousand_jobs_once(
    database: Database,
    settings: Settings,
    make_identity: "Callable[..., WorkerIdentity]",
    tmp_path: Path,
    backend: str,
) -> None:
    took = claimed_by_all(database, settings, make_identity, tmp_path, processes=8, jobs=16_000)
    print(
        f"F42 {backend}: 8 processes claimed 16,000 jobs in {took:.0f} s, {16_000 / took:.0f}/s, none twice"
    )


# Between fork and exec a child counts its parent's memory as its own: so a small one starts it.
MEASURE = """
import os, subprocess, sys, time
began = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.monotonic() - began, usage.ru_maxrss / 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(ganq: Ganq, *arguments: str) -> tuple[float, float]:
    """Run a command; returns (seconds, its largest memory in MB)."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, "-P", "-m", "cli.main", *arguments],
        env=ganq.env,
        cwd=ganq.folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


CLAIMS = 1000
"""Of 200, the second worst is the 99th percentile, and two are slow for what the insertion left behind."""


def long_queue(
    ganq: Ganq,
    database: Database,
    claim: Claimer,
    images: Path,
    number: int,
    users: int,
) -> dict[str, float]:
    """What the commands and a claim cost with so many queued jobs."""
    bulk_insert(database, number, users=users)
    claims = []
    for _ in range(CLAIMS):
        began = time.perf_counter()
        claim()
        claims.append((time.perf_counter() - began) * 1000)
    listed, list_mb = measured(ganq, "status", "--json")
    submitted, submit_mb = measured(ganq, "submit", "train", "--data", str(images), "--hold")
    return {
        "claim p50 ms": percentile(claims, 0.5),
        "claim p99 ms": percentile(claims, 0.99),
        "status --json s": listed,
        "submit s": submitted,
        "RSS MB": max(list_mb, submit_mb),
    }


@sqlite_only
def test_f46_ten_thousand_queued_jobs_are_listed_and_claimed(
    ganq: Ganq, database: Database, claim: Claimer, faces: Path, backend: str
) -> None:
    facts = long_queue(ganq, database, claim, faces, 10_000, users=3)
    assert facts["RSS MB"] < 300


@pytest.mark.tier2
@pytest.mark.timeout(900)
@pytest.mark.parametrize("users", [1, 50])
def test_f46_a_hundred_thousand_queued_jobs(
    ganq: Ganq,
    redis_url: str,
    database: Database,
    store: JobStore,
    claim: Claimer,
    faces: Path,
    backend: str,
    users: int,
) -> None:
    facts = long_queue(ganq, database, claim, faces, 100_000, users=users)
    # A worker refuses a volume without the jobs that have begun, here without one.
    Path(ganq.env["GANQ_VOLUME"], "jobs").mkdir(parents=True, exist_ok=True)
    ganq.start_worker()
    until(lambda: ganq.present(), what="a worker among so many")
    time.sleep(5)
    with redis.Redis.from_url(redis_url) as client:
        notifications = client.llen(KEY)
    facts["messages in Redis"] = notifications
    began = time.monotonic()
    ids = database.read(lambda c: c.execute(select(job.c.id).where(job.c.state == "queued")).scalars().all())
    for one in ids[:1000]:
        store.request_cancel(one)
    facts["cancels per s"] = 1000 / (time.monotonic() - began)
    words = ", ".join(f"{name} {value:.3g}" for name, value in facts.items())
    print(f"F46 {backend}, {users} users: {words}")
    assert notifications < 1000
    assert facts["RSS MB"] < 300
    assert facts["status --json s"] < 1.0 * slower_than_usual()
    promised = 10 if backend == "sqlite" else 50  # with its trips; reading the index through takes 400
    assert facts["claim p99 ms"] < promised * slower_than_usual()


def slower_than_usual() -> float:
    """How much more a machine takes that does other things, too: load for each core, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


# --- who may write to Redis ---------------------------------------------------------------------


@sqlite_only
def test_f49_a_broadcast_shutdown_and_foreign_tasks_stop_nothing_and_change_nothing(
    ganq: Ganq, redis_url: str, database: Database, store: JobStore, settings: Settings, tmp_path: Path
) -> None:
    """S3, and S1 with arguments: more of these in tests/acceptance/test_hostile_redis.py."""
    add_model(settings)
    worker = ganq.start_worker()
    until(lambda: ganq.present(), what="the worker")
    canary = tmp_path / "canary"
    app = make_app(settings)
    app.control.broadcast("shutdown")
    app.control.broadcast("pool_restart", arguments={"reload": True})
    app.close()
    with redis.Redis.from_url(redis_url) as client:
        for body in ([[1, "more", {"a": 1}], {"id": 1}, {}], [["1; DROP TABLE job"], {}, {}], [[-1], {}, {}]):
            import base64

            client.lpush(KEY, envelope(base64.b64encode(json.dumps(body).encode()).decode()))
        evil = json.loads(envelope())
        evil["headers"] |= {"task": "os.system", "argsrepr": f"('touch {canary}',)"}
        client.lpush(KEY, json.dumps(evil))
        until(lambda: client.llen(KEY) == 0, what="all of them read")
    before = database.read(lambda conn: conn.execute(text("SELECT count(*) FROM event")).scalar_one())
    done = ganq.run("submit", "generate", "--from", "m", "--count", "4", "--wait")
    assert done.returncode == 0, done.stderr
    assert before == 1
    assert worker.poll() is None
    assert not canary.exists()
    assert_invariants(database, Volume(settings.volume))
