"""
What many workers need: an index from a bucket to its running jobs, and room for updates in place.

Additive. The index still has all running jobs, for older workers too. On Postgres an update that changes no
indexed column (a heartbeat, a report of a worker) stays in its page if that has room, and writes no index.
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

RUNNING = sa.text("state = 'running'")
STORAGE = {
    "job": "fillfactor = 80, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000",
    "attempt": "autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000",
    "worker": "fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500",
}


def upgrade() -> None:
    op.drop_index("ix_job_running", "job")
    op.create_index(
        "ix_job_running", "job", [sa.text("(id % 64)")], sqlite_where=RUNNING, postgresql_where=RUNNING
    )
    if op.get_bind().dialect.name == "postgresql":
        for table, parameters in STORAGE.items():
            op.execute(f"ALTER TABLE {table} SET ({parameters})")
