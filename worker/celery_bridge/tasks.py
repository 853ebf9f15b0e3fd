"""
The one task, `ganq.run_job`: wake the supervisor, and hold Celery's only process until it is idle.

Holding it is what sends later bells to other, idle workers. The argument is a
hint; the supervisor claims the best job of the table.
"""

import os
from typing import Any

from celery import Celery

from worker.celery_bridge.app import TASK, queue_key
from worker.celery_bridge.wakeup import WAKE_ENV, wake


def register(app: Celery) -> None:
    """Add the task to an application."""

    @app.task(name=TASK, bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
    def run_job(self: Any, hint: int = 0, *args: Any, **kwargs: Any) -> None:
        for reply in wake(os.environ[WAKE_ENV]):
            if reply == "busy":
                # The supervisor found work by itself before this bell came: pass the bell on,
                # so that it wakes another worker, and take no more until this one is idle.
                info = self.request.delivery_info or {}
                queue = str(info.get("routing_key"))
                if not queue.startswith(queue_key("")):  # a forged message names no key of ours
                    continue
                app.send_task(TASK, args=[hint], queue=queue, retry=False)
