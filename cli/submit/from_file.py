"""`ganq submit -f`: submit the jobs of a file."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from cli.session import open_session
from cli.submit.notify import notices_of, report_unwritten
from cli.ui import output
from ganq.submission.jobfile import MAX_BYTES, PlannedFile, plan_file, read_file, submit_planned
from storage.settings import Settings


def submit_file(file: str, *, dry_run: bool, held: bool, as_json: bool) -> int:
    """Submit the jobs of a TOML file, or of stdin ('-'), in one transaction; return the exit code."""
    if file == "-":
        text, name = sys.stdin.buffer.read(MAX_BYTES + 1), "stdin"
    else:
        with open(file, "rb") as opened:
            text, name = opened.read(MAX_BYTES + 1), Path(file).name
    settings = Settings.load()
    jobs = read_file(text, name)
    if held:
        jobs = [
            replace(job, request=replace(job.request, job=replace(job.request.job, held=True)))
            for job in jobs
        ]
    plan = plan_file(
        settings, lambda create: open_session(create=create, settings=settings), jobs, dry_run=dry_run
    )
    if dry_run:
        return _show(plan, as_json)
    made, notices = submit_planned(plan)
    with report_unwritten(f"{output.count(sum(map(len, made)), 'job')} of {name}"):
        try:
            _announce(plan, made, as_json)
        finally:
            notices_of(notices)
    return 0


def _show(plan: PlannedFile, as_json: bool) -> int:
    """Print what would be submitted."""
    if as_json:
        output.print_json(
            [
                {"kind": entry.columns["kind"], "name": name, "spec": spec}
                for entry in plan.entries
                for name, spec in zip(entry.names, entry.specs, strict=True)
            ]
        )
        return 0
    for job, entry in zip(plan.jobs, plan.entries, strict=True):
        name = f"{job.request.job.name}: " if job.request.job.name else ""
        swept = f", sweep of {output.count(len(entry.specs), 'job')}" if entry.swept else ""
        click.echo(f"{name}{job.request.kind}{swept}")
    click.echo("nothing was submitted (--dry-run)")
    return 0


def _announce(plan: PlannedFile, made: Sequence[Sequence[int]], as_json: bool) -> None:
    """Print the accepted jobs."""
    from storage.status import job_text

    queries = plan.session.queries
    rows = queries.get_many([one for ids in made for one in ids])
    context = job_text.StatusContext.of(queries, rows)
    if as_json:
        output.print_json([job_text.as_json(row, context) for row in rows])
        return
    by_id = {row.id: row for row in rows}
    for planned, ids in zip(plan.jobs, made, strict=True):
        job = by_id[ids[0]]
        if planned.axes:
            jobs = output.count(len(ids), "job")
            click.echo(f"sweep {job.sweep}: {jobs} of kind {job.kind} accepted, {ids[0]} to {ids[-1]}")
        else:
            name = f" ({job.name})" if job.name else ""
            click.echo(f"job {job.id}{name}: {job.kind} accepted, {job_text.state(job, context)}")
    click.echo("  → ganq status")
