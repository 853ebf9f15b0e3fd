"""`ganq status`: list jobs, or show one job."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.session import JOB, LABEL_FILTER, NoJobsYetError, Session, open_archive, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import BoundedInt, Duration, RenamedOption, User
from jobs.errors import SpecError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.db.queries import Filter
    from storage.db.rows import Job

COLUMNS = (
    "ID",
    "NAME",
    "USER",
    "KIND",
    "STATE",
    "PROGRESS",
    "RATE",
    "ETA",
    "WORKER",
    "AGE",
    "LABELS",
    "OPTIONS",
)
STREAM_WIDTHS = (6, 20, 10, 8, 12, 28, 8, 12, 20, 12, 0, 0)
RIGHT_ALIGNED = ("ID", "RATE", "ETA", "AGE")
DEFAULT_LIMIT = 20
MAX_REASON = 72
"""Characters of a failure's reason in the list; `ganq status JOB` and --json have all of it."""
MAX_ID = 2**63 - 1
STATES = [state.value for state in JobState]
REFRESH_S = 1.0
FIRST_STEP = "submit a job with ganq submit train --data DIR, or run ganq demo"


@click.command(
    epilog=examples(
        "ganq status",
        "ganq status 12",
        "ganq status faces --watch",
        "ganq status --state failed --state cancelled --all",
        "ganq status --sweep rates",
        "ganq status --since 7d --all",
        "ganq status --archived --user ada",
        "ganq status --json --all | jq '.[] | select(.kind == \"train\") | .id'",
    )
)
@click.argument("job", required=False, type=JOB)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="Only jobs in this state; repeatable.",
)
@click.option("--kind", help="Only jobs of this kind: train, generate, evaluate, import.")
@click.option("--user", type=User(), help="Only jobs of this user.")
@click.option("--name", help="Only jobs whose name contains this text.")
@click.option(
    "--label", "labels", multiple=True, type=LABEL_FILTER, help="Only jobs with this label; repeatable."
)
@click.option("--sweep", help="Only the jobs of this sweep (id or name).")
@click.option(
    "--since",
    type=Duration(),
    help="Only jobs submitted within this time, e.g. 7d; adds a column with their options.",
)
@click.option("--before", type=BoundedInt(1), help="Only jobs with a smaller id (the next page).")
@click.option("--limit", type=BoundedInt(1, 1_000_000), help=f"Number of jobs.  [default: {DEFAULT_LIMIT}]")
@click.option("--all", "everything", is_flag=True, help="List all jobs.")
@click.option(
    "--shards",
    "shards",
    cls=RenamedOption,
    old="--parts",
    is_flag=True,
    help="Also list the shards of split jobs; with JOB, the shards of this job.",
)
@click.option("--archived", is_flag=True, help="The jobs that ganq gc --rows moved to the archive.")
@click.option("--full", is_flag=True, help="With JOB: show all options, also those with default values.")
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
@output.json_option
def status(
    job: str | None,
    states: tuple[str, ...],
    kind: str | None,
    user: str | None,
    name: str | None,
    labels: tuple[str, ...],
    sweep: str | None,
    since: float | None,
    before: int | None,
    limit: int | None,
    everything: bool,
    shards: bool,
    archived: bool,
    full: bool,
    watch: bool,
    as_json: bool,
) -> int:
    """List jobs, newest first; or show one JOB (id or name)."""
    filtered = bool(
        states or kind or user or name or labels or sweep or since or before or limit or everything
    )
    if job is not None and filtered and not shards:
        raise SpecError(
            "JOB cannot be combined with filters", hint=f"ganq status {job}, or ganq status --name {job}"
        )
    if watch and (as_json or not output.on_terminal()):
        raise SpecError(
            "--watch requires a terminal",
            hint="ganq wait JOB prints a line for each change",
        )
    if kind is not None:
        from jobs.kinds import kind_named

        kind_named(kind)
    try:
        session = open_session()
    except NoJobsYetError as exc:
        if job is not None:
            raise
        return _no_jobs_yet(as_json, exc)
    if archived:
        if watch:
            raise SpecError("--watch shows nothing new of archived jobs", hint="leave out --watch")
        session = open_archive(session)
    if job is not None and not shards:
        return _show_job(session, job, watch, as_json, full)

    from jobs.labels import read_filters
    from storage.db.queries import Filter

    job_filter = Filter(
        states=tuple(JobState(state) for state in states) or None,
        kind=kind,
        user=user,
        name=name,
        labels=read_filters(labels),
        sweep=session.queries.find_sweep(sweep) if sweep is not None else None,
        before_id=None if before is None else min(before, MAX_ID),
        parts=shards,
        part_of=session.queries.find(job).id if job is not None else None,
        since=None if since is None else session.queries.now() - since,
    )
    if as_json:
        return _list_as_json(session, job_filter, None if everything else limit or DEFAULT_LIMIT)
    if watch:
        return _watch(lambda: _overview(session, job_filter, limit or _screen_rows(4)))
    if everything and not output.on_terminal():
        return _stream(session, job_filter)
    headers, rows, footer = _list_rows(session, job_filter, None if everything else limit or DEFAULT_LIMIT)
    if rows:
        output.print_table(headers, rows, right=RIGHT_ALIGNED)
    click.echo(footer)
    return 0


def _no_jobs_yet(as_json: bool, exc: NoJobsYetError) -> int:
    """Print how to submit the first job."""
    if as_json:
        output.print_json_array(())
        return 0
    click.echo(exc.message)
    click.echo(f"  → {FIRST_STEP}")
    return 0


# --- the list -----------------------------------------------------------------------------


def _list_rows(
    session: Session, job_filter: "Filter", limit: int | None
) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
    """Return headers, rows and footer."""
    from storage.status import job_text

    jobs = (
        list(session.queries.stream(job_filter))
        if limit is None
        else session.queries.page(job_filter, limit=limit)
    )
    context = job_text.StatusContext.of(session.queries, jobs)
    bars, options = output.on_terminal(), job_filter.since is not None
    more = limit is not None and len(jobs) == limit
    hidden = set() if options else {"OPTIONS"}
    if not output.several_users((job.user for job in jobs), session.settings.user):
        hidden.add("USER")
    if not any(context.labels.values()):
        hidden.add("LABELS")
    rows = [_row(job, context, bars, options) for job in jobs]
    return *output.without_columns(COLUMNS, rows, hidden), _footer(session, len(jobs), job_filter, more=more)


def _row(job: "Job", context: Any, bars: bool, options: bool) -> list[str]:
    from storage.status import job_text

    job = job_text.as_one(job, context)
    share = job_text.fraction(job)
    progress = job_text.progress(job)
    warning = job_text.warning(job, context)
    if job.state is JobState.FAILED:
        progress = job.error_message or job.error_code or ""
        progress = progress if len(progress) <= MAX_REASON else f"{progress[: MAX_REASON - 1].rstrip()}…"
    elif bars and share is not None and progress:
        progress = f"{job_text.bar(share)} {progress}"
    elif share is not None and progress and not job.state.terminal:
        progress = f"{progress} {share:.0%}"
    if warning is not None and job.state is not JobState.FAILED:
        progress = ", ".join(filter(None, (progress, warning.partition(":")[0])))
    return [
        str(job.id),
        job.name or "",
        job.user,
        job.kind,
        job_text.state(job, context),
        progress,
        job_text.rate_text(job_text.rate(job)),
        output.duration(job_text.eta(job)),
        job_text.place(job, context),
        job_text.age(job, context),
        " ".join(f"{key}={value}" for key, value in context.labels.get(job.id, {}).items()),
        " ".join(f"{n.replace('_', '-')}={v}" for n, v in job_text.changed_options(job).items())
        if options
        else "",
    ]


def _footer(session: Session, shown: int, job_filter: "Filter", *, more: bool = False) -> str:
    """Count all jobs by state, and explain how to list the rest if there are more."""
    from storage.db.queries import Filter

    counts = session.queries.counts(
        sweep=job_filter.sweep, parts=job_filter.parts, part_of=job_filter.part_of
    )
    total = sum(counts.values())
    by_state = ", ".join(f"{number:,} {state}" for state, number in counts.items() if number)
    line = f"{output.count(total, 'job')}: {by_state}"
    if job_filter.part_of is not None:
        if total == 0:
            return f"job {job_filter.part_of} has no shards"
        line = f"job {job_filter.part_of} has {output.count(total, 'shard')}: {by_state}"
    if total == 0:
        return f"no jobs yet\n  → {FIRST_STEP}"
    if job_filter.sweep is not None:
        ended = sum(number for state, number in counts.items() if JobState(state).terminal)
        line = f"sweep {job_filter.sweep}: {ended:,} of {total:,} ended: {by_state}"
    unfiltered = job_filter == Filter(parts=job_filter.parts, part_of=job_filter.part_of)
    if shown < total and unfiltered:
        line += f" · newest {shown} shown; --all shows all, ganq status ID shows one"
    elif not unfiltered and more:
        line += f" · {shown} matching jobs shown; --all or --limit N shows more"
    elif not unfiltered and shown < total:
        line += f" · {shown} match the filter"
    return line


def _stream(session: Session, job_filter: "Filter") -> int:
    """Print all jobs to a pipe, page by page, at constant memory."""
    from storage.status import job_text

    options = job_filter.since is not None
    headers = COLUMNS if options else (*COLUMNS[:-1], "")
    click.echo("  ".join(h.ljust(w) for h, w in zip(headers, STREAM_WIDTHS, strict=True)).rstrip())
    shown = 0
    for page in _pages(session.queries.stream(job_filter)):
        context = job_text.StatusContext.of(session.queries, page)
        for job in page:
            cells = [output.clean(cell) for cell in _row(job, context, False, options)]
            click.echo("  ".join(c.ljust(w) for c, w in zip(cells, STREAM_WIDTHS, strict=True)).rstrip())
        shown += len(page)
    click.echo(_footer(session, shown, job_filter))
    return 0


def _pages(jobs: "Iterator[Job]", size: int = 500) -> "Iterator[list[Job]]":
    from itertools import islice

    while page := list(islice(jobs, size)):
        yield page


def _list_as_json(session: Session, job_filter: "Filter", limit: int | None) -> int:
    from itertools import islice

    from storage.status import job_text

    def facts() -> Iterator[dict[str, Any]]:
        for page in _pages(islice(session.queries.stream(job_filter), limit)):
            context = job_text.StatusContext.of(session.queries, page)
            for job in page:
                yield job_text.as_json(job, context)

    output.print_json_array(facts())
    return 0


# --- on a terminal ------------------------------------------------------------------------


def _screen_rows(taken: int) -> int:
    import shutil

    return max(5, shutil.get_terminal_size().lines - taken)


def _overview(session: Session, job_filter: "Filter", limit: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    headers, rows, footer = _list_rows(session, job_filter, limit)
    return Group(output.rich_table(headers, rows, right=RIGHT_ALIGNED), Text(footer, style="dim"))


def _watch(draw: Callable[[], Any], ended: Callable[[], bool] = lambda: False) -> int:
    """Redraw until Ctrl-C, or until `ended` is true."""
    from rich.live import Live

    with Live(auto_refresh=False, screen=False) as live:
        while True:
            last = ended()  # checked before drawing, so that the last frame shows the end
            live.update(draw(), refresh=True)
            if last:
                return 0
            time.sleep(REFRESH_S)


def _show_job(session: Session, reference: str, watch: bool, as_json: bool, full: bool) -> int:
    from cli.ui import job_page

    job_id = session.queries.find(reference).id
    if as_json:
        output.print_json(job_page.as_json(session, job_id))
        return 0

    if watch:
        from rich.text import Text

        def page() -> Text:
            shown = job_page.lines(session, job_id, rows=_screen_rows(1), full=full)
            return Text("\n".join(shown), no_wrap=True, overflow=output.overflow())

        return _watch(page, lambda: session.queries.get(job_id).state.terminal)
    for line in job_page.lines(session, job_id, full=full):
        click.echo(line)
    from cli.ui import graphics

    if graphics.enabled():
        graphics.print_graphics(session, session.queries.get(job_id))
    return 0
