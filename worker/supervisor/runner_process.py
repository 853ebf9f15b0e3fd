"""The supervisor's handle on its runner: a child process with torch loaded, replaced when it dies."""

import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

from jobs.errors import ProcessUnavailableError, one_line
from storage.settings import Settings
from worker.host.process import describe_state
from worker.ipc import Channel, Message

log = logging.getLogger("ganq.runner")

CHANNEL_ENV = "GANQ_CHANNEL_FD"
KILL_S = 10.0
"""A process with a large GPU context may take some seconds to end; one stuck in the kernel is left behind."""

OPENMP_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def thread_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """
    Return the environment that makes a runner's OpenMP threads sleep while they wait, not spin.

    A spinning thread occupies the core that another process needs. With one other busy process on two
    cores, training ran at 395 images/s with sleeping threads and at 111 with threads that spin for a
    fraction of a millisecond first. On an idle machine spinning was a quarter faster.

    Returns:
        Variables for libgomp and for LLVM's and Intel's libomp; none if the environment sets one itself.
    """
    if any(name in environment for name in OPENMP_VARIABLES):
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def memory_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """
    Return the environment that makes glibc keep freed memory instead of returning it after each pass.

    The kernel zeroes each page that it hands out again: 7 % of a training's processor time, and a third
    where batches are large (docs/performance.md). Blocks above 32 MB, glibc's own limit for what it learns
    to keep, are still returned: kept, they would leave 300 MB of gaps in a training of the tutorial's
    size. A runner without work returns everything.

    Returns:
        Variables for glibc's malloc; none if the environment sets one itself.
    """
    policy = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    return {} if any(name in environment for name in policy) else policy


class RunnerProcess:
    """
    Starts, feeds and kills the process that executes jobs.

    Args:
        selector: gets the channel, with the data "runner".
    """

    def __init__(self, settings: Settings, selector: selectors.BaseSelector) -> None:
        self.settings = settings
        self.selector = selector
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.failed_starts = 0
        """Number of runners that have died or could not be started since one was last ready."""
        self.start_at = 0.0
        """Monotonic time before which no other runner may be started."""
        self.ready = False
        """Whether the runner that was started last has finished loading."""
        self._unkillable: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def stuck_pid(self) -> int | None:
        """
        Return the process id of a runner that was killed and does not die.

        It waits in the kernel, for a volume that hangs or in a GPU driver. Its GPU may not be used until it
        has died.
        """
        if self._unkillable is not None and self._unkillable.poll() is not None:
            log.info("the stuck runner (process %s) has died", self._unkillable.pid)
            self._unkillable = None
        return self._unkillable.pid if self._unkillable is not None else None

    def ensure(self) -> Channel:
        """
        Return the channel to a living runner; start one if there is none.

        Raises:
            ProcessUnavailableError: the machine starts no process, or a stuck runner has not died.
        """
        if self.channel is not None and self.process is not None and self.process.poll() is None:
            return self.channel
        self.kill()
        if self.stuck_pid is not None:
            raise ProcessUnavailableError(
                f"the previous runner (process {self.stuck_pid}) does not die",
                hint="it waits in the kernel: for a volume that hangs, or a driver (dmesg)",
            )
        try:
            self._start()
        except OSError as exc:
            raise ProcessUnavailableError(
                f"no runner can be started ({one_line(exc)})",
                hint="raise the limit of processes (ulimit -u, pids.max), or stop what uses them up",
            ) from exc
        assert self.channel is not None
        return self.channel

    def _start(self) -> None:
        self.ready = False
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as undo:
            undo.callback(ours.close)
            # -P keeps the current folder off the import path: a folder named jobs/ there would hide ours.
            # In its own session, the runner gets no Ctrl-C of the terminal.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "worker.runner.main"],
                env={
                    **os.environ,
                    **thread_policy(os.environ),
                    **memory_policy(os.environ),
                    CHANNEL_ENV: str(theirs.fileno()),
                    "GANQ_SUPERVISOR": str(os.getpid()),
                },
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout carries notifications to the launcher, which waits until it is closed
                start_new_session=True,
            )
            undo.pop_all()
        self.channel = Channel(ours)
        self.selector.register(self.channel.sock, selectors.EVENT_READ, "runner")

    def back_off(self) -> float:
        """
        Delay the next start after a runner that died without work or could not be started.

        Returns:
            Seconds until the next start; they double with each failure, up to a minute.
        """
        self.failed_starts += 1
        pause_s: float = min(0.5 * 2**self.failed_starts, 60.0)
        self.start_at = time.monotonic() + pause_s
        return pause_s

    def receive(self) -> list[Message] | None:
        """Return messages that have arrived; None: the runner has closed its end."""
        return None if self.channel is None else self.channel.receive()

    def send(self, op: str, **fields: Any) -> None:
        """Send a message to a runner that may be dead; receive() reports its end."""
        with suppress(OSError):
            if self.channel is not None:
                self.channel.send(op, **fields)

    def kill(self) -> str:
        """
        Kill the runner's process group at once; after KILL_S leave it behind, see `stuck_pid`.

        Returns:
            How it ended, as text.
        """
        if self.channel is not None:
            self.selector.unregister(self.channel.sock)
            self.channel.close()
            self.channel = None
        if self.process is None:
            return "not running"
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        process, self.process = self.process, None
        try:
            code = process.wait(timeout=KILL_S)
        except subprocess.TimeoutExpired:
            self._unkillable = process
            state = describe_state(process.pid)
            log.error(
                "the runner (process %s) does not die: it is %s; no job is claimed until it has died",
                process.pid,
                state,
            )
            return f"killed and does not die: it is {state}"
        if code < 0:
            with suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def reap(self) -> str:
        """Wait for a runner that has closed its channel; return how it ended, as text."""
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=2.0)
        return self.kill()
