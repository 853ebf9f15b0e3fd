"""Log records of workers: lines for people, or JSON for machines, passwords masked."""

import json
import logging
import socket
import sys

from jobs.text import use_streams_of_any_encoding
from storage.settings import Settings, redact

BROKER_LOGGERS = ("celery", "kombu")


class RedactingFormatter(logging.Formatter):
    """Plain lines; whatever is said, a password in a URL is masked."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record).replace("\n", "\n  "))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(line)


class BrokerAway(logging.Filter):
    """A broker that is away is no defect: what Celery tells of it keeps its line, and loses its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.name.split(".")[0] in BROKER_LOGGERS and error is not None and _is_away(error):
            record.msg, record.args = f"{record.getMessage()} ({type(error).__name__}: {error})", ()
            record.exc_info = record.exc_text = None
        return True


def _is_away(error: BaseException) -> bool:
    # By name: redis and kombu need not be imported to tell that nothing of theirs was raised.
    mine = f"{type(error).__module__}.{type(error).__name__}"
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or mine in (
        "redis.exceptions.ConnectionError",
        "redis.exceptions.TimeoutError",
        "kombu.exceptions.OperationalError",
    )


def configure(settings: Settings) -> None:
    """Send the log of this process to stderr."""
    use_streams_of_any_encoding()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(BrokerAway())
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
