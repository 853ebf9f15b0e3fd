"""The Celery application and the notifications it carries."""
