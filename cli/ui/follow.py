"""
Follow jobs until they have ended, for `ganq wait` and `ganq submit --wait`.

On a terminal each job has a progress bar; otherwise each change is one line.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cli.session import Session
from cli.ui import output
from ganq.copies import copy_pending
from ganq.polling import poll_delay_s
from jobs.errors import DatabaseUnavailableError
from jobs.states import JobState
from storage.db.rows import Job
from storage.status import job_text

LINE_INTERVAL_S = 10.0
EXIT_TIMEOUT = 124
MAX_BARS = 30
"""Jobs that are shown individually."""


class View(Protocol):
    """Display of the followed jobs."""

    def show(self, jobs: Sequence[Job], context: job_text.StatusContext) -> None: ...


def follow(
    session: Session, job_ids: Sequence[int], *, timeout_s: float | None = None, quiet: bool = False
) -> tuple[list[Job], bool]:
    """
    Wait until all jobs have ended, also while the database is unavailable.

    Args:
        timeout_s: None: no timeout.
        quiet: print nothing.

    Returns:
        (the jobs, whether the timeout has expired).
    """
    try:
        with _view(quiet, len(job_ids)) as view:
            jobs, timed_out = _until_ended(session, job_ids, timeout_s, view)
    except KeyboardInterrupt:
        ids = " ".join(map(str, job_ids)) if len(job_ids) <= MAX_BARS else "--sweep …"
        output.notice(f"\nstopped waiting; the jobs continue (ganq wait {ids}, ganq cancel {ids})")
        raise
    for job in jobs:
        if (reason := copy_pending(session, job)) is not None:
            output.notice(output.clean(reason))
    if not quiet and len(jobs) > MAX_BARS:
        for job in [job for job in jobs if job.state is JobState.FAILED][:MAX_BARS]:
            output.notice(outcome(job))
        output.notice(_state_counts(jobs))
    elif not quiet:
        for job in jobs:
            if timed_out or output.on_terminal():  # otherwise the view has printed a line for each end
                output.notice(outcome(job))
    return jobs, timed_out


def _until_ended(
    session: Session, job_ids: Sequence[int], timeout_s: float | None, view: "View"
) -> tuple[list[Job], bool]:
    started = time.monotonic()
    deadline = None if timeout_s is None else started + timeout_s
    unavailable = False
    ended: dict[int, Job] = {}  # not queried again
    while True:
        jobs: list[Job] = []
        polled = time.monotonic()
        try:
            open_ids = [job_id for job_id in job_ids if job_id not in ended]
            found = {job.id: job for job in session.queries.get_many(open_ids)}
            ended |= {job.id: job for job in found.values() if job.state.terminal}
            jobs = [found.get(job_id) or ended[job_id] for job_id in job_ids]
            context = job_text.StatusContext.of(session.queries, jobs)
            view.show([job_text.as_one(job, context) for job in jobs], context)
            unavailable = False
        except DatabaseUnavailableError as exc:
            if not unavailable:
                output.notice(f"{exc.message}; waiting for it")
            unavailable = True
        if jobs and all(job.state.terminal for job in jobs):
            return jobs, False
        if deadline is not None and time.monotonic() >= deadline:
            return jobs or session.queries.get_many(job_ids), True
        now = time.monotonic()
        time.sleep(poll_delay_s(now - started, query_s=now - polled))


def exit_code_of(jobs: Sequence[Job], timed_out: bool) -> int:
    """Return 0 if all have succeeded, 1 if not, 124 after a timeout."""
    if timed_out:
        return EXIT_TIMEOUT
    return 0 if all(job.state is JobState.SUCCEEDED for job in jobs) else 1


def outcome(job: Job) -> str:
    """Describe how a job ended and what to do next."""
    name = f" ({output.clean(job.name)})" if job.name else ""
    took = ""
    if job.started_at is not None and job.finished_at is not None:
        took = f" after {output.duration(job.finished_at - job.started_at)}"
    if job.state is JobState.SUCCEEDED:
        failed = (job.result or {}).get("out_error")
        not_copied = f"\n  but the result was not copied: {output.clean(failed)}" if failed else ""
        return f"job {job.id}{name} has succeeded{took}: ganq open {job.id}{not_copied}"
    if job.state is JobState.CANCELLED:
        reason = f": {output.clean(job.error_message)}" if job.error_message else ""
        return f"job {job.id}{name} was cancelled{took}{reason}"
    if job.state is JobState.FAILED:
        hint = f"\n  → {output.clean(job.error_hint)}" if job.error_hint else ""
        reason = output.clean(job.error_message or job.error_code or "no reason given")
        return f"job {job.id}{name} has failed{took}: {reason}{hint}"
    return f"job {job.id}{name} is still {job.state}"


def summary(jobs: Sequence[Job], timed_out: bool) -> str:
    """Return one line on how the waiting ended: for one job how it ended, else the number in each state."""
    text = outcome(jobs[0]).splitlines()[0] if len(jobs) == 1 else _state_counts(jobs)
    return f"stopped waiting: {text}" if timed_out else text


@contextmanager
def _view(quiet: bool, jobs: int) -> Iterator[View]:
    if quiet:
        yield _NullView()
    elif not output.on_terminal() and jobs > MAX_BARS:
        yield _CountsView()
    elif not output.on_terminal():
        yield _LinesView()
    else:
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            yield _BarsView(live)


class _NullView:
    """Show nothing."""

    def show(self, jobs: Sequence[Job], context: job_text.StatusContext) -> None:
        pass


def _state_counts(jobs: Sequence[Job]) -> str:
    states = Counter(str(job.state) for job in jobs)
    by_state = ", ".join(f"{states[state]:,} {state}" for state in JobState if states[state])
    return f"{output.count(len(jobs), 'job')}: {by_state}"


class _CountsView:
    """Print the number of jobs in each state from time to time."""

    def __init__(self) -> None:
        self.printed, self.printed_at = "", 0.0

    def show(self, jobs: Sequence[Job], context: job_text.StatusContext) -> None:
        now, line = time.monotonic(), _state_counts(jobs)
        if line != self.printed and now - self.printed_at >= LINE_INTERVAL_S:
            self.printed, self.printed_at = line, now
            output.notice(line)


class _LinesView:
    """Print a line for each new state, and from time to time one for the progress."""

    def __init__(self) -> None:
        self.printed: dict[int, tuple[str, str, float]] = {}

    def show(self, jobs: Sequence[Job], context: job_text.StatusContext) -> None:
        for job in jobs:
            state, progress = job_text.state(job, context), job_text.progress(job)
            stable = state.split(" in ")[0].split(" for ")[0]  # 'retry in 9 s' changes every second
            before = self.printed.get(job.id)
            now = time.monotonic()
            same = before is not None and before[0] == stable
            if same and before is not None and (before[1] == progress or now - before[2] < LINE_INTERVAL_S):
                continue
            self.printed[job.id] = (stable, progress, now)
            if job.state.terminal:
                output.notice(outcome(job))
            else:
                output.notice(_line(job, state, progress))


def _line(job: Job, state: str, progress: str) -> str:
    parts = [f"job {job.id}{f' ({job.name})' if job.name else ''}: {state}"]
    if job.state is JobState.RUNNING:
        share, left = job_text.fraction(job), job_text.eta(job)
        parts.append(f"{progress} {share:.0%}" if share is not None and progress else progress)
        parts.append(job_text.rate_text(job_text.rate(job)))
        parts.append(f"{output.duration(left)} left" if left is not None else "")
    return output.clean(", ".join(part for part in parts if part))


class _BarsView:
    """Redraw one line per job."""

    def __init__(self, live: Any) -> None:
        self.live = live

    def show(self, jobs: Sequence[Job], context: job_text.StatusContext) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        active = [job for job in jobs if not job.state.terminal]
        for job in jobs if len(jobs) <= MAX_BARS else active[:MAX_BARS]:
            left = job_text.eta(job)
            cells = [
                f"{job.id} {job.name or job.kind}",
                job_text.state(job, context),
                job_text.bar(job_text.fraction(job), 24),
                job_text.progress(job),
                job_text.rate_text(job_text.rate(job)),
                f"{output.duration(left)} left" if left is not None else "",
            ]
            row = [Text(output.clean(cell), no_wrap=True) for cell in cells]
            row[1].stylize(output.STATE_STYLES.get(str(job.state), ""))
            table.add_row(*row)
        self.live.update(table, refresh=True)
