"""`ganq logs` and `ganq events`: the log and the history of a job."""

import time
from pathlib import Path
from typing import IO

import click

from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import BoundedInt

POLL_S = 0.5
CHUNK = 64 * 1024


@click.command(epilog=examples("ganq logs 12", "ganq logs 12 -f", "ganq logs faces --all | grep loss"))
@click.argument("job", type=JOB)
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the job has ended.")
@click.option("-n", "--lines", type=BoundedInt(0), help="Print only the last N lines of each attempt.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Print all attempts, not only the newest. A job has a new attempt after each interruption.",
)
def logs(job: str, follow: bool, lines: int | None, everything: bool) -> int:
    """Print the log of JOB."""
    session = open_session()
    found = session.queries.find(job)
    if found.attempt == 0 and found.state.terminal:
        output.notice(f"job {found.id} ({found.state}) never started and has no log")
        return 0
    if found.attempt == 0 and not follow:
        output.notice(f"job {found.id} has not started yet; -f waits for it")
        return 0
    if found.attempt:
        session.volume_of(found)
    if found.attempt > 1 and not everything:
        output.notice(f"this is attempt {found.attempt}; --all prints all attempts")
    first = 1 if everything else max(1, found.attempt)
    for attempt in range(first, found.attempt):
        _separator(session, found.id, attempt)
        with _Tail(_path(session, found.id, attempt)) as tail:
            tail.skip_to_last(lines)
            tail.print_new(flush=True)
    if everything and found.attempt:
        _separator(session, found.id, found.attempt)
    _print_newest(session, found.id, max(1, found.attempt), lines, follow)
    return 0


def _print_newest(session: Session, job_id: int, attempt: int, lines: int | None, follow: bool) -> None:
    """Print the newest attempt, and with `follow` all later ones."""
    while True:
        path = _path(session, job_id, attempt)
        with _Tail(path) as tail:
            tail.skip_to_last(lines)
            if not follow:
                if not tail.print_new(flush=True) and not path.exists():
                    output.notice(f"attempt {attempt} has no log at {path}")
                return
            while True:
                now = session.queries.get(job_id)
                # Read the state before the file, so that lines written before the end are printed.
                ended = now.state.terminal or now.attempt > attempt
                tail.print_new(flush=ended)
                if ended:
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
    attempts = {entry["number"]: entry for entry in session.queries.attempts(job_id)}
    known = attempts.get(attempt)
    outcome = f" ({known['worker']}, {known['outcome'] or 'running'})" if known else ""
    click.echo(output.clean(f"--- attempt {attempt}{outcome} ---"))


class _Tail:
    """Read a log file that may not exist yet and may grow; print complete lines."""

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

    def print_new(self, *, flush: bool) -> bool:
        """Print new lines, with `flush` also an incomplete last line; return whether there were any."""
        file = self._open()
        if file is None:
            return False
        printed = False
        while data := file.read(CHUNK):
            *whole, self.partial_line = (self.partial_line + data).split(b"\n")
            for line in whole:
                click.echo(output.clean(line.decode(errors="replace")))
            printed = True
        if flush and self.partial_line:
            click.echo(output.clean(self.partial_line.decode(errors="replace")))
            self.partial_line = b""
        return printed


@click.command(epilog=examples("ganq events 12", "ganq events faces --json"))
@click.argument("job", type=JOB)
@output.json_option
def events(job: str, as_json: bool) -> int:
    """Print the history of JOB, oldest event first."""
    from cli.ui.job_page import event_line

    session = open_session()
    history = session.queries.events(session.queries.find(job).id)
    if as_json:
        output.print_json_array(event.__dict__ for event in history)
        return 0
    for event in history:
        click.echo(event_line(event))
    return 0
