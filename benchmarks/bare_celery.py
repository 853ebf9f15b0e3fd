"""
Celery as it comes, the peer of ganq's dispatch: one task on one prefork process, JSON, no results.

    celery -A benchmarks.bare_celery worker --concurrency 1
"""

import os
import time

import redis
from celery import Celery

URL = os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379/0")
ANSWERS = "bench.answers"

app = Celery("bare", broker=URL)
app.conf.update(task_ignore_result=True, task_default_queue="bare")
_answers: "redis.Redis | None" = None


@app.task(ignore_result=True)  # type: ignore[untyped-decorator]
def note(sent: float) -> None:
    """Tell when the body began."""
    began = time.time()
    global _answers
    if _answers is None:
        _answers = redis.Redis.from_url(URL)
    _answers.rpush(ANSWERS, f"{sent} {began}")
