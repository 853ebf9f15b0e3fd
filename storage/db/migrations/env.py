"""Runs the migrations on the connection that storage/db/schema.py hands over."""

from alembic import context

import storage.db.migrations.indexes  # noqa: F401 - they belong to the metadata
from storage.db.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
