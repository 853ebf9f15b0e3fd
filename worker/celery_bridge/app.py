"""
The Celery application: routing, process pool and reconnects are Celery's; the promises are not.

A message is a doorbell. It carries a hint and may be lost, doubled or forged
without any harm: what runs is decided by the job table alone.
"""

import os
from typing import Any

from celery import Celery

from storage import redis_url
from storage.settings import Settings
from worker.celery_bridge import environment, transport
from worker.celery_bridge.notify import TASK as TASK
from worker.celery_bridge.notify import queue_key as queue_key

VISIBILITY_TIMEOUT_S = 7 * 24 * 3600


def make_app(settings: Settings) -> Celery:
    """The application of a worker, which waits for a Redis that is away."""
    environment.clear(os.environ)
    transport.register()
    address = redis_url.parse(settings.redis_url)
    app = Celery("ganq", broker=address.broker, set_as_current=True)
    app.conf.update(
        # Without it kombu verifies no certificate.
        broker_use_ssl=address.tls or False,
        # One long job a worker, and later jobs go to the idle worker: a bell is fetched
        # only when the pool's one process is free.
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        # Early acknowledgement: with a late one, Redis delivers a long job twice.
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
        # It would make a log record of each write to stderr: a traceback cut into words.
        worker_redirect_stdouts=False,
        event_queue_durable=False,
    )
    # In a thread other than this, Celery would else make an application from a celeryconfig.py.
    app.set_default()
    if settings.embedded_redis:
        # A unix socket knows no TCP keepalive.
        app.conf.broker_transport_options.pop("socket_keepalive")
    return app


def send_notification(app: Celery, queue: str, job_id: int, installation: str) -> None:
    """
    Ring once.

    Raises:
        kombu.exceptions.OperationalError: Redis is not there.
    """
    options: dict[str, Any] = {"queue": queue_key(queue, installation), "retry": False, "ignore_result": True}
    app.send_task(TASK, args=[job_id], **options)
