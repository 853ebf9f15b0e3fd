"""`ganq logs` and `ganq events`: what a job said, and what happened to it."""

import time
from pathlib import Path
from typing import IO

import click

from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import Whole

POLL_S = 0.5
CHUNK = 64 * 1024


@click.command(epilog=examples("ganq logs 12", "ganq logs 12 -f", "ganq logs faces --all | grep loss"))
@click.argument("job", type=JOB)
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, until the job has ended.")
@click.option("-n", "--lines", type=Whole(0), help="Only the last so many lines of each attempt.")
@click.option("--all", "everything", is_flag=True, help="All attempts, not the newest alone.")
def logs(job: str, follow: bool, lines: int | None, everything: bool) -> int:
    """Print what JOB has logged: the newest attempt's log.txt."""
    session = open_session()
    found = session.queries.find(job)
    if found.attempt == 0 and found.state.terminal:
        output.notice(f"job {found.id} ({found.state}) never began, and has logged nothing")
        return 0
    if found.attempt == 0 and not follow:
        output.notice(f"job {found.id} has not begun yet; -f waits for it")
        return 0
    if found.attempt > 1 and not everything:
        output.notice(f"attempt {found.attempt}; --all prints those before it, too")
    first = 1 if everything else max(1, found.attempt)
    for attempt in range(first, found.attempt):
        _separator(session, found.id, attempt)
        with _Tail(_path(session, found.id, attempt)) as tail:
            tail.skip_to_last(lines)
            tail.print_new(flush=True)
    if everything and found.attempt:
        _separator(session, found.id, found.attempt)
    _last(session, found.id, max(1, found.attempt), lines, follow)
    return 0


def _last(session: Session, job_id: int, attempt: int, lines: int | None, follow: bool) -> None:
    """The newest attempt, and with `follow` every one that comes after it."""
    while True:
        path = _path(session, job_id, attempt)
        with _Tail(path) as tail:
            tail.skip_to_last(lines)
            if not follow:
                if not tail.print_new(flush=True) and not path.exists():
                    output.notice(f"attempt {attempt} has left no log at {path}")
                return
            while True:
                now = session.queries.get(job_id)
                # The state is read before the file: what was logged before the end is printed.
                over = now.state.terminal or now.attempt > attempt
                tail.print_new(flush=over)
                if over:
                    break
                time.sleep(POLL_S)
        if now.attempt <= attempt:
            output.notice(f"job {job_id} has ended: {now.state}")
            return
        attempt, lines = now.attempt, None
        _separator(session, job_id, attempt)


def _path(session: Session, job_id: int, attempt: int) -> Path:
    return session.volume.attempt(job_id, attempt) / "log.txt"


def _separator(session: Session, job_id: int, attempt: int) -> None:
    known = {one["number"]: one for one in session.queries.attempts(job_id)}.get(attempt, {})
    how = f" ({known['worker']}, {known['outcome'] or 'running'})" if known else ""
    click.echo(output.clean(f"--- attempt {attempt}{how} ---"))


class _Tail:
    """A log file that may not be there yet and may grow; prints whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] | None = None
        self.rest = b""

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
        """Move to the last so many lines, reading the file backwards."""
        file = self._open()
        if file is None or lines is None:
            return
        at = file.seek(0, 2)
        found = 0
        data = b""
        while at > 0 and found <= lines:
            step = min(CHUNK, at)
            at -= step
            file.seek(at)
            data = file.read(step) + data
            found = data.count(b"\n")
        parts = data.splitlines(keepends=True)
        file.seek(at + sum(map(len, parts[: max(0, len(parts) - lines)])))

    def print_new(self, *, flush: bool) -> bool:
        """Print what has come since; with `flush` also a last line without its end."""
        file = self._open()
        if file is None:
            return False
        some = False
        while data := file.read(CHUNK):
            *whole, self.rest = (self.rest + data).split(b"\n")
            for line in whole:
                click.echo(output.clean(line.decode(errors="replace")))
            some = True
        if flush and self.rest:
            click.echo(output.clean(self.rest.decode(errors="replace")))
            self.rest = b""
        return some


@click.command(epilog=examples("ganq events 12", "ganq events faces --json"))
@click.argument("job", type=JOB)
@output.json_option
def events(job: str, as_json: bool) -> int:
    """Print JOB's history: every step of its state, oldest first."""
    from cli.ui.job_page import event_line

    session = open_session()
    known = session.queries.events(session.queries.find(job).id)
    if as_json:
        output.print_json_array(one.__dict__ for one in known)
        return 0
    for one in known:
        click.echo(event_line(one))
    return 0
