"""Send one message: by HTTP, to a command of this machine, or through apprise."""

import asyncio
import os
import shlex
import signal
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from tempfile import TemporaryFile
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jobs.errors import GanqError, one_line
from storage.db.webhooks import Webhook
from storage.settings import Settings, redact
from storage.version import version
from worker.webhooks import targets
from worker.webhooks.message import Message, signed_headers

T = TypeVar("T")

MAX_ERROR_LENGTH = 300
READ_BYTES = 65_536


@dataclass(frozen=True)
class Reply:
    """What came of one attempt."""

    delivered: bool
    status: int | None = None
    error: str | None = None
    retry_after_s: float = 0.0
    """The receiver wants no other attempt before."""
    gone: bool = False


async def send(hook: Webhook, message: Message, settings: Settings) -> Reply:
    """Send a message within the timeout of the settings; never raises."""
    channel = {"http": _http, "command": _command, "apprise": _apprise}[hook.channel]
    limit_s = settings.webhook_timeout_seconds
    try:
        async with asyncio.timeout(limit_s):
            return await channel(hook, message, settings)
    except TimeoutError:
        return Reply(False, error=f"no answer within {limit_s:g} s")
    except Exception as exc:
        return Reply(False, error=_reason(exc))


async def in_thread(call: Callable[..., T], *args: Any) -> T:
    """
    Call a function that may block, in a thread of its own.

    The threads of an executor would be few, and would be waited for at the end of the process: a name
    server that does not answer could take all of them.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = call(*args)
        except Exception as exc:
            error = exc
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="webhooks", daemon=True).start()
    return await future


async def _http(hook: Webhook, message: Message, settings: Settings) -> Reply:
    """Connect to an address that was checked, and to no other: not through a proxy, and after no redirect."""
    scheme, host, port = targets.split_http(hook.url)
    failed = OSError()
    for address in await in_thread(targets.addresses, host, port, settings):
        try:
            reader, writer = await asyncio.open_connection(
                address,
                port,
                ssl=_tls() if scheme == "https" else None,
                server_hostname=host if scheme == "https" else None,
            )
        except OSError as exc:
            failed = exc
            continue
        try:
            return await _exchange(reader, writer, hook, message)
        finally:
            writer.transport.abort()  # close() would wait for the receiver's end of TLS
    raise failed


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hook: Webhook, message: Message
) -> Reply:
    """Send the request, and read the beginning of the answer; its body is of no use."""
    import h11

    parts = urlsplit(hook.url)
    headers = {
        "host": parts.netloc,
        "user-agent": f"ganq/{version()}",
        "content-length": str(len(message.body)),
        "connection": "close",
        **signed_headers(message, hook.secret, time.time()),
    }
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    request = h11.Request(method="POST", target=target, headers=list(headers.items()))
    connection = h11.Connection(h11.CLIENT)
    for part in (request, h11.Data(data=message.body), h11.EndOfMessage()):
        writer.write(connection.send(part) or b"")
    try:
        while not isinstance(event := connection.next_event(), h11.Response):
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(READ_BYTES))
    except h11.RemoteProtocolError:
        return Reply(False, error="what it answered is not HTTP")
    return _reply(event.status_code, dict(event.headers).get(b"retry-after", b"").decode("ascii", "replace"))


@cache
def _tls() -> ssl.SSLContext:
    """Return a context that trusts the authorities of the system, and those of certifi."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _reply(status: int, retry_after: str) -> Reply:
    if 200 <= status < 300:
        return Reply(True, status)
    what = "a redirect, which is not followed" if 300 <= status < 400 else "not a success"
    pause_s = float(retry_after) if retry_after.isascii() and retry_after.isdecimal() else 0.0
    return Reply(
        False, status, f"HTTP {status}: {what}", retry_after_s=min(pause_s, 86400.0), gone=status == 410
    )


async def _command(hook: Webhook, message: Message, settings: Settings) -> Reply:
    """Run the command of this machine's settings with the message on its standard input."""
    # Files, not pipes: a command may leave its input unread, and what it starts keep its output open.
    with TemporaryFile() as body, TemporaryFile() as errors:
        body.write(message.body + b"\n")
        body.seek(0)
        process = await asyncio.create_subprocess_exec(
            *shlex.split(settings.webhook_command),
            stdin=body,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:  # the time is up
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if code == 0:
            return Reply(True)
        errors.seek(max(errors.seek(0, os.SEEK_END) - READ_BYTES, 0))
        lines = errors.read().decode(errors="replace").strip().splitlines()
        return Reply(False, error=f"the command exited with {code}: {(lines or [''])[-1]}"[:MAX_ERROR_LENGTH])


async def _apprise(hook: Webhook, message: Message, settings: Settings) -> Reply:
    return await in_thread(_notify, hook.url, message, settings)


def _notify(url: str, message: Message, settings: Settings) -> Reply:
    targets.check_service(url, settings)
    plugin = targets.notifier(url.removeprefix(targets.APPRISE))
    import apprise

    kinds = {"job.succeeded": apprise.NotifyType.SUCCESS, "job.failed": apprise.NotifyType.FAILURE}
    kind = kinds.get(message.type, apprise.NotifyType.INFO)
    capture: Any = apprise.LogCapture
    with capture(level=apprise.logging.WARNING, fmt="%(message)s") as said:
        done = plugin.notify(body=message.text, title=message.title, notify_type=kind)
        lines = said.getvalue().strip().splitlines()
    if done:
        return Reply(True)
    return Reply(False, error=redact((lines or ["apprise could not send it"])[-1])[:MAX_ERROR_LENGTH])


def _reason(exc: BaseException) -> str:
    """Return why a message could not be sent, in one line."""
    if isinstance(exc, GanqError):
        return f"{exc.message}; {exc.hint}" if exc.hint else exc.message
    if isinstance(exc, OSError) and exc.strerror:
        number = 0 if isinstance(exc, ssl.SSLError) else exc.errno or 0
        return (os.strerror(number) if number > 0 else exc.strerror).lower()
    return redact(one_line(exc))[:MAX_ERROR_LENGTH]
