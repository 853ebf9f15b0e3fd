"""
Indexes of the held jobs and of the retries.

The page counts the first and finds the second; without them it would read all jobs. Older workers go on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

HELD = sa.text("held != 0")
RETRIES = sa.text("retry_of IS NOT NULL")


def upgrade() -> None:
    op.create_index("ix_job_held", "job", ["id"], sqlite_where=HELD, postgresql_where=HELD)
    op.create_index("ix_job_retry_of", "job", ["retry_of"], sqlite_where=RETRIES, postgresql_where=RETRIES)
