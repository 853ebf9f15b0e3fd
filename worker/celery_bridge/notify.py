"""
Notify the workers of a submitted job. Best effort: the job table is the truth, and workers poll it.

A notification is a message of Celery's protocol 2 in kombu's envelope, built here without Celery: importing
Celery takes longer than the rest of `ganq submit`, and its producer ten times as long as the push. A test
compares each part of the message with what Celery itself sends.
"""

import base64
import json
import uuid
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from jobs.errors import DatabaseUnavailableError, QueueUnavailableError
from storage import redis_url
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.db.store import JobStore

TASK = "ganq.run_job"
ANSWER_S = 1.0
MAX_WAITING = 100
"""Notifications in one queue. A worker that fetches one claims the best job: one per idle worker suffices."""
MAX_NOTIFIED = 16
"""Notifications for one submission: each wakes one worker, and each shard may occupy one."""
MAX_BODY = 4096
"""Characters of a notification's body; those that ganq sends have about a hundred."""


def queue_key(queue: str, installation: str = "") -> str:
    """
    Return the name of a queue on the broker.

    Args:
        installation: id of the job table, so that two installations may share one Redis. Without it: the
            name of version 0.2.0 and older, which workers also consume.
    """
    return f"ganq.{installation}.{queue}" if installation else f"ganq.{queue}"


def notify_job(
    settings: Settings, queries: "Queries", store: "JobStore", job: "Job"
) -> QueueUnavailableError | None:
    """
    Notify the workers of a submitted or released job, or of its shards.

    Returns:
        The first failure, if any; workers then find the jobs by polling.
    """
    shards = queries.shards(job.id, most=MAX_NOTIFIED) if job.blockers else []
    failure = None
    for one in shards or [job]:
        if one.state.terminal or one.held or one.blockers > 0:
            continue
        try:
            notify(settings, one.id, one.queue, store.database.installation)
        except QueueUnavailableError as exc:
            failure = failure or exc
            with suppress(DatabaseUnavailableError):  # then the notification is sent a little later
                store.not_notified(one.id)
    return failure


def try_notify(settings: Settings, job_id: int, queue: str, installation: str) -> bool:
    """
    Send one notification if Redis is available.

    Returns:
        False if it is not; an idle worker then finds the job by polling, within settings.poll_seconds.
    """
    try:
        notify(settings, job_id, queue, installation)
    except QueueUnavailableError:
        return False
    return True


def notify(settings: Settings, job_id: int, queue: str, installation: str) -> None:
    """
    Send one notification.

    Raises:
        QueueUnavailableError: Redis does not accept it; the message says why.
    """
    from redis.exceptions import RedisError

    try:
        key = queue_key(queue, installation)
        client = _client(settings.redis_url)
        if client.lpush(key, message(key, job_id)) > MAX_WAITING:
            client.brpop([key], timeout=1)  # the oldest; RPOP is not in the ACL of docker/make_secrets.py
    except (RedisError, OSError, ValueError) as exc:  # ValueError: an address that cannot be read
        why = redis_url.distrust(exc)
        raise QueueUnavailableError(
            f"the certificate of Redis is not trusted ({why})" if why else "Redis does not answer",
            hint=redis_url.HINT_TLS if why else "ganq doctor",
        ) from exc


def waiting(settings: Settings, queues: Iterable[str], installation: str) -> dict[str, int]:
    """
    Return how many notifications of each queue no worker has fetched yet.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """
    from redis.exceptions import RedisError

    try:
        client = _client(settings.redis_url)
        return {queue: int(client.llen(queue_key(queue, installation))) for queue in queues}
    except (RedisError, OSError, ValueError) as exc:
        raise QueueUnavailableError("Redis does not answer", hint="ganq doctor") from exc


def message(key: str, job_id: int) -> str:
    """Return one notification as it is stored in Redis until a worker fetches it."""
    task_id = str(uuid.uuid4())
    body = json.dumps([[job_id], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    return json.dumps(
        {
            "body": base64.b64encode(body.encode()).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": TASK,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "group_index": None,
                "shadow": None,
                "eta": None,
                "expires": None,
                "retries": 0,
                "timelimit": [None, None],
                "argsrepr": f"[{job_id}]",
                "kwargsrepr": "{}",
                "origin": "ganq",
                "ignore_result": True,
                "replaced_task_nesting": 0,
                "stamped_headers": None,
                "stamps": {},
            },
            "properties": {
                "correlation_id": task_id,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": key},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    )


def is_notification(message: Any) -> bool:
    """
    Return whether a decoded message from Redis is one that message() or Celery's `send_task` creates.

    Only such messages reach Celery: none with an eta, compression, or options other than to run the one
    task now.
    """
    try:
        headers, properties = message["headers"], message["properties"]
        if (
            headers["task"] != TASK
            or not isinstance(headers["id"], str)
            or any(headers.get(name) is not None for name in ("eta", "expires", "compression"))
            or headers.get("timelimit") not in (None, [None, None])
            or message["content-type"] != "application/json"
            or message["content-encoding"] != "utf-8"
            or properties["body_encoding"] != "base64"
            or not isinstance(properties["delivery_tag"], str)
            or len(message["body"]) > MAX_BODY
        ):
            return False
        arguments, named, embedded = json.loads(base64.b64decode(message["body"]))
        return (
            isinstance(arguments, list)
            and isinstance(named, dict)
            and isinstance(embedded, dict)
            and not any(embedded.values())
            and isinstance(properties["delivery_info"]["routing_key"], str)
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return False


@cache
def _client(url: str) -> Any:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return redis_url.parse(url).client(
        socket_timeout=ANSWER_S,
        socket_connect_timeout=ANSWER_S,
        # A connection that was left open may have died meanwhile. A duplicate notification does no harm.
        retry=Retry(NoBackoff(), 1),
        health_check_interval=25,
    )
