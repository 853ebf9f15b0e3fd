"""
How a check of `ganq doctor` is run, and what it says: nothing that it asks can keep it waiting.

Each probe runs in a thread of its own that is left behind when its time is up: a server
that accepts and says nothing, a disk that is gone. All that were started run side by side.
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
    """A check that could not look."""
    if isinstance(exc, GanqError):
        return error(check, exc.message, exc.hint)
    if isinstance(exc, OSError) and exc.strerror:
        where = f"{exc.filename}: " if exc.filename else ""
        return error(check, f"{where}{exc.strerror.lower()}", "check its owner and permissions")
    said = (str(exc).strip().splitlines() or [""])[0]
    return error(
        check, redact(f"cannot be looked at: {type(exc).__name__}: {said}"), "this is a defect in ganq"
    )


class Probe:
    """
    A generator of findings, begun at once in a thread, read when its turn comes.

    Args:
        check: what its own findings are filed under.
        look: makes the generator; whatever it raises becomes a finding.
        within_s: seconds for all of it, from now on.
        hint: what to do if it does not answer.
    """

    def __init__(
        self, check: str, look: Callable[[], Iterator[Finding]], *, within_s: float, hint: str
    ) -> None:
        self.check = check
        self.within_s = within_s
        self.hint = hint
        self.deadline = time.monotonic() + within_s
        self._found: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(look,), name=f"doctor {check}", daemon=True).start()

    def _run(self, look: Callable[[], Iterator[Finding]]) -> None:
        try:
            for finding in look():
                self._found.put(finding)
        except Exception as exc:
            self._found.put(as_finding(self.check, exc))
        self._found.put(None)

    def __iter__(self) -> Iterator[Finding]:
        while True:
            try:
                # What is there already is taken, however late the reader comes.
                finding = self._found.get(timeout=max(self.deadline - time.monotonic(), 0.05))
            except queue.Empty:
                yield error(self.check, f"no answer within {self.within_s:.0f} s", self.hint)
                return
            if finding is None:
                return
            yield finding


def within(seconds: float, ask: Callable[[], T]) -> T:
    """
    The answer to a question that may never be answered.

    Raises:
        TimeoutError: no answer in time; the thread that asked is left behind.
    """
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((ask(), None))
        except BaseException as exc:
            answer.put((None, exc))

    threading.Thread(target=run, name="within", daemon=True).start()
    try:
        found, failed = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if failed is not None:
        raise failed
    return found  # type: ignore[return-value]
