"""The gallery of a generation: sheets, one image with its facts, stars, and a zip of the starred."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from jobs.errors import NotFoundError, SpecError, StorageError
from storage.db.rows import Job
from storage.results import codecs
from storage.results.formats import bytes_of, pixels_of
from web import html, sheets
from web.files import IMMUTABLE, job_of, require_volume
from web.gallery import gallery_facts, image_facts, manifest_sha256, stars_of
from web.manifest import ORDERS, ManifestIndex, index_of
from web.pages.run import head
from web.site import Site

TYPES = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8\xff": "image/jpeg"}


def page(request: Request) -> Response:
    site: Site = request.app.state.site
    job = job_of(request)
    if job.kind != "generate":
        raise NotFoundError(
            f"job {job.id} is of kind {html.cut(job.kind, 32)} and publishes no images",
            hint=f"/jobs/{job.id}",
        )
    return html.answer(
        request, "images.html", lambda: {**head(site, job), "gallery": gallery_facts(site, job)}
    )


def facts_of_one(request: Request) -> Response:
    site: Site = request.app.state.site
    job = job_of(request)
    require_volume(site)
    index = index_of(site, job)
    return html.json_answer(image_facts(site, job, index, request.path_params["index"]))


def picture(request: Request) -> Response:
    """Return an image byte for byte; an image of an npz as PNG."""
    site: Site = request.app.state.site
    job = job_of(request)
    require_volume(site)
    made = index_of(site, job).made(request.path_params["index"])
    try:
        data = bytes_of(made)
        if hashlib.sha256(data).hexdigest() != made.record["sha256"]:
            raise NotFoundError(f"{made.path.name} has changed since it was published")
        if "shape" in made.record:
            data = codecs.encode_png(pixels_of(made))
    except (OSError, StorageError) as exc:
        raise NotFoundError(f"{made.path.name} is missing or torn") from exc
    kind = next((name for mark, name in TYPES.items() if data.startswith(mark)), None)
    if kind is None:
        raise NotFoundError(f"{made.path.name} is no image")
    return Response(data, media_type=kind, headers=IMMUTABLE)


def sheet(request: Request) -> Response:
    """Return a contact sheet as WebP."""
    site: Site = request.app.state.site
    job = job_of(request)
    require_volume(site)
    columns, order = request.query_params.get("columns", "16"), request.query_params.get("order", "index")
    if columns not in map(str, sheets.WIDTHS) or order not in (*ORDERS, "starred"):
        raise SpecError("there is no such sheet", hint=f"columns {sheets.WIDTHS}, order {ORDERS} or starred")
    index = index_of(site, job)
    size = int(columns) * sheets.ROWS
    first = request.path_params["sheet"] * size
    if order == "starred":
        numbers = [one for one in stars_of(site, job) if one < index.count][first : first + size]
    else:
        numbers = index.ordered(order, first, size) if first < index.count else []
    if not numbers:
        raise NotFoundError(f"job {job.id} has no such sheet")
    side = sheets.side_of(index) if index.count else sheets.MAX_SIDE
    key = ("sheet", job.id, manifest_sha256(job), columns, tuple(numbers))
    data = site.image_cache.get_or_make(key, lambda: sheets.draw(index, numbers, int(columns), side), len)
    return Response(data, media_type="image/webp", headers=IMMUTABLE | {"X-Ganq-Images": _listed(numbers)})


def _listed(numbers: list[int]) -> str:
    """Return the indices of the images on a sheet for the response header."""
    return ",".join(map(str, numbers))


def starred_zip(request: Request) -> Response:
    """Return the starred images as a zip, with one image at a time in memory."""
    site: Site = request.app.state.site
    job = job_of(request)
    require_volume(site)
    index = index_of(site, job)
    stars = [one for one in stars_of(site, job) if one < index.count]
    if not stars:
        raise NotFoundError(f"no image of job {job.id} is starred")
    headers = {"Content-Disposition": f'attachment; filename="ganq-{job.id}-starred.zip"'}
    return StreamingResponse(
        _zipped(index, stars, _about(job)), media_type="application/zip", headers=headers
    )


class _Pipe(io.RawIOBase):
    """Buffer between zipfile and the response."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.at = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        self.waiting += data
        self.at += len(data)
        return len(data)

    def tell(self) -> int:
        return self.at

    def take(self) -> bytes:
        data, self.waiting = bytes(self.waiting), bytearray()
        return data


def _about(job: Job) -> dict[str, Any]:
    """Return what the lines of a zip's manifest have in common: the checkpoint."""
    pinned: dict[str, Any] = (job.inputs or {}).get("checkpoint") or {}
    return {
        "job": job.id,
        "source": job.spec.get("source"),
        "epoch": pinned.get("epoch"),
        "checkpoint_sha256": pinned.get("manifest_sha256", pinned.get("sha256")),
    }


def _zipped(index: ManifestIndex, numbers: list[int], about: dict[str, Any]) -> Iterator[bytes]:
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for number in numbers:
            made = index.made(number)
            try:
                data = bytes_of(made)
                if "shape" in made.record:
                    data = codecs.encode_png(pixels_of(made))
            except (OSError, StorageError, ValueError):
                archive.writestr(f"{number:06d}.missing.txt", f"{made.path.name} is missing or torn\n")
            else:
                kind = next((name for mark, name in TYPES.items() if data.startswith(mark)), "image/bin")
                archive.writestr(f"{number:06d}.{kind.partition('/')[2]}", data)
            yield pipe.take()
        lines = (json.dumps({"index": number, **about, **index.line(number)}) for number in numbers)
        archive.writestr("manifest.jsonl", "".join(f"{line}\n" for line in lines))
    yield pipe.take()
