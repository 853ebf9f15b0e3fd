"""The supervisor's handle on its volume process: detects a volume that hangs, and sends requests."""

import logging
import os
import select
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from storage.settings import Settings
from storage.volume.layout import Volume
from worker.host.volume_process import DUMP_S
from worker.ipc import Channel, Message

log = logging.getLogger("ganq.volume")

PROBE_S = 2.0
SILENT_S = 10.0
"""A volume that has not answered for so long is reported as hung, and no job is claimed."""
SILENT_POLL_S = 1.0
RESTART_S = 2.0
DUMP_WAIT_S = DUMP_S + 2.0


class VolumeMonitor:
    """
    Starts and restarts the volume process, and records when the volume last answered.

    Args:
        selector: gets the channel, with the data "volume".
    """

    def __init__(self, settings: Settings, selector: selectors.BaseSelector) -> None:
        self.volume = Volume(settings.volume)
        self.selector = selector
        self.silent_after_s = min(SILENT_S, settings.volume_seconds)
        self.hung_after_s = settings.volume_seconds
        self.probe_s = min(PROBE_S, settings.volume_seconds / 5)
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.start_at = 0.0
        self.answered = False
        """Whether this process has had any answer yet."""
        self.answered_at = time.monotonic()
        self._last_request = 0
        self._unread: list[Message] = []

    # --- state -----------------------------------------------------------------------------

    @property
    def silent_s(self) -> float:
        """Return the seconds since the last answer; 0 while no process probes the volume."""
        return time.monotonic() - self.answered_at if self.channel is not None else 0.0

    @property
    def answers(self) -> bool:
        """Return whether the volume has just answered, so that a job may be claimed."""
        return self.answered and self.channel is not None and not self.is_silent

    @property
    def is_silent(self) -> bool:
        return self.silent_s > self.silent_after_s

    @property
    def is_hung(self) -> bool:
        """Return whether the running job must be requeued."""
        return self.silent_s > self.hung_after_s

    @property
    def next_check_s(self) -> float:
        """Return the seconds until the main loop must check again."""
        if self.channel is None:
            return max(self.start_at - time.monotonic(), 0.0)
        silent_s = self.silent_s
        if silent_s <= self.silent_after_s:
            return self.silent_after_s - silent_s + 0.01
        return SILENT_POLL_S

    # --- the process -----------------------------------------------------------------------

    def ensure(self) -> None:
        """Start the process if none runs and one is due."""
        if self.channel is not None or time.monotonic() < self.start_at:
            return
        self.start_at = time.monotonic() + RESTART_S
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "worker.host.volume_process"]
        arguments = [os.getpid(), theirs.fileno(), self.volume.root, self.probe_s]
        try:
            self.process = subprocess.Popen(
                [*command, *map(str, arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )
        except OSError as exc:
            log.warning("the volume process cannot be started: %s", exc)
            ours.close()
            return
        finally:
            theirs.close()
        ours.setblocking(False)  # a process that is stopped and reads nothing must not block this one
        self.channel, self.answered, self.answered_at = Channel(ours), False, time.monotonic()
        self.selector.register(ours, selectors.EVENT_READ, "volume")

    def receive(self) -> list[Message]:
        """Return messages other than answers to probes; close the handle of a process that has ended."""
        messages, self._unread = self._unread, []
        return messages + self._read()

    def _read(self) -> list[Message]:
        if self.channel is None:
            return []
        messages = self.channel.receive()
        if messages is None:
            log.warning("the volume process has ended; starting another")
            self.close()
            return []
        if any(message["op"] == "answered" for message in messages):
            if self.is_silent:
                log.info("the volume %s answers again, after %.0f s", self.volume.root, self.silent_s)
            self.answered, self.answered_at = True, time.monotonic()
        return [message for message in messages if message["op"] != "answered"]

    def close(self) -> None:
        """End the process. If it hangs, it ends when the volume is back; do not wait for it."""
        if self.channel is not None:
            self.selector.unregister(self.channel.sock)
            self.channel.close()
            self.channel = None
        if self.process is not None:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=0.2)
            self.process = None

    # --- requests --------------------------------------------------------------------------

    def delete(self, job_id: int, paths: Sequence[str]) -> None:
        """
        Request the deletion of folders.

        Args:
            paths: relative to the volume. If the process dies, `ganq gc` deletes what is left.
        """
        if paths:
            self._send("delete", job_id=job_id, paths=list(paths))

    def dump(self, pid: int, log_file: Path, why: str) -> str:
        """
        Request a runner's stacks in its job's log; wait for at most DUMP_WAIT_S.

        Returns:
            Where the stacks are, or why there are none, as text.
        """
        self._last_request += 1
        self._send("dump", number=self._last_request, pid=pid, log_file=str(log_file), why=why)
        deadline = time.monotonic() + DUMP_WAIT_S
        while self.channel is not None and (left_s := deadline - time.monotonic()) > 0:
            if not select.select([self.channel.sock], [], [], left_s)[0]:
                break
            for message in self._read():
                if message["op"] == "dumped" and message["number"] == self._last_request:
                    return str(message["where"])
                self._unread.append(message)
        return "no stacks: the volume does not answer"

    def _send(self, op: str, **fields: object) -> None:
        with suppress(OSError):
            if self.channel is not None:
                self.channel.send(op, **fields)
