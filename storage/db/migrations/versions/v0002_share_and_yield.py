"""
What it takes to share: preemption, time limits, parts of a job, sweeps, quotas.

Additive, but for an index that another takes over from. `schema_info.compatible_from` names
the oldest code that may work on this schema: see storage/db/schema.py.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CLAIMABLE = sa.text("state = 'queued' AND held = 0 AND blockers = 0 AND not_before IS NULL")
YIELDED = sa.text("state = 'queued' AND yielded_at IS NOT NULL")
DELAYED = sa.text("state = 'queued' AND not_before IS NOT NULL")


def upgrade() -> None:
    zero = sa.text("0")
    for column in (
        sa.Column("part_of", ID, nullable=True),
        sa.Column("sweep", sa.String(length=64), nullable=True),
        sa.Column("preemptible", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("preempt_for", ID, nullable=True),
        sa.Column("yields", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("yielded_at", sa.Double(), nullable=True),
        sa.Column("time_limit_s", sa.Double(), nullable=True),
        sa.Column("ran_s", sa.Double(), server_default=zero, nullable=False),
    ):
        op.add_column("job", column)
    op.drop_index("ix_job_claimable", "job")
    op.create_index(
        "ix_job_claimable",
        "job",
        ["state", "queue", sa.text("priority DESC"), "user", "id"],
        sqlite_where=CLAIMABLE,
        postgresql_where=CLAIMABLE,
    )
    op.create_index("ix_job_ripening", "job", ["not_before"], sqlite_where=DELAYED, postgresql_where=DELAYED)
    op.create_index("ix_job_yielded", "job", ["yielded_at"], sqlite_where=YIELDED, postgresql_where=YIELDED)
    for name in ("part_of", "sweep"):
        where = sa.text(f"{name} IS NOT NULL")
        op.create_index(f"ix_job_{name}", "job", [name], sqlite_where=where, postgresql_where=where)
    op.create_table(
        "share",
        sa.Column("user", sa.String(length=64), nullable=False),
        sa.Column("served_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("user", name="pk_share"),
    )
    op.create_table(
        "quota",
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("scope", "name", name="pk_quota"),
    )
    info = op.create_table(
        "schema_info",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("compatible_from", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_schema_info"),
    )
    op.bulk_insert(info, [{"id": 1, "compatible_from": "0002"}])
