"""
The runner process: executes one assignment of its supervisor at a time, with torch loaded.

It uses no database. It dies with its supervisor, so that a killed worker leaves no process on the GPU.
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
from storage.volume.permissions import use_group_umask
from worker.host.process import die_with_parent, release_free_memory
from worker.host.starting import is_shortage
from worker.ipc import Channel, Message
from worker.runner.context import RunContext
from worker.supervisor.runner_process import CHANNEL_ENV

STORAGE_ERRNOS = (errno.ENOSPC, errno.EMLINK, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)

IDLE_S = 5.0
"""A runner without work for so long returns the memory that runner_process.memory_policy() makes it keep;
so does one that changes to another kind of job, which allocates blocks of other sizes."""


class Runner:
    """Executes many jobs, one after another."""

    def __init__(self, channel: Channel, volume: Volume) -> None:
        self.channel = channel
        self.volume = volume
        self.assignments: list[Message] = []
        self.arrived = threading.Condition()
        self.context: RunContext | None = None
        self.kind: str | None = None
        """Kind of the last job."""

    def serve(self) -> None:
        """Execute assignments until the supervisor has exited."""
        threading.Thread(target=self._listen, name="channel", daemon=True).start()
        # Loading takes seconds, before the first assignment. It creates 200,000 objects that stay: collect no
        # garbage meanwhile (a seventh of that time), nor among these objects afterwards.
        gc.disable()
        import torch  # noqa: F401

        gc.freeze()
        gc.enable()
        self.channel.send("ready")
        while self._run(self._next_assignment()):
            pass

    def _next_assignment(self) -> Message:
        with self.arrived:
            if not self.arrived.wait_for(lambda: self.assignments, IDLE_S):
                release_free_memory()
                self.arrived.wait_for(lambda: self.assignments)
            # The assignment stays in the list until it has a context, so that a stop request finds either.
            return self.assignments[0]

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
                self.assignments.append(message["order"])
                self.arrived.notify()
            elif self.context is not None and message["op"] == "stop":
                self.context.request_stop(message["reason"])
            elif self.context is not None and message["op"] == "ack":
                self.context.acknowledge()
            elif self.context is not None and message["op"] == "forgotten":
                self.context.forget(message["paths"])
            elif message["op"] == "stop" and self.assignments:
                self.assignments[0]["stop"] = message["reason"]

    def _run(self, assignment: Message) -> bool:
        """Execute one job and report how it ended; return False if this process must be replaced."""
        answer: dict[str, Any]
        healthy = True
        ctx: RunContext | None = None
        if assignment["kind"] != self.kind:
            self.kind = assignment["kind"]
            release_free_memory()
        try:
            ctx = self._begin(assignment)
            failpoint("runner.assigned")
            answer = self._work(assignment, ctx)
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
                # A defect of ganq or torch: a new process tries again, at most three times.
                _log_traceback(ctx, traceback.format_exc())
                answer = {"op": "crashed", "message": f"{type(exc).__name__}: {_first_line(exc)}"}
                healthy = False
        if ctx is not None:
            if answer["op"] != "done":
                with suppress(Exception):  # the answer is more important
                    ctx.write_spec()
            if answer["op"] == "failed":
                ctx.log(f"error {answer['code']}: {answer['message']}")
            ctx.close()
        with self.arrived:
            self.context = None
        self.channel.send(**answer, job_id=assignment["job_id"])
        return healthy

    def _begin(self, assignment: Message) -> RunContext:
        """
        Return the context of a job.

        Raises:
            VolumeError: the volume cannot be written, or is not the one that was used before.
        """
        try:
            if assignment.get("see_volume"):
                self.volume.ensure(used=lambda: True)  # this attempt's row is in the table
        except BaseException:
            with self.arrived:
                self.assignments.pop(0)
            raise
        with self.arrived:
            self.assignments.pop(0)
            ctx = self.context = RunContext(assignment, self.channel, self.volume)
            if "stop" in assignment:
                ctx.request_stop(assignment["stop"])
        return ctx

    def _work(self, assignment: Message, ctx: RunContext) -> dict[str, Any]:
        kind = kind_named(assignment["kind"])
        spec = kind.spec_class().from_json(assignment["spec"])
        with _redirected_output(ctx):
            ctx.log(f"job {ctx.job_id}, attempt {ctx.attempt}: {assignment['kind']}")
            began = time.monotonic()
            result = kind.run_function()(spec, ctx)
            ctx.log(f"done in {time.monotonic() - began:.1f} s")
        out = getattr(spec, "out", None)
        if out is not None and not assignment["copies_out"]:
            result = {**result, "out_pending": out}
        elif out is not None:
            from storage.results.reader import copy_out

            result = {**result, **copy_out(ctx.folder, out)}
        return {"op": "done", "result": result}


class _redirected_output:  # noqa: N801 - reads as a statement
    """Context manager that writes this process's stdout, stderr and stack dumps into a job's log."""

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
        with suppress(OSError):  # a full disk of the log must not fail the job
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
    """Return the answer for an OSError: a full or broken volume is a storage error, others are defects."""
    folder = ctx.folder if ctx else volume.jobs
    if exc.errno in STORAGE_ERRNOS or not os.path.isdir(folder):
        try:
            raise_storage_error(exc, folder / "any")
        except GanqError as error:
            return _failed(error, replace=False), True
    if is_shortage(exc):
        return _failed(_no_process(exc), replace=True), False
    _log_traceback(ctx, traceback.format_exc())
    return {"op": "crashed", "message": f"{type(exc).__name__}: {_first_line(exc)}"}, False


def _no_process(exc: Exception) -> ProcessUnavailableError:
    return ProcessUnavailableError(
        f"the machine cannot start another process or thread ({one_line(exc)})",
        hint="raise the limit of processes (ulimit -u, pids.max), or stop what uses them up",
    )


def _log_traceback(ctx: RunContext | None, text: str) -> None:
    if ctx is not None:
        ctx.log(text)
    else:
        sys.stderr.write(text)


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or ["no message"])[0][:500]


def main() -> None:
    """Run the process; worker/supervisor/runner_process.py starts it."""
    die_with_parent(int(os.environ["GANQ_SUPERVISOR"]), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor decides when to stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_streams_of_any_encoding()  # libraries and metrics of users may print anything
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sock = socket.socket(fileno=int(os.environ.pop(CHANNEL_ENV)))
    volume = Settings.load().volume
    use_group_umask(volume)
    Runner(Channel(sock), Volume(volume)).serve()


if __name__ == "__main__":
    main()
