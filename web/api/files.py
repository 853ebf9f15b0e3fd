"""Events, logs, images, checkpoints and whole results over HTTP."""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from jobs.errors import (
    CheckpointNotFoundError,
    DatabaseUnavailableError,
    NotFoundError,
    StorageError,
    VolumeError,
)
from jobs.states import JobState
from storage.results.attempts import METRICS
from storage.results.formats import bytes_of
from storage.results.reader import names_of_result
from storage.volume.durable import MANIFEST as CHECKPOINT_MANIFEST
from storage.volume.durable import raise_storage_error
from storage.volume.tar_headers import header
from web.api.answers import checkpoint_facts, event_facts, json_answer, ranged, ranged_file
from web.api.call import Call, require_fields
from web.files import require_volume
from web.live import PING_S, Revisions
from web.manifest import index_of, published_folder
from web.pages.images import TYPES
from web.report import report
from web.samples import path_of, samples_of

LIMIT = 500
LOG_POLL_S = 0.3
CHUNK = 1 << 20
MAX_LINE = 1 << 20
TAR_BLOCK = 512


# --- events and logs --------------------------------------------------------------------------


def events(call: Call) -> Response:
    """List the events of a job, oldest first."""
    limit = call.query.get("limit", LIMIT)
    found = call.site.queries.events(call.job.id, after_id=call.query.get("after", 0))
    more = found[limit - 1].id if len(found) > limit else None
    return json_answer({"events": [event_facts(one) for one in found[:limit]], "next_after": more})


async def event_stream(call: Call) -> AsyncIterator[bytes]:
    """Send each event of a job, until it has ended."""
    revisions: Revisions = call.request.app.state.revisions
    job_id = (await run_in_threadpool(lambda: call.job)).id
    after = _last_id(call, r"[0-9]{1,18}") or str(call.query.get("after", 0))
    known = ""
    while True:
        try:
            # The job is read before its events, so that the last event is sent before the end.
            job = await run_in_threadpool(call.site.queries.get, job_id)
            new = partial(call.site.queries.events, job_id, after_id=int(after))
            for one in await run_in_threadpool(new):
                after = str(one.id)
                yield _message(one.type, event_facts(one), after)
            if job.state.terminal:
                yield _message("end", {"state": str(job.state)}, after)
                return
        except DatabaseUnavailableError:
            yield b": the job table does not answer\n\n"
        if (changed := await revisions.changed(known, PING_S)) is None:
            yield b": ping\n\n"
        known = changed or known


def _message(kind: str, data: Any, number: str) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data, default=str)}\n\n".encode()


def _last_id(call: Call, form: str) -> str | None:
    """Return where a stream that broke off goes on."""
    given: str = call.request.headers.get("last-event-id", "")
    return given if re.fullmatch(form, given) else None


def log(call: Call) -> Response:
    """Return the log of an attempt; a Range header names the part."""
    folder, attempt = _attempt(call)
    what = f"the log of attempt {attempt}"
    return ranged_file(call.request, folder / "log.txt", None, "text/plain; charset=utf-8", what)


def metrics(call: Call) -> Response:
    """Return the metrics of an attempt as JSON lines; a Range header names the part."""
    folder, attempt = _attempt(call)
    what = f"the metrics of attempt {attempt}"
    return ranged_file(call.request, folder / METRICS, None, "application/jsonl", what)


def _attempt(call: Call) -> tuple[Path, int]:
    """Return the folder and number of the attempt that is asked for."""
    require_volume(call.site)
    job = call.job
    attempt = call.query.get("attempt", max(1, job.attempt))
    if not 1 <= attempt <= job.attempt:
        raise NotFoundError(f"job {job.id} has no attempt {attempt}", hint=f"the newest is {job.attempt}")
    return call.site.volume.attempt(job.id, attempt), attempt


def samples(call: Call) -> Response:
    """List the sample grids of a training, by epoch."""
    require_volume(call.site)
    found = samples_of(call.site.volume, call.job)
    return json_answer(
        {"samples": [{"epoch": one.epoch, "attempt": one.attempt, "at": one.at} for one in found]}
    )


def sample(call: Call) -> Response:
    """Return the sample grid of an epoch as PNG."""
    require_volume(call.site)
    job, text = call.job, call.request.path_params["epoch"]
    for one in samples_of(call.site.volume, job):
        if str(one.epoch) == text:
            path = path_of(call.site.volume, job.id, one.attempt, one.epoch)
            return ranged_file(call.request, path, None, "image/png", f"the sample of epoch {text}")
    raise NotFoundError(f"job {job.id} has no sample of epoch {text[:20]}")


async def log_stream(call: Call) -> AsyncIterator[bytes]:
    """Send each line of the log, of later attempts, too, until the job has ended."""
    site, job = call.site, await run_in_threadpool(lambda: call.job)
    attempt, offset = call.query.get("attempt", max(1, job.attempt)), 0
    if (last := _last_id(call, r"[0-9]{1,9}:[0-9]{1,18}")) is not None:
        attempt, offset = map(int, last.split(":"))
    silent = 0.0
    while True:
        try:
            # The state is read before the file, so that lines written before the end are sent.
            job = await run_in_threadpool(site.queries.get, job.id)
            ended = job.state.terminal or job.attempt > attempt
            path = site.volume.attempt(job.id, attempt) / "log.txt"
            lines, offset = await run_in_threadpool(_lines, site, path, offset, ended)
        except (DatabaseUnavailableError, VolumeError) as exc:
            lines, ended = [], False
            yield f": {exc.code}\n\n".encode()
        for text, end in lines:
            yield _message("line", {"attempt": attempt, "text": text}, f"{attempt}:{end}")
        if ended and not lines:
            if job.attempt <= attempt:
                yield _message("end", {"state": str(job.state)}, f"{attempt}:{offset}")
                return
            attempt, offset = attempt + 1, 0
        elif not lines:
            await asyncio.sleep(LOG_POLL_S)
            silent += LOG_POLL_S
            if silent >= PING_S:
                silent = 0.0
                yield b": ping\n\n"


def _lines(site: Any, path: Path, offset: int, flush: bool) -> tuple[list[tuple[str, int]], int]:
    """
    Return whole lines from an offset on, each with the offset behind it.

    Args:
        flush: return the last part of a line, too.
    """

    def read() -> bytes:
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(MAX_LINE)
        except FileNotFoundError:
            return b""
        except OSError as exc:
            raise_storage_error(exc, path)

    data: bytes = site.on_volume(read)
    found, at = [], 0
    while (end := data.find(b"\n", at)) >= 0:
        found.append((data[at:end].decode(errors="replace"), offset + end + 1))
        at = end + 1
    if at < len(data) and (flush or (not found and len(data) >= MAX_LINE)):
        found.append((data[at:].decode(errors="replace"), offset + len(data)))
        at = len(data)
    return found, offset + at


# --- images and results -----------------------------------------------------------------------


def images(call: Call) -> Response:
    """List the images of a generation in order."""
    require_volume(call.site)
    index = index_of(call.site, call.job)
    limit, first = call.query.get("limit", LIMIT), call.query.get("after", -1) + 1
    last = min(index.count, first + limit)
    listed = [{"index": number, **_image(index.line(number))} for number in range(first, last)]
    more = last - 1 if last < index.count else None
    return json_answer({"images": listed, "count": index.count, "next_after": more})


def _image(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "seed": line.get("seed"),
        "sample_index": line.get("draw"),
        "score": line.get("score"),
        "class": line.get("class"),
        "shape": line.get("shape"),
        "bytes": line["bytes"],
        "sha256": line["sha256"],
    }


def image(call: Call) -> Response:
    """Return an image byte for byte; of an npz the raw pixels."""
    require_volume(call.site)
    index = index_of(call.site, call.job)
    sha256 = call.request.path_params["sha256"]
    made = index.made(index.find(sha256))
    try:
        data = bytes_of(made)
    except (OSError, StorageError) as exc:
        raise NotFoundError(f"{made.path.name} is missing or torn") from exc
    if hashlib.sha256(data).hexdigest() != sha256:
        raise NotFoundError(f"{made.path.name} has changed since it was published")
    kind = next((kind for mark, kind in TYPES.items() if data.startswith(mark)), "application/octet-stream")
    return ranged(call.request, data, sha256, kind)


def manifest(call: Call) -> Response:
    """Return the list of all images, as JSON lines; its SHA-256 is `manifest_sha256` of the job's result."""
    require_volume(call.site)
    index = index_of(call.site, call.job)
    sha256 = str((call.job.result or {})["manifest_sha256"])
    return ranged_file(call.request, index.path, sha256, "application/jsonl", "the manifest")


def result(call: Call) -> Response:
    """Return the files of a result as a tar archive; the manifest is last."""
    require_volume(call.site)
    index_of(call.site, call.job)
    folder = published_folder(call.site, call.job)
    names = list(_files(folder))
    if (after := call.query.get("after")) is not None:
        if after not in names:
            raise NotFoundError(f"the result has no file {after[:200]!r}")
        names = names[names.index(after) + 1 :]
    if (only := call.query.get("only")) is not None:
        names = [name for name in names if name.partition("/")[0] == only]
    body = _tar(folder, names) if call.request.method == "GET" else iter(())
    return StreamingResponse(body, media_type="application/x-tar")


def _files(folder: Path) -> Iterator[str]:
    for name in names_of_result(folder):
        if not (folder / name).is_dir():
            yield name
            continue
        for path, folders, files in os.walk(folder / name):
            folders.sort()
            inside = Path(path).relative_to(folder).as_posix()
            yield from (f"{inside}/{one}" for one in sorted(files))


def _tar(folder: Path, names: list[str]) -> Iterator[bytes]:
    """Yield an archive in large pieces: a piece costs two changes of the thread."""
    waiting = bytearray()
    for name in names:
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            size = left = os.fstat(file.fileno()).st_size
            waiting += header(name, size)
            while left:
                data = file.read(min(left, CHUNK))
                if not data:
                    raise StorageError(f"{name} has become shorter while it was read")
                left -= len(data)
                waiting += data
                if len(waiting) >= CHUNK:
                    yield bytes(waiting)
                    waiting.clear()
            waiting += bytes(-size % TAR_BLOCK)
    yield bytes(waiting) + bytes(2 * TAR_BLOCK)


def report_file(call: Call) -> Response:
    """Return the page of a job as one HTML file."""
    name = f'attachment; filename="ganq-{call.job.id}.html"'
    # Not text/html, which a browser would show as a page of this server.
    media = "application/octet-stream"
    return Response(report(call.site, call.job), headers={"Content-Disposition": name}, media_type=media)


# --- checkpoints ------------------------------------------------------------------------------


def checkpoint(call: Call) -> Response:
    """Return a checkpoint with its files."""
    found, folder = _checkpoint(call)
    return json_answer({**checkpoint_facts(found), "files": _listed(folder, found.manifest_sha256)})


def checkpoint_file(call: Call) -> Response:
    """Return a file of a checkpoint; a Range header names the part."""
    found, folder = _checkpoint(call)
    name = call.request.path_params["file"]
    manifest = {"name": CHECKPOINT_MANIFEST, "sha256": found.manifest_sha256}
    for one in [*_listed(folder, found.manifest_sha256), manifest]:
        if one["name"] == name:
            return ranged_file(call.request, folder / name, one["sha256"], "application/octet-stream", name)
    raise NotFoundError(f"checkpoint {found.manifest_sha256[:12]} has no file {name[:80]!r}")


def _checkpoint(call: Call) -> tuple[Any, Path]:
    require_volume(call.site)
    sha256 = call.request.path_params["sha256"]
    for one in call.site.queries.checkpoints(call.job.id):
        if one.manifest_sha256 == sha256:
            return one, call.site.volume.absolute(one.path)
    raise CheckpointNotFoundError(
        f"job {call.job.id} has no checkpoint {sha256[:64]}", hint="GET …/checkpoints lists them"
    )


def _listed(folder: Path, sha256: str) -> list[dict[str, Any]]:
    path = folder / CHECKPOINT_MANIFEST
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise_storage_error(exc, path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StorageError(f"{path} has changed since it was registered")
    return [{name: one[name] for name in ("name", "bytes", "sha256")} for one in json.loads(data)["files"]]


# --- workers and queues -----------------------------------------------------------------------


def workers(call: Call) -> Response:
    """List all workers."""
    from web.api.answers import worker_facts

    queries = call.site.queries
    return json_answer({"workers": [worker_facts(one) for one in queries.workers()], "now": queries.now()})


def drain(call: Call) -> Response:
    """Ask a worker to return its job and exit."""
    from ganq.draining import choose, request_drain
    from web.api.answers import worker_facts

    require_fields(call.body, ())
    name = call.request.path_params["worker"]
    known = choose(call.session, [name])
    request_drain(call.session, known)
    found = next(one for one in call.site.queries.workers() if one.name == name)
    return json_answer(worker_facts(found))


def queues(call: Call) -> Response:
    """List the queues that have jobs or workers."""
    from storage.db.quotas import Quotas
    from storage.status.job_text import TAKES_NO_JOB, UNRESPONSIVE_S

    found: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        empty = {"queued": 0, "held": 0, "claimable": 0, "running": 0, "oldest_s": 0.0, "workers": 0}
        return found.setdefault(name, {"queue": name, **empty, "limit": None})

    for one in call.site.queries.live():
        row = of(one.queue)
        if one.state == JobState.RUNNING:
            row["running"] += one.jobs
            continue
        row["held" if one.held else "queued"] += one.jobs
        row["claimable"] += one.claimable
        row["oldest_s"] = max(row["oldest_s"], one.oldest_s)
    for worker in call.site.queries.workers():
        if worker.silent_s < UNRESPONSIVE_S and worker.state not in TAKES_NO_JOB:
            for name in worker.queues.split(","):
                of(name)["workers"] += 1
    limits = [quota for quota in Quotas(call.site.database).all() if quota.scope == "queue"]
    for quota in limits:
        if quota.name in found:
            found[quota.name]["limit"] = quota.max_running
    return json_answer({"queues": [found[name] for name in sorted(found)]})
