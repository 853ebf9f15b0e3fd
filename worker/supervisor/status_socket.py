"""
The status socket: the supervisor reports its state, even while the database is unavailable.

`ganq health` reads it. A thread of its own answers, because the others may wait for the database. It uses
no processor time until a client connects, and a stopped process cannot answer. A file beside the socket
holds the worker's name, so that a worker that does not answer can be named.

    live-<pid of the launcher>.sock   live-<pid of the launcher>.json
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.host.live_supervisors import with_old_keys

if TYPE_CHECKING:
    from worker.supervisor.loop import Supervisor

CLIENT_S = 2.0
"""Time that a client has to read the answer; the next client waits meanwhile."""
RETRY_ACCEPT_S = 0.5
TOUCH_EVERY_S = 3600.0
"""Programs that clean /tmp delete files that have not been used for days."""


def status_socket_path(wake_socket: Path) -> Path:
    """Return the path of the status socket beside a wake-up socket; it has the same length."""
    return wake_socket.with_name(wake_socket.name.replace("wake-", "live-", 1))


class StatusSocket(threading.Thread):
    """Answers each connection with one line of JSON, then closes it."""

    def __init__(self, supervisor: "Supervisor", path: Path) -> None:
        super().__init__(name="status", daemon=True)
        self.supervisor = supervisor
        self.path = path
        self.iterated_at = time.monotonic()
        self.drained_at: float | None = None
        self.stopped = False
        self._write_name()
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(16)

    def _write_name(self) -> None:
        name_file = self.path.with_suffix(".json")
        temporary = name_file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"worker": self.supervisor.identity.name, "pid": os.getpid()}))
        temporary.replace(name_file)

    def _touch_files(self) -> None:
        """Mark this worker's files in the temporary folder as used, so that nothing deletes them as old."""
        own = self.path.parent.glob(self.path.stem.replace("live-", "*-", 1) + ".*")
        for path in (self.path.parent, *own):
            with suppress(OSError):
                os.utime(path)
        with suppress(OSError):
            if not self.path.with_suffix(".json").exists():
                self._write_name()

    def mark_iteration(self) -> None:
        """Record that the main loop begins an iteration."""
        self.iterated_at = time.monotonic()
        if self.supervisor.draining and self.drained_at is None:
            self.drained_at = self.iterated_at

    def run(self) -> None:
        self.listener.settimeout(TOUCH_EVERY_S)
        touched_at = time.monotonic()
        while True:
            if time.monotonic() - touched_at >= TOUCH_EVERY_S:
                self._touch_files()
                touched_at = time.monotonic()
            try:
                client, _ = self.listener.accept()
            except TimeoutError:
                continue
            except OSError:  # stop() has closed it, or no file descriptor is free
                if self.stopped:
                    return
                time.sleep(RETRY_ACCEPT_S)
                continue
            with client, suppress(OSError):
                client.settimeout(CLIENT_S)
                client.sendall(json.dumps(with_old_keys(self.status())).encode() + b"\n")

    def status(self) -> dict[str, Any]:
        """Return the supervisor's state; ages are seconds of the monotonic clock."""
        supervisor = self.supervisor
        settings, heartbeat, lease = supervisor.settings, supervisor.heartbeat, supervisor.lease
        now = time.monotonic()
        threads = (heartbeat, supervisor.recovery)
        state = "draining" if supervisor.draining else "idle" if lease is None else "busy"
        return {
            "worker": supervisor.identity.name,
            "pid": os.getpid(),
            "state": state,
            "job_id": lease.job_id if lease is not None else None,
            "loop_s": now - self.iterated_at,
            "heartbeat_s": now - heartbeat.iterated_at,
            "report_s": now - heartbeat.acknowledged_at,
            "database_s": now - supervisor.database.answered_at,
            "draining_s": now - self.drained_at if self.drained_at is not None else None,
            "dead_threads": [
                one.name
                for one in threads
                if one.ident is not None and not one.is_alive() and not one.stopping.is_set()
            ],
            "stuck_after_s": settings.stuck_seconds,
            "volume": str(settings.volume),
            # While the loop waits for the database it reads no answers of the volume.
            "volume_s": max(supervisor.volume_monitor.silent_s - (now - self.iterated_at), 0.0),
            "volume_after_s": supervisor.volume_monitor.silent_after_s,
            "stuck_runner": supervisor.runner.stuck_pid,
            "away_after_s": 3 * max(settings.heartbeat_seconds, settings.reap_seconds),
            "drain_seconds": settings.drain_seconds,
        }

    def stop(self) -> None:
        """Close the socket and delete its files."""
        self.stopped = True
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() alone would not
        self.listener.close()
        for path in (self.path, self.path.with_suffix(".json")):
            with suppress(OSError):
                path.unlink(missing_ok=True)
