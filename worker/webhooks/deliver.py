"""
The process or thread that delivers events to webhooks: `ganq web`, `ganq webhook deliver`.

Several may run: each webhook is delivered by the one that has its lease. A webhook whose receiver hangs
delays no other.
"""

import asyncio
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from jobs.errors import one_line
from storage.db.engine import Database
from storage.db.webhooks import LEASE_S, Delivery, Sent, Webhook, Webhooks
from storage.settings import Settings
from worker.webhooks.message import message_of
from worker.webhooks.send import in_thread, send
from worker.webhooks.targets import channels, shown

T = TypeVar("T")

log = logging.getLogger("ganq.webhooks")

POLL_S = 1.0
BATCH = 16
"""Messages to one receiver at the same time, each of another job."""
STOP_S = 3.0
"""Time that messages on their way have when the process stops; then the next process repeats them."""
PRUNE_S = 3600.0
RETRIES = (1, 60, 360, 1440, 3600, 7200, 10080, 14400, 17280)
"""
Pauses before each repetition, in units of GANQ_WEBHOOK_RETRY_SECONDS.

With 5 s it is the schedule of Standard Webhooks: 5 s, 5 min, 30 min, 2, 5, 10, 14, 20 and 24 h.
"""


def retry_in_s(attempts: int, first_s: float, retry_after_s: float = 0.0) -> float | None:
    """Return the pause after so many failed attempts, with some jitter; None: there is no other attempt."""
    if attempts > len(RETRIES):
        return None
    return max(RETRIES[attempts - 1] * first_s * random.uniform(1.0, 1.1), retry_after_s)


class Deliverer:
    """
    Delivers until it is stopped.

    Args:
        owner: name of the leases; those that somebody took under this name are used.
    """

    def __init__(self, database: Database, settings: Settings, owner: str | None = None) -> None:
        self.webhooks = Webhooks(database)
        self.installation = database.installation
        self.settings = settings
        self.owner = owner or secrets.token_hex(16)
        self.channels = channels(settings)
        self.stopping = threading.Event()
        self._one_at_a_time = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, exit_after_s: float | None = None) -> None:
        """
        Deliver.

        Args:
            exit_after_s: return when nothing was due for so many seconds; None: never.
        """
        self._loop, self._woken = asyncio.get_running_loop(), asyncio.Event()
        tasks: dict[int, asyncio.Task[None]] = {}
        busy_at, prune_at = time.monotonic(), 0.0
        complained = ""
        while not self.stopping.is_set():
            try:
                for number in await self._ask(self.webhooks.due, self.owner, self.channels):
                    if number not in tasks:
                        tasks[number] = asyncio.create_task(self._serve(number))
                if time.monotonic() >= prune_at:
                    await self._ask(self.webhooks.prune)
                    prune_at = time.monotonic() + PRUNE_S
                complained = ""
            except Exception as exc:  # else no event would be delivered any more
                if (reason := one_line(exc)) != complained:
                    log.warning("webhooks wait: %s", reason)
                complained = reason
            tasks = {number: task for number, task in tasks.items() if not task.done()}
            if tasks:
                busy_at = time.monotonic()
            elif exit_after_s is not None and time.monotonic() - busy_at >= exit_after_s:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), POLL_S)
        if tasks:
            await asyncio.wait(tasks.values(), timeout=STOP_S)
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    def stop(self) -> None:
        """Have run() return soon; from any thread, and from a signal handler."""
        self.stopping.set()
        if self._loop is not None:
            with suppress(RuntimeError):  # it has returned
                self._loop.call_soon_threadsafe(self._woken.set)

    async def _serve(self, number: int) -> None:
        """Deliver what is due to one webhook."""
        try:
            leased_at = time.monotonic()
            hook = await self._ask(self.webhooks.lease, number, self.owner, self.channels)
            while hook is not None and not self.stopping.is_set():
                batch = await self._ask(self.webhooks.batch, hook, BATCH)
                if not batch:
                    break
                if time.monotonic() - leased_at > LEASE_S / 3:  # the process was stopped, or the table slow
                    leased_at = time.monotonic()
                    hook = await self._ask(self.webhooks.lease, number, self.owner, self.channels)
                    continue
                outcomes = await asyncio.gather(*(self._attempt(hook, one) for one in batch))
                leased_at = time.monotonic()
                if not await self._ask(self.webhooks.record, number, self.owner, outcomes):
                    break
        except Exception as exc:
            log.warning("webhook %s waits: %s", number, one_line(exc))
            log.debug("the delivery that failed", exc_info=True)
        finally:
            with suppress(Exception):
                await self._ask(self.webhooks.release, number, self.owner)

    async def _attempt(self, hook: Webhook, delivery: Delivery) -> Sent:
        reply = await send(hook, message_of(delivery, self.installation), self.settings)
        attempts = delivery.attempts + 1
        pause_s = None if reply.gone else self._pause_s(attempts, reply.retry_after_s)
        if not reply.delivered:
            what = f"event {delivery.event.id} of job {delivery.job.id}"
            log.info("webhook %s (%s) did not take %s: %s", hook.id, shown(hook.url), what, reply.error)
        return Sent(
            event_id=delivery.event.id,
            attempts=attempts,
            delivered=reply.delivered,
            status=reply.status,
            error=reply.error,
            retry_in_s=None if reply.delivered else pause_s,
            gone=reply.gone,
        )

    def _pause_s(self, attempts: int, retry_after_s: float) -> float | None:
        return retry_in_s(attempts, self.settings.webhook_retry_seconds, retry_after_s)

    async def _ask(self, call: Callable[..., T], *args: Any) -> T:
        """Use the job table, one call at a time: its connections are few."""
        async with self._one_at_a_time:
            return await in_thread(call, *args)


@contextmanager
def delivering(database: Database, settings: Settings) -> Iterator[None]:
    """Deliver in a thread for as long as the block runs, if the settings allow it."""
    if settings.webhook_delivery == "off":
        yield
        return
    deliverer = Deliverer(database, settings)
    thread = threading.Thread(target=lambda: asyncio.run(deliverer.run()), name="deliverer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        deliverer.stop()
        thread.join(STOP_S + POLL_S)
