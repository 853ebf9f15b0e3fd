"""Log records of workers: lines for people, or JSON for machines, passwords masked."""

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
"""Which pipe the log of this process goes to already: a worker of several starts no relay of its own."""
FLUSH_S = 1.0
"""How long a worker that ends waits for its last lines to be written: a container ends with it."""


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
    """
    A broker that is away, or a machine without a process left, is no defect: what Celery says of it
    keeps its line, and loses its traceback.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        known = _known(error) if error is not None and record.name.split(".")[0] in BROKER_LOGGERS else None
        if known is not None:
            record.msg, record.args = f"{record.getMessage()} ({type(known).__name__}: {known})", ()
            record.exc_info = record.exc_text = None
        return True


def _known(error: BaseException) -> BaseException | None:
    """Return what of the machine or the broker is behind an error; None: it is a defect."""
    if _is_away(error):
        return error
    behind: BaseException | None = error  # Celery stumbles on over a process that it could not start
    while behind is not None and not is_shortage(behind):
        behind = behind.__cause__ or behind.__context__
    return behind


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
    threading.excepthook = _log_uncaught


def _log_uncaught(args: threading.ExceptHookArgs) -> None:
    """Log what a thread did not catch as one record, whatever stderr is."""
    name = args.thread.name if args.thread is not None else "a thread"
    error = args.exc_value or args.exc_type()
    logging.getLogger("ganq").error(
        "thread %s has ended: %s", name, error, exc_info=(args.exc_type, error, args.exc_traceback)
    )


@contextmanager
def relayed(settings: Settings) -> Iterator[None]:
    """
    Send what this process and its children write to stdout and stderr through a relay that never blocks.

    See worker/host/log_relay.py. Without a relay, where the machine starts no process, they write themselves.
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
            with suppress(subprocess.TimeoutExpired):  # it goes on by itself, see LINGER_S
                relay.wait(FLUSH_S)


def _start_relay(log_format: str) -> "subprocess.Popen[bytes] | None":
    reader, writer = os.pipe()
    program = str(Path(__file__).with_name("log_relay.py"))
    try:
        relay = subprocess.Popen(
            [sys.executable, "-I", "-S", program, log_format],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a group's Ctrl-C or SIGKILL is for those whose log it is
        )
    except OSError as exc:
        logging.getLogger("ganq.logs").warning("no relay for the log: %s", exc)
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
