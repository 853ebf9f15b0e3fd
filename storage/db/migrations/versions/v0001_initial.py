"""
The first schema: job, attempt, checkpoint, event, worker, dependency.

Two triggers hold what no code may break: a terminal state is final, and the
history is only ever added to.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CLAIMABLE = "state = 'queued' AND held = 0 AND blockers = 0"
TERMINAL = "('succeeded', 'failed', 'cancelled')"

SQLITE_TRIGGERS = (
    f"""CREATE TRIGGER job_terminal_is_final BEFORE UPDATE OF state ON job
        WHEN OLD.state IN {TERMINAL} AND NEW.state <> OLD.state
        BEGIN SELECT RAISE(ABORT, 'a terminal state is final'); END""",
    """CREATE TRIGGER event_is_append_only BEFORE UPDATE ON event
        BEGIN SELECT RAISE(ABORT, 'events are never changed'); END""",
)
POSTGRES_TRIGGERS = (
    """CREATE FUNCTION ganq_refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION '%', TG_ARGV[0]; END $$""",
    f"""CREATE TRIGGER job_terminal_is_final BEFORE UPDATE OF state ON job FOR EACH ROW
        WHEN (OLD.state IN {TERMINAL} AND NEW.state <> OLD.state)
        EXECUTE FUNCTION ganq_refuse('a terminal state is final')""",
    """CREATE TRIGGER event_is_append_only BEFORE UPDATE ON event FOR EACH ROW
        EXECUTE FUNCTION ganq_refuse('events are never changed')""",
)


def where(condition: str) -> dict[str, Any]:
    """Return the condition of a partial index, for both dialects."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "job",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("submit_key", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=True),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("queue", sa.String(length=64), nullable=False),
        sa.Column("user", sa.String(length=64), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("spec_version", sa.Integer(), nullable=False),
        sa.Column("inputs", sa.JSON(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_token", sa.String(length=32), nullable=True),
        sa.Column("worker", sa.String(length=128), nullable=True),
        sa.Column("hb_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("held", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("blockers", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("not_before", sa.Double(), nullable=True),
        sa.Column("cancel_requested_at", sa.Double(), nullable=True),
        sa.Column("crash_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("waits", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("fresh_retries", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error_code", sa.String(length=32), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("error_hint", sa.Text(), nullable=True),
        sa.Column("bit_exact", sa.Integer(), nullable=True),
        sa.Column("retry_of", ID, nullable=True),
        sa.Column("rung_at", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["retry_of"], ["job.id"], name="fk_job_retry_of"),
        sa.PrimaryKeyConstraint("id", name="pk_job"),
        sa.UniqueConstraint("submit_key", name="uq_job_submit_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_claimable", "job", ["state", sa.text("priority DESC"), "id"], **where(CLAIMABLE))
    op.create_index("ix_job_name", "job", ["name"], unique=False)
    op.create_index("ix_job_running", "job", ["id"], unique=False, **where("state = 'running'"))
    op.create_index("ix_job_state_id", "job", ["state", "id"], unique=False)
    op.create_table(
        "worker",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("host", sa.String(length=128), nullable=False),
        sa.Column("boot_id", sa.String(length=64), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("start_ticks", sa.BigInteger(), nullable=True),
        sa.Column("device", sa.String(length=128), nullable=False),
        sa.Column("queues", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("job_id", ID, nullable=True),
        sa.Column("version", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_worker"),
    )
    op.create_table(
        "attempt",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("lease_token", sa.String(length=32), nullable=False),
        sa.Column("worker", sa.String(length=128), nullable=False),
        sa.Column("host", sa.String(length=128), nullable=True),
        sa.Column("device", sa.String(length=128), nullable=True),
        sa.Column("boot_id", sa.String(length=64), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("start_ticks", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=True),
        sa.Column("error_code", sa.String(length=32), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_attempt_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_attempt"),
    )
    op.create_index("uq_attempt_open", "attempt", ["job_id"], unique=True, **where("ended_at IS NULL"))
    op.create_table(
        "checkpoint",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("metric", sa.Double(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_checkpoint_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoint"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_checkpoint_job_id_step", "checkpoint", ["job_id", "step"], unique=False)
    op.create_table(
        "dependency",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("needs", ID, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_dependency_job_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["needs"], ["job.id"], name="fk_dependency_needs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "needs", name="pk_dependency"),
    )
    op.create_index("ix_dependency_needs", "dependency", ["needs"], unique=False)
    op.create_table(
        "event",
        sa.Column("id", ID, autoincrement=True, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("worker", sa.String(length=128), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_event_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_event"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_event_job_id_id", "event", ["job_id", "id"], unique=False)
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    for trigger in SQLITE_TRIGGERS if on_sqlite else POSTGRES_TRIGGERS:
        op.execute(trigger)
