"""
Live updates by Server-Sent Events.

One task reads the revision of the job table twice a second. If it has changed, every open page receives
the new revision, and fetches again what it shows.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from storage.db.queries import Queries

POLL_S = 0.5
TICK_S = 10.0
"""Seconds between updates without a commit: ages change, and workers become unresponsive."""
PING_S = 5.0
MAX_STREAMS = 256


class Revisions:
    """The revision of the job table, and the pages that wait for the next one."""

    def __init__(self, queries: Queries) -> None:
        self.queries = queries
        self._nonce = secrets.token_hex(4)  # two servers, or one started again, share no revision
        self._number = 0
        self._seen: object = None
        self._ticked = time.monotonic()
        self._changed = asyncio.Condition()
        self.streams = 0
        self.away: str | None = None
        """Why the job table cannot be read, if it cannot."""

    @property
    def current(self) -> str:
        return f"{self._nonce}-{self._number}"

    async def poll(self) -> None:
        """Read the revision until cancelled."""
        while True:
            away = None
            try:
                seen: object = await run_in_threadpool(self.queries.revision)
            except Exception as exc:  # the database may come back
                seen, away = self._seen, str(exc)
            now = time.monotonic()
            if seen != self._seen or away != self.away or now - self._ticked >= TICK_S:
                self._seen, self.away, self._ticked = seen, away, now
                await self.bump()
            await asyncio.sleep(POLL_S)

    async def bump(self) -> None:
        """Notify every open page."""
        async with self._changed:
            self._number += 1
            self._changed.notify_all()

    async def changed(self, known: str, within_s: float) -> str | None:
        """Return the revision as soon as it differs from `known`; None if it does not in time."""
        try:
            return await asyncio.wait_for(self._next(known), within_s)
        except TimeoutError:
            return None

    async def _next(self, known: str) -> str:
        async with self._changed:
            await self._changed.wait_for(lambda: self.current != known)
        return self.current

    async def _events(self) -> AsyncIterator[bytes]:
        known = ""
        yield b"retry: 1000\n\n"
        while True:
            if (found := await self.changed(known, PING_S)) is None:
                yield b"event: ping\ndata: \n\n"
            else:
                known = found
                yield f"event: revision\ndata: {known}\n\n".encode()

    async def stream(self, request: Request) -> Response:
        """Answer with the event stream; refuse beyond MAX_STREAMS."""
        if (found := self.streamed(self._events())) is None:
            return PlainTextResponse("too many open pages\n", 503, {"Retry-After": "10"})
        return found

    def streamed(self, events: AsyncIterator[bytes]) -> Response | None:
        """Return a stream of events as a response; None beyond MAX_STREAMS."""
        if self.streams >= MAX_STREAMS:
            return None
        self.streams += 1
        headers = {"X-Accel-Buffering": "no"}  # nginx would hold events back
        return StreamingResponse(self._counted(events), media_type="text/event-stream", headers=headers)

    async def _counted(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for one in events:
                yield one
        finally:
            self.streams -= 1
