"""
The tables. Times are seconds since 1970 (UTC) by the database's clock. Partial indexes are in
storage/db/migrations/indexes.py.

job           a request and its state; (attempt, lease_token) is the fence
attempt       one row per claim; at most one open per job
checkpoint    registered checkpoints; a folder without a row does not exist for readers
event         history of a job, written in the transaction of the change
worker        last report of each worker
dependency    job_id can run when `needs` has succeeded
end_dependency  job_id can run when `needs` has ended, whatever its outcome ('any'), or has failed ('fail')
label         key and value that a user has given a job
share         when each user was last served
quota         how many jobs of a user or a queue may run at once
token         who may use the page and the REST API, with hashes of the tokens
webhook       where events are sent, and which
delivery      an event that is to be sent to a webhook, or was; a trigger on `event` inserts it
schema_info   the oldest code that may work on these tables
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

from storage.db.json_object import JsonObject

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
metadata = MetaData(naming_convention=NAMING)

Json = JsonObject()

# SQLite gives an auto-incremented id to INTEGER only.
Id = BigInteger().with_variant(Integer(), "sqlite")

# The planner of SQLite matches a partial index by its text: queries use the same literals.
CLAIMABLE = "state = 'queued' AND held = 0 AND blockers = 0 AND not_before IS NULL"
DELAYED = "state = 'queued' AND not_before IS NOT NULL"
PREEMPTED = "state = 'queued' AND yielded_at IS NOT NULL"
RUNNING = "state = 'running'"
BUCKET = "(job.id % 64)"
"""The bucket of a running job: see WatchShare. An index has this expression, so that 64 cannot be changed."""
BEGINS = "state = 'queued' AND begin_at IS NOT NULL"
THROTTLED = "state = 'queued' AND throttled = 1"
UNRESOLVED = "resolved = 0"
HELD = "held != 0"
RETRIES = "retry_of IS NOT NULL"
PENDING = "state = 'pending'"


CLOCKS = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    # now() would be the start of the transaction, which may have waited for a lock.
    "postgresql": "extract(epoch FROM clock_timestamp())::double precision",
}


def indexed_by(dialect: str, index: str) -> str:
    """
    Name the index for SQLite, which else prefers an index on `state` and reads all rows of that state.

    Postgres chooses the partial index by itself.
    """
    return f"INDEXED BY {index}" if dialect == "sqlite" else ""


class utcnow(FunctionElement[float]):  # noqa: N801 - reads as SQL
    """
    The database's clock at the moment of the statement, in seconds since 1970.

    A FunctionElement, because SQLAlchemy cannot cache a statement that holds a bare
    ColumnElement of ours: compiling it again each time took half of a claim's time.
    """

    type: TypeEngine[float] = Double()
    name = "utcnow"
    inherit_cache = True


@compiles(utcnow)
def _utcnow(element: Any, compiler: Any, **kw: Any) -> str:
    return CLOCKS[compiler.dialect.name]


job = Table(
    "job",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("submit_key", String(64), nullable=False, unique=True),
    Column("name", String(64), index=True),
    Column("kind", String(32), nullable=False),
    Column("queue", String(64), nullable=False),
    Column("user", String(64), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("spec", Json, nullable=False),
    Column("spec_version", Integer, nullable=False),
    Column("inputs", Json),  # pinned by the first attempt: checkpoint, data set
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("lease_token", String(32)),
    Column("worker", String(128)),
    Column("hb_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("held", Integer, nullable=False, server_default=text("0")),
    Column("blockers", Integer, nullable=False, server_default=text("0")),
    Column("not_before", Double),
    Column("cancel_requested_at", Double),
    Column("crash_count", Integer, nullable=False, server_default=text("0")),
    Column("waits", Integer, nullable=False, server_default=text("0")),
    Column("fresh_retries", Integer, nullable=False, server_default=text("0")),
    Column("progress", Json),  # done, total, unit, rate, epoch, epochs, phase
    Column("result", Json),
    Column("error_code", String(32)),
    Column("error_message", Text),
    Column("error_hint", Text),
    Column("bit_exact", Integer),
    Column("retry_of", Id, ForeignKey("job.id")),
    Column("rung_at", Double),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("part_of", Id),  # parent of a shard
    Column("sweep", String(64)),  # id of its sweep
    Column("preemptible", Integer, nullable=False, server_default=text("0")),
    Column("preempt_for", Id),  # waiting job for which this one is preempted
    Column("yields", Integer, nullable=False, server_default=text("0")),
    Column("yielded_at", Double),
    Column("time_limit_s", Double),
    Column("ran_s", Double, nullable=False, server_default=text("0")),  # duration of ended attempts
    Column("kept", Integer, nullable=False, server_default=text("0")),  # results are not deleted
    Column("note", Text),
    Column("begin_at", Double),  # counts in `blockers` until then
    Column("max_running", Integer),  # of its sweep
    Column("throttled", Integer, nullable=False, server_default=text("0")),  # counts in `blockers`
    Column("position", Double, nullable=False, server_default=text("0")),  # among jobs of equal priority
    Index("ix_job_state_id", "state", "id"),
    sqlite_autoincrement=True,
)

attempt = Table(
    "attempt",
    metadata,
    Column("job_id", Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("lease_token", String(32), nullable=False),
    Column("worker", String(128), nullable=False),
    Column("host", String(128)),
    Column("device", String(128)),
    Column("boot_id", String(64)),
    Column("pid", Integer),
    Column("start_ticks", BigInteger),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("outcome", String(16)),
    Column("error_code", String(32)),
    Column("error_message", Text),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("job_id", Id, ForeignKey("job.id", ondelete="CASCADE"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(16), nullable=False),  # resume, epoch, final, import
    Column("epoch", Integer, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("path", Text, nullable=False),  # relative to the volume
    Column("manifest_sha256", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("metric", Double),
    Column("created_at", Double, nullable=False),
    Index("ix_checkpoint_job_id_step", "job_id", "step"),
    sqlite_autoincrement=True,
)

event = Table(
    "event",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("job_id", Id, ForeignKey("job.id", ondelete="CASCADE"), nullable=False),
    Column("at", Double, nullable=False),
    Column("type", String(32), nullable=False),
    Column("attempt", Integer),
    Column("worker", String(128)),
    Column("detail", Json),
    Index("ix_event_job_id_id", "job_id", "id"),
    sqlite_autoincrement=True,
)

worker = Table(
    "worker",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("host", String(128), nullable=False),
    Column("boot_id", String(64)),
    Column("pid", Integer),
    Column("start_ticks", BigInteger),
    Column("device", String(128), nullable=False),
    Column("queues", Text, nullable=False),
    Column("state", String(16), nullable=False),  # starting, idle, busy, draining, stopped
    Column("job_id", Id),
    Column("version", String(32), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("drain_requested_at", Double),
)

dependency = Table(
    "dependency",
    metadata,
    Column("job_id", Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    Column("needs", Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True, index=True),
)

end_dependency = Table(
    "end_dependency",
    metadata,
    Column("job_id", Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    Column("needs", Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    Column("condition", String(16), nullable=False),  # any, fail
    # Older workers do not read this table; it is resolved when a newer worker sees that `needs` has ended.
    Column("resolved", Integer, nullable=False, server_default=text("0")),
)

label = Table(
    "label",
    metadata,
    Column("job_id", Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(256), nullable=False),
    Index("ix_label_key_value_job_id", "key", "value", "job_id"),
)

share = Table(
    "share",
    metadata,
    Column("user", String(64), primary_key=True),
    Column("served_at", Double, nullable=False),
)

quota = Table(
    "quota",
    metadata,
    Column("scope", String(16), primary_key=True),  # user, queue
    Column("name", String(64), primary_key=True),  # '*': each user or queue without a row
    Column("max_running", Integer, nullable=False),
)

token = Table(
    "token",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("user", String(64), nullable=False),
    Column("role", String(16), nullable=False),  # viewer, submitter, operator, admin
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("used_at", Double),
    sqlite_autoincrement=True,
)

webhook = Table(
    "webhook",
    metadata,
    Column("id", Id, primary_key=True, autoincrement=True),
    Column("channel", String(16), nullable=False),  # http, command, apprise
    Column("url", Text, nullable=False),
    Column("secret", String(128), nullable=False, unique=True),  # signing needs it in clear
    # Filters: lines of text between line feeds, so that a trigger can search them; empty: all.
    *(Column(name, Text, nullable=False) for name in ("events", "users", "kinds", "jobs", "labels")),
    Column("created_by", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("delivered_at", Double),
    Column("failing_since", Double),  # no delivery has succeeded since
    Column("disabled_at", Double),
    Column("disabled_reason", Text),
    Column("lease_owner", String(32)),  # the process that delivers
    Column("lease_until", Double),
    sqlite_autoincrement=True,
)
# A restore inserts the events first, so that they are not sent again.
webhook.add_is_dependent_on(event)

delivery = Table(
    "delivery",
    metadata,
    Column("event_id", Id, ForeignKey("event.id", ondelete="CASCADE"), primary_key=True),
    # No foreign key: a webhook that is removed meanwhile must not break the transaction of a job's event.
    Column("webhook_id", Id, primary_key=True),
    Column("job_id", Id, nullable=False),
    Column("state", String(16), nullable=False),  # pending, delivered, failed
    Column("created_at", Double, nullable=False),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("next_at", Double),  # of a retry
    Column("tried_at", Double),
    Column("status", Integer),  # of HTTP
    Column("error", Text),
)

schema_info = Table(
    "schema_info",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("compatible_from", String(32), nullable=False),
    Column("installation", String(16)),  # prefix of its notifications in Redis
)
