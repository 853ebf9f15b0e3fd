"""The Celery application, notifications, and how they wake the supervisor."""
