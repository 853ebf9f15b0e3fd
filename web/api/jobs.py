"""Submit, list, read and change jobs over HTTP."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlencode

from starlette.responses import Response

from ganq.submission.accept import MAX_NOTE, notify_workers
from ganq.submission.jobfile import located, plan_file, read_tables, submit_planned
from ganq.submission.options import field_name, read_value, spec_class
from ganq.submission.requests import read_request, read_seconds
from ganq.submission.retry import resubmit
from ganq.submission.submit import submit_axes, submit_request
from jobs.errors import CheckpointNotFoundError, ForbiddenError, GanqError, SpecError
from jobs.kinds import kind_named
from jobs.labels import read_filters
from jobs.states import JobState
from storage.db.engine import Requester
from storage.db.queries import Filter
from storage.db.rows import Job
from storage.db.store import JobStore
from storage.db.tokens import Role
from storage.status.job_text import StatusContext
from web.api.answers import (
    checkpoint_facts,
    chosen_fields,
    job_facts,
    jobs_facts,
    json_answer,
    one_job,
    require_match,
    tag_of,
)
from web.api.call import Call, require_fields
from web.api.uploads import DATASET, SHA256, dataset_path

USAGE_S = 30 * 86400
LIMIT = 50
PATHS = ("data", "path", "init_netg", "init_netd", "feature_network")
IDEMPOTENCY_KEY = "idempotency-key"
MAX_REASON = 1000


# --- submit -----------------------------------------------------------------------------------


def submit(call: Call) -> Response:
    """Submit one job; 200 instead of 201 if it was accepted earlier with this key."""
    kind, options = _request(call, ("kind",))
    request, session = read_request(kind, options), call.session
    done = submit_request(session.settings, lambda create: session, request)
    job = done.accepted.job
    labels = None if done.accepted.known else {job.id: request.job.labels}
    around = StatusContext.of(call.site.recent, [job], labels)
    return json_answer(
        {"job": job_facts(job, around), "known": done.accepted.known, "notices": done.notices},
        200 if done.accepted.known else 201,
        {"Location": f"/api/v1/jobs/{job.id}", "ETag": tag_of(job)},
    )


def submit_sweep(call: Call) -> Response:
    """Submit a job for each combination of values, in one transaction."""
    over = call.body.get("over")
    if not isinstance(over, dict):
        raise SpecError(
            "over must be an object with a list of values for each option", hint='{"seed": [0, 1]}'
        )
    kind, options = _request(call, ("kind", "over"))
    request = read_request(kind, options)
    done = submit_axes(call.session.settings, lambda create: call.session, request, over)
    sweep = done.accepted.sweep
    return json_answer(
        {
            "sweep": sweep.id,
            "name": done.accepted.name,
            "jobs": list(sweep.job_ids),
            "known": done.accepted.known,
            "notices": done.notices,
        },
        200 if done.accepted.known else 201,
        {"Location": f"/api/v1/jobs?{urlencode({'sweep': sweep.id})}"},
    )


def submit_file(call: Call) -> Response:
    """Submit the jobs of a job file in one transaction: all or none."""
    body = dict(call.body)
    places = body.pop("places", [])
    if not isinstance(places, list) or not all(isinstance(one, str) and len(one) < 300 for one in places):
        raise SpecError("places must be a list of texts: where each job stands, for errors")
    key = call.request.headers.get(IDEMPOTENCY_KEY)
    jobs = []
    for number, job in enumerate(read_tables(body, "the body", places)):
        with located(job.place):
            given = dict(job.request.given)
            _require_ours(call, job.request.kind, given, job.request.job.user)
            options = job.request.job
            if key is not None and options.submit_key is None:
                options = replace(options, submit_key=hashlib.sha256(f"{key} {number}".encode()).hexdigest())
            jobs.append(replace(job, request=replace(job.request, given=given, job=options)))
    session = call.session
    plan = plan_file(session.settings, lambda create: session, jobs)
    made, notices = submit_planned(replace(plan, data=[]))
    return json_answer({"jobs": made, "notices": notices}, 201)


def _request(call: Call, own: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """
    Return kind and options of a submission.

    Raises:
        SpecError: one of them is not valid here.
        ForbiddenError: it is in the name of another user.
    """
    kind = call.body.get("kind")
    if not isinstance(kind, str):
        raise SpecError("the body has no kind", hint='e.g. {"kind": "generate", "count": 64}')
    spec_class(kind)
    options = {name: value for name, value in call.body.items() if name not in own}
    _require_ours(call, kind, options, options.get("user"))
    key = call.request.headers.get(IDEMPOTENCY_KEY)
    if key is not None:
        if options.get("submit_key") not in (None, key):
            raise SpecError("Idempotency-Key and submit_key differ", hint="give only the header")
        options["submit_key"] = key
    return kind, options


def _require_ours(call: Call, kind: str, options: dict[str, Any], user: Any) -> None:
    """
    Check what a submission may name, and replace uploaded data sets by their paths.

    Raises:
        SpecError, ForbiddenError, JobNotFoundError: see _read_paths().
    """
    if user not in (None, call.principal.user):
        call.principal.require(Role.ADMIN, "submit jobs of other users")
    if options.get("out") is not None:
        raise SpecError("out is a folder of the server", hint="leave it out, and download the images")
    _read_paths(call, kind, options)


def _read_paths(call: Call, kind: str, options: dict[str, Any]) -> None:
    """
    Replace uploaded data sets by their paths.

    Raises:
        SpecError: a path is relative, or the server would choose the data set.
        ForbiddenError: the caller may not name a path.
        JobNotFoundError: the subject of an evaluation is no job.
    """
    fields, needs_data = set(), kind == "train"
    for name, value in options.items():
        field = field_name(kind, name)
        if value is None:
            continue
        fields.add(field)
        if field in PATHS:
            options[name] = _server_path(call, field, value)
            needs_data = needs_data or field == "path"
        elif kind == "evaluate" and field in ("subject", "source") and isinstance(value, str):
            if "/" in value or DATASET.fullmatch(value):
                options[name], needs_data = _server_path(call, field, value), True
            else:  # else it might be a file in the folder where the server runs
                call.site.queries.find(value)
    if needs_data and not fields & {"data", "continue_from"} and not call.principal.role.includes(Role.ADMIN):
        raise SpecError(
            "the request has no data", hint="POST /api/v1/datasets uploads one; then use dataset:ID"
        )


def _server_path(call: Call, name: str, value: Any) -> Any:
    """
    Return a path of the server, or that of an uploaded data set.

    Raises:
        SpecError: it is relative, and this server's folder means nothing to the caller.
        ForbiddenError: it is not below a folder that the settings allow, and the caller is no admin.
    """
    value = read_value(name, value) if value is not None and name != "subject" else value
    if not isinstance(value, str):
        return value
    if name == "feature_network" and "/" not in value:
        return value
    if (uploaded := dataset_path(call.site, value)) is not None:
        return str(uploaded)
    if not PurePosixPath(value).is_absolute():
        raise SpecError(
            f"{name}: {value[:200]!r} is neither an absolute path of the server nor an uploaded data set",
            hint="POST /api/v1/datasets uploads one; then use dataset:ID",
        )
    if not call.principal.role.includes(Role.ADMIN):
        _require_allowed(call, name, value)
    return value


def _require_allowed(call: Call, name: str, value: str) -> None:
    """
    Check that a path of the server may be used.

    Raises:
        ForbiddenError: the path, or where its links lead, is not below an allowed folder.
    """
    folders = [os.path.realpath(one) for one in call.site.settings.allowed_folders]
    path = PurePosixPath(os.path.realpath(value))
    if not any(path.is_relative_to(folder) for folder in folders):
        raise ForbiddenError(
            f"{name}: {value[:200]!r} is a path of the server, which a token of the role"
            f" {call.principal.role} may not name",
            hint="upload the data set: ganq submit train --data DIR, or POST /api/v1/datasets and dataset:ID;"
            " GANQ_API_PATHS of the server allows folders",
        )


# --- read -------------------------------------------------------------------------------------


def read_list(call: Call) -> Response:
    """List jobs, newest first, a page at a time."""
    wanted, site = dict(call.query), call.site
    limit, fields = wanted.pop("limit", LIMIT), wanted.pop("fields", None)
    if (ids := wanted.pop("ids", None)) is not None:
        if wanted:
            raise SpecError("ids cannot be combined with filters")
        found = site.queries.get_many(ids)
        return json_answer({"jobs": chosen_fields(jobs_facts(site.queries, found), fields), "next": None})
    since = wanted.get("since")
    listed = site.queries.page(
        Filter(
            states=tuple(map(JobState, wanted["state"])) if "state" in wanted else None,
            kind=kind_named(wanted["kind"]).name if "kind" in wanted else None,
            user=wanted.get("user"),
            name=wanted.get("name"),
            sweep=site.queries.find_sweep(wanted["sweep"]) if "sweep" in wanted else None,
            before_id=wanted.get("before"),
            parts=wanted.get("shards", False) or "shards_of" in wanted,
            part_of=wanted.get("shards_of"),
            held=wanted.get("held"),
            to_retry=wanted.get("to_retry", False),
            labels=read_filters(wanted.get("label", ())),
            since=wanted.get("since_at") if since is None else site.queries.now() - read_seconds(since),
        ),
        limit=limit + 1,
    )
    more = None
    if len(listed) > limit:
        given = [(name, text) for name, text in call.request.query_params.items() if name != "before"]
        more = f"/api/v1/jobs?{urlencode([*given, ('before', listed[limit - 1].id)])}"
    return json_answer(
        {"jobs": chosen_fields(jobs_facts(site.queries, listed[:limit]), fields), "next": more}
    )


def read(call: Call) -> Response:
    """Return one job."""
    job = call.job
    facts = one_job(call.site.queries, job)
    fields = call.query.get("fields")
    return json_answer(chosen_fields([facts], fields)[0], headers={"ETag": tag_of(job)})


def counts(call: Call) -> Response:
    """Count jobs by state."""
    sweep = call.query.get("sweep")
    return json_answer(
        call.site.queries.counts(
            sweep=None if sweep is None else call.site.queries.find_sweep(sweep),
            parts=call.query.get("shards", False),
            part_of=call.query.get("shards_of"),
        )
    )


def usage(call: Call) -> Response:
    """Sum the time of attempts on workers by user, queue or kind."""
    found = call.site.queries.usage(call.query.get("by", "user"), call.query.get("since_s", USAGE_S))
    return json_answer({"usage": [asdict(one) for one in found]})


def attempts(call: Call) -> Response:
    """List the attempts of a job, oldest first."""
    return json_answer({"attempts": call.site.queries.attempts(call.job.id)})


def checkpoints(call: Call) -> Response:
    """List the checkpoints of a job, oldest first."""
    return json_answer(
        {"checkpoints": [checkpoint_facts(one) for one in call.site.queries.checkpoints(call.job.id)]}
    )


def checkpoint(call: Call) -> Response:
    """Return the checkpoint with a SHA-256, of whichever job."""
    sha256 = call.request.path_params["sha256"]
    found = call.site.queries.checkpoint_of(sha256) if SHA256.fullmatch(sha256) else None
    if found is None:
        raise CheckpointNotFoundError(f"there is no checkpoint with the SHA-256 {sha256[:64]!r}")
    return json_answer(checkpoint_facts(found))


def relations(call: Call) -> Response:
    """Return what a job depends on, who lends it priority, and its place in the queue."""
    from storage.db.quotas import Quotas

    job, queries = call.job, call.site.queries
    ready = job.state is JobState.QUEUED and not job.held and not job.blockers
    full = Quotas(call.site.database).blocking_quota(job.user, job.queue) if ready else None
    return json_answer(
        {
            "after": [{"id": needed, "state": str(state)} for needed, state in queries.needs(job.id)],
            "after_end": [
                {"id": needed, "condition": how, "state": str(state)}
                for needed, how, state in queries.waits_for_end(job.id)
            ],
            "priority_lent_by": queries.priority_sources(job),
            "ahead_in_queue": queries.queue_position(job) if ready else None,
            "limit_reached": None if full is None else vars(full),
            "ended_with_it": [one.id for one in queries.ended_with(job.id)],
        }
    )


# --- change -----------------------------------------------------------------------------------


def change(call: Call) -> Response:
    """Change name and priority of a job that has not ended, note and labels of any."""
    require_fields(call.body, CHANGES)
    if not call.body:
        raise SpecError("nothing to change", hint=f"fields: {', '.join(CHANGES)}")
    for name, value in call.body.items():
        CHANGES[name](value)  # all are checked before the first is made
    job = call.changed_job()
    store = _expecting(call)
    if "name" in call.body:
        job = store.rename(job.id, call.body["name"])
    if "priority" in call.body:
        job = store.set_priority(job.id, call.body["priority"])
    if "note" in call.body:
        job = store.set_note(job.id, call.body["note"])
    if "labels" in call.body:
        job = store.set_labels(job.id, {key: value or None for key, value in call.body["labels"].items()})
    return _changed(call, job)


def _name(value: Any) -> None:
    from jobs.specs import check_name

    if not isinstance(value, str):
        raise SpecError(f"name: {str(value)[:60]!r} is not text")
    check_name(value)


def _priority(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not -1000 <= value <= 1000:
        raise SpecError(f"priority: {str(value)[:60]!r} is not a whole number from -1000 to 1000")


def _note(value: Any) -> None:
    if not isinstance(value, str) or len(value) > MAX_NOTE:
        raise SpecError(f"note must be text of at most {MAX_NOTE:,} characters")


def _labels(value: Any) -> None:
    from jobs.labels import check_label

    if not isinstance(value, dict) or not all(isinstance(one, str | None) for one in value.values()):
        raise SpecError("labels must be an object of texts", hint='{"project": "faces"}; null removes one')
    for key, text in value.items():
        check_label(key, text or "")


CHANGES: Mapping[str, Callable[[Any], None]] = {
    "name": _name,
    "priority": _priority,
    "note": _note,
    "labels": _labels,
}


def _expecting(call: Call) -> JobStore:
    """Return a store whose first change is made only if If-Match holds, in the same transaction."""
    given = call.request.headers.get("if-match")
    checked = False

    def expect(row: Any) -> None:
        nonlocal checked
        if not checked:  # not again: the change itself gives the job another tag
            checked = True
            require_match(given, Job.from_row(row))

    return JobStore(call.site.database, Requester(call.principal.user, "api", expect))


def _changed(call: Call, job: Job, **more: Any) -> Response:
    return json_answer({"job": one_job(call.site.recent, job), **more}, headers={"ETag": tag_of(job)})


def cancel(call: Call) -> Response:
    """Cancel a job: a queued one at once, a running one at its next step."""
    require_fields(call.body, ())
    return _changed(call, _expecting(call).request_cancel(call.changed_job().id, by=call.principal.user))


def hold(call: Call) -> Response:
    """Prevent a queued job from starting."""
    require_fields(call.body, ())
    return _changed(call, _expecting(call).hold(call.changed_job().id, held=True, by=call.principal.user))


def pause(call: Call) -> Response:
    """Stop a running job with its work saved, and hold it; hold a queued one."""
    require_fields(call.body, ("reason",))
    reason = call.body.get("reason")
    if reason is not None and (not isinstance(reason, str) or len(reason) > MAX_REASON):
        raise SpecError(f"reason must be text of at most {MAX_REASON} characters")
    return _changed(
        call, _expecting(call).pause(call.changed_job().id, by=call.principal.user, reason=reason)
    )


def release(call: Call) -> Response:
    """Allow a held job to start, or continue a paused one."""
    require_fields(call.body, ())
    job = _expecting(call).hold(call.changed_job().id, held=False, by=call.principal.user)
    return _changed(
        call, job, notices=notify_workers(call.session, job) if job.state is JobState.QUEUED else []
    )


def move(call: Call) -> Response:
    """Move a queued job before another one of the same user and queue."""
    require_fields(call.body, ("before",))
    before = call.body.get("before")
    if isinstance(before, bool) or not isinstance(before, int | str):
        raise SpecError("before must be the id or the name of a job")
    other = call.site.queries.find(str(before))
    return _changed(call, _expecting(call).move_before(call.changed_job().id, other.id))


def keep(call: Call) -> Response:
    """Protect the results of a job from deletion; `undo` ends that."""
    require_fields(call.body, ("undo",))
    undo = call.body.get("undo", False)
    if not isinstance(undo, bool):
        raise SpecError("undo must be true or false")
    return _changed(call, _expecting(call).keep(call.changed_job().id, kept=not undo))


def retry(call: Call) -> Response:
    """Submit an ended job again, as a job of the caller."""
    require_fields(call.body, ("with_waiting",))
    with_waiting = call.body.get("with_waiting", False)
    if not isinstance(with_waiting, bool):
        raise SpecError("with_waiting must be true or false")
    require_match(call.request.headers.get("if-match"), call.job)
    made: list[Job] = []
    notices: list[str] = []
    failed: GanqError | None = None
    try:
        for again in resubmit(call.session, call.job, with_waiting=with_waiting):
            made.append(again.new)
            notices += again.notices
    except GanqError as exc:
        if not made:
            raise
        failed = exc
    around = StatusContext.of(call.site.queries, made)
    return json_answer(
        {
            "job": job_facts(made[0], around),
            "jobs": [job.id for job in made],
            "notices": [*notices, *([failed.message] if failed else [])],
        },
        201,
        {"Location": f"/api/v1/jobs/{made[0].id}", "ETag": tag_of(made[0])},
    )
