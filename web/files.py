"""Responses with files: static files, sample grids, thumbnails, files of a result."""

import functools
import mimetypes
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import NotFoundError, VolumeError
from storage.db.rows import Job
from web import samples
from web.html import WEB_FOLDER
from web.site import Site

Handler = Callable[[Request], Response]
IMMUTABLE = {"Cache-Control": "private, max-age=31536000, immutable"}
ONE_MINUTE = {"Cache-Control": "private, max-age=60"}
RESULT_FILES = ("neighbours.png", "epochs.png")
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def _blank() -> bytes:
    """Return a transparent PNG of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(5))) + chunk(b"IEND", b"")


BLANK = _blank()


def job_of(request: Request) -> Job:
    """
    Return the job that an address names.

    Raises:
        JobNotFoundError: the address names no job.
    """
    site: Site = request.app.state.site
    return site.queries.find(request.path_params["job"])


def require_volume(site: Site) -> None:
    """
    Check that the volume answers.

    Raises:
        VolumeError: it does not answer, or is not there.
    """
    if (trouble := site.volume_trouble()) is not None:
        raise VolumeError(trouble, hint="the job's page still shows what the job table contains")


def static(request: Request) -> Response:
    name = request.path_params["name"]
    folder = WEB_FOLDER / "static"
    known = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    if name not in known or not (path := folder / name).is_file():
        raise NotFoundError("there is no such file")
    kind = TYPES.get(path.suffix) or mimetypes.guess_type(name)[0] or "text/plain"
    return Response(path.read_bytes(), media_type=kind, headers=IMMUTABLE)


def sample(request: Request) -> Response:
    """Return a sample grid. The address contains its version, so it is cached for good."""
    site: Site = request.app.state.site
    job = job_of(request)
    attempt, epoch = request.path_params["attempt"], request.path_params["epoch"]
    require_volume(site)
    if not (1 <= attempt <= job.attempt and 0 <= epoch < 10**9):
        raise NotFoundError(f"job {job.id} has no sample of epoch {epoch} of attempt {attempt}")
    return _file(samples.path_of(site.volume, job.id, attempt, epoch), f"the sample grid of epoch {epoch}")


def _file(path: Path, what: str) -> Response:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise NotFoundError(
            f"{what} is not on the volume", hint="it was deleted, or is not written yet"
        ) from exc
    return Response(data, headers=IMMUTABLE, media_type=mimetypes.guess_type(path.name)[0])


def on_volume(handler: Handler) -> Handler:
    """Decorator for handlers that read the volume; see Site.on_volume()."""

    @functools.wraps(handler)
    def guarded(request: Request) -> Response:
        site: Site = request.app.state.site
        return site.on_volume(lambda: handler(request))

    return guarded


def thumbnail(request: Request) -> Response:
    """Return four images of a job's last grid, or a transparent image if there is no grid."""
    site: Site = request.app.state.site
    job = job_of(request)
    if site.volume_trouble() is not None or (grid := samples.newest_grid(site.volume, job)) is None:
        return Response(BLANK, media_type="image/png", headers={"Cache-Control": "private, max-age=2"})
    try:
        about = grid.stat()
        data = site.image_cache.get_or_make(
            ("thumb", grid, about.st_mtime_ns),
            lambda: samples.as_webp(
                samples.faces(samples.open_image(grid), samples.side_of(job), samples.THUMB_FACES)
            ),
            len,
        )
    except OSError:  # torn, or deleted meanwhile
        return Response(BLANK, media_type="image/png", headers=ONE_MINUTE)
    return Response(data, media_type="image/webp", headers=ONE_MINUTE)


def last_grid(request: Request) -> Response:
    """Return the newest sample grid, for small multiples."""
    site: Site = request.app.state.site
    job = job_of(request)
    require_volume(site)
    grid = samples.newest_grid(site.volume, job)
    if grid is None:
        return Response(BLANK, media_type="image/png", headers={"Cache-Control": "private, max-age=2"})
    answer = _file(grid, "the last grid")
    answer.headers["Cache-Control"] = ONE_MINUTE["Cache-Control"]
    return answer


def result_file(request: Request) -> Response:
    site: Site = request.app.state.site
    job = job_of(request)
    require_volume(site)
    name = request.path_params["name"]
    if name not in RESULT_FILES:
        raise NotFoundError("there is no such file")
    folder = site.volume.attempt(job.id, job.attempt)
    path = folder / ("grids" if name == "epochs.png" else ".") / name
    answer = _file(path, name)
    answer.headers["Cache-Control"] = ONE_MINUTE["Cache-Control"]
    return answer
