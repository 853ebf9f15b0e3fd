"""`ganq set` and `ganq move`: change jobs."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from cli.control import for_each_job
from cli.session import JOB, LABEL, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import BoundedInt
from jobs.errors import SpecError

if TYPE_CHECKING:
    from storage.db.rows import Job


@click.command(
    "set",
    epilog=examples(
        "ganq set 12 --priority 20",
        "ganq set 12 --name faces",
        "ganq set faces --label project=avatars --note 'the good one'",
        "ganq set faces --label project=",
    ),
)
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@click.option("--priority", type=BoundedInt(-1000, 1000), help="Higher runs first.")
@click.option("--name", help="Name of the job; accepted wherever an id is.")
@click.option(
    "--label", "labels", multiple=True, type=LABEL, help="Label; an empty value removes it. Repeatable."
)
@click.option("--note", help="Text that is shown with the job; an empty one removes it.")
@output.json_option
def set_(
    jobs: Sequence[str],
    priority: int | None,
    name: str | None,
    labels: Sequence[str],
    note: str | None,
    as_json: bool,
) -> int:
    """
    Change the priority or the name of queued or running JOBS, or the labels and the note of any.

    The priority also applies to the jobs that they wait for, if it is higher than theirs. A running
    training of a lower priority may be preempted.
    """
    from ganq.submission.accept import MAX_NOTE
    from jobs.labels import read_label

    if priority is None and name is None and not labels and note is None:
        raise SpecError(
            "nothing to change", hint="--priority N, --name NAME, --label KEY=VALUE or --note TEXT"
        )
    changes = {key: value or None for key, value in map(read_label, labels)}
    if note is not None and len(note) > MAX_NOTE:
        raise SpecError(f"a note has at most {MAX_NOTE:,} characters")
    if name is not None:
        from jobs.specs import check_name

        check_name(name)
        if len(jobs) > 1:
            raise SpecError(
                "one name cannot be that of several jobs", hint=f"ganq set {jobs[0]} --name {name}"
            )

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        done = []
        if name is not None:
            job = session.store.rename(job.id, name)
            done.append(f"name {name}")
        if priority is not None:
            job = session.store.set_priority(job.id, priority)
            done.append(f"priority {priority}")
        if changes:
            job = session.store.set_labels(job.id, changes)
            done += [
                f"label {key}={output.clean(value)}" if value is not None else f"label {key} removed"
                for key, value in changes.items()
            ]
        if note is not None:
            job = session.store.set_note(job.id, note)
            done.append(f"note: {output.clean(note)}" if note else "note removed")
        yield job, ", ".join(done)

    return for_each_job(open_session(), jobs, as_json, action)


@click.command(epilog=examples("ganq move 14 --before 12"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@click.option("--before", "other", required=True, type=JOB, help="The job that they are to run before.")
@output.json_option
def move(jobs: Sequence[str], other: str, as_json: bool) -> int:
    """
    Move queued JOBS before another one of the same user and queue.

    They get the priority of that job if their own is lower; a job of higher priority comes before it
    already. Users take turns, so that the order among jobs of different users cannot be set.
    """
    session = open_session()
    target = session.queries.find(other)

    def action(session: Session, job: "Job") -> "Iterable[tuple[Job, str]]":
        now = session.store.move_before(job.id, target.id)
        raised = f", priority {now.own_priority}" if now.own_priority != job.own_priority else ""
        place = session.queries.queue_position(now)
        ahead = "next" if place == 0 else f"{output.count(place, 'job')} ahead"
        yield now, f"before job {target.id}{raised} ({ahead})"

    return for_each_job(session, jobs, as_json, action)
