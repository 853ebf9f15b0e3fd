"""The supervisor's handle on its runner: a child with torch loaded, replaced when it dies."""

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
from worker.host.process import where
from worker.ipc import Channel, Message

log = logging.getLogger("ganq.runner")

CHANNEL_ENV = "GANQ_CHANNEL_FD"
KILL_S = 10.0
"""For a process with a large GPU context that may be some seconds; one that is stuck is not waited for."""

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def thread_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """
    How long a runner's OpenMP threads spin for each other before they sleep.

    They don't. A thread that spins takes the core that its neighbour needs: with one other busy
    process on two cores the demo's training ran at 395 pictures/s with threads that sleep at
    once, and at 111 with threads that look 10,000 times first, a fraction of a millisecond.
    On a quiet machine those were a quarter faster (498 against 399): worth less than it risks.

    Returns:
        Variables for libgomp and for LLVM's and Intel's libomp; none where the environment
        has a choice of its own.
    """
    if any(name in environment for name in CHOICES):
        return {}
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def memory_policy(environment: Mapping[str, str]) -> dict[str, str]:
    """
    Have glibc keep memory that was freed, instead of giving it back after every pass of a network.

    The kernel hands out each page anew, zeroed: 7 % of a training's processor time, and a third where
    batches are large (docs/performance.md). Blocks above 32 MB, glibc's own limit for what it learns
    to keep, come and go all the same: kept, they leave gaps, 300 MB of them in a training of the
    tutorial's size. A runner without work gives everything back.

    Returns:
        Variables for glibc's malloc; none where the environment has a choice of its own.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    return {} if any(name in environment for name in chosen) else chosen


class RunnerProcess:
    """
    Starts, feeds, stops and kills the process that does the work.

    Args:
        selector: tells, as "runner", when the process has said something or is gone.
    """

    def __init__(self, settings: Settings, selector: selectors.BaseSelector) -> None:
        self.settings = settings
        self.selector = selector
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: Channel | None = None
        self.deaths = 0
        """Since one was last ready."""
        self.due = 0.0
        """By the monotonic clock: when another one may be started."""
        self.ready = False
        """Whether the one that was started last has come so far that it can work."""
        self._undead: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def stuck(self) -> int | None:
        """
        The process id of a runner that was killed and does not die: it is stuck in the kernel, as in a
        call on a volume that hangs or in a GPU's driver. Nothing else may use its GPU until it has.
        """
        if self._undead is not None and self._undead.poll() is not None:
            log.info("the runner (process %s) has died at last", self._undead.pid)
            self._undead = None
        return self._undead.pid if self._undead is not None else None

    def ensure(self) -> Channel:
        """
        The channel to a living runner; starts one if there is none.

        Raises:
            ProcessUnavailableError: the machine starts no process.
        """
        if self.channel is not None and self.process is not None and self.process.poll() is None:
            return self.channel
        self.kill()
        if self.stuck is not None:
            raise ProcessUnavailableError(
                f"the runner before (process {self.stuck}) does not die",
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
            # -P keeps the current folder off the import path: a folder named jobs/ there
            # would hide ours. The own session keeps a terminal's Ctrl-C from the runner.
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
                stdout=2,  # ours is the pipe of bells: its reader waits until nobody holds it open
                start_new_session=True,
            )
            undo.pop_all()
        self.channel = Channel(ours)
        self.selector.register(self.channel.sock, selectors.EVENT_READ, "runner")

    def pause(self) -> float:
        """
        Seconds until another one is due after one that died with nothing to do, or could not be started.

        One that cannot even start must not be started as fast as Python can.
        """
        self.deaths += 1
        pause_s: float = min(0.5 * 2**self.deaths, 60.0)
        self.due = time.monotonic() + pause_s
        return pause_s

    def receive(self) -> list[Message] | None:
        """Messages that have arrived; None: the runner is gone."""
        return None if self.channel is None else self.channel.receive()

    def send(self, op: str, **facts: Any) -> None:
        """Say something to a runner that may be dead: its end is heard on the same channel."""
        with suppress(OSError):
            if self.channel is not None:
                self.channel.send(op, **facts)

    def kill(self) -> str:
        """
        End the runner and all that it started, at once; after KILL_S it is left behind, see `stuck`.

        Returns:
            How it ended, in words.
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
            self._undead = process
            how = where(process.pid)
            log.error("the runner (process %s) does not die: it is %s; no job until it has", process.pid, how)
            return f"killed and does not die: it is {how}"
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
