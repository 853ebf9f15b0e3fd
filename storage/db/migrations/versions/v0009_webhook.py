"""
Webhooks, and the deliveries of events to them.

Older workers go on: the tables are new, and a trigger writes the deliveries of the events that they
record. It is in the transaction of the event, so that no event is missed; a cursor over the ids of events
would miss those that commit after later ones.
"""

import sqlalchemy as sa
from alembic import op

from storage.db.tables import Id

revision = "0009"
down_revision = "0008"

FILTERS = {"events": "NEW.type", "users": 'job."user"', "kinds": "job.kind", "jobs": "CAST(job.id AS TEXT)"}


def _deliveries(position: str, line_feed: str) -> str:
    """Return the statement of the trigger; shards are a matter of their parent."""
    conditions = " AND ".join(
        f"(webhook.{name} = '' OR {position}(webhook.{name}, {line_feed} || {value} || {line_feed}) > 0)"
        for name, value in FILTERS.items()
    )
    return f"""INSERT INTO delivery (event_id, webhook_id, job_id, state, created_at)
        SELECT NEW.id, webhook.id, NEW.job_id, 'pending', NEW.at
        FROM webhook JOIN job ON job.id = NEW.job_id
        WHERE webhook.disabled_at IS NULL AND job.part_of IS NULL AND {conditions};"""


SQLITE_TRIGGERS = (
    f"""CREATE TRIGGER event_is_delivered AFTER INSERT ON event
        WHEN EXISTS (SELECT 1 FROM webhook)
        BEGIN {_deliveries("instr", "char(10)")} END""",
)
POSTGRES_TRIGGERS = (
    f"""CREATE FUNCTION ganq_deliver() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN
        IF EXISTS (SELECT 1 FROM webhook) THEN {_deliveries("strpos", "chr(10)")} END IF;
        RETURN NULL;
        END $$""",
    """CREATE TRIGGER event_is_delivered AFTER INSERT ON event FOR EACH ROW
        EXECUTE FUNCTION ganq_deliver()""",
)


def upgrade() -> None:
    op.create_table(
        "webhook",
        sa.Column("id", Id, autoincrement=True, nullable=False),
        sa.Column("channel", sa.String(16), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.String(128), nullable=False),
        *(
            sa.Column(name, sa.Text(), nullable=False)
            for name in ("events", "users", "kinds", "jobs", "labels")
        ),
        sa.Column("created_by", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("delivered_at", sa.Double()),
        sa.Column("failing_since", sa.Double()),
        sa.Column("disabled_at", sa.Double()),
        sa.Column("disabled_reason", sa.Text()),
        sa.Column("lease_owner", sa.String(32)),
        sa.Column("lease_until", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_webhook"),
        sa.UniqueConstraint("secret", name="uq_webhook_secret"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "delivery",
        sa.Column("event_id", Id, nullable=False),
        sa.Column("webhook_id", Id, nullable=False),
        sa.Column("job_id", Id, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_at", sa.Double()),
        sa.Column("tried_at", sa.Double()),
        sa.Column("status", sa.Integer()),
        sa.Column("error", sa.Text()),
        sa.ForeignKeyConstraint(["event_id"], ["event.id"], name="fk_delivery_event_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("event_id", "webhook_id", name="pk_delivery"),
    )
    pending = sa.text("state = 'pending'")
    columns = ["webhook_id", "job_id", "event_id"]
    op.create_index(
        "ix_delivery_pending", "delivery", columns, sqlite_where=pending, postgresql_where=pending
    )
    on_sqlite = op.get_bind().dialect.name == "sqlite"
    for trigger in SQLITE_TRIGGERS if on_sqlite else POSTGRES_TRIGGERS:
        op.execute(trigger)
