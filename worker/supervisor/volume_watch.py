"""The supervisor's handle on its volume process: whether the volume answers, and requests to it."""

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
"""A volume that has not answered for so long is said to hang, and no job is claimed for it."""
SILENT_LOOK_S = 1.0
START_AGAIN_S = 2.0
DUMP_WAIT_S = DUMP_S + 2.0


class VolumeWatch:
    """
    Starts the process again when it has died, and knows when the volume last answered.

    Args:
        selector: reports, as "volume", when the process has sent something or is gone.
    """

    def __init__(self, settings: Settings, selector: selectors.BaseSelector) -> None:
        self.volume = Volume(settings.volume)
        self.selector = selector
        self.silent_after_s = min(SILENT_S, settings.volume_seconds)
        self.hung_after_s = settings.volume_seconds
        self.probe_s = min(PROBE_S, settings.volume_seconds / 5)
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.due = 0.0
        self.answered = False
        """Whether this process has had any answer yet."""
        self.answered_at = time.monotonic()
        self._number = 0
        self._unread: list[Message] = []

    # --- what is known ---------------------------------------------------------------------

    @property
    def silent_s(self) -> float:
        """Seconds without an answer to a process that asks; 0 while none asks, which says nothing."""
        return time.monotonic() - self.answered_at if self.channel is not None else 0.0

    @property
    def answers(self) -> bool:
        """Whether a job may be claimed: the volume has just answered."""
        return self.answered and self.channel is not None and not self.is_silent

    @property
    def is_silent(self) -> bool:
        return self.silent_s > self.silent_after_s

    @property
    def is_hung(self) -> bool:
        """Whether the job in hand goes back to the queue."""
        return self.silent_s > self.hung_after_s

    @property
    def next_s(self) -> float:
        """Seconds until the loop should look again."""
        if self.channel is None:
            return max(self.due - time.monotonic(), 0.0)
        silent_s = self.silent_s
        if silent_s <= self.silent_after_s:
            return self.silent_after_s - silent_s + 0.01
        return SILENT_LOOK_S

    # --- the process -----------------------------------------------------------------------

    def ensure(self) -> None:
        """Start the process if there is none and one is due."""
        if self.channel is not None or time.monotonic() < self.due:
            return
        self.due = time.monotonic() + START_AGAIN_S
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "worker.host.volume_process"]
        facts = [os.getpid(), theirs.fileno(), self.volume.root, self.probe_s]
        try:
            self.process = subprocess.Popen(
                [*command, *map(str, facts)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
            )
        except OSError as exc:
            log.warning("the process that asks the volume cannot be started: %s", exc)
            ours.close()
            return
        finally:
            theirs.close()
        ours.setblocking(False)  # a process that is stopped, and reads nothing, holds nobody up
        self.channel, self.answered, self.answered_at = Channel(ours), False, time.monotonic()
        self.selector.register(ours, selectors.EVENT_READ, "volume")

    def receive(self) -> list[Message]:
        """Return what has arrived, answers aside; restart a process that has died."""
        messages, self._unread = self._unread, []
        return messages + self._read()

    def _read(self) -> list[Message]:
        if self.channel is None:
            return []
        messages = self.channel.receive()
        if messages is None:
            log.warning("the process that asks the volume has ended; starting another")
            self.close()
            return []
        if any(message["op"] == "answered" for message in messages):
            if self.is_silent:
                log.info("the volume %s answers again, after %.0f s", self.volume.root, self.silent_s)
            self.answered, self.answered_at = True, time.monotonic()
        return [message for message in messages if message["op"] != "answered"]

    def close(self) -> None:
        """End the process; one that hangs ends when the volume is back, and is not waited for."""
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
        Have folders deleted; receive() reports it.

        Args:
            paths: relative to the volume. What stays, because a process dies, is for `ganq gc`.
        """
        if paths:
            self._send("delete", job_id=job_id, paths=list(paths))

    def dump(self, pid: int, log_file: Path, why: str) -> str:
        """
        Have a runner's stacks written into its job's log.

        Returns:
            Where they are, or why there are none, in words; after DUMP_WAIT_S at most.
        """
        self._number += 1
        self._send("dump", number=self._number, pid=pid, log_file=str(log_file), why=why)
        deadline = time.monotonic() + DUMP_WAIT_S
        while self.channel is not None and (left_s := deadline - time.monotonic()) > 0:
            if not select.select([self.channel.sock], [], [], left_s)[0]:
                break
            for message in self._read():
                if message["op"] == "dumped" and message["number"] == self._number:
                    return str(message["where"])
                self._unread.append(message)
        return "no stacks: the volume does not answer"

    def _send(self, op: str, **facts: object) -> None:
        with suppress(OSError):
            if self.channel is not None:
                self.channel.send(op, **facts)
