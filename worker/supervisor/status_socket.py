"""
A supervisor's sign of life: a socket in the runtime folder that says how it is, whatever the database does.

`ganq health` asks there. A thread of its own answers, because the others may be waiting
for the database. It costs nothing while nobody asks, and a stopped process cannot answer.
Beside the socket lies a file with the worker's name, to name one that cannot.

    live-<pid of the launcher>.sock   live-<pid of the launcher>.json
"""

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker.supervisor.loop import Supervisor

log = logging.getLogger("ganq.pulse")

CLIENT_S = 2.0
"""What somebody who asks has for taking the answer; the next one waits meanwhile."""
ACCEPT_AGAIN_S = 0.5
KEEP_EVERY_S = 3600.0
"""Programs that clean /tmp delete what has not been used for days."""


def status_socket_path(wake_socket: Path) -> Path:
    """Where the supervisor behind this wake socket tells how it is; equally long, so it fits, too."""
    return wake_socket.with_name(wake_socket.name.replace("wake-", "live-", 1))


class StatusSocket(threading.Thread):
    """Answers each connection with one line of JSON, then closes it."""

    def __init__(self, supervisor: "Supervisor", path: Path) -> None:
        super().__init__(name="pulse", daemon=True)
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
        named = self.path.with_suffix(".json")
        beside = named.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"worker": self.supervisor.who.name, "pid": os.getpid()}))
        beside.replace(named)

    def _keep_files(self) -> None:
        """Mark this worker's files in the temporary folder as used, so that nothing deletes them as old."""
        mine = self.path.parent.glob(self.path.stem.replace("live-", "*-", 1) + ".*")
        for path in (self.path.parent, *mine):
            with suppress(OSError):
                os.utime(path)
        with suppress(OSError):
            if not self.path.with_suffix(".json").exists():
                self._write_name()

    def turned(self) -> None:
        """The supervisor's loop begins another round."""
        self.iterated_at = time.monotonic()
        if self.supervisor.draining and self.drained_at is None:
            self.drained_at = self.iterated_at

    def run(self) -> None:
        self.listener.settimeout(KEEP_EVERY_S)
        kept_at = time.monotonic()
        while True:
            if time.monotonic() - kept_at >= KEEP_EVERY_S:
                self._keep_files()
                kept_at = time.monotonic()
            try:
                client, _ = self.listener.accept()
            except TimeoutError:
                continue
            except OSError:  # stop() has closed it; or no file descriptor is free
                if self.stopped:
                    return
                time.sleep(ACCEPT_AGAIN_S)
                continue
            with client, suppress(OSError):
                client.settimeout(CLIENT_S)
                client.sendall(json.dumps(self.facts()).encode() + b"\n")

    def facts(self) -> dict[str, Any]:
        """What the supervisor knows of itself; ages are seconds, by the monotonic clock."""
        supervisor = self.supervisor
        settings, heartbeat, lease = supervisor.settings, supervisor.heartbeat, supervisor.lease
        now = time.monotonic()
        threads = (heartbeat, supervisor.recovery)
        state = "draining" if supervisor.draining else "idle" if lease is None else "busy"
        return {
            "worker": supervisor.who.name,
            "pid": os.getpid(),
            "state": state,
            "job_id": lease.job_id if lease is not None else None,
            "turned_s": now - self.iterated_at,
            "beat_s": now - heartbeat.looped_at,
            "spoke_s": now - heartbeat.spoke_at,
            "database_s": now - supervisor.database.answered_at,
            "draining_s": now - self.drained_at if self.drained_at is not None else None,
            "dead_threads": [
                one.name
                for one in threads
                if one.ident is not None and not one.is_alive() and not one.stopping.is_set()
            ],
            "stuck_after_s": settings.stuck_seconds,
            "volume": str(settings.volume),
            # A loop that waits for the database takes in no answers.
            "volume_s": max(supervisor.volume_watch.silent_s - (now - self.iterated_at), 0.0),
            "volume_after_s": supervisor.volume_watch.silent_after_s,
            "stuck_runner": supervisor.runner.stuck,
            "away_after_s": 3 * max(settings.heartbeat_seconds, settings.reap_seconds),
            "drain_seconds": settings.drain_seconds,
        }

    def stop(self) -> None:
        """This worker says goodbye: nothing of it stays behind."""
        self.stopped = True
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closing alone would not
        self.listener.close()
        for path in (self.path, self.path.with_suffix(".json")):
            with suppress(OSError):
                path.unlink(missing_ok=True)
