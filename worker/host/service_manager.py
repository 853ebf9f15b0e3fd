"""
Report readiness and liveness to systemd (`Type=notify`, `WatchdogSec=`).

The protocol is one datagram to the socket $NOTIFY_SOCKET (sd_notify(3)); it needs no library. The watchdog is
fed only while `ganq health` calls all workers of the service healthy, so systemd restarts a stuck worker.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from worker.host.live_supervisors import Condition, ask_supervisors

log = logging.getLogger("ganq.worker")

READY_POLL_S = 0.5
"""Interval of checks until the service is ready."""
STATUS_S = 10.0
"""The longest interval of checks after that."""
SEND_S = 1.0


@dataclass(frozen=True)
class ServiceManager:
    """
    The connection to systemd.

    Args:
        address: path of the socket, or '@name' in the abstract namespace.
        watchdog_s: silence after which systemd kills the service; None: never.
    """

    address: str
    watchdog_s: float | None

    @classmethod
    def from_environment(cls, env: MutableMapping[str, str]) -> "ServiceManager | None":
        """Return the service manager that started this process, and hide it from child processes."""
        address = env.pop("NOTIFY_SOCKET", "")
        usec = env.pop("WATCHDOG_USEC", "")
        is_ours = env.pop("WATCHDOG_PID", "") in ("", str(os.getpid()))
        if not address.startswith(("/", "@")):
            return None
        return cls(address, int(usec) / 1e6 if is_ours and usec.isdigit() and int(usec) else None)

    def send(self, *lines: str) -> None:
        """Send one message; a service manager that does not receive must not stop the worker."""
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(SEND_S)
            sender.sendto("\n".join(lines).encode(), address)

    def watch(self, runtime: Path, workers: Callable[[], Collection[str]] | None = None) -> None:
        """
        Report from now on, on a thread of its own.

        Args:
            runtime: the folder of the supervisors' status sockets.
            workers: names of the service's workers; all in the folder by default.
        """
        threading.Thread(target=self._report, args=(runtime, workers), name="systemd", daemon=True).start()

    def _report(self, runtime: Path, workers: Callable[[], Collection[str]] | None) -> None:
        pause, is_ready = threading.Event(), False
        interval_s = min(STATUS_S, self.watchdog_s / 4) if self.watchdog_s else STATUS_S
        while True:
            conditions = _of(runtime, workers)
            if conditions is not None:
                self.send(*([] if is_ready else ["READY=1"]), "WATCHDOG=1", f"STATUS={_summary(conditions)}")
                is_ready = True
            pause.wait(interval_s if is_ready else READY_POLL_S)

    def stopping(self) -> None:
        """Report that the service drains."""
        self.send("STOPPING=1", "STATUS=draining: a running job is saved and requeued")


def _of(runtime: Path, workers: Callable[[], Collection[str]] | None) -> list[Condition] | None:
    """Return the conditions of the service's workers; None unless each of them is healthy."""
    try:
        conditions = ask_supervisors(runtime)
    except OSError as exc:  # no file descriptor is free
        log.debug("workers not checked: %s", exc)
        return None
    names = {one.worker for one in conditions} if workers is None else set(workers())
    conditions = [one for one in conditions if one.worker in names]
    if not names or {one.worker for one in conditions} != names:
        return None
    return conditions if all(one.healthy for one in conditions) else None


def _summary(conditions: list[Condition]) -> str:
    return "; ".join(f"{one.worker} {one.why}" for one in conditions)[:400]
