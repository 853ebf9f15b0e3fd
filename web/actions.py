"""
Changes from the page. Each makes the same store call as the command of that name.

Only POST reaches this, from the page itself (web/security.py), and only with --allow-changes.
"""

import json
import secrets
from typing import Any

from anyio import from_thread
from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import ForbiddenError, InvalidTransitionError, NotFoundError, SpecError
from jobs.kinds import SPEC_VERSION, kind_named
from jobs.states import JobState
from storage.db.engine import Requester
from storage.db.rows import Job
from storage.db.store import JobStore
from storage.db.tokens import Role
from storage.status import job_text
from storage.volume.stars import set_star
from web import html
from web.files import job_of, require_volume
from web.gallery import manifest_sha256
from web.manifest import index_of
from web.principals import Principal
from web.site import Site
from worker.celery_bridge.notify import notify_job

MAX_BODY = 4096
MAX_PRIORITY = 1000
"""The limit of `ganq submit --priority`."""


class ChangesNotAllowedError(ForbiddenError):
    """The server was started read-only."""

    code = "READ_ONLY"


def act(request: Request) -> Response:
    """
    Change a job on request of the page.

    Raises:
        GanqError: the same errors as those of the command.
    """
    site: Site = request.app.state.site
    verb = request.path_params["action"]
    if verb not in VERBS:
        raise NotFoundError("there is no such action", hint=", ".join(VERBS))
    if not site.allow_changes:
        raise ChangesNotAllowedError("this server is read-only", hint="ganq web --allow-changes")
    values = _body(request)
    job, principal = job_of(request), principal_of(request)
    if verb in SUBMITS:
        principal.require(Role.SUBMITTER, "submit jobs")
    else:
        principal.require_change(job)
    store = JobStore(site.database, Requester(principal.user, "page"))
    done = VERBS[verb](site, store, principal.user, job, values)
    from_thread.run(request.app.state.revisions.bump)
    return html.json_answer(done)


def _body(request: Request) -> dict[str, Any]:
    """
    Return the JSON object of a request.

    Raises:
        SpecError: it is no small JSON object.
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise SpecError("the request is too large")
    data = from_thread.run(request.body) if length != "0" else b"{}"
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise SpecError("the request is no JSON") from exc
    if not isinstance(found, dict):
        raise SpecError("the request is no JSON object")
    return found


def principal_of(request: Request) -> Principal:
    found: Principal = request.scope["ganq_principal"]
    return found


def _outcome(job: Job, done: str, message: str | None = None) -> dict[str, Any]:
    """
    Return the answer to a change.

    Args:
        message: what the browser shows; by default the job and what was done.
    """
    said = message or f"Job {job.id}: {done}."
    return {"id": job.id, "done": done, "message": said, "state": str(job.state), "url": f"/jobs/{job.id}"}


def _submitted(new: Job) -> dict[str, Any]:
    done = f"submitted as job {new.id}"
    return _outcome(new, done, f"{done.capitalize()}.")


def _cancel(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    now = store.request_cancel(job.id, by=user)
    return _outcome(now, "cancelled" if now.state.terminal else "cancel requested")


def _hold(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    return _outcome(store.hold(job.id, held=True, by=user), "held")


def _pause(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    now = store.pause(job.id, by=user)
    done = job_text.after_pause(now, job_text.StatusContext.of(site.queries, [now]))
    with_button = done.replace(f"ganq resume {now.id}", "Resume")
    return _outcome(now, done, f"Job {now.id}: {with_button}.")


def _resume(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    return _release(site, store, user, job, values) | {"message": f"Job {job.id}: resumed."}


def _release(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    now = store.hold(job.id, held=False, by=user)
    if now.state is JobState.QUEUED:
        notify_job(site.settings, site.queries, store, now)
    return _outcome(now, "released")


def _priority(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    """Raise or lower the own priority by a step."""
    step = values.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise SpecError("step must be a number")
    priority = max(-MAX_PRIORITY, min(MAX_PRIORITY, job.own_priority + step))
    now = store.set_priority(job.id, priority)
    return _outcome(now, f"priority {now.own_priority}")


def _retry(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    """
    Submit an ended job again; with `both`, together with the failed jobs that it waited for.

    Raises:
        InvalidTransitionError: it would fail at once, because a job that it needs has failed.
    """
    from storage.db.resubmit import resubmit  # pydantic: a fifth of the server's start

    failed = _failed_needs(site, job)
    if failed and values.get("both") is not True:
        raise InvalidTransitionError(
            f"job {job.id} needs job {failed[0].id}, which {failed[0].state}",
            hint=f"ganq retry {failed[0].id} --with-waiting",
        )
    instead: dict[int, int] = {}
    for old in [*failed, job]:
        new = resubmit(site.queries, store, old, user=user, instead=instead)
        notify_job(site.settings, site.queries, store, new)
        instead[old.id] = new.id
    return _submitted(new)


def _failed_needs(site: Site, job: Job) -> list[Job]:
    """Return the failed jobs because of which this one never started, oldest first."""
    if job.error_code != "DEPENDENCY_FAILED":
        return []
    ended = (JobState.FAILED, JobState.CANCELLED)
    needed = [site.queries.get(one) for one, state in site.queries.needs(job.id) if state in ended]
    found = {each.id: each for one in needed for each in (*_failed_needs(site, one), one)}
    return [found[one] for one in sorted(found)]


def _generate(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    """Submit a generation from an existing checkpoint."""
    from jobs.specs import GenerateSpec

    if not kind_named(job.kind).makes_model:
        raise SpecError(f"job {job.id} has no generator of its own")
    epoch, count = values.get("checkpoint"), values.get("count")
    if not (isinstance(epoch, int) and isinstance(count, int)):
        raise SpecError("checkpoint and count must be numbers")
    site.queries.choose_checkpoint(job.id, str(epoch))
    spec = GenerateSpec.create(source=job.id, checkpoint=str(epoch), count=count)
    kind = kind_named("generate")
    new = store.submit(
        will_notify=True,
        shards=[(shard.to_json(), shard.image_count) for shard in spec.split()],
        max_workers=spec.max_workers,
        kind="generate",
        spec=spec.to_json(),
        spec_version=SPEC_VERSION,
        submit_key=secrets.token_hex(16),
        user=user,
        priority=kind.priority,
        preemptible=kind.preemptible,
    )
    notify_job(site.settings, site.queries, store, new)
    return _submitted(new)


def _star(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    require_volume(site)
    index, starred = values.get("image"), values.get("starred")
    if isinstance(index, bool) or not isinstance(index, int) or not isinstance(starred, bool):
        raise SpecError("image must be a number, starred true or false")
    index_of(site, job).line(index)
    stars = set_star(site.volume, job.id, manifest_sha256(job), index, starred=starred)
    return {"image": index, "starred": index in stars, "stars": stars}


SUBMITS = ("retry", "generate")
"""Actions that submit a job of the user's own, and change no other."""
VERBS = {
    "cancel": _cancel,
    "pause": _pause,
    "resume": _resume,
    "hold": _hold,
    "release": _release,
    "priority": _priority,
    "retry": _retry,
    "generate": _generate,
    "star": _star,
}
