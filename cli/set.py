"""`ganq set`: change jobs that have not ended."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from cli.control import for_each_job
from cli.session import JOB, Session, open_session
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import BoundedInt
from jobs.errors import SpecError

if TYPE_CHECKING:
    from storage.db.rows import Job


@click.command("set", epilog=examples("ganq set 12 --priority 20", "ganq set 12 --name faces"))
@click.argument("jobs", nargs=-1, required=True, type=JOB)
@click.option("--priority", type=BoundedInt(-1000, 1000), help="Higher runs first.")
@click.option("--name", help="Name of the job; accepted wherever an id is.")
@output.json_option
def set_(jobs: Sequence[str], priority: int | None, name: str | None, as_json: bool) -> int:
    """
    Change the priority or the name of queued or running JOBS.

    The priority also applies to the jobs that they wait for, if it is higher than theirs. A running
    training of a lower priority may be preempted.
    """
    if priority is None and name is None:
        raise SpecError("nothing to change", hint="--priority N, or --name NAME")
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
        yield job, ", ".join(done)

    return for_each_job(open_session(), jobs, as_json, action)
