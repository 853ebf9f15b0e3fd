"""
Celery with default settings, the peer of ganq's dispatch: a task on one prefork process, JSON, no results.

    celery -A benchmarks.bare_celery worker --concurrency 1
"""

import os
import time
from collections.abc import Callable

import redis
from celery import Celery

URL = os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379/0")
ANSWERS = "bench.answers"

CONF = {"task_ignore_result": True, "task_default_queue": "bare"}

app = Celery("bare", broker=URL)
app.conf.update(CONF)
_answers: "redis.Redis | None" = None


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def note(sent: float) -> None:
    """Report when the body began."""
    began = time.time()
    global _answers
    if _answers is None:
        _answers = redis.Redis.from_url(URL)
    _answers.rpush(ANSWERS, f"{sent} {began}")


def client(redis_url: str) -> "tuple[Callable[[], None], redis.Redis]":
    """
    Return a function that sends a task, and a client for the answers, both of this Redis.

    Each benchmark has its own Redis, and the app above keeps the URL of its first connection.
    """
    sender = Celery("bare", broker=redis_url)
    sender.conf.update(CONF)

    def send() -> None:
        sender.send_task(note.name, args=[time.time()])

    return send, redis.Redis.from_url(redis_url)
