"""Logging of workers: plain lines or JSON, with passwords masked."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jobs.text import use_streams_of_any_encoding
from storage.settings import Settings, redact
from worker.host.starting import is_shortage

BROKER_LOGGERS = ("celery", "kombu")
RELAY_ENV = "GANQ_LOG_PIPE"
"""The relay's pipe that this process already writes to: one worker of several starts no second relay."""
FLUSH_S = 1.0
"""How long a worker that exits waits for its last lines to be written: a container ends with it."""


class RedactingFormatter(logging.Formatter):
    """Format plain lines; mask passwords in URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record).replace("\n", "\n  "))


class JsonFormatter(logging.Formatter):
    """Format one JSON object per line; mask passwords in URLs."""

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


class WithoutBrokerTracebacks(logging.Filter):
    """Remove Celery's tracebacks for an unavailable broker or a process shortage: neither is a defect."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        known = (
            _known_cause(error) if error is not None and record.name.split(".")[0] in BROKER_LOGGERS else None
        )
        if known is not None:
            record.msg, record.args = f"{record.getMessage()} ({type(known).__name__}: {known})", ()
            record.exc_info = record.exc_text = None
        return True


def _known_cause(error: BaseException) -> BaseException | None:
    """Return the broker's or the machine's error behind an exception; None: it is a defect."""
    if _is_unavailable(error):
        return error
    cause: BaseException | None = error  # Celery raises others after a process that it could not start
    while cause is not None and not is_shortage(cause):
        cause = cause.__cause__ or cause.__context__
    return cause


def _is_unavailable(error: BaseException) -> bool:
    # Compare by name, so that redis and kombu need not be imported.
    name = f"{type(error).__module__}.{type(error).__name__}"
    return isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or name in (
        "redis.exceptions.ConnectionError",
        "redis.exceptions.TimeoutError",
        "kombu.exceptions.OperationalError",
    )


def configure(settings: Settings) -> None:
    """Send the log of this process to stderr."""
    use_streams_of_any_encoding()
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(WithoutBrokerTracebacks())
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    threading.excepthook = _log_uncaught


def _log_uncaught(args: threading.ExceptHookArgs) -> None:
    """Log an exception that ends a thread as one record."""
    name = args.thread.name if args.thread is not None else "a thread"
    error = args.exc_value or args.exc_type()
    logging.getLogger("ganq").error(
        "thread %s has ended: %s", name, error, exc_info=(args.exc_type, error, args.exc_traceback)
    )


@contextmanager
def relayed(settings: Settings) -> Iterator[None]:
    """
    Send stdout and stderr of this process and its children through a relay, so that they never block.

    See worker/host/log_relay.py. If no relay process can be started, they write directly.
    """
    if os.environ.get(RELAY_ENV) == _pipe_name(2):
        yield
        return
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    relay = _start_relay(settings.log_format)
    try:
        yield
    finally:
        os.environ.pop(RELAY_ENV, None)
        for number, saved in zip((1, 2), before, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        if relay is not None:
            with suppress(subprocess.TimeoutExpired):  # it continues by itself, see LINGER_S
                relay.wait(FLUSH_S)


def _start_relay(log_format: str) -> "subprocess.Popen[bytes] | None":
    reader, writer = os.pipe()
    program = str(Path(__file__).with_name("log_relay.py"))
    try:
        relay = subprocess.Popen(
            [sys.executable, "-I", "-S", program, log_format],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C or SIGKILL of the process group must not end the relay
        )
    except OSError as exc:
        logging.getLogger("ganq.logs").warning("the log relay cannot be started: %s", exc)
        os.close(writer)
        return None
    finally:
        os.close(reader)
    for number in (1, 2):
        os.dup2(writer, number)
    os.close(writer)
    os.environ[RELAY_ENV] = _pipe_name(2)
    return relay


def _pipe_name(number: int) -> str:
    about = os.fstat(number)
    return f"{about.st_dev}:{about.st_ino}"
