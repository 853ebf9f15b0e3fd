"""
What steering needs: notes and labels, times to begin, conditions of dependencies, the order within a queue.

Additive. Older workers go on: they do not start a job that waits for a time, for the end of another job or
for its sweep (each counts in `blockers`), and newer workers release those. They ignore `position`, and
requests to drain. The shape of ix_job_claimable changes; older workers sort the jobs of one user at a claim.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CLAIMABLE = sa.text("state = 'queued' AND held = 0 AND blockers = 0 AND not_before IS NULL")
BEGINS = sa.text("state = 'queued' AND begin_at IS NOT NULL")
THROTTLED = sa.text("state = 'queued' AND throttled = 1")
UNRESOLVED = sa.text("resolved = 0")


def upgrade() -> None:
    zero = sa.text("0")
    for column in (
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("begin_at", sa.Double(), nullable=True),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("throttled", sa.Integer(), server_default=zero, nullable=False),
        sa.Column("position", sa.Double(), server_default=zero, nullable=False),
    ):
        op.add_column("job", column)
    op.add_column("worker", sa.Column("drain_requested_at", sa.Double(), nullable=True))
    op.create_table(
        "label",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("value", sa.String(length=256), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_label_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "key", name="pk_label"),
    )
    op.create_index("ix_label_key_value_job_id", "label", ["key", "value", "job_id"])
    op.create_table(
        "end_dependency",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("needs", ID, nullable=False),
        sa.Column("condition", sa.String(length=16), nullable=False),
        sa.Column("resolved", sa.Integer(), server_default=zero, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_end_dependency_job_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["needs"], ["job.id"], name="fk_end_dependency_needs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "needs", name="pk_end_dependency"),
    )
    partial: dict[str, tuple[str, list[Any], Any]] = {"ix_job_begins": ("job", ["begin_at"], BEGINS)}
    partial["ix_job_throttled"] = ("job", ["sweep", "id"], THROTTLED)
    partial["ix_end_dependency_unresolved"] = ("end_dependency", ["needs"], UNRESOLVED)
    op.drop_index("ix_job_claimable", "job")
    claim_order = ["queue", sa.text("priority DESC"), "user", "position", "id"]
    partial["ix_job_claimable"] = ("job", claim_order, CLAIMABLE)
    for name, (table, columns, where) in partial.items():
        op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
