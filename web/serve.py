"""Start the server: choose the port, print the link, store the address for `ganq open`."""

import contextlib
import errno
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jobs.errors import ConfigError
from storage.db.schema import open_database
from storage.settings import Settings
from web.security import LOOPBACK, TOKEN_FILE, Access, networks, read_token
from worker.webhooks.deliver import delivering

PORT = 8311
PORTS_TRIED = 100
ADDRESS_FILE = "web.json"
MAX_CONNECTIONS = 1024


@dataclass(frozen=True)
class Options:
    """Options of `ganq web`."""

    host: str = "127.0.0.1"
    port: int = PORT
    allow_changes: bool | None = None
    """None: allowed on loopback."""
    token_file: Path | None = None
    hosts: Sequence[str] = ()
    """Host names under which it is reached, beside those of this machine."""
    proxies: Sequence[str] = ()
    user_header: str = "X-Forwarded-User"

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def changes(self) -> bool:
        return self.on_loopback if self.allow_changes is None else self.allow_changes


def access_of(settings: Settings, options: Options) -> Access:
    """
    Return who may use the server.

    Raises:
        ConfigError: others could reach the page, and nothing says who may.
    """
    proxies = networks(options.proxies)
    if not options.on_loopback and options.token_file is None and not proxies:
        raise ConfigError(
            f"--host {options.host} lets other machines in",
            hint="name a token file (--token-file), or the proxy that logs users in (--trust-proxy)",
        )
    token = None
    if options.token_file is not None or options.on_loopback:
        token = read_token(options.token_file or settings.home / TOKEN_FILE)
    own = () if options.host in ("0.0.0.0", "::") else (options.host,)
    return Access(
        token=token,
        hosts=tuple(dict.fromkeys([*LOOPBACK, *own, *(one.lower() for one in options.hosts)])),
        proxies=proxies,
        user_header=options.user_header.lower(),
    )


def bind(host: str, port: int) -> socket.socket:
    """
    Take the port, or the next free one.

    Raises:
        ConfigError: none of PORTS_TRIED is free, or the address is not this machine's.
    """
    for tried in range(port, min(port + PORTS_TRIED, 65536)) if port else [0]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, tried))
            listener.listen(2048)
        except OSError as exc:
            listener.close()
            if exc.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {host}:{tried}: {(exc.strerror or '').lower()}") from exc
        else:
            listener.setblocking(False)
            return listener
    raise ConfigError(f"the ports from {port} on are all taken", hint="--port 0 takes any free one")


def link(host: str, port: int, token: str | None) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{port}/" + (f"?token={quote(token)}" if token else "")


def serve(settings: Settings, options: Options, say: Callable[[str], None]) -> None:
    """
    Serve the page until SIGTERM or Ctrl-C.

    Args:
        say: gets the link, and that the port was taken.

    Raises:
        ConfigError: it cannot be served like this.
        SchemaMismatchError, DatabaseUnavailableError: there is no job table to show.
    """
    import uvicorn

    from web.app import create_app

    allow_open_files()
    access = access_of(settings, options)
    database = open_database(settings, create=settings.is_sqlite)
    listener = bind(options.host, options.port)
    port = listener.getsockname()[1]
    if options.port not in (0, port):
        say(f"port {options.port} is taken; the page is at {port}")
    app = create_app(settings, database, access, allow_changes=options.changes)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
        ws="none",
    )
    server = uvicorn.Server(config)
    with listener, _address_stored(settings, options.host, port, access), delivering(database, settings):
        if access.token is None or sys.stderr.isatty():
            say(f"the page: {link(options.host, port, access.token)}")
        else:  # a log must not contain the token
            say(f"the page: {link(options.host, port, None)} (ganq open --print adds its token)")
        # uvicorn raises the signal again when it has ended: the address must be removed all the same.
        signal.signal(signal.SIGTERM, _exit)
        server.run(sockets=[listener])


def allow_open_files() -> None:
    """Raise the limit of open files to all connections and as many files, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _exit(*_: object) -> None:
    raise SystemExit(0)


@contextlib.contextmanager
def _address_stored(settings: Settings, host: str, port: int, access: Access) -> Iterator[None]:
    """Store the address for `ganq open`; leave that of an earlier server, if it still runs."""
    path = settings.home / ADDRESS_FILE
    earlier = running(settings)
    about = {"pid": os.getpid(), "url": link(host, port, None), "link": link(host, port, access.token)}
    with contextlib.suppress(OSError):
        settings.home.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(about, file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text()).get("pid") == os.getpid():
                path.unlink() if earlier is None else path.write_text(json.dumps(earlier))


def running(settings: Settings) -> dict[str, Any] | None:
    """Return where the page of this home is served, if it answers."""
    try:
        about: dict[str, Any] = json.loads((settings.home / ADDRESS_FILE).read_text())
        address = about["url"].removeprefix("http://").rstrip("/")
        host, _, port = address.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=0.5):
            return about
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def wait_running(settings: Settings, within_s: float = 10.0) -> dict[str, Any] | None:
    """Return where the page is served as soon as it is; None if it is not in time."""
    deadline = time.monotonic() + within_s
    while (about := running(settings)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return about
