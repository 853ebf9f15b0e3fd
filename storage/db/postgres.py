"""Postgres for the job table: every wait has an end, on the server and on this side of the line."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError

ANSWER_S = 40.0
"""Longer than the server's statement_timeout: who has not answered by then is not there."""

FRESH_S = 1.0
"""A connection that was used so lately is taken as alive; if it is not, Database tries another."""


def postgres_engine(url: str) -> Engine:
    """An engine whose connections notice a dead server, a dead network and a silent middleman."""
    engine = create_engine(
        url,
        pool_size=4,
        max_overflow=8,
        # The connection that was used last: it need not be asked whether it lives, and the server has
        # the plans of its statements, which psycopg prepares when it sends them for the sixth time.
        pool_use_lifo=True,
        connect_args={
            "connect_timeout": 5,
            "application_name": "ganq",
            # Sent and not acknowledged: 20 s. Waiting, with nothing to send: 10 s + 3 × 5 s.
            "tcp_user_timeout": 20_000,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "options": "-c lock_timeout=5s -c statement_timeout=30s"
            " -c idle_in_transaction_session_timeout=30s",
        },
    )

    @event.listens_for(engine, "checkin")
    def _left(raw: Any, record: Any) -> None:
        record.info["left_at"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _still_there(raw: Any, record: Any, proxy: Any) -> None:
        # SQLAlchemy's own pool_pre_ping asks each time, which is a trip of every claim's seven.
        left_at = record.info.get("left_at")
        if left_at is None or time.monotonic() - left_at < FRESH_S:
            return
        try:
            alive = engine.dialect.do_ping(raw)
        except engine.dialect.loaded_dbapi.Error as exc:
            raise DisconnectionError("the connection has died in the pool") from exc
        if not alive:
            raise DisconnectionError("the connection has died in the pool")

    @event.listens_for(engine, "do_connect")
    def _bounded(dialect: Any, record: Any, arguments: Any, options: Any) -> Any:
        return _bounded_connection().connect(*arguments, **options)

    return engine


@contextmanager
def patient_connections(engine: Engine) -> Iterator[None]:
    """For statements that may take any time: the connections that are opened meanwhile wait for ever."""
    if engine.dialect.name != "postgresql":
        yield
        return

    def wait_for_ever(raw: Any, record: Any) -> None:
        raw.answer_s = None

    engine.dispose()
    event.listen(engine, "connect", wait_for_ever)
    try:
        yield
    finally:
        event.remove(engine, "connect", wait_for_ever)
        engine.dispose()


@cache
def _bounded_connection() -> Any:
    import psycopg

    class BoundedConnection(psycopg.Connection[Any]):
        """
        Gives up on a server that does not answer.

        TCP's own timeouts do not see a proxy or a frozen server: the machine acknowledges
        the packets, and no answer ever comes.
        """

        answer_s: float | None = ANSWER_S

        def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
            return super().wait(self._until(gen), *args, **kwargs)

        def _until(self, gen: Any) -> Generator[Any, Any, Any]:
            deadline = None if self.answer_s is None else time.monotonic() + self.answer_s
            try:
                wanted = next(gen)
                while True:
                    try:
                        ready = yield wanted
                    except BaseException as exc:
                        wanted = gen.throw(exc)
                        continue
                    if not ready and deadline is not None and time.monotonic() > deadline:
                        self.pgconn.finish()  # a later answer would belong to no question
                        raise psycopg.OperationalError(f"no answer within {self.answer_s:.0f} s")
                    wanted = gen.send(ready)
            except StopIteration as exc:
                return exc.value

    return BoundedConnection
