"""Send data sets to a server: by content, only what it lacks, resumable."""

import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ganq.notices import report
from ganq.remote.api import Api
from ganq.remote.files import until_done
from jobs.errors import GanqError, NotFoundError, SpecError, StorageError
from storage.volume.tar_headers import header

PATHS = ("data", "path", "subject", "init_netg", "init_netd", "feature_network")
BUNDLE = 16 << 20
BUNDLED = 1 << 20
"""Files up to this size are sent together."""
PIECE = 8 << 20
REPORT_EVERY_S = 5.0
SERVER = "server:"
"""Prefix of a path of the server."""
UPLOADED = re.compile(r"/uploads/datasets/([0-9a-f]{32}(/[^/]+)?)$")
FEATURE_NETWORKS = ("effnet-lite0", "random")


def on_server(api: Api, name: str, value: Any) -> Any:
    """
    Return an option as the server takes it: a local path is uploaded.

    Raises:
        NotFoundError: there is no such path here.
        SpecError: it is neither a folder nor a file.
    """
    if name not in PATHS or not isinstance(value, str | os.PathLike):
        return value
    text = os.fspath(value)
    if text.startswith(SERVER):
        return text.removeprefix(SERVER)
    if text.startswith("dataset:") or (name == "feature_network" and text in FEATURE_NETWORKS):
        return text
    path = Path(text).expanduser()
    if path.exists():
        return upload(api, path)
    if name == "subject" and "/" not in text:
        return text  # a job
    raise NotFoundError(
        f"there is no {path.absolute()} on this machine",
        hint=f"{SERVER}{path.absolute()} names a path of the server",
    )


def of_server(name: str, value: Any) -> Any:
    """Return an option of a server's job as on_server() takes it; of an upload its id."""
    if name not in PATHS or not isinstance(value, str) or not value.startswith("/"):
        return value
    uploaded = UPLOADED.search(value)
    return f"{SERVER}{value}" if uploaded is None else f"dataset:{uploaded[1]}"


def upload(api: Api, path: Path) -> str:
    """
    Send what the server lacks of a folder or a file; return what names it in a submission.

    Raises:
        StorageError: a file cannot be read.
        GanqError: that of the server.
    """
    files = {path.name: path} if path.is_file() else dict(_files(path))
    if not files:
        raise SpecError(f"{path} contains no files", hint="give a folder, zip or tar of images")
    sizes = {name: file.stat().st_size for name, file in files.items()}
    progress = UploadProgress(f"upload of {path.name}", sum(sizes.values()))
    known = {name: _hash(file) for name, file in files.items()}
    listing: dict[str, Any] = {
        "files": [{"path": name, "bytes": sizes[name], "sha256": known[name]} for name in files]
    }
    if path.is_file():
        listing["file"] = True
    of_hash = {known[name]: files[name] for name in files}
    while True:
        answer = api.repeated(lambda: api.post("/datasets", listing))
        if answer["complete"]:
            progress.end()
            return str(answer["data"])
        wanted = [of_hash[sha256] for sha256 in answer["missing"]]
        lacking = sum(file.stat().st_size for file in wanted)
        progress.begin(progress.total - lacking if answer["missing_count"] == len(wanted) else 0)
        _send(api, {sha256: of_hash[sha256] for sha256 in answer["missing"]}, progress)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        inside = os.path.relpath(place, folder).replace(os.sep, "/") + "/"
        for name in sorted(files):
            path = os.path.join(place, name)
            if not name.startswith(".") and os.path.isfile(path):
                yield inside.removeprefix("./") + name, Path(path)


def _hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size <= BUNDLED:  # file_digest() clears a large buffer first
                return hashlib.sha256(file.read()).hexdigest()
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise StorageError(f"{path} cannot be read: {(exc.strerror or str(exc)).lower()}") from exc


def _send(api: Api, files: dict[str, Path], progress: "UploadProgress") -> None:
    """Send files, small ones together; the next bundle is read while one is on its way."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as sender:
        waiting = None
        for bundle, size in _bundles(files):
            if waiting is not None:
                waiting.result()
            waiting = sender.submit(_send_bundle, api, bundle, size, progress)
        if waiting is not None:
            waiting.result()
    for sha256, path in files.items():
        if path.stat().st_size > BUNDLED:
            send_file(api, sha256, path, progress.add)


def _bundles(files: dict[str, Path]) -> Iterator[tuple[bytes, int]]:
    data, size = io.BytesIO(), 0
    for sha256, path in files.items():
        content = path.read_bytes() if path.stat().st_size <= BUNDLED else None
        if content is None:
            continue
        data.write(header(sha256, len(content)) + content + bytes(-len(content) % 512))
        size += len(content)
        if data.tell() >= BUNDLE:
            yield data.getvalue() + bytes(1024), size
            data, size = io.BytesIO(), 0
    if data.tell():
        yield data.getvalue() + bytes(1024), size


def _send_bundle(api: Api, bundle: bytes, size: int, progress: "UploadProgress") -> None:
    def once() -> bool:
        api.send("POST", "/blobs", content=bundle, headers={"Content-Type": "application/x-tar"})
        return True

    until_done(once, lambda: None)
    progress.add(size)


def send_file(api: Api, sha256: str, path: Path, sent: Callable[[int], None]) -> None:
    """
    Send a large file in pieces, from where the last attempt ended.

    Raises:
        GanqError: that of the server, e.g. if the file changes while it is sent.
    """
    total = path.stat().st_size
    offset = -1

    def rest() -> bool:
        nonlocal offset
        found = api.get(f"/blobs/{sha256}")
        arrived = int(found["offset"])
        sent(arrived - max(offset, 0))
        offset = arrived
        with open(path, "rb") as file:
            while not found["complete"]:
                file.seek(offset)
                data = file.read(PIECE)
                headers = {"Content-Type": "application/octet-stream"}
                headers["Content-Range"] = f"bytes {offset}-{offset + len(data) - 1}/{total}"
                try:
                    answer = api.send("PUT", f"/blobs/{sha256}", content=data, headers=headers)
                except GanqError as exc:
                    if exc.code == "WRONG_OFFSET":  # another upload of the same file
                        return False
                    raise
                found = answer.json()
                sent(int(found["offset"]) - offset)
                offset = int(found["offset"])
        return True

    until_done(rest, lambda: offset)


class UploadProgress:
    """Report the progress of an upload and the time left, every REPORT_EVERY_S."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = self.first = 0
        self.began = self.said = time.monotonic()

    def begin(self, done: int) -> None:
        """Start counting; the server has `done` bytes already."""
        self.done = self.first = done
        self.began = time.monotonic()

    def add(self, size: int) -> None:
        """Count bytes that have arrived."""
        self.done += size
        now = time.monotonic()
        if now - self.said >= REPORT_EVERY_S:
            from storage.status.units import duration
            from storage.status.units import size as in_words

            self.said = now
            rate = (self.done - self.first) / (now - self.began)
            left = f", {duration((self.total - self.done) / rate)} left" if rate > 0 else ""
            report([f"{self.what}: {in_words(self.done)} of {in_words(self.total)}{left}"])

    def end(self) -> None:
        """Report the end of an upload of which progress was reported."""
        if self.said > self.began:
            report([f"{self.what}: complete"])
