"""`ganq compare`: finished evaluations beside each other."""

from typing import TYPE_CHECKING, Any

import click

from cli import evaluations, output
from cli.lazy import examples
from cli.session import JOB, Session, open_session
from jobs.errors import NotFoundError
from jobs.states import JobState

if TYPE_CHECKING:
    from storage.jobs import Job

LATEST = 20
LOOK_BACK = 10_000


@click.command(epilog=examples("ganq compare", "ganq compare 12 15 faces", "ganq compare 12 15 --json"))
@click.argument("jobs", nargs=-1, type=JOB)
@output.json_option
def compare(jobs: tuple[str, ...], as_json: bool) -> int:
    """
    Put finished evaluations beside each other, the best first.

    JOBS are evaluations, or jobs that have been evaluated: then their newest evaluation
    counts. Without JOBS, the newest 20. Best is by the first metric that all of them have.
    """
    session = open_session()
    finished = _finished(session)
    chosen = [_evaluation_of(session, one, finished) for one in jobs] if jobs else finished[:LATEST]
    chosen = _ranked(list({one.id: one for one in chosen}.values()))
    if as_json:
        output.print_json_array(
            {"id": one.id, "name": one.name, "of": _of(one), "evaluation": one.result} for one in chosen
        )
        return 0
    if not chosen:
        click.echo("no evaluation has finished yet\n  → ganq submit evaluate JOB makes one")
        return 0
    cells = [evaluations.row(one.result or {}) for one in chosen]
    measured = list(dict.fromkeys(name for row in cells for name in row))
    rows = [
        [str(one.id), _of(one), _pictures(one), *(row.get(name, "") for name in measured)]
        for one, row in zip(chosen, cells, strict=True)
    ]
    output.print_table(("ID", "OF", "PICTURES", *measured), rows, right=("ID", "PICTURES", *measured))
    if len({(one.result or {}).get("data", {}).get("fingerprint") for one in chosen}) > 1:
        output.notice("these were measured against different real pictures: their numbers do not compare")
    return 0


def _finished(session: Session) -> "list[Job]":
    from storage.queries import Filter

    wanted = Filter(kind="evaluate", states=(JobState.SUCCEEDED,))
    return session.queries.page(wanted, limit=LOOK_BACK)


def _evaluation_of(session: Session, reference: str, finished: "list[Job]") -> "Job":
    """
    Raises:
        NotFoundError: it is no finished evaluation, and has none.
    """
    job = session.queries.find(reference)
    if job.kind == "evaluate" and job.state is JobState.SUCCEEDED:
        return job
    for one in finished:
        if one.spec.get("source") == job.id:
            return one
    if job.kind == "evaluate":
        raise NotFoundError(f"job {job.id} is {job.state}", hint=f"ganq status {job.id} shows how far it is")
    raise NotFoundError(
        f"job {job.id} has not been evaluated", hint=f"ganq submit evaluate {job.id} --wait does it"
    )


def _of(one: "Job") -> str:
    """What was evaluated."""
    if one.spec.get("path"):
        return str(one.spec["path"])
    pinned: Any = (one.inputs or {}).get("checkpoint") or {}
    epoch = f", epoch {pinned['epoch']:,}" if "epoch" in pinned else ""
    return f"job {one.spec.get('source')}{epoch}"


def _pictures(one: "Job") -> str:
    made = (one.result or {}).get("pictures")
    return f"{made:,}" if isinstance(made, int) else ""


def _ranked(jobs: "list[Job]") -> "list[Job]":
    """By the first metric that all have, lowest first; as they are if there is none."""
    tables = [(one.result or {}).get("metrics") or {} for one in jobs]
    shared = [key for key in (tables[0] if tables else ()) if all(key in table for table in tables)]
    if not shared:
        return jobs
    return sorted(jobs, key=lambda one: float(((one.result or {}).get("metrics") or {})[shared[0]]["value"]))
