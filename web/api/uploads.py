"""
Data sets that are uploaded: by content, deduplicated, resumable.

    <volume>/uploads/blobs/ab/ab12…     a file by the SHA-256 of its content; .part while it arrives
    <volume>/uploads/datasets/ID/…      hard links to blobs, by the names of the data set; complete or absent

The id is the hash of the listing, so that the same files give the same data set.
"""

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jobs.errors import NotFoundError, SpecError
from storage.reachable import is_reachable
from storage.volume.durable import (
    fsync_folder,
    link_or_copy,
    make_folder,
    raise_storage_error,
    require_room,
    sha256_file,
    sync_filesystem,
)
from storage.volume.tar_headers import Header
from web.api.answers import json_answer
from web.api.call import BODY_READ, Call, require_fields
from web.files import require_volume
from web.problems import HttpError
from web.site import VOLUME_ANSWER_S, Site

MAX_LISTING_BYTES = 64 << 20
MAX_BUNDLE_BYTES = 32 << 20
"""Bytes of a bundle of small files."""
MAX_FILES = 1_000_000
MAX_SHOWN = 50_000
"""Missing files that one answer names; the client asks again."""
DATASET = re.compile(r"dataset:([0-9a-f]{32})(?:/([^/\x00]{1,255}))?")
SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})")
_HELD = 1 << 20
"""Bytes that are written at once."""


def dataset_path(site: Site, name: str) -> Path | None:
    """
    Return the path of an uploaded data set; None if the name is not of the form dataset:ID.

    Raises:
        NotFoundError: it was not uploaded completely.
    """
    found = DATASET.fullmatch(name)
    if found is None:
        return None
    require_volume(site)
    folder = _datasets(site) / found[1]
    path = folder / found[2] if found[2] else folder
    _touched(folder)  # before the job has a row
    if found[2] in (".", "..") or not path.exists():
        raise NotFoundError(
            f"there is no uploaded data set {name[:60]}", hint="POST /api/v1/datasets uploads one"
        )
    return path


def _datasets(site: Site) -> Path:
    return site.volume.uploads / "datasets"


def _blob(site: Site, sha256: str) -> Path:
    return Path(f"{site.volume.uploads}/blobs/{sha256[:2]}/{sha256}")


# --- data sets --------------------------------------------------------------------------------


def create(call: Call) -> Response:
    """Return what the server lacks of a data set; create it if that is nothing."""
    _ensure_volume(call.site)
    files = _listing(call.body)
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:32]
    folder = _datasets(call.site) / digest
    missing: list[str] = []
    if not _touched(folder):
        wanted = dict.fromkeys(sha256 for sha256, _ in files.values())
        missing = [sha256 for sha256 in wanted if not _touched(_blob(call.site, sha256))]
        sizes = dict(files.values())
        if not missing:
            _link_all(call.site, folder, files)
        else:
            with _storage_errors(call.site):
                make_folder(call.site.volume.uploads)
                require_room(call.site.volume.uploads, sum(sizes[sha256] for sha256 in missing))
    only = next(iter(files)) if len(files) == 1 else None
    return json_answer(
        {
            "dataset": digest,
            "data": f"dataset:{digest}" + (f"/{only}" if only and call.body.get("file") else ""),
            "complete": not missing,
            "missing": missing[:MAX_SHOWN],
            "missing_count": len(missing),
        },
        200 if missing else 201,
    )


def _ensure_volume(site: Site) -> None:
    """
    Check that the volume answers; create it as the first worker does, if none has started yet.

    Raises:
        VolumeError: it does not answer, cannot be created, or is not the one that the job table used.
    """
    if site.volume_trouble() is not None and is_reachable(site.settings.volume, VOLUME_ANSWER_S):
        site.volume.ensure(site.queries.any_begun)
        site.volume_trouble(asked_before_s=0)
    require_volume(site)


def _touched(path: Path) -> bool:
    """Return whether a data set or a file is there; `ganq gc` then leaves it for a while."""
    try:
        found = path.stat()
        if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode):
            os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # a file of another account
        return path.exists()
    return True


def _listing(body: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """
    Return SHA-256 and size of each file by its path.

    Raises:
        SpecError: the listing is malformed, or a path leads elsewhere.
    """
    require_fields(body, ("files", "file"))
    files, single = body.get("files"), body.get("file", False)
    if not isinstance(files, list) or not 1 <= len(files) <= MAX_FILES:
        raise SpecError(f"files must be a list of 1 to {MAX_FILES:,} files")
    if not isinstance(single, bool) or (single and len(files) != 1):
        raise SpecError("file is true for a data set that is one archive")
    found: dict[str, tuple[str, int]] = {}
    for one in files:
        if not isinstance(one, dict):
            raise SpecError("each file must be an object with path, bytes and sha256")
        require_fields(one, ("path", "bytes", "sha256"))
        path, size, sha256 = one.get("path"), one.get("bytes"), one.get("sha256")
        if not isinstance(path, str) or not _is_safe(path) or path in found:
            raise SpecError(f"{str(path)[:200]!r} cannot be a path of a data set, or is given twice")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise SpecError(f"bytes of {path[:200]!r} is not a number")
        if not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise SpecError(f"sha256 of {path[:200]!r} is not a SHA-256")
        found[path] = sha256, size
    return found


def _is_safe(path: str) -> bool:
    parts = path.split("/")
    short = len(path) < 1000 and all(0 < len(part.encode(errors="replace")) < 250 for part in parts)
    return (
        short and not {".", ".."} & {*parts} and path.isprintable() and not PurePosixPath(path).is_absolute()
    )


def _link_all(site: Site, folder: Path, files: dict[str, tuple[str, int]]) -> None:
    temp = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    try:
        for parent in {path.rpartition("/")[0] for path in files}:
            os.makedirs(temp / parent, exist_ok=True)
        for path, (sha256, size) in files.items():
            blob = _blob(site, sha256)
            if (stored := blob.stat().st_size) != size:
                raise SpecError(f"{path[:200]!r} has {stored} bytes, not {size}")
            link_or_copy(blob, f"{temp}/{path}")
        sync_filesystem(temp)
        if not folder.is_dir():  # another request may have been faster
            temp.rename(folder)
        fsync_folder(folder.parent)
    except OSError as exc:
        if not folder.is_dir():
            raise_storage_error(exc, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


# --- files ------------------------------------------------------------------------------------


def find(call: Call) -> Response:
    """Answer whether a file is there; Upload-Offset says how much of it has arrived."""
    require_volume(call.site)
    sha256 = _sha256_of(call.request)
    blob = _blob(call.site, sha256)
    if blob.exists():
        size = blob.stat().st_size
        return json_answer(
            {"sha256": sha256, "complete": True, "offset": size}, headers={"Upload-Offset": str(size)}
        )
    part = _part(blob)
    arrived = part.stat().st_size if part.exists() else 0
    return json_answer(
        {"sha256": sha256, "complete": False, "offset": arrived}, headers={"Upload-Offset": str(arrived)}
    )


async def receive(call: Call) -> Response:
    """
    Write a file, or with Content-Range the rest of one, and check its SHA-256.

    Raises:
        HttpError: it does not begin where the last part ended, or its content has another SHA-256.
    """
    site, sha256 = call.site, _sha256_of(call.request)
    blob = _blob(site, sha256)
    start, total = await run_in_threadpool(_begin, site, call.request, blob)
    if start is None:  # it is complete; the body is not read
        return json_answer({"sha256": sha256, "complete": True, "offset": total})
    file = await run_in_threadpool(_open_part, site, _part(blob), start)
    waiting = bytearray()
    try:
        async for chunk in call.request.stream():
            waiting += chunk
            if len(waiting) >= _HELD:
                await run_in_threadpool(_write, site, file, bytes(waiting))
                waiting.clear()
        ended = call.request.scope[BODY_READ] = True
    except ClientDisconnect:
        ended = False  # what has arrived is kept
    await run_in_threadpool(_write, site, file, bytes(waiting))
    arrived = file.tell()
    file.close()
    if not ended:
        raise SpecError("the body ended early", hint=f"continue at byte {arrived}")
    if total is not None and arrived < total:
        return json_answer({"sha256": sha256, "complete": False, "offset": arrived}, 202)
    await run_in_threadpool(_finish, site, blob, sha256)
    return json_answer({"sha256": sha256, "complete": True, "offset": arrived}, 201)


def _begin(site: Site, request: Request, blob: Path) -> tuple[int | None, int | None]:
    require_volume(site)
    if blob.exists():
        return None, blob.stat().st_size
    given = request.headers.get("content-range")
    if given is None:
        length = request.headers.get("content-length", "")
        with _storage_errors(site):
            make_folder(blob.parent)
            require_room(blob.parent, int(length) if length.isdecimal() else 0)
        return 0, None
    found = _CONTENT_RANGE.fullmatch(given)
    if found is None or not int(found[1]) <= int(found[2]) < int(found[3]):
        raise SpecError(f"Content-Range {given[:80]!r} is not valid", hint="bytes FIRST-LAST/TOTAL")
    start, part = int(found[1]), _part(blob)
    arrived = part.stat().st_size if part.exists() else 0
    if start != arrived:
        raise HttpError(
            f"{arrived:,} bytes have arrived, so the next part begins there",
            status=409,
            code="WRONG_OFFSET",
            headers={"Upload-Offset": str(arrived)},
        )
    with _storage_errors(site):
        make_folder(blob.parent)
        require_room(blob.parent, int(found[3]) - start)
    return start, int(found[3])


def receive_bundle(call: Call) -> Response:
    """Write many small files: a tar archive whose members are named by their SHA-256."""
    require_volume(call.site)
    stored, mark = 0, secrets.token_hex(4)
    try:
        with tarfile.open(fileobj=io.BytesIO(call.raw), mode="r:", tarinfo=Header) as archive:
            for member in archive:
                if not member.isreg() or not SHA256.fullmatch(member.name):
                    raise SpecError(f"{member.name[:80]!r} is not a file that is named by its SHA-256")
                data = call.raw[member.offset_data : member.offset_data + member.size]
                if len(data) != member.size:
                    raise SpecError("the archive ended early")
                if hashlib.sha256(data).hexdigest() != member.name:
                    raise _lied(member.name)
                _store(call.site, member.name, data, mark)
                stored += 1
    except tarfile.TarError as exc:
        raise SpecError(f"the body is no tar archive: {exc}") from exc
    return json_answer({"stored": stored})


def _store(site: Site, sha256: str, data: bytes, mark: str) -> None:
    blob = _blob(site, sha256)
    if blob.exists():
        return
    temp = f"{blob.parent}/.{sha256}-{mark}"
    with _storage_errors(site):
        try:
            try:
                file = open(temp, "wb")  # noqa: SIM115
            except FileNotFoundError:
                make_folder(blob.parent)
                file = open(temp, "wb")  # noqa: SIM115
            with file:
                file.write(data)
            os.rename(temp, blob)
        except BaseException:
            with suppress(OSError):
                os.unlink(temp)
            raise


def _open_part(site: Site, part: Path, start: int) -> IO[bytes]:
    with _storage_errors(site):
        file = open(part, "r+b" if start else "wb")  # noqa: SIM115 - closed by the caller
        file.seek(start)
        file.truncate()
        return file


def _write(site: Site, file: IO[bytes], data: bytes) -> None:
    with _storage_errors(site):
        file.write(data)
        file.flush()


def _finish(site: Site, blob: Path, sha256: str) -> None:
    part = _part(blob)
    with _storage_errors(site):
        if sha256_file(part) != sha256:
            part.unlink(missing_ok=True)
            raise _lied(sha256)
        part.rename(blob)
        fsync_folder(blob.parent)


def _lied(sha256: str) -> HttpError:
    return HttpError(
        f"the content has another SHA-256 than {sha256[:12]}…",
        hint="the file may have changed while it was sent; send it again",
        status=400,
        code="WRONG_SHA256",
    )


def _part(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.part")


def _sha256_of(request: Request) -> str:
    sha256: str = request.path_params["sha256"]
    if not SHA256.fullmatch(sha256):
        raise SpecError(f"{sha256[:80]!r} is not a SHA-256")
    return sha256


@contextmanager
def _storage_errors(site: Site) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise_storage_error(exc, site.volume.uploads)
