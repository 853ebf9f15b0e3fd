"""
The warm child with torch in it: takes one order at a time from its supervisor and does the work.

It touches no database. It dies with its supervisor, so that a killed worker
leaves no orphan on the GPU.
"""

import errno
import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any

from jobs.errors import GanqError, OutOfMemoryError, ProcessUnavailableError, StopRequested, one_line
from jobs.failpoints import failpoint
from jobs.kinds import kind_named
from jobs.text import use_streams_of_any_encoding
from storage.settings import Settings
from storage.volume.durable import raise_storage_error
from storage.volume.layout import Volume
from worker.host.process import die_with_parent, release_free_memory
from worker.host.starting import is_shortage
from worker.ipc import Channel, Message
from worker.runner.context import RunContext
from worker.supervisor.runner_process import CHANNEL_ENV

STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)

IDLE_S = 5.0
"""A runner without work for so long gives back the memory that warm_runner.memory_policy() lets it keep;
so does one that goes over to another kind of job, which asks for blocks of other sizes."""


class Runner:
    """One process, many jobs in a row."""

    def __init__(self, channel: Channel, volume: Volume) -> None:
        self.channel = channel
        self.volume = volume
        self.orders: list[Message] = []
        self.arrived = threading.Condition()
        self.context: RunContext | None = None
        self.kind: str | None = None  # of the last order

    def serve(self) -> None:
        """Run orders until the supervisor is gone."""
        threading.Thread(target=self._listen, name="channel", daemon=True).start()
        # The warm part: seconds, before the first order comes. Its modules make 200,000 objects that
        # stay: no garbage is looked for meanwhile (a seventh of that time), nor among them ever after.
        gc.disable()
        import torch  # noqa: F401

        gc.freeze()
        gc.enable()
        self.channel.send("ready")
        while self._run(self._next_order()):
            pass

    def _next_order(self) -> Message:
        with self.arrived:
            if not self.arrived.wait_for(lambda: self.orders, IDLE_S):
                release_free_memory()
                self.arrived.wait_for(lambda: self.orders)
            # The order stays where it is until it has a context, so that a stop finds one of them.
            return self.orders[0]

    def _listen(self) -> None:
        while True:
            messages = self.channel.receive()
            if messages is None:
                os._exit(0)
            for message in messages:
                self._on_message(message)

    def _on_message(self, message: Message) -> None:
        with self.arrived:
            if message["op"] == "run":
                self.orders.append(message["order"])
                self.arrived.notify()
            elif self.context is not None and message["op"] == "stop":
                self.context.ask_to_stop(message["reason"])
            elif self.context is not None and message["op"] == "ack":
                self.context.acknowledge()
            elif self.context is not None and message["op"] == "forgotten":
                self.context.forget(message["paths"])
            elif message["op"] == "stop" and self.orders:
                self.orders[0]["stop"] = message["reason"]

    def _run(self, order: Message) -> bool:
        """
        Do one job and say how it ended.

        Returns:
            False if this process should be replaced.
        """
        answer: dict[str, Any]
        healthy = True
        ctx: RunContext | None = None
        if order["kind"] != self.kind:
            self.kind = order["kind"]
            release_free_memory()
        try:
            ctx = self._begin(order)
            failpoint("runner.ordered")
            answer = self._work(order, ctx)
            failpoint("runner.worked")
        except StopRequested as stop:
            answer = {"op": "stopped", "reason": stop.reason}
        except GanqError as exc:
            healthy = not isinstance(exc, OutOfMemoryError)
            answer = _failed(exc, replace=not healthy)
        except MemoryError:
            healthy = False
            answer = _failed(
                OutOfMemoryError("the machine's memory is full", hint="use a smaller --batch"), True
            )
        except OSError as exc:
            answer, healthy = _os_error(exc, ctx, self.volume)
        except Exception as exc:
            if is_shortage(exc):
                answer, healthy = _failed(_no_process(exc), replace=True), False
            else:
                # A defect, ours or torch's: a fresh process tries again, three times at most.
                _note(ctx, traceback.format_exc())
                answer = {"op": "crashed", "message": f"{type(exc).__name__}: {_first_line(exc)}"}
                healthy = False
        if ctx is not None:
            if answer["op"] != "done":
                with suppress(Exception):  # how it ended says more
                    ctx.introduce()
            if answer["op"] == "failed":
                ctx.log(f"error {answer['code']}: {answer['message']}")
            ctx.close()
        with self.arrived:
            self.context = None
        self.channel.send(**answer, job_id=order["job_id"])
        return healthy

    def _begin(self, order: Message) -> RunContext:
        """
        Raises:
            VolumeError: the volume cannot be written, or is not the one that was used.
        """
        try:
            if order.get("see_volume"):
                self.volume.ensure(used=lambda: True)  # this attempt's row is in the table
        except BaseException:
            with self.arrived:
                self.orders.pop(0)
            raise
        with self.arrived:
            self.orders.pop(0)
            ctx = self.context = RunContext(order, self.channel, self.volume)
            if "stop" in order:
                ctx.ask_to_stop(order["stop"])
        return ctx

    def _work(self, order: Message, ctx: RunContext) -> dict[str, Any]:
        kind = kind_named(order["kind"])
        spec = kind.spec_class().from_json(order["spec"])
        with _output_to(ctx):
            ctx.log(f"job {ctx.job_id}, attempt {ctx.attempt}: {order['kind']}")
            began = time.monotonic()
            result = kind.run_function()(spec, ctx)
            ctx.log(f"done in {time.monotonic() - began:.1f} s")
        out = getattr(spec, "out", None)
        if out is not None:
            from storage.results.reader import copy_out

            result = {**result, **copy_out(ctx.folder, out)}
        return {"op": "done", "result": result}


class _output_to:  # noqa: N801 - reads as a statement
    """Send this process's stdout, stderr and stack dumps into a job's log while it runs."""

    def __init__(self, ctx: RunContext) -> None:
        self.fd = ctx._log.fileno()

    def __enter__(self) -> None:
        _flush()
        self.saved = os.dup(1), os.dup(2)
        os.dup2(self.fd, 1)
        os.dup2(self.fd, 2)

    def __exit__(self, *exc: object) -> None:
        _flush()
        for fd, saved in zip((1, 2), self.saved, strict=True):
            os.dup2(saved, fd)
            os.close(saved)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a log on a full disk: the work is not at fault
            stream.flush()


def _failed(exc: GanqError, replace: bool) -> dict[str, Any]:
    return {
        "op": "failed",
        "code": exc.code,
        "message": exc.message,
        "hint": exc.hint,
        "replace": replace,
    }


def _os_error(exc: OSError, ctx: RunContext | None, volume: Volume) -> tuple[dict[str, Any], bool]:
    """A full or broken volume is a storage error wherever it shows; anything else is a defect."""
    if exc.errno in STORAGE_ERRNOS:
        try:
            raise_storage_error(exc, ctx.folder if ctx else volume.root)
        except GanqError as told:
            return _failed(told, replace=False), True
    if is_shortage(exc):
        return _failed(_no_process(exc), replace=True), False
    _note(ctx, traceback.format_exc())
    return {"op": "crashed", "message": f"{type(exc).__name__}: {_first_line(exc)}"}, False


def _no_process(exc: Exception) -> ProcessUnavailableError:
    return ProcessUnavailableError(
        f"the machine has no process or thread left ({one_line(exc)})",
        hint="raise the limit of processes (ulimit -u, pids.max), or stop what uses them up",
    )


def _note(ctx: RunContext | None, text: str) -> None:
    if ctx is not None:
        ctx.log(text)
    else:
        sys.stderr.write(text)


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or ["no message"])[0][:500]


def main() -> None:
    """Entry point of the process that worker/supervisor/runner_process.py starts."""
    die_with_parent(int(os.environ["GANQ_SUPERVISOR"]), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_streams_of_any_encoding()  # libraries and metrics of users may print anything
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sock = socket.socket(fileno=int(os.environ.pop(CHANNEL_ENV)))
    Runner(Channel(sock), Volume(Settings.load().volume)).serve()


if __name__ == "__main__":
    main()
