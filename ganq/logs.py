"""Read the logs of a job, which may not exist yet and may grow."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ganq.session import Session

POLL_S = 0.5
CHUNK = 64 * 1024


def log_path(session: Session, job_id: int, attempt: int) -> Path:
    """Return the path of the log of an attempt."""
    return session.volume.attempt(job_id, attempt) / "log.txt"


def log_lines(session: Session, job_id: int, *, follow: bool, everything: bool) -> Iterator[str]:
    """
    Yield the lines of the newest attempt's log.

    Args:
        follow: wait for new lines, and for later attempts, until the job has ended.
        everything: begin with the first attempt.
    """
    found = session.queries.get(job_id)
    if found.attempt == 0 and (found.state.terminal or not follow):
        return
    if found.attempt and not session.remote:
        session.volume_of(found)
    newest = max(1, found.attempt)
    for attempt in range(1, newest) if everything else ():
        yield from attempt_lines(session, job_id, attempt)
    while True:
        yield from attempt_lines(session, job_id, newest, follow=follow)
        now = session.queries.get(job_id)
        if not follow or now.attempt <= newest:
            return
        newest = now.attempt


def attempt_lines(
    session: Session, job_id: int, attempt: int, *, last: int | None = None, follow: bool = False
) -> Iterator[str]:
    """
    Yield the lines of one attempt's log.

    Args:
        last: only so many of the lines that exist now.
        follow: wait for new lines until the job has ended or has a newer attempt.
    """
    if session.remote:
        yield from session.log_lines(job_id, attempt, last=last, follow=follow)
        return
    with _Tail(log_path(session, job_id, attempt)) as tail:
        tail.skip_to_last(last)
        while follow:
            now = session.queries.get(job_id)
            # Read the state before the file, so that lines written before the end are printed.
            ended = now.state.terminal or now.attempt > attempt
            yield from tail.new_lines(flush=ended)
            if ended:
                return
            time.sleep(POLL_S)
        yield from tail.new_lines(flush=True)


class _Tail:
    """A log file; yields complete lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] | None = None
        self.partial_line = b""

    def __enter__(self) -> "_Tail":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.file is not None:
            self.file.close()

    def _open(self) -> IO[bytes] | None:
        if self.file is None:
            try:
                self.file = open(self.path, "rb")  # noqa: SIM115 - closed by __exit__
            except FileNotFoundError:
                return None
            except OSError as exc:
                from storage.volume.durable import raise_storage_error

                raise_storage_error(exc, self.path)
        return self.file

    def skip_to_last(self, lines: int | None) -> None:
        """Move to the last `lines` lines, reading the file backwards."""
        file = self._open()
        if file is None or lines is None:
            return
        position = file.seek(0, 2)
        found = 0
        data = b""
        while position > 0 and found <= lines:
            step = min(CHUNK, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
            found = data.count(b"\n")
        parts = data.splitlines(keepends=True)
        file.seek(position + sum(map(len, parts[: max(0, len(parts) - lines)])))

    def new_lines(self, *, flush: bool) -> Iterator[str]:
        """Yield new lines, with `flush` also an incomplete last line."""
        file = self._open()
        if file is None:
            return
        while data := file.read(CHUNK):
            *whole, self.partial_line = (self.partial_line + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
        if flush and self.partial_line:
            yield self.partial_line.decode(errors="replace")
            self.partial_line = b""
