"""
An id for the installation: the prefix of its notifications in Redis.

Two installations may share one Redis database. They used the same keys, and took each other's
notifications. Older workers go on: the column is new, and they read the old keys.
"""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("schema_info", sa.Column("installation", sa.String(16)))
    info = sa.table("schema_info", sa.column("installation"))
    op.get_bind().execute(sa.update(info).values(installation=secrets.token_hex(4)))
