"""
Watch jobs until they have ended: `ganq wait` and `ganq submit --wait`.

On a terminal a bar for each job; otherwise one line for each change, so that a log
of a script can be read.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from cli.session import Session
from cli.ui import output
from jobs.errors import DatabaseUnavailableError
from jobs.states import JobState
from storage.db.rows import Job
from storage.status import job_text

POLL_S = (0.02, 0.5)
POLL_SHARE = 0.1
"""Of the time waited so far: a short job is seen to end at once, a long one costs few questions."""
LINE_EVERY_S = 10.0
EXIT_TIMEOUT = 124
BARS = 30
"""Of more jobs than this only so many of those that have not ended are drawn."""


class View(Protocol):
    """How the news is shown."""

    def show(self, jobs: Sequence[Job], around: job_text.StatusContext) -> None: ...


def follow(
    session: Session, job_ids: Sequence[int], *, timeout_s: float | None = None, quiet: bool = False
) -> tuple[list[Job], bool]:
    """
    Wait until all jobs have ended. A database that is away for a while is waited for.

    Args:
        timeout_s: give up after so many seconds; None: never.
        quiet: show nothing (the answer will be JSON).

    Returns:
        (the jobs as they stand, whether the time ran out).
    """
    try:
        with _view(quiet, len(job_ids)) as view:
            jobs, timed_out = _until_ended(session, job_ids, timeout_s, view)
    except KeyboardInterrupt:
        ids = " ".join(map(str, job_ids)) if len(job_ids) <= BARS else "--sweep …"
        output.notice(f"\nno longer waiting; the work goes on (ganq wait {ids}, ganq cancel {ids})")
        raise
    if not quiet and len(jobs) > BARS:
        for one in [one for one in jobs if one.state is JobState.FAILED][:BARS]:
            output.notice(ending(one))
        output.notice(_counted(jobs))
    elif not quiet:
        for one in jobs:
            if timed_out or output.on_terminal():  # off a terminal each end already has its line
                output.notice(ending(one))
    return jobs, timed_out


def _until_ended(
    session: Session, job_ids: Sequence[int], timeout_s: float | None, view: "View"
) -> tuple[list[Job], bool]:
    began = time.monotonic()
    deadline = None if timeout_s is None else began + timeout_s
    away = False
    ended: dict[int, Job] = {}  # what is final needs no second look
    while True:
        jobs: list[Job] = []
        looked = time.monotonic()
        try:
            still = [one for one in job_ids if one not in ended]
            found = {one.id: one for one in session.queries.get_many(still)}
            ended |= {one.id: one for one in found.values() if one.state.terminal}
            jobs = [found.get(one) or ended[one] for one in job_ids]
            around = job_text.StatusContext.of(session.queries, jobs)
            view.show([job_text.as_one(one, around) for one in jobs], around)
            away = False
        except DatabaseUnavailableError as exc:
            if not away:
                output.notice(f"{exc.message}; waiting for it")
            away = True
        if jobs and all(one.state.terminal for one in jobs):
            return jobs, False
        if deadline is not None and time.monotonic() >= deadline:
            return jobs or session.queries.get_many(job_ids), True
        now = time.monotonic()
        time.sleep(pause_s(now - began, look_s=now - looked))


def pause_s(waited_s: float, look_s: float = 0.0) -> float:
    """How long to wait before the next look; as long as the last one took, where many are waited for."""
    shortest, longest = POLL_S
    return min(max(waited_s * POLL_SHARE, shortest, look_s), longest)


def exit_code_of(jobs: Sequence[Job], timed_out: bool) -> int:
    """The exit code of those who waited: 0 all succeeded, 1 not all, 124 not yet."""
    if timed_out:
        return EXIT_TIMEOUT
    return 0 if all(one.state is JobState.SUCCEEDED for one in jobs) else 1


def ending(job: Job) -> str:
    """How a job ended, in one line with what to do next."""
    name = f" ({output.clean(job.name)})" if job.name else ""
    took = ""
    if job.started_at is not None and job.finished_at is not None:
        took = f" after {output.duration(job.finished_at - job.started_at)}"
    if job.state is JobState.SUCCEEDED:
        failed = (job.result or {}).get("out_error")
        not_copied = f"\n  but was not copied: {output.clean(failed)}" if failed else ""
        return f"job {job.id}{name} has succeeded{took}: ganq open {job.id}{not_copied}"
    if job.state is JobState.CANCELLED:
        return f"job {job.id}{name} was cancelled{took}"
    if job.state is JobState.FAILED:
        hint = f"\n  → {output.clean(job.error_hint)}" if job.error_hint else ""
        why = output.clean(job.error_message or job.error_code or "no reason given")
        return f"job {job.id}{name} has failed{took}: {why}{hint}"
    return f"job {job.id}{name} is still {job.state}"


@contextmanager
def _view(quiet: bool, jobs: int) -> Iterator[View]:
    if quiet:
        yield _Silent()
    elif not output.on_terminal() and jobs > BARS:
        yield _Counts()
    elif not output.on_terminal():
        yield _Lines()
    else:
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            yield _Bars(live)


class _Silent:
    def show(self, jobs: Sequence[Job], around: job_text.StatusContext) -> None:
        pass


def _counted(jobs: Sequence[Job]) -> str:
    states = Counter(str(one.state) for one in jobs)
    by_state = ", ".join(f"{states[state]:,} {state}" for state in JobState if states[state])
    return f"{output.count(len(jobs), 'job')}: {by_state}"


class _Counts:
    """Of many jobs, how many are in which state, now and then."""

    def __init__(self) -> None:
        self.said, self.at = "", 0.0

    def show(self, jobs: Sequence[Job], around: job_text.StatusContext) -> None:
        now, line = time.monotonic(), _counted(jobs)
        if line != self.said and now - self.at >= LINE_EVERY_S:
            self.said, self.at = line, now
            output.notice(line)


class _Lines:
    """A line for each new state, and now and then one for the progress."""

    def __init__(self) -> None:
        self.said: dict[int, tuple[str, str, float]] = {}

    def show(self, jobs: Sequence[Job], around: job_text.StatusContext) -> None:
        for job in jobs:
            state, progress = job_text.state(job, around), job_text.progress(job)
            kind = state.split(" in ")[0].split(" for ")[0]  # 'retry in 9 s' changes every second
            before = self.said.get(job.id)
            now = time.monotonic()
            same = before is not None and before[0] == kind
            if same and before is not None and (before[1] == progress or now - before[2] < LINE_EVERY_S):
                continue
            self.said[job.id] = (kind, progress, now)
            if job.state.terminal:
                output.notice(ending(job))
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


class _Bars:
    """One redrawn line for each job."""

    def __init__(self, live: Any) -> None:
        self.live = live

    def show(self, jobs: Sequence[Job], around: job_text.StatusContext) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        moving = [job for job in jobs if not job.state.terminal]
        for job in jobs if len(jobs) <= BARS else moving[:BARS]:
            left = job_text.eta(job)
            cells = [
                f"{job.id} {job.name or job.kind}",
                job_text.state(job, around),
                job_text.bar(job_text.fraction(job), 24),
                job_text.progress(job),
                job_text.rate_text(job_text.rate(job)),
                f"{output.duration(left)} left" if left is not None else "",
            ]
            row = [Text(output.clean(cell), no_wrap=True) for cell in cells]
            row[1].stylize(output.STATE_STYLES.get(str(job.state), ""))
            table.add_row(*row)
        self.live.update(table, refresh=True)
