"""Rows of the job table as the REST API shows them."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from jobs.errors import NotFoundError, SpecError
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Event, Job, WorkerRow
from storage.status import job_text
from storage.status.job_text import StatusContext
from storage.volume.durable import raise_storage_error
from web.html import as_json
from web.problems import HttpError

OLD_KEYS = ("yields", "waits_for", "part_of", "parts")
"""Keys of `ganq status --json` that only ganq 0.2 had."""
CHUNK = 1 << 20
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(value), status, dict(headers or {}), media_type="application/json")


def job_facts(job: Job, around: StatusContext) -> dict[str, Any]:
    """Return a job as JSON: that of `ganq status --json`, without the keys of ganq 0.2."""
    facts = {name: value for name, value in job_text.as_json(job, around).items() if name not in OLD_KEYS}
    more = ("spec_version", "inputs", "crash_count", "throttled", "position")
    return {**facts, **{name: getattr(job, name) for name in more}}


def jobs_facts(queries: Queries, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    around = StatusContext.of(queries, jobs)
    return [job_facts(job, around) for job in jobs]


def one_job(queries: Queries, job: Job) -> dict[str, Any]:
    return jobs_facts(queries, [job])[0]


def tag_of(job: Job) -> str:
    """
    Return the ETag of what a PATCH or a verb changes, for If-Match.

    Progress is not part of it: it changes every two seconds, and no request changes it. Labels are not,
    because they are not in the row.
    """
    known = (job.id, str(job.state), job.attempt, job.held, job.kept, job.name, job.note)
    text = json.dumps(
        [*known, job.own_priority, job.cancel_requested_at, job.result], sort_keys=True, default=str
    )
    return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


def event_facts(event: Event) -> dict[str, Any]:
    return dict(event.__dict__)


def checkpoint_facts(one: Checkpoint) -> dict[str, Any]:
    return {
        "id": one.id,
        "job_id": one.job_id,
        "attempt": one.attempt,
        "kind": one.kind,
        "epoch": one.epoch,
        "step": one.step,
        "metric": one.metric,
        "bytes": one.bytes,
        "sha256": one.manifest_sha256,
        "path": one.path,
        "created_at": one.created_at,
    }


def worker_facts(worker: WorkerRow) -> dict[str, Any]:
    silent = worker.silent_s > job_text.UNRESPONSIVE_S and worker.state != "stopped"
    return {**worker.__dict__, "status": "unresponsive" if silent else worker.state}


def chosen_fields(rows: Iterable[dict[str, Any]], fields: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the rows with these keys alone; None: with all."""
    if fields is None:
        return list(rows)
    return [{name: row[name] for name in fields} for row in rows]


def ranged(request: Request, data: bytes, sha256: str, media: str) -> Response:
    """
    Answer with bytes that never change, or with the part that a Range header names.

    Raises:
        HttpError: there is no such part.
    """
    headers = _immutable(sha256)
    if request.headers.get("if-none-match") in (headers["ETag"], "*"):
        return Response(status_code=304, headers=headers)
    start, end, status = _part(request, len(data), headers)
    return Response(data[start:end], status, headers, media_type=media)


def ranged_file(request: Request, path: Path, sha256: str | None, media: str, what: str) -> Response:
    """
    Answer with a file, or with the part that a Range header names.

    Args:
        sha256: of a file that never changes; None: it may grow.
        what: it is, for the error.

    Raises:
        NotFoundError: it is not there.
        HttpError: there is no such part.
    """
    headers = {"Accept-Ranges": "bytes"} if sha256 is None else _immutable(sha256)
    if sha256 is not None and request.headers.get("if-none-match") in (headers["ETag"], "*"):
        return Response(status_code=304, headers=headers)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed when it has been sent
    except FileNotFoundError as exc:
        raise NotFoundError(
            f"{what} is not on the volume", hint="it was deleted, or is not written yet"
        ) from exc
    except OSError as exc:
        raise_storage_error(exc, path)
    try:
        start, end, status = _part(request, os.fstat(file.fileno()).st_size, headers)
    except BaseException:
        file.close()
        raise
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        file.close()
        return Response(status_code=status, headers=headers, media_type=media)
    return StreamingResponse(_pieces(file, start, end), status, headers, media_type=media)


def _pieces(file: IO[bytes], start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while start < end and (data := file.read(min(CHUNK, end - start))):
            start += len(data)
            yield data


def _immutable(sha256: str) -> dict[str, str]:
    return {
        "ETag": f'"{sha256}"',
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
    }


def _part(request: Request, size: int, headers: dict[str, str]) -> tuple[int, int, int]:
    """
    Return the first byte, the one behind the last, and the status; add Content-Range.

    A Range header of another form is ignored, as the standard has it.

    Raises:
        HttpError: there is no such part.
    """
    found = _RANGE.fullmatch(request.headers.get("range", ""))
    tag = headers.get("ETag")
    if found is None or found[0] == "bytes=-" or request.headers.get("if-range", tag) != tag:
        return 0, size, 200
    if found[1]:
        start, end = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
    else:
        start, end = max(0, size - int(found[2])), size
    if start >= end:
        raise HttpError(
            f"there are {size:,} bytes",
            status=416,
            code="RANGE_NOT_SATISFIABLE",
            headers={"Content-Range": f"bytes */{size}"},
        )
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return start, end, 206


def require_match(given: str | None, job: Job) -> None:
    """
    Check If-Match.

    Raises:
        HttpError: the job has changed since it was read.
        SpecError: the header is malformed.
    """
    if given is None or given.strip() == "*":
        return
    tags = [one.strip() for one in given.split(",")]
    if not all(re.fullmatch(r'(W/)?"[!#-~]*"', one) for one in tags):
        raise SpecError("If-Match must be an ETag in quotes", hint="that of GET /api/v1/jobs/JOB")
    if tag_of(job) not in tags:
        raise HttpError(
            f"job {job.id} has changed since it was read",
            hint="read it again, then repeat the change",
            status=412,
            code="PRECONDITION_FAILED",
        )
