"""`ganq status`: all jobs at a glance, or everything about one."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from cli.session import JOB, NoJobsYetError, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import User, Whole
from jobs.errors import SpecError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.db.queries import Filter
    from storage.db.rows import Job

COLUMNS = ("ID", "NAME", "KIND", "STATE", "PROGRESS", "RATE", "ETA", "WORKER", "AGE")
RIGHT = ("ID", "RATE", "ETA", "AGE")
DEFAULT_LIMIT = 20
MOST_ID = 2**63 - 1
STATES = [state.value for state in JobState]
WATCH_S = 1.0
FIRST_STEP = "ganq submit train --data DIR submits the first one; ganq demo shows it all"


@click.command(
    epilog=examples(
        "ganq status",
        "ganq status 12",
        "ganq status faces --watch",
        "ganq status --state failed --state cancelled --all",
        "ganq status --sweep rates",
        "ganq status --json --all | jq '.[] | select(.kind == \"train\") | .id'",
    )
)
@click.argument("job", required=False, type=JOB)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="Only these; repeatable.",
)
@click.option("--kind", help="Only this kind: train, generate, evaluate, import.")
@click.option("--user", type=User(), help="Only jobs of this user.")
@click.option("--name", help="Only jobs whose name contains this.")
@click.option("--sweep", help="Only the jobs of this array: its id, or the name that they begin with.")
@click.option("--before", type=Whole(1), help="Only jobs older than this id: the next page.")
@click.option("--limit", type=Whole(1, 1_000_000), help=f"How many to list (default {DEFAULT_LIMIT}).")
@click.option("--all", "everything", is_flag=True, help="List all, however many.")
@click.option("--parts", is_flag=True, help="List the parts of split jobs, too; with JOB, those of this one.")
@click.option("--watch", is_flag=True, help="Redraw every second, until Ctrl-C.")
@output.json_option
def status(
    job: str | None,
    states: tuple[str, ...],
    kind: str | None,
    user: str | None,
    name: str | None,
    sweep: str | None,
    before: int | None,
    limit: int | None,
    everything: bool,
    parts: bool,
    watch: bool,
    as_json: bool,
) -> int:
    """List jobs, newest first; or show all about one JOB (an id or a name)."""
    filtered = bool(states or kind or user or name or sweep or before or limit or everything)
    if job is not None and filtered and not parts:
        raise SpecError(
            "one job and a filter do not go together", hint=f"ganq status {job}, or ganq status --name {job}"
        )
    if watch and (as_json or not output.on_terminal()):
        raise SpecError(
            "--watch redraws a terminal, and this is none",
            hint="ganq wait JOB prints a line for each change; ganq status --json prints once",
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
    if job is not None and not parts:
        return _one(session, job, watch, as_json)

    from storage.db.queries import Filter

    wanted = Filter(
        states=tuple(JobState(one) for one in states) or None,
        kind=kind,
        user=user,
        name=name,
        sweep=session.queries.find_sweep(sweep) if sweep is not None else None,
        before_id=None if before is None else min(before, MOST_ID),
        parts=parts,
        part_of=session.queries.find(job).id if job is not None else None,
    )
    if as_json:
        return _list_as_json(session, wanted, None if everything else limit or DEFAULT_LIMIT)
    if watch:
        return _watch(lambda: _overview(session, wanted, limit or _screen_rows(4)))
    if everything and not output.on_terminal():
        return _stream(session, wanted)
    rows, footer = _overview_rows(session, wanted, None if everything else limit or DEFAULT_LIMIT)
    if rows:
        output.print_table(COLUMNS, rows, right=RIGHT)
    click.echo(footer)
    return 0


def _no_jobs_yet(as_json: bool, exc: NoJobsYetError) -> int:
    """Nothing was ever submitted: no error, but a way forward."""
    if as_json:
        output.print_json_array(())
        return 0
    click.echo(exc.message)
    click.echo(f"  → {FIRST_STEP}")
    return 0


# --- the list -----------------------------------------------------------------------------


def _overview_rows(session: Session, wanted: "Filter", limit: int | None) -> tuple[list[list[str]], str]:
    from storage.status import job_text

    jobs = (
        list(session.queries.stream(wanted)) if limit is None else session.queries.page(wanted, limit=limit)
    )
    around = job_text.StatusContext.of(session.queries, jobs)
    bars = output.on_terminal()
    more = limit is not None and len(jobs) == limit
    return [_row(one, around, bars) for one in jobs], _footer(session, len(jobs), wanted, more=more)


def _row(one: "Job", around: Any, bars: bool) -> list[str]:
    from storage.status import job_text

    one = job_text.as_one(one, around)
    share = job_text.fraction(one)
    progress = job_text.progress(one)
    if bars and share is not None and progress:
        progress = f"{job_text.bar(share)} {progress}"
    elif share is not None and progress and not one.state.terminal:
        progress = f"{progress} {share:.0%}"
    return [
        str(one.id),
        one.name or "",
        one.kind,
        job_text.state(one, around),
        progress,
        job_text.rate_text(job_text.rate(one)),
        output.duration(job_text.eta(one)),
        job_text.place(one, around),
        job_text.age(one, around),
    ]


def _footer(session: Session, shown: int, wanted: "Filter", *, more: bool = False) -> str:
    """How many there are in all, by state, and how to see the rest, if there may be more."""
    from storage.db.queries import Filter

    counts = session.queries.counts(sweep=wanted.sweep, parts=wanted.parts, part_of=wanted.part_of)
    total = sum(counts.values())
    by_state = ", ".join(f"{number:,} {state}" for state, number in counts.items() if number)
    line = f"{output.count(total, 'job')}: {by_state}"
    if wanted.part_of is not None:
        if total == 0:
            return f"job {wanted.part_of} has no parts"
        line = f"job {wanted.part_of} has {output.count(total, 'part')}: {by_state}"
    if total == 0:
        return f"no jobs yet\n  → {FIRST_STEP}"
    if wanted.sweep is not None:
        ended = sum(number for state, number in counts.items() if JobState(state).terminal)
        line = f"sweep {wanted.sweep}: {ended:,} of {total:,} ended: {by_state}"
    unfiltered = wanted == Filter(parts=wanted.parts, part_of=wanted.part_of)
    if shown < total and unfiltered:
        line += f" · newest {shown} shown; --all shows every one, ganq status ID one of them"
    elif not unfiltered and more:
        line += f" · {shown} shown of those that match; --all or --limit N shows more"
    elif not unfiltered and shown < total:
        line += f" · {shown} of them match"
    return line


def _stream(session: Session, wanted: "Filter") -> int:
    """All jobs into a pipe: one aligned page after another, at constant memory."""
    from storage.status import job_text

    widths = (6, 20, 8, 12, 28, 8, 12, 20, 12)
    click.echo("  ".join(h.ljust(w) for h, w in zip(COLUMNS, widths, strict=True)).rstrip())
    shown = 0
    for page in _pages(session.queries.stream(wanted)):
        around = job_text.StatusContext.of(session.queries, page)
        for one in page:
            cells = [output.clean(cell) for cell in _row(one, around, False)]
            click.echo("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip())
        shown += len(page)
    click.echo(_footer(session, shown, wanted))
    return 0


def _pages(jobs: "Iterator[Job]", size: int = 500) -> "Iterator[list[Job]]":
    from itertools import islice

    while page := list(islice(jobs, size)):
        yield page


def _list_as_json(session: Session, wanted: "Filter", limit: int | None) -> int:
    from itertools import islice

    from storage.status import job_text

    def facts() -> Iterator[dict[str, Any]]:
        for page in _pages(islice(session.queries.stream(wanted), limit)):
            around = job_text.StatusContext.of(session.queries, page)
            for one in page:
                yield job_text.as_json(one, around)

    output.print_json_array(facts())
    return 0


# --- on a terminal ------------------------------------------------------------------------


def _screen_rows(taken: int) -> int:
    import shutil

    return max(5, shutil.get_terminal_size().lines - taken)


def _overview(session: Session, wanted: "Filter", limit: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    rows, footer = _overview_rows(session, wanted, limit)
    return Group(output.rich_table(COLUMNS, rows, right=RIGHT), Text(footer, style="dim"))


def _watch(draw: Callable[[], Any], ended: Callable[[], bool] = lambda: False) -> int:
    """Redraw in place until Ctrl-C, or until there is nothing more to see."""
    from rich.live import Live

    with Live(auto_refresh=False, screen=False) as live:
        while True:
            over = ended()  # before the last drawing, which then shows the end
            live.update(draw(), refresh=True)
            if over:
                return 0
            time.sleep(WATCH_S)


def _one(session: Session, reference: str, watch: bool, as_json: bool) -> int:
    from cli.ui import job_page

    job_id = session.queries.find(reference).id
    if as_json:
        output.print_json(job_page.as_json(session, job_id))
        return 0

    if watch:
        from rich.text import Text

        def page() -> Text:
            shown = job_page.lines(session, job_id, rows=_screen_rows(1))
            return Text("\n".join(shown), no_wrap=True, overflow=output.overflow())

        return _watch(page, lambda: session.queries.get(job_id).state.terminal)
    for line in job_page.lines(session, job_id):
        click.echo(line)
    return 0
