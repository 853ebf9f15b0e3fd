"""
Other queues with the same no-op job: `python -m benchmarks.peer_queues rq|huey|procrastinate URL JOBS`.

Each enqueues all jobs, runs them with one worker as its manual shows, and prints the jobs per
second from the first body to the last.
"""

import json
import sys
import time

AT: list[float] = []


def note() -> None:
    AT.append(time.time())


def rate() -> float:
    return (len(AT) - 1) / (AT[-1] - AT[0])


def rq(url: str, jobs: int) -> float:
    """Run RQ, whose worker forks for each job; the times are from its job records."""
    from redis import Redis
    from rq import Queue, Worker

    connection = Redis.from_url(url)
    connection.flushdb()
    queue = Queue("bench", connection=connection)
    made = [queue.enqueue("benchmarks.peer_queues.note") for _ in range(jobs)]
    Worker([queue], connection=connection).work(burst=True, logging_level="WARNING")
    for one in made:
        one.refresh()  # type: ignore[no-untyped-call]
    ends = sorted(one.ended_at.timestamp() for one in made if one.ended_at is not None)
    return (len(ends) - 1) / (ends[-1] - ends[0])


def huey(url: str, jobs: int) -> float:
    """Run Huey's consumer with one thread, without results."""
    import threading

    from huey import RedisHuey

    app = RedisHuey("bench", url=url, results=False)
    app.flush()
    task = app.task()(note)
    for _ in range(jobs):
        task()
    consumer = app.create_consumer(workers=1, worker_type="thread", periodic=False)
    consumer.start()
    while len(AT) < jobs:
        time.sleep(0.01)
    threading.Thread(target=consumer.stop, daemon=True).start()
    return rate()


def procrastinate(url: str, jobs: int) -> float:
    """Run Procrastinate on Postgres: one worker, one job at a time, with finished jobs retained."""
    from procrastinate import App, PsycopgConnector, SyncPsycopgConnector

    url = url.replace("postgresql+psycopg://", "postgresql://")
    app = App(connector=SyncPsycopgConnector(conninfo=url))
    with app.open():
        app.schema_manager.apply_schema()
        task = app.task(name="note")(note)
        for _ in range(jobs):
            task.defer()
        with app.replace_connector(PsycopgConnector(conninfo=url)):
            app.run_worker(wait=False, concurrency=1, install_signal_handlers=False)
    return rate()


if __name__ == "__main__":
    name, url, jobs = sys.argv[1:]
    print(json.dumps({"jobs_per_s": globals()[name](url, int(jobs))}), flush=True)
    import os

    os._exit(0)
