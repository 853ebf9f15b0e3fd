"""
The Celery application, its one task and its transport.

Celery does the routing, the process pool and the reconnects. A message is a notification: it carries a job
id as a hint and may be lost, duplicated or forged without harm. The job table alone decides what runs.
"""

import logging
import os
import time
from typing import Any

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES, redis

from storage import redis_url
from storage.settings import Settings
from worker.celery_bridge import environment
from worker.celery_bridge.notify import TASK as TASK
from worker.celery_bridge.notify import is_notification
from worker.celery_bridge.notify import queue_key as queue_key
from worker.celery_bridge.wakeup import WAKE_ENV, wait_until_idle

log = logging.getLogger("ganq.worker")

VISIBILITY_TIMEOUT_S = 7 * 24 * 3600
REPORT_EVERY_S = 60.0


def make_app(settings: Settings) -> Celery:
    """Return the application of a worker, which waits for a Redis that is unavailable."""
    environment.clear(os.environ)
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
    address = redis_url.parse(settings.redis_url)
    app = Celery("ganq", broker=address.broker, set_as_current=True)
    app.conf.update(
        # Without it kombu verifies no certificate.
        broker_use_ssl=address.tls or False,
        # Each worker runs one long job; later jobs go to an idle worker. A notification is therefore
        # fetched only when the one pool process is free.
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        # Acknowledge early: with late acknowledgement Redis delivers a long job twice.
        task_acks_late=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_ignore_result=True,
        result_backend=None,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=queue_key("default"),
        task_create_missing_queues=True,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
        },
        # Any client of Redis could broadcast a shutdown.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        # Otherwise each write to stderr becomes a log record, and a traceback becomes many.
        worker_redirect_stdouts=False,
        event_queue_durable=False,
    )
    # In another thread Celery would otherwise make an application from a celeryconfig.py.
    app.set_default()
    if settings.embedded_redis:
        # A unix socket has no TCP keepalive.
        app.conf.broker_transport_options.pop("socket_keepalive")
    return app


def register_task(app: Celery) -> None:
    """Add the task `ganq.run_job`: wake the supervisor and occupy the pool process until it is idle."""

    @app.task(name=TASK, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
    def run_job(self: Any, hint: int = 0, *args: Any, **kwargs: Any) -> None:
        for reply in wait_until_idle(os.environ[WAKE_ENV]):
            if reply == "busy":
                # The supervisor had found work before this notification arrived: send it on to another
                # worker, and fetch no more until this one is idle.
                info = self.request.delivery_info or {}
                queue = str(info.get("routing_key"))
                if not queue.startswith(queue_key("")):  # a forged message names another key
                    continue
                app.send_task(TASK, args=[hint], queue=queue, retry=False)


def send_notification(app: Celery, queue: str, job_id: int, installation: str) -> None:
    """
    Send one notification.

    Raises:
        kombu.exceptions.OperationalError: Redis is unavailable.
    """
    options: dict[str, Any] = {"queue": queue_key(queue, installation), "retry": False, "ignore_result": True}
    app.send_task(TASK, args=[job_id], **options)


class Transport(redis.Transport):
    """
    kombu's transport for Redis; drops what is not a plain notification before Celery reads it.

    Celery would keep a message with an eta in memory until then, decompress a compressed one, and kill its
    pool process for one with a time limit. Anybody who may write to Redis could send them.
    """

    dropped = 0
    reported_at = float("-inf")

    def _deliver(self, message: Any, queue: str) -> None:
        if is_notification(message):
            super()._deliver(message, queue)  # type: ignore[no-untyped-call]
            return
        # No acknowledgement is needed: the message has left its list, and nothing else refers to it yet.
        Transport.dropped += 1
        if time.monotonic() - Transport.reported_at >= REPORT_EVERY_S:
            log.warning(
                "messages in %s that are no notifications of ganq are dropped unread (%d so far)",
                queue,
                Transport.dropped,
            )
            Transport.reported_at = time.monotonic()
