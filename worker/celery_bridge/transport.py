"""
Celery's way to Redis, which drops what is no plain notification before Celery reads it.

Celery would keep a message with an eta in its memory until then, unpack a compressed one, and
kill its pool for one with a time limit. Anybody who may write to Redis could send them.
"""

import logging
import time
from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis

from worker.celery_bridge.notify import is_notification

log = logging.getLogger("ganq.worker")

REPORT_EVERY_S = 60.0


class Transport(redis.Transport):
    """kombu's transport for Redis, with a filter where messages arrive."""

    dropped = 0
    reported_at = float("-inf")

    def _deliver(self, message: Any, queue: str) -> None:
        if is_notification(message):
            super()._deliver(message, queue)  # type: ignore[no-untyped-call]
            return
        # Not acknowledged either: it has left its list, and nothing else knows of it yet.
        Transport.dropped += 1
        if time.monotonic() - Transport.reported_at >= REPORT_EVERY_S:
            log.warning(
                "messages in %s that are no notifications of ganq are dropped unread (%d so far)",
                queue,
                Transport.dropped,
            )
            Transport.reported_at = time.monotonic()


def register() -> None:
    """Let kombu take this transport for redis:// and its kin."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:Transport"
