"""The endpoints, and what every request passes before its handler."""

import functools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, get_args

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ganq.submission.jobfile import MAX_BYTES
from jobs.errors import GanqError, SpecError
from jobs.kinds import KINDS
from jobs.states import JobState
from storage.db.queries import UsageKey
from storage.db.tokens import Role
from storage.db.webhooks import DELIVERED, FAILED, PENDING
from storage.version import version
from web import html
from web.actions import ChangesNotAllowedError
from web.api import files, jobs, uploads, webhooks
from web.api.answers import json_answer
from web.api.call import (
    BODY_READ,
    PREFIX,
    Call,
    Endpoint,
    Param,
    read_body,
    read_bytes,
    read_query,
    read_rest,
)
from web.api.openapi import document
from web.api.schemas import JOB_FIELDS
from web.live import Revisions
from web.principals import Principal
from web.problems import HttpError, Problem, problem
from web.site import Site

TEXT = {"type": "string", "minLength": 1, "maxLength": 200}
ID = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
STATES = {
    "type": "array",
    "items": {"type": "string", "enum": [str(one) for one in JobState]},
    "maxItems": 10,
}
FIELDS = Param(
    "fields",
    {"type": "array", "items": {"type": "string", "enum": []}, "maxItems": 50},
    "Only these keys, separated by commas.",
)
SWEEP = Param("sweep", TEXT, "Only jobs of this sweep: id, name, or a job of it.")
SHARDS = Param("shards", {"type": "boolean"}, "Also the shards of split jobs.")
SHARDS_OF = Param("shards_of", ID, "Only the shards of this job.")
STREAM = "With `Accept: text/event-stream` it is a stream of server-sent events; `Last-Event-ID` resumes it."


def _limit(most: int, default: int) -> Param:
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return Param("limit", schema, "Length of a page.")


def about(call: Call) -> Response:
    """Return who asks, and what the server is."""
    return json_answer(
        {
            "ganq": version(),
            "api": 1,
            "installation": call.site.database.installation,
            "user": call.principal.user,
            "role": str(call.principal.role),
            "changes": call.site.allow_changes and call.principal.role.includes(Role.SUBMITTER),
            "now": call.site.queries.now(),
        }
    )


@functools.cache
def _document() -> dict[str, Any]:
    return document(endpoints())


def openapi(call: Call) -> Response:
    """Return this description."""
    return json_answer(_document())


def docs(call: Call) -> Response:
    """Show this description as a page."""
    return HTMLResponse(html.render("api.html", document=_document()))


@functools.cache
def endpoints() -> tuple[Endpoint, ...]:
    """Return all endpoints, in the order of the description."""
    fields = Param(
        FIELDS.name, {**FIELDS.schema, "items": {"type": "string", "enum": JOB_FIELDS}}, FIELDS.description
    )
    listing = (
        Param("state", STATES, "Only jobs in these states, separated by commas."),
        Param("kind", {"type": "string", "enum": list(KINDS)}, "Only jobs of this kind."),
        Param("user", TEXT, "Only jobs of this user."),
        Param("name", TEXT, "Only jobs whose name contains this text."),
        SWEEP,
        Param(
            "label",
            {"type": "array", "items": TEXT, "maxItems": 20},
            "Only jobs with these labels: KEY=VALUE or KEY, separated by commas.",
        ),
        Param("since", TEXT, "Only jobs that were submitted within this time, e.g. 7d."),
        Param("since_at", ID, "Only jobs that were submitted at this time or later, in seconds since 1970."),
        Param("before", ID, "Only jobs with a smaller id: the next page."),
        Param("ids", {"type": "array", "items": ID, "maxItems": 500}, "Exactly these jobs, oldest first."),
        Param("held", {"type": "boolean"}, "Only jobs that are held or paused, or only the others."),
        Param("to_retry", {"type": "boolean"}, "Only failed jobs that were not retried yet."),
        SHARDS,
        SHARDS_OF,
        _limit(500, jobs.LIMIT),
        fields,
    )
    get, post = functools.partial(Endpoint, "GET"), functools.partial(Endpoint, "POST")
    one, of_job = "/jobs/{job}", functools.partial(get, errors=(404,))
    change = functools.partial(
        Endpoint, role=Role.SUBMITTER, errors=(404, 409, 412), headers=("If-Match",), answer="Changed"
    )
    hook = "/webhooks/{webhook}"
    admin = functools.partial(Endpoint, role=Role.ADMIN, answer="Webhook")
    stored = functools.partial(
        get,
        errors=(404, 416, 503),
        media="application/octet-stream",
        headers=("Range",),
        also=(206, 304),
        on_volume=True,
    )
    return (
        get("", "about", "Who asks, and what the server is", about, answer="About"),
        get("/openapi.json", "openapi", "This description", openapi, answer="Any"),
        get("/docs", "docs", "This description as a page", docs, media="text/html"),
        post(
            "/jobs",
            "submit",
            "Submit a job",
            jobs.submit,
            Role.SUBMITTER,
            body="Submission",
            answer="Submitted",
            status=201,
            also=(200,),
            errors=(404, 409, 503),
            headers=("Idempotency-Key",),
            description="`Idempotency-Key` is the submit key: the same request with the same key returns the "
            "first job with 200. Another request with the same key is refused with 409.",
        ),
        post(
            "/sweeps",
            "submitSweep",
            "Submit a job for each combination of values",
            jobs.submit_sweep,
            Role.SUBMITTER,
            body="SweepSubmission",
            answer="SubmittedSweep",
            status=201,
            also=(200,),
            errors=(404, 409, 503),
            headers=("Idempotency-Key",),
        ),
        post(
            "/jobfiles",
            "submitFile",
            "Submit the jobs of a job file in one transaction",
            jobs.submit_file,
            Role.SUBMITTER,
            body="JobFile",
            most_body=MAX_BYTES,
            answer="SubmittedFile",
            status=201,
            errors=(404, 409, 503),
            headers=("Idempotency-Key",),
            description="All or none. The body is a job file as JSON; `places` say where each job stands, "
            "for errors. The same request with the same key returns the first jobs.",
        ),
        get(
            "/jobs",
            "listJobs",
            "List jobs, newest first",
            jobs.read_list,
            params=listing,
            answer="Jobs",
            errors=(404,),
        ),
        get(
            "/counts",
            "countJobs",
            "Count jobs by state",
            jobs.counts,
            params=(SWEEP, SHARDS, SHARDS_OF),
            answer="Counts",
            errors=(404,),
        ),
        get(
            "/usage",
            "readUsage",
            "Sum the time of attempts on workers",
            jobs.usage,
            params=(
                Param("by", {"type": "string", "enum": list(get_args(UsageKey))}, "What to sum for: user."),
                Param("since_s", {**ID, "maximum": 10**9}, "Only the last so many seconds; 30 days."),
            ),
            answer="AllUsage",
        ),
        of_job(one, "readJob", "Read a job", jobs.read, params=(fields,), answer="SomeJob"),
        change("PATCH", one, "changeJob", "Change a job", jobs.change, body="Change"),
        change("POST", f"{one}/cancel", "cancelJob", "Cancel a job", jobs.cancel, body="Empty"),
        change(
            "POST", f"{one}/hold", "holdJob", "Prevent a queued job from starting", jobs.hold, body="Empty"
        ),
        change(
            "POST", f"{one}/pause", "pauseJob", "Stop a job with its work saved", jobs.pause, body="Pause"
        ),
        change("POST", f"{one}/move", "moveJob", "Move a job before another", jobs.move, body="Move"),
        change("POST", f"{one}/resume", "resumeJob", "Continue a paused job", jobs.release, body="Empty"),
        change(
            "POST", f"{one}/release", "releaseJob", "Allow a held job to start", jobs.release, body="Empty"
        ),
        change(
            "POST",
            f"{one}/keep",
            "keepJob",
            "Protect the results of a job from deletion",
            jobs.keep,
            body="Keep",
        ),
        change(
            "POST",
            f"{one}/retry",
            "retryJob",
            "Submit an ended job again",
            jobs.retry,
            body="Retry",
            answer="Retried",
            status=201,
        ),
        of_job(
            f"{one}/attempts", "listAttempts", "List the attempts of a job", jobs.attempts, answer="Attempts"
        ),
        of_job(
            f"{one}/relations", "readRelations", "What a job waits for", jobs.relations, answer="Relations"
        ),
        of_job(
            f"{one}/events",
            "listEvents",
            "List or follow the events of a job",
            files.events,
            answer="Events",
            params=(Param("after", ID, "Only events with a larger id."), _limit(1000, files.LIMIT)),
            live=True,
            headers=("Last-Event-ID",),
            description=STREAM,
        ),
        stored(
            f"{one}/log",
            "readLog",
            "Read or follow the log of a job",
            files.log,
            live=True,
            params=(
                Param("attempt", {**ID, "maximum": 10**9}, "Number of the attempt; the newest by default."),
            ),
            description=STREAM,
            media="text/plain",
            headers=("Range", "Last-Event-ID"),
        ),
        stored(
            f"{one}/metrics",
            "readMetrics",
            "Read the metrics of an attempt as JSON lines",
            files.metrics,
            params=(
                Param("attempt", {**ID, "maximum": 10**9}, "Number of the attempt; the newest by default."),
            ),
            media="application/jsonl",
        ),
        get(
            f"{one}/samples",
            "listSamples",
            "List the sample grids of a training",
            files.samples,
            on_volume=True,
            answer="Samples",
            errors=(404, 503),
        ),
        stored(
            f"{one}/samples/{{epoch}}",
            "readSample",
            "Read the sample grid of an epoch",
            files.sample,
            media="image/png",
        ),
        get(
            f"{one}/images",
            "listImages",
            "List the images of a generation",
            files.images,
            on_volume=True,
            params=(Param("after", ID, "Only images with a larger index."), _limit(1000, files.LIMIT)),
            answer="Images",
            errors=(404, 503),
        ),
        stored(f"{one}/images/{{sha256}}", "readImage", "Read an image by its SHA-256", files.image),
        stored(
            f"{one}/manifest",
            "readManifest",
            "Read the list of all images as JSON lines",
            files.manifest,
            media="application/jsonl",
        ),
        get(
            f"{one}/result.tar",
            "readResult",
            "Read the files of a generation as a tar archive",
            files.result,
            on_volume=True,
            media="application/x-tar",
            errors=(404, 503),
            params=(
                Param("after", TEXT, "Only the files behind this one."),
                Param("only", TEXT, "Only this folder or file: images, grids."),
            ),
            description="The manifest is the last file. `after` resumes a download that broke off.",
        ),
        get(
            f"{one}/report",
            "readReport",
            "Read the page of a job as one HTML file",
            files.report_file,
            on_volume=True,
            media="application/octet-stream",
            errors=(404, 503),
        ),
        get(
            "/checkpoints/{sha256}",
            "findCheckpoint",
            "Find a checkpoint by its SHA-256",
            jobs.checkpoint,
            answer="Checkpoint",
            errors=(404,),
        ),
        of_job(
            f"{one}/checkpoints",
            "listCheckpoints",
            "List the checkpoints of a job",
            jobs.checkpoints,
            answer="Checkpoints",
        ),
        get(
            f"{one}/checkpoints/{{sha256}}",
            "readCheckpoint",
            "Read a checkpoint with its files",
            files.checkpoint,
            on_volume=True,
            answer="CheckpointWithFiles",
            errors=(404, 503),
        ),
        stored(
            f"{one}/checkpoints/{{sha256}}/{{file}}",
            "readCheckpointFile",
            "Read a file of a checkpoint",
            files.checkpoint_file,
        ),
        post(
            "/datasets",
            "createDataset",
            "Find out what the server lacks of a data set, or create it",
            uploads.create,
            Role.SUBMITTER,
            body="DatasetListing",
            most_body=uploads.MAX_LISTING_BYTES,
            answer="Dataset",
            status=201,
            also=(200,),
            errors=(507,),
            description="201: nothing is missing, and `data` names the data set in submissions. 200: send "
            "the missing files, then ask again.",
        ),
        get(
            "/blobs/{sha256}",
            "findBlob",
            "Find out how much of a file has arrived",
            uploads.find,
            answer="Blob",
            on_volume=True,
        ),
        Endpoint(
            "PUT",
            "/blobs/{sha256}",
            "putBlob",
            "Send a file, or the rest of it",
            uploads.find,
            Role.SUBMITTER,
            takes="application/octet-stream",
            receive=uploads.receive,
            answer="Blob",
            status=201,
            also=(200, 202),
            errors=(409, 507),
            headers=("Content-Range",),
            description="200: the server has the file already. 202: more is to come.",
        ),
        post(
            "/blobs",
            "putBlobs",
            "Send many small files",
            uploads.receive_bundle,
            Role.SUBMITTER,
            takes="application/x-tar",
            most_body=uploads.MAX_BUNDLE_BYTES,
            answer="Stored",
            errors=(413, 507),
            description="A tar archive whose members are named by their SHA-256.",
        ),
        get("/workers", "listWorkers", "List the workers", files.workers, answer="Workers"),
        post(
            "/workers/{worker}/drain",
            "drainWorker",
            "Have a worker return its job and exit",
            files.drain,
            Role.OPERATOR,
            body="Empty",
            answer="Worker",
            errors=(404,),
        ),
        get("/queues", "listQueues", "List the queues", files.queues, answer="Queues"),
        admin("GET", "/webhooks", "listWebhooks", "List the webhooks", webhooks.read_list, answer="Webhooks"),
        admin(
            "POST",
            "/webhooks",
            "addWebhook",
            "Send events of jobs to a URL",
            webhooks.create,
            body="NewWebhook",
            answer="AddedWebhook",
            status=201,
            errors=(404, 409),
        ),
        admin("DELETE", hook, "removeWebhook", "Remove a webhook", webhooks.remove, errors=(404,)),
        admin(
            "POST",
            f"{hook}/enable",
            "enableWebhook",
            "Enable a webhook again, and send what is left",
            webhooks.enable,
            errors=(404,),
        ),
        admin(
            "GET",
            f"{hook}/deliveries",
            "listDeliveries",
            "List what was sent to a webhook, and what waits",
            webhooks.deliveries,
            params=(
                Param(
                    "state", {"type": "string", "enum": [PENDING, DELIVERED, FAILED]}, "Only in this state."
                ),
                _limit(1000, 50),
            ),
            answer="Deliveries",
            errors=(404,),
        ),
    )


STREAMS: dict[str, Callable[[Call], AsyncIterator[bytes]]] = {
    "listEvents": files.event_stream,
    "readLog": files.log_stream,
}
CACHED = ("listJobs", "readJob", "countJobs", "listWorkers", "listQueues")
"""Reads whose answer is kept until the job table changes."""


def routes() -> Sequence[Route]:
    """Return the routes of the API."""
    paths = dict.fromkeys(one.path for one in endpoints())
    return [
        Route(PREFIX + path, _Resource([one for one in endpoints() if one.path == path])) for path in paths
    ]


class _Resource:
    """ASGI application of one address."""

    def __init__(self, found: Sequence[Endpoint]) -> None:
        self.by_method = {one.method: one for one in found}
        if "GET" in self.by_method:
            self.by_method["HEAD"] = self.by_method["GET"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        answer = await self._answer(request)
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        endpoint = self.by_method.get(request.method)
        try:
            if endpoint is None:
                allowed = ", ".join(sorted(self.by_method))
                raise HttpError(
                    f"this address takes {allowed}",
                    status=405,
                    code="METHOD_NOT_ALLOWED",
                    headers={"Allow": allowed},
                )
            return await _run(endpoint, request)
        except GanqError as exc:
            unread = request.method in ("POST", "PUT", "PATCH") and BODY_READ not in request.scope
            close = {"Connection": "close"} if unread and not await read_rest(request) else {}
            return problem(Problem.of(exc), {**exc.facts.get("headers", {}), **close})
        except OSError as exc:  # of a path that the request names
            reason = (exc.strerror or str(exc)).lower()
            return problem(Problem.of(SpecError(f"{str(exc.filename or 'a path')[:200]}: {reason}")))


async def _run(endpoint: Endpoint, request: Request) -> Response:
    """
    Check a request and run its handler.

    Raises:
        GanqError: it is refused.
    """
    site: Site = request.app.state.site
    principal: Principal = request.scope["ganq_principal"]
    principal.require(endpoint.role, f"do this ({request.method} {request.url.path[:120]})")
    if endpoint.changes and not site.allow_changes:
        raise ChangesNotAllowedError("this server is read-only", hint="ganq web --allow-changes")
    query = read_query(request, endpoint.params)
    call = Call(site, request, principal, query)
    if endpoint.live and "text/event-stream" in request.headers.get("accept", ""):
        await run_in_threadpool(lambda: call.job)  # so that a job that does not exist is a 404
        revisions: Revisions = request.app.state.revisions
        if (stream := revisions.streamed(STREAMS[endpoint.operation](call))) is None:
            raise HttpError("too many streams are open", status=503, code="TOO_MANY_STREAMS")
        return stream
    if endpoint.receive is not None:
        return await endpoint.receive(call)
    if endpoint.takes is not None:
        call.raw = await read_bytes(request, endpoint.most_body)
    elif endpoint.body is not None:
        call.body = await read_body(request, endpoint.most_body)
    if endpoint.operation in CACHED:
        return await _cached(site, endpoint, call)
    answer = await _handled(endpoint, call)
    if endpoint.changes:
        await request.app.state.revisions.bump()
    return answer


async def _handled(endpoint: Endpoint, call: Call) -> Response:
    if endpoint.on_volume:
        return await run_in_threadpool(call.site.on_volume, lambda: endpoint.handler(call))
    return await run_in_threadpool(endpoint.handler, call)


async def _cached(site: Site, endpoint: Endpoint, call: Call) -> Response:
    """Answer from memory if the job table has not changed since."""
    key = f"{call.request.url.path}?{call.request.url.query}"
    fresh = "no-cache" in call.request.headers.get("cache-control", "")
    revision = site.newest_revision()
    known: tuple[str, Response] | None = site.api_answers.get(key)
    if known is not None and known[0] == revision and not fresh:
        return known[1]
    answer = await _handled(endpoint, call)
    site.api_answers.put(key, (revision, answer), len(answer.body) + len(key))
    return answer
