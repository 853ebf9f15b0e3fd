"""Postgres for the job table: connections with timeouts on the server and on the client."""

import threading
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError
from sqlalchemy.pool import QueuePool

ANSWER_S = 40.0
"""Longer than the server's statement_timeout: a server that has not answered by then is unreachable."""

FRESH_S = 1.0
"""A connection used within this time is not pinged; if it is dead, Database retries with another."""

SPARE_S = 5.0
"""Seconds after which a second connection that no thread needed is closed."""

TIMEOUTS = {"lock_timeout": "5s", "statement_timeout": "30s", "idle_in_transaction_session_timeout": "30s"}
DIRECT = "ganq.direct"
"""Set in the start-up packet; a session that does not have it is behind a pooler, which drops the packet."""
OF_WORKERS = {"enable_bitmapscan": "off", "plan_cache_mode": "force_generic_plan"}
"""
A worker reads few rows of partial indexes whose rows come and go, such as that of running jobs. A bitmap
scan visits all dead entries again until a vacuum (521 blocks after 1,500 jobs, with 2 running); an index scan
marks those that it meets, and the next one omits them (5 to 17 blocks).

Most of its statements name their indexes by literals, so that a plan for these parameters is the plan for
any. By default Postgres plans the larger ones anew each time, a quarter of its time for a claim.
"""
USUAL_PLANS = "SET LOCAL enable_bitmapscan = on; SET LOCAL plan_cache_mode = auto"
"""For the statement of a worker of which that is not true."""


def postgres_engine(url: str, connections: int | None = None) -> Engine:
    """
    Return an engine whose connections detect a dead server, network or proxy, and a pooler of transactions.

    Args:
        connections: of a worker, at most; None: of another process, as many as threads use at once.
    """
    settings = TIMEOUTS if connections is None else {**TIMEOUTS, **OF_WORKERS}
    set_local = "; ".join(f"SET LOCAL {name} = '{value}'" for name, value in settings.items())
    engine = create_engine(
        url,
        pool_size=connections or 4,
        max_overflow=8 if connections is None else 0,
        # Reuse the last connection: it needs no ping, and the server has its prepared statements.
        pool_use_lifo=True,
        connect_args={
            "connect_timeout": 5,
            "application_name": "ganq",
            # Unacknowledged data: 20 s. Idle: 10 s + 3 × 5 s.
            "tcp_user_timeout": 20_000,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "options": " ".join(f"-c {name}={value}" for name, value in {**settings, DIRECT: "1"}.items()),
        },
    )

    @event.listens_for(engine, "checkin")
    def _left(raw: Any, record: Any) -> None:
        record.info["left_at"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _still_there(raw: Any, record: Any, proxy: Any) -> None:
        # pool_pre_ping of SQLAlchemy pings each time, which would double the round trips of a claim.
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
        return _connect(arguments, options)

    @event.listens_for(engine, "begin")
    def _limited(conn: Any) -> None:
        raw = conn.connection.dbapi_connection
        if raw.without_timeouts and not raw.autocommit:
            conn.exec_driver_sql(set_local)

    return engine


class SpareConnection:
    """
    Closes the second connection of an engine when one has been enough for SPARE_S.

    A pool of one that may overflow would close whichever connection is returned last, in half of the cases
    the one that has the prepared statements of the main thread.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.needed_at = 0.0
        self._connections: tuple[weakref.ref[Any], ...] = ()
        self._lock = threading.Lock()
        self._closing = threading.Lock()

        @event.listens_for(engine, "connect")
        def _opened(raw: Any, record: Any) -> None:
            with self._lock:
                self._connections = (*self._open(), weakref.ref(raw))

        @event.listens_for(engine, "checkout")
        def _used(raw: Any, record: Any, proxy: Any) -> None:
            if self._pool.checkedout() > 1:
                self.needed_at = time.monotonic()

    def _open(self) -> "list[weakref.ref[Any]]":
        return [one for one in self._connections if (raw := one()) is not None and not raw.closed]

    @property
    def _pool(self) -> QueuePool:
        assert isinstance(self.engine.pool, QueuePool)
        return self.engine.pool

    def maintain(self) -> None:
        """Close the spare connection if it is due, between two transactions; ignore its errors."""
        if time.monotonic() - self.needed_at < SPARE_S or self._pool.checkedin() < 2 or len(self._open()) < 2:
            return
        if not self._closing.acquire(blocking=False):
            return
        try:
            with suppress(SQLAlchemyError), self.engine.connect():  # the one that was used last
                spare = self.engine.connect()
                spare.detach()
                spare.close()
        finally:
            self._closing.release()


def _connect(arguments: Any, options: dict[str, Any]) -> Any:
    """
    Connect, and find out whether a pooler is between.

    A pooler of transactions (PgBouncer) gives each transaction another session: settings of a session and
    prepared statements do not work. Some refuse the settings of the start-up packet, some drop them.
    """
    import psycopg

    connection = _bounded_connection()
    try:
        raw = connection.connect(*arguments, **options)
    except psycopg.OperationalError as exc:
        if "unsupported startup parameter" not in str(exc):
            raise
        raw = connection.connect(*arguments, **{**options, "options": ""})
    raw.autocommit = True
    seen = raw.execute(
        f"SELECT current_setting('{DIRECT}', true), current_setting('lock_timeout')"
    ).fetchone()
    raw.autocommit = False
    raw.pooled = seen[0] != "1"
    if raw.pooled:
        raw.prepare_threshold = None
        raw.without_timeouts = seen[1] == "0"
    return raw


@contextmanager
def patient_connections(engine: Engine) -> Iterator[None]:
    """Open connections without a client timeout, for statements that may take any time."""
    if engine.dialect.name != "postgresql":
        yield
        return

    def disable_timeout(raw: Any, record: Any) -> None:
        raw.answer_s = None

    engine.dispose()
    event.listen(engine, "connect", disable_timeout)
    try:
        yield
    finally:
        event.remove(engine, "connect", disable_timeout)
        engine.dispose()


@cache
def _bounded_connection() -> Any:
    import psycopg

    class BoundedConnection(psycopg.Connection[Any]):
        """
        A connection that fails if the server does not answer.

        TCP timeouts do not detect a stopped proxy or server, whose kernel still acknowledges packets.
        """

        answer_s: float | None = ANSWER_S
        pooled = False
        without_timeouts = False
        """Whether the sessions behind the pooler have no lock_timeout: write transactions then set one."""

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
                        self.pgconn.finish()  # a late answer must not be taken for that of the next query
                        raise psycopg.OperationalError(f"no answer within {self.answer_s:.0f} s")
                    wanted = gen.send(ready)
            except StopIteration as exc:
                return exc.value

    return BoundedConnection
