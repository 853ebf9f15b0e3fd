"""Runs jobs: the Celery app, the supervisor that owns a lease, the warm runner, recovery."""
