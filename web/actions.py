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

from jobs.errors import ForbiddenError, NotFoundError, SpecError
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
from worker.celery_bridge.notify_job import notify_job

MOST_BODY = 4096
MOST_PRIORITY = 1000
"""The limit of `ganq submit --priority`."""


class ChangesNotAllowedError(ForbiddenError):
    """The server was started read-only."""

    code = "READ_ONLY"


def act(request: Request) -> Response:
    """
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
    Raises:
        SpecError: it is no small JSON object.
    """
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_BODY:
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


def _outcome(job: Job, done: str) -> dict[str, Any]:
    return {"id": job.id, "done": done, "state": str(job.state), "url": f"/jobs/{job.id}"}


def _cancel(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    now = store.request_cancel(job.id, by=user)
    return _outcome(now, "cancelled" if now.state.terminal else "cancel requested")


def _hold(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    return _outcome(store.hold(job.id, held=True, by=user), "held")


def _pause(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    now = store.pause(job.id, by=user)
    return _outcome(now, job_text.after_pause(now, job_text.StatusContext.of(site.queries, [now])))


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
    priority = max(-MOST_PRIORITY, min(MOST_PRIORITY, job.own_priority + step))
    now = store.set_priority(job.id, priority)
    return _outcome(now, f"priority {now.own_priority}")


def _retry(site: Site, store: JobStore, user: str, job: Job, values: dict[str, Any]) -> dict[str, Any]:
    from storage.db.resubmit import resubmit  # pydantic: a fifth of the server's start

    new = resubmit(site.queries, store, job, user=user)
    notify_job(site.settings, site.queries, store, new)
    return _outcome(new, f"submitted as job {new.id}")


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
    return _outcome(new, f"submitted as job {new.id}")


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
    "resume": _release,
    "hold": _hold,
    "release": _release,
    "priority": _priority,
    "retry": _retry,
    "generate": _generate,
    "star": _star,
}
