"""
Findings of `ganq doctor`, and how its checks run with a time limit.

Each probe runs in its own thread, which is abandoned when its time is up: a server may accept and never
answer, a disk may hang. Probes that have been started run concurrently.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from jobs.errors import GanqError
from storage.settings import redact

T = TypeVar("T")


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One line of `ganq doctor`: the check, its result, and what to do."""

    check: str
    level: Level
    message: str
    hint: str | None = None


def ok(check: str, message: str) -> Finding:
    return Finding(check, Level.OK, message)


def warn(check: str, message: str, hint: str) -> Finding:
    return Finding(check, Level.WARN, message, hint)


def error(check: str, message: str, hint: str | None) -> Finding:
    return Finding(check, Level.ERROR, message, hint)


def as_finding(check: str, exc: Exception) -> Finding:
    """Return the finding of a check that failed with an exception."""
    if isinstance(exc, GanqError):
        return error(check, exc.message, exc.hint)
    if isinstance(exc, OSError) and exc.strerror:
        where = f"{exc.filename}: " if exc.filename else ""
        return error(check, f"{where}{exc.strerror.lower()}", "check its owner and permissions")
    first_line = (str(exc).strip().splitlines() or [""])[0]
    return error(
        check, redact(f"the check failed: {type(exc).__name__}: {first_line}"), "this is a defect in ganq"
    )


class Probe:
    """
    Runs a generator of findings in a thread, started at once; iterate to get them.

    Args:
        check: the name for its own findings.
        run: returns the generator; an exception of it becomes a finding.
        within_s: seconds for the whole check, from now on.
        hint: what to do if the time is exceeded.
    """

    def __init__(
        self, check: str, run: Callable[[], Iterator[Finding]], *, within_s: float, hint: str
    ) -> None:
        self.check = check
        self.within_s = within_s
        self.hint = hint
        self.deadline = time.monotonic() + within_s
        self._found: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(run,), name=f"doctor {check}", daemon=True).start()

    def _run(self, run: Callable[[], Iterator[Finding]]) -> None:
        try:
            for finding in run():
                self._found.put(finding)
        except Exception as exc:
            self._found.put(as_finding(self.check, exc))
        self._found.put(None)

    def __iter__(self) -> Iterator[Finding]:
        while True:
            try:
                # Findings that are there already are returned, however late.
                finding = self._found.get(timeout=max(self.deadline - time.monotonic(), 0.05))
            except queue.Empty:
                yield error(self.check, f"no answer within {self.within_s:.0f} s", self.hint)
                return
            if finding is None:
                return
            yield finding


def within(seconds: float, call: Callable[[], T]) -> T:
    """
    Call a function that may never return, and return its result.

    Raises:
        TimeoutError: it did not return in time; its thread is abandoned.
    """
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((call(), None))
        except BaseException as exc:
            results.put((None, exc))

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        result, failed = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if failed is not None:
        raise failed
    return result  # type: ignore[return-value]
