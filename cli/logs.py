"""`ganq logs` and `ganq events`: the log and the history of a job."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import BoundedInt
from ganq.logs import attempt_lines, log_path

if TYPE_CHECKING:
    from storage.db.rows import Job


@click.command(epilog=examples("ganq logs 12", "ganq logs 12 -f", "ganq logs faces -n 50"))
@click.argument("job", type=JOB)
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the job has ended.")
@click.option("-n", "--lines", type=BoundedInt(0), help="Print only the last N lines.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="With -n: N lines of each attempt. A job has a new attempt after each interruption.",
)
def logs(job: str, follow: bool, lines: int | None, everything: bool) -> int:
    """Print the log of JOB, of all its attempts."""
    session = open_session()
    found = session.queries.find(job)
    if found.attempt == 0 and found.state.terminal:
        output.notice(f"job {found.id} ({found.state}) never started and has no log")
        return 0
    if found.attempt == 0 and not follow:
        output.notice(f"job {found.id} has not started yet; -f waits for it")
        return 0
    if found.attempt and not session.remote:
        session.volume_of(found)
    shown = _lines_of_attempts(session, found, lines, everything)
    for attempt, last in shown.items():
        _separator(session, found.id, attempt)
        _print(attempt_lines(session, found.id, attempt, last=last))
    if shown:
        _separator(session, found.id, found.attempt)
    _print_newest(session, found.id, max(1, found.attempt), lines, follow)
    return 0


def _lines_of_attempts(
    session: Session, job: "Job", lines: int | None, everything: bool
) -> dict[int, int | None]:
    """Return the attempts before the newest that are printed, and how many of their last lines; None: all."""
    earlier = range(1, job.attempt)
    if lines is None or everything:
        return dict.fromkeys(earlier, lines)
    found: dict[int, int | None] = {}
    left = lines - _count(session, job.id, job.attempt, lines)
    for attempt in reversed(earlier):
        if left <= 0:
            break
        found[attempt] = left
        left -= _count(session, job.id, attempt, left)
    return dict(reversed(found.items()))


def _count(session: Session, job_id: int, attempt: int, most: int) -> int:
    return sum(1 for _ in attempt_lines(session, job_id, attempt, last=most)) if attempt else 0


def _print(lines: Iterable[str]) -> bool:
    """Print lines; return whether there were any."""
    printed = False
    for line in lines:
        click.echo(output.clean(line))
        printed = True
    return printed


def _print_newest(session: Session, job_id: int, attempt: int, lines: int | None, follow: bool) -> None:
    """Print the newest attempt, and with `follow` all later ones."""
    while True:
        printed = _print(attempt_lines(session, job_id, attempt, last=lines, follow=follow))
        if not follow:
            if not printed and not session.remote and not log_path(session, job_id, attempt).exists():
                path = log_path(session, job_id, attempt)
                output.notice(f"attempt {attempt} has no log at {path}")
            return
        now = session.queries.get(job_id)
        if now.attempt <= attempt:
            output.notice(f"job {job_id} has ended: {now.state}")
            return
        attempt, lines = now.attempt, None
        _separator(session, job_id, attempt)


def _separator(session: Session, job_id: int, attempt: int) -> None:
    attempts = {entry["number"]: entry for entry in session.queries.attempts(job_id)}
    known = attempts.get(attempt)
    outcome = f" ({known['worker']}, {known['outcome'] or 'running'})" if known else ""
    click.echo(output.clean(f"--- attempt {attempt}{outcome} ---"))


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
