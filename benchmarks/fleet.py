"""
Simulate a fleet: `python -m benchmarks fleet --workers 1000 --seconds 60`.

The workers are real supervisors with their heartbeats and recovery, a real job table and a real Redis.
Only their children are simulated: a runner without torch, which reports progress and ends after its time, and
the volume process. The workers of a process take turns in one thread, each with one connection to the
database; another thread fetches notifications, as Celery does, while one of its workers is idle.
"""

import argparse
import heapq
import json
import os
import random
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import psycopg
from redis import Redis as RedisClient

from benchmarks import stack
from benchmarks.measure import quantile
from benchmarks.tables import fill
from storage.db.rows import WorkerIdentity
from storage.settings import Settings
from tests.services import PgBouncer, Postgres, Redis, pgbouncer_binary, postgres_binaries, redis_binary
from worker.celery_bridge.notify import queue_key, try_notify
from worker.host.process import start_ticks
from worker.ipc import Message
from worker.supervisor.loop import Supervisor
from worker.supervisor.runner_process import RunnerProcess
from worker.supervisor.volume_monitor import VolumeMonitor

PER_HOST = 8
START_S = 0.1
"""Between two workers that start; a thousand at once would wait for two cores, not for Postgres."""
POOL = 80
"""Sessions of Postgres behind PgBouncer."""
WORKERS_NICE = 10
PROBE_JOB_S = 1.0
"""Of the host whose claims are measured."""
PROGRESS_S = 2.0
QUEUED = 10_000
READY_S = 300.0
SAMPLE_S = 0.5
COMPILED: dict[Any, Any] = {}
"""Compiled statements of all workers of a process; a real worker compiles each once."""

# --- one process of workers ---------------------------------------------------------------


class Turns:
    """
    Calls functions at their times, and the loops of workers when something arrives for them.

    Three threads for each worker would mostly wait for the interpreter lock of their process.
    """

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._arrivals = selectors.DefaultSelector()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._number, call))

    def when_readable(self, descriptor: int, call: Callable[[], None]) -> None:
        self._arrivals.register(descriptor, selectors.EVENT_READ, call)

    def run(self) -> None:
        while True:
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            for key, _ in self._arrivals.select(wait_s):
                key.data()
            while self._due and self._due[0][0] <= time.monotonic():
                heapq.heappop(self._due)[2]()


class SimulatedRunner(RunnerProcess):
    """A runner that is always warm, reports progress as a training does, and succeeds after `job_s`."""

    def __init__(
        self, settings: Settings, selector: selectors.BaseSelector, turns: Turns, job_s: float
    ) -> None:
        super().__init__(settings, selector)
        self.turns, self.job_s = turns, job_s
        self.events = os.eventfd(0, os.EFD_NONBLOCK)
        selector.register(self.events, selectors.EVENT_READ, "runner")
        self.channel: Any = self
        self.ready = True
        self._messages: list[Message] = []
        self._job: tuple[int, int] | None = None
        self._first = True

    def ensure(self) -> Any:
        return self

    def kill(self) -> str:
        self._job = None
        return "not running"

    def send(self, op: str, **fields: Any) -> None:
        if op == "stop":
            self._report({"op": "stopped", "reason": fields["reason"]})
            self._job = None
        elif op == "run":
            order = fields["order"]
            self._job = order["job_id"], order["attempt"]
            # The first jobs of a fleet have begun at any time before the measurement.
            length_s = self.job_s * (random.random() if self._first else 1.0)
            self._first = False
            self._step(self._job, time.monotonic(), length_s)

    def _step(self, job: tuple[int, int], began: float, length_s: float) -> None:
        if job != self._job:
            return
        ran_s = time.monotonic() - began
        if ran_s >= length_s:
            self._job = None
            self._report({"op": "done", "job_id": job[0], "result": {"images": int(ran_s * 400)}})
            return
        done = {"done": int(ran_s * 400), "total": int(length_s * 400), "unit": "images", "rate": 400.0}
        more = {"epoch": int(ran_s), "epochs": int(length_s), "phase": "training"}
        self._report({"op": "progress", "job_id": job[0], "progress": done | more})
        self.turns.after(min(PROGRESS_S, length_s - ran_s), partial(self._step, job, began, length_s))

    def _report(self, message: Message) -> None:
        self._messages.append(message)
        os.eventfd_write(self.events, 1)

    def receive(self) -> list[Message]:
        try:
            os.eventfd_read(self.events)
        except BlockingIOError:
            return []
        messages, self._messages = self._messages, []
        return messages


class AnsweringVolume(VolumeMonitor):
    """A volume that answers at any time."""

    silent_s = 0.0
    answers = True
    next_check_s = 60.0

    def ensure(self) -> None: ...

    def receive(self) -> list[Message]:
        return []

    def close(self) -> None: ...


class SimulatedWorker(Supervisor):
    """A supervisor without a process and threads of its own."""

    def __init__(self, settings: Settings, number: int, turns: Turns, job_s: float, folder: Path) -> None:
        host = f"host{number // PER_HOST}"
        pid = os.getpid()
        who = WorkerIdentity(
            f"{host}-{number % PER_HOST}", host, "simulated", f"boot-{host}", pid, start_ticks(pid),
            ("default",), "0",
        )  # fmt: skip
        super().__init__(settings, who, folder / f"wake-{number}.sock")
        for engine in (self.database.engine, self.database.autocommit_engine, self.database._readers):
            engine._compiled_cache = COMPILED
        self.runner = self.held.runner = SimulatedRunner(settings, self.selector, turns, job_s)
        self.volume_monitor = self.retention_volume = AnsweringVolume(settings, self.selector)
        self.recovery.notify = self._notify
        self.recovery.reaper.boot, self.recovery.reaper.host = who.boot_id or "", host
        self.turns = turns
        self.claims_s: list[float] = []
        self.iterates_at = 0.0
        self.store.claim = self._timed(self.store.claim)  # type: ignore[method-assign]
        self.store.succeed_and_claim = self._timed(self.store.succeed_and_claim)  # type: ignore[method-assign]

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            lease = call(*args, **named)
            if lease is not None:
                self.claims_s.append(time.perf_counter() - began)
            return lease

        return timed

    def _notify(self, queue: str, job_id: int) -> None:
        try_notify(self.settings, job_id, queue, self.database.installation)

    def begin(self) -> None:
        """Register, and run what the three threads of a worker do."""
        self._register_name()
        self.turns.when_readable(self.selector.fileno(), self._iterate)
        self._iterate()
        self._look()
        self.turns.after(self.heartbeat.pause_s(), self._beat)

    def _beat(self) -> None:
        self.heartbeat.beat()
        self.turns.after(self.heartbeat.pause_s(), self._beat)

    def _look(self) -> None:
        self.turns.after(self.recovery.look(), self._look)

    def _iterate(self) -> None:
        super()._iterate()
        self.iterates_at = time.monotonic() + super()._timeout_s()
        self.turns.after(super()._timeout_s(), self._iterate_if_due)

    def _iterate_if_due(self) -> None:
        if time.monotonic() >= self.iterates_at:
            self._iterate()

    def _timeout_s(self) -> float:
        return 0.0


def _fetch_notifications(settings: Settings, workers: list[SimulatedWorker]) -> None:
    """Wake an idle worker for each notification; fetch none while all are busy, as Celery does."""
    from redis.exceptions import RedisError

    key = queue_key("default", workers[0].database.installation)
    client = RedisClient.from_url(settings.redis_url)
    while True:
        idle = [one for one in workers if one.lease is None]
        try:
            if idle and client.brpop([key], timeout=1):
                random.choice(idle)._wake()
            elif not idle:
                time.sleep(0.1)
        except RedisError:
            time.sleep(1.0)


def _work(first: int, workers: int, job_s: float, pause_s: float, folder: Path) -> None:
    settings = Settings.load()
    turns = Turns()
    fleet = [SimulatedWorker(settings, first + one, turns, job_s, folder) for one in range(workers)]
    for number, one in enumerate(fleet):
        turns.after(number * pause_s, one.begin)
    turns.after(workers * pause_s, lambda: print("ready", flush=True))
    threading.Thread(target=turns.run, daemon=True).start()
    threading.Thread(target=_fetch_notifications, args=(settings, fleet), daemon=True).start()
    for line in sys.stdin:
        found = [seconds for one in fleet for seconds in one.claims_s]
        if line.startswith("reset"):
            for one in fleet:
                one.claims_s = []
        print(
            json.dumps({"claims_s": found, "busy": sum(one.lease is not None for one in fleet)}), flush=True
        )
    os._exit(0)


# --- the measurement ----------------------------------------------------------------------


@dataclass
class Servers:
    """The servers of one measurement."""

    postgres: Postgres
    redis: Redis
    database: str
    url: str

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return self.postgres.sql(statement, self.database)

    def cpu_s(self) -> float:
        """Return the CPU time of Postgres, with that of backends that have ended."""
        assert self.postgres.process is not None
        root = psutil.Process(self.postgres.process.pid)
        times = root.cpu_times()
        total = times.user + times.system + times.children_user + times.children_system
        for child in root.children():
            try:
                total += sum(child.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
        return float(total)

    def connections(self) -> int:
        query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = %s"
        with psycopg.connect(self.postgres.conninfo("postgres"), autocommit=True) as conn:
            row = conn.execute(query, (self.database,)).fetchone()
        assert row is not None
        return int(row[0])


@contextmanager
def servers(*, pgbouncer: bool, max_connections: int) -> Iterator[Servers]:
    """
    Start Postgres with the durability of a deployment, Redis and, if asked for, PgBouncer.

    Raises:
        RuntimeError: one of them is not installed.
    """
    binaries, redis, bouncer = postgres_binaries(), redis_binary(), pgbouncer_binary()
    if binaries is None or redis is None or (pgbouncer and bouncer is None):
        raise RuntimeError(
            "this needs Postgres, Redis and, with --pgbouncer, PgBouncer (Debian has all three)"
        )
    settings = {
        "shared_preload_libraries": "pg_stat_statements",
        "pg_stat_statements.max": "1000",
        "max_connections": str(max_connections),
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "autovacuum": "on",
        "wal_level": "replica",
    }
    with ExitStack() as stop:
        postgres = stop.enter_context(Postgres(binaries, fsync=True, settings=settings))
        database = postgres.create()
        postgres.sql("CREATE EXTENSION pg_stat_statements", database)
        url = postgres.url(database)
        if pgbouncer:
            assert bouncer is not None
            url = stop.enter_context(PgBouncer(bouncer, postgres, pool=POOL)).url(database)
        yield Servers(postgres, stop.enter_context(Redis(redis)), database, url)


def measure(
    workers: int,
    seconds: float,
    *,
    busy: bool,
    pgbouncer: bool = False,
    job_s: float = 80.0,
    kill: bool = False,
) -> dict[str, Any]:
    """
    Simulate a fleet and measure its servers.

    Args:
        busy: each worker has a job, and QUEUED jobs wait; else the table is empty.
        job_s: duration of a job.
        kill: then kill one of the processes with its workers, and measure until others have their jobs.
    """
    processes = min(4, workers)
    with (
        servers(pgbouncer=pgbouncer, max_connections=4 * workers + 50) as there,
        tempfile.TemporaryDirectory(prefix="fl-") as folder,
    ):
        env = {
            "GANQ_HOME": folder, "GANQ_DATABASE_URL": there.url, "GANQ_REDIS_URL": there.redis.url,
        }  # fmt: skip
        fill(Settings.load(env), QUEUED if busy else 0, users=3, preemptible=True)
        there.sql("ANALYZE")
        # The claims of one host at usual priority are measured: it waits for the servers as a
        # host of a fleet does. All other workers share what is left of these cores.
        plan = [(PER_HOST, PROBE_JOB_S, 0)] if busy else []
        plan += [((workers + place) // processes, job_s, WORKERS_NICE) for place in range(processes)]
        firsts = accumulate((share for share, _, _ in plan), initial=0)
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fleet", str(first), str(share), str(length_s),
                 str(START_S * processes)],
                env=stack.clean_environment(**env, FLEET=folder),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                preexec_fn=partial(os.nice, nice),
            )
            for first, (share, length_s, nice) in zip(firsts, plan, strict=False)
        ]  # fmt: skip
        try:
            for child in children:
                _line(child)
            _until(lambda: _busy(there) >= workers * busy, READY_S, "the workers do not claim")
            there.sql("ANALYZE")  # as autovacuum does within a minute
            time.sleep(15.0)  # statements are compiled and prepared, shares of the recovery are known
            found = _measure(there, children, seconds)
            if kill:
                found["back_s"] = _kill(there, children)
        finally:
            for child in children:
                child.kill()
                child.wait()
    return found


def _measure(there: Servers, children: list["subprocess.Popen[str]"], seconds: float) -> dict[str, Any]:
    for child in children:
        _ask(child, "reset")
    there.sql("SELECT pg_stat_statements_reset()")
    before, began, cpu_s = _counters(there), time.monotonic(), there.cpu_s()
    client = RedisClient.from_url(there.redis.url)
    longest, connections, memory = 0, 0, 0
    while time.monotonic() < began + seconds:
        longest = max([longest, *(int(client.llen(key)) for key in client.keys("ganq.*"))])
        connections = max(connections, there.connections())
        memory = max(memory, int(client.info("memory")["used_memory"]))
        time.sleep(SAMPLE_S)
    took_s = time.monotonic() - began
    cpu_s = there.cpu_s() - cpu_s
    after = _counters(there)
    answers = [_ask(child, "now") for child in children]
    claims, of_all = (
        [one * 1000 for answer in some for one in answer["claims_s"]] for some in (answers[:1], answers)
    )
    rate = {name: (after[name] - before[name]) / took_s for name in after}
    updates = after["job updates"] - before["job updates"]
    top = there.sql(
        "SELECT calls, rows, total_exec_time, left(regexp_replace(query, '\\s+', ' ', 'g'), 90)"
        " FROM pg_stat_statements ORDER BY total_exec_time DESC LIMIT 14"
    )
    return {
        "queries_per_s": rate["queries"],
        "rows_read_per_s": rate["rows read"],
        "rows_returned_per_s": rate["rows returned"],
        "commits_per_s": rate["commits"],
        "wal_bytes_per_s": rate["wal"],
        "job_updates_per_s": rate["job updates"],
        "job_hot_ratio": (after["job hot"] - before["job hot"]) / updates if updates else None,
        "postgres_cores": cpu_s / took_s,
        "connections": connections,
        "redis_bytes": memory,
        "redis_list": longest,
        "claims": len(of_all),
        "claim_of_all_p99_ms": quantile(of_all, 0.99) if of_all else None,
        "claim_p50_ms": quantile(claims, 0.5) if claims else None,
        "claim_p99_ms": quantile(claims, 0.99) if claims else None,
        "busy": sum(answer["busy"] for answer in answers),
        "top": [[int(calls / took_s), int(rows / took_s), float(ms), text] for calls, rows, ms, text in top],
    }


def _counters(there: Servers) -> dict[str, float]:
    names = ("queries", "rows returned", "rows read", "job updates", "job hot", "wal", "commits")
    (row,) = there.sql(
        "SELECT (SELECT sum(calls) FROM pg_stat_statements), (SELECT sum(rows) FROM pg_stat_statements),"
        " (SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)) FROM pg_stat_user_tables),"
        " (SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'job'),"
        " (SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'job'),"
        " pg_current_wal_lsn() - '0/0',"
        " (SELECT xact_commit FROM pg_stat_database WHERE datname = current_database())"
    )
    return dict(zip(names, map(float, row), strict=True))


def _kill(there: Servers, children: list["subprocess.Popen[str]"]) -> float:
    """Kill a process; return the seconds until all its jobs are requeued or run elsewhere."""
    open_ones = f"SELECT count(*) FROM attempt WHERE ended_at IS NULL AND pid = {children[-1].pid}"
    children[-1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _until(lambda: not there.sql(open_ones)[0][0], 200.0, "jobs of the killed process are not requeued")
    return time.monotonic() - began


def _busy(there: Servers) -> int:
    return int(there.sql("SELECT count(*) FROM job WHERE state = 'running'")[0][0])


def _until(reached: Callable[[], bool], within_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + within_s
    while not reached():
        if time.monotonic() > deadline:
            raise RuntimeError(otherwise)
        time.sleep(0.5)


def _line(child: "subprocess.Popen[str]") -> str:
    assert child.stdout is not None
    if not (line := child.stdout.readline()):
        raise RuntimeError(f"a process of workers ended with code {child.wait()}")
    return line


def _ask(child: "subprocess.Popen[str]", question: str) -> dict[str, Any]:
    assert child.stdin is not None
    child.stdin.write(question + "\n")
    child.stdin.flush()
    answer: dict[str, Any] = json.loads(_line(child))
    return answer


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fleet", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of each measurement")
    parser.add_argument("--load", choices=("idle", "busy", "both"), default="both")
    parser.add_argument("--job", type=float, default=80.0, metavar="S", help="duration of a job (default 80)")
    parser.add_argument("--pgbouncer", action="store_true", help="through PgBouncer, transaction pooling")
    parser.add_argument("--kill", action="store_true", help="then kill a quarter of the workers")
    parser.add_argument("--top", action="store_true", help="print the statements that take most time")
    options = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for workers in options.workers:
        for busy in (False, True):
            if options.load != "both" and busy != (options.load == "busy"):
                continue
            found = measure(
                workers, options.seconds, busy=busy, pgbouncer=options.pgbouncer, job_s=options.job,
                kill=options.kill and busy,
            )  # fmt: skip
            top = found.pop("top")
            shown = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if v is not None)
            print(f"{workers} workers, {'busy' if busy else 'idle'}: {shown}", flush=True)
            for calls, rows, ms, text in top if options.top else ():
                print(f"  {calls}/s, {rows} rows/s, {ms:.0f} ms: {text}")
    return 0


if __name__ == "__main__":
    _work(
        int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), Path(os.environ["FLEET"])
    )
