"""
A mark on jobs whose results `ganq gc` must leave.

Older workers go on: they insert rows without it. A `ganq gc --jobs` of an older version does not see it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("job", sa.Column("kept", sa.Integer(), server_default=sa.text("0"), nullable=False))
