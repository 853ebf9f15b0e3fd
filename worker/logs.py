"""Log records of workers: lines for people, or JSON for machines, passwords masked."""

import json
import logging
import sys

from storage.settings import Settings, redact


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


def configure(settings: Settings) -> None:
    """Send the log of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
