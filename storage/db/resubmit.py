"""Submit an ended job again, for `ganq retry` and for the page."""

import secrets
from collections.abc import Mapping

from jobs.errors import InvalidTransitionError
from jobs.kinds import kind_named
from storage.db.malformed import malformed_error
from storage.db.queries import Queries
from storage.db.rows import Job
from storage.db.store import JobStore
from storage.db.store.waiting import Extras

DRAWS_FROM = ("source", "continue_from")
"""Fields of a spec that name another job."""


def resubmit(
    queries: Queries, store: JobStore, job: Job, *, user: str, instead: Mapping[int, int] | None = None
) -> Job:
    """
    Submit what an ended job was, as a new job; the caller notifies the workers.

    Args:
        instead: retried jobs and their new ids: it waits for those, and draws from them.

    Raises:
        InvalidTransitionError: it has not ended, or no worker runs its kind.
        SpecError: it waited for another job, too, that has failed.
    """
    instead = instead or {}
    if not job.state.terminal:
        raise InvalidTransitionError(
            f"job {job.id} is {job.state}, and only an ended job can be retried",
            hint=f"ganq wait {job.id}, or ganq cancel {job.id} first",
        )
    if job.malformed:
        raise malformed_error(job)
    kind = kind_named(job.kind)
    if kind.runner is None:
        raise InvalidTransitionError(
            f"job {job.id} is an {job.kind}, which no worker runs", hint="ganq import does it again"
        )
    kind.spec_class().from_json(job.spec)  # one that no ganq wrote is refused before it is read
    spec = dict(job.spec)
    for field in DRAWS_FROM:
        if spec.get(field) in instead:
            spec[field] = instead[spec[field]]
    after = [instead.get(needed, needed) for needed, _ in queries.needs(job.id)] if instead else []
    source = spec.get("source") if kind.needs_model else None
    if source is not None and not queries.get(source).state.terminal:
        after.append(source)
    return store.submit(
        will_notify=True,
        shards=[(shard.to_json(), shard.image_count) for shard in kind.spec_class().from_json(spec).split()],
        max_workers=spec.get("max_workers", 0),
        after=after,
        kind=job.kind,
        spec=spec,
        spec_version=job.spec_version,
        submit_key=secrets.token_hex(16),
        user=user,
        name=job.name,
        queue=job.queue,
        priority=job.own_priority,
        preemptible=job.preemptible,
        time_limit_s=job.time_limit_s,
        retry_of=job.id,
        extras=Extras(note=job.note, labels=queries.labels_of([job.id]).get(job.id, {})),
    )
