"""The supervisor's handle on its runner: a child with torch loaded, replaced when it dies."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

from storage.settings import Settings
from worker.channel import Channel, Message

log = logging.getLogger("ganq.runner")

CHANNEL_ENV = "GANQ_CHANNEL_FD"


class WarmRunner:
    """Starts, feeds, stops and kills the process that does the work."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.heard_at = 0.0

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def ensure(self) -> Channel:
        """The channel to a living runner; starts one if there is none."""
        if self.channel is not None and self.process is not None and self.process.poll() is None:
            return self.channel
        self.kill()
        ours, theirs = socket.socketpair()
        with theirs:
            # -P keeps the current folder off the import path: a folder named jobs/ there
            # would hide ours. The own session keeps a terminal's Ctrl-C from the runner.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker.runner"],
                env={
                    # A thread that spins for its neighbour takes the core that the neighbour
                    # needs: with other work on two cores, training ran at 85 pictures/s, and
                    # at 890 with threads that sleep.
                    "OMP_WAIT_POLICY": "PASSIVE",
                    **os.environ,
                    CHANNEL_ENV: str(theirs.fileno()),
                    "GANQ_SUPERVISOR": str(os.getpid()),
                },
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.channel = Channel(ours)
        self.heard_at = time.monotonic()
        return self.channel

    def receive(self) -> list[Message] | None:
        """Messages that have arrived; None: the runner is gone."""
        if self.channel is None:
            return None
        messages = self.channel.receive()
        if messages:
            self.heard_at = time.monotonic()
        return messages

    @property
    def silent_s(self) -> float:
        """Seconds since the runner last said anything."""
        return time.monotonic() - self.heard_at

    def dump(self) -> None:
        """Have the runner write all its stacks into the job's log (faulthandler)."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.3)

    def kill(self) -> str:
        """
        End the runner and all that it started, at once.

        Returns:
            How it ended, in words.
        """
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.process is None:
            return "not running"
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.process = None
        if code < 0:
            with suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def ended(self) -> str:
        """Reap a runner that closed its channel; says how it ended."""
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=2.0)
        return self.kill()
