"""
Tokens for the page and the REST API.

Older workers and servers go on: the table is new.
"""

import sqlalchemy as sa
from alembic import op

from storage.db.tables import Id

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "token",
        sa.Column("id", Id, autoincrement=True, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("user", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double()),
        sa.Column("revoked_at", sa.Double()),
        sa.Column("used_at", sa.Double()),
        sa.PrimaryKeyConstraint("id", name="pk_token"),
        sa.UniqueConstraint("sha256", name="uq_token_sha256"),
        sqlite_autoincrement=True,
    )
