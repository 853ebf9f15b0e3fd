"""Alembic's migrations of the job table."""
