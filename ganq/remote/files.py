"""Logs, images, checkpoints and results of a server; interrupted transfers resume."""

import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ganq.images import Image
from ganq.notices import report
from ganq.remote.api import Api
from jobs.errors import GanqError, NotFoundError, ServerUnavailableError, StorageError
from storage.volume.tar_headers import Header

if TYPE_CHECKING:
    from storage.db.rows import Checkpoint, Job
    from storage.volume.layout import Volume

PAUSE_S = (0.5, 10.0)
"""First and longest pause before a stream that broke off is opened again."""
GIVE_UP_S = 600.0
"""Time without progress after which a transfer or a stream is given up."""
TAIL = 1 << 16
MANIFEST = "manifest.jsonl"
PARTIAL = ".ganq-partial"
BLOCK = 512
EVENT = re.compile(r"(id|event|data): ?(.*)")


def until_done(work: Callable[[], bool], progress: Callable[[], Any]) -> None:
    """
    Repeat what may break off, until it returns true; give up if it made no progress for ten minutes.

    Args:
        progress: returns a value that changes with each step forward.
    """
    pause, known, since, said = PAUSE_S[0], progress(), time.monotonic(), False
    while True:
        try:
            if work():
                return
        except ServerUnavailableError as exc:
            now = progress()
            if now != known:
                known, since, pause, said = now, time.monotonic(), PAUSE_S[0], False
            elif time.monotonic() - since > GIVE_UP_S:
                raise
            if not said:
                report([f"{exc.message}; trying again"])
                said = True
        time.sleep(pause)
        pause = min(2 * pause, PAUSE_S[1])


# --- logs -------------------------------------------------------------------------------------


def log_lines(api: Api, path: str, attempt: int, *, last: int | None, follow: bool) -> Iterator[str]:
    """
    Yield the lines of the log of one attempt; see ganq.logs.attempt_lines().

    A connection that breaks off is opened again behind the last line, for ten minutes.
    """
    offset = 0
    if not follow or last is not None:
        data, offset = _read_log(api, f"{path}/log", attempt, last)
        lines = data.split(b"\n")
        if follow:  # the stream begins with the last line, if that is incomplete
            offset -= len(lines[-1])
            lines[-1] = b""
        whole = lines[:-1] if lines[-1] == b"" else lines
        yield from (
            line.decode(errors="replace")
            for line in (whole if last is None else whole[-last:] if last else [])
        )
        if not follow:
            return
    yield from _followed(api, f"{path}/log", attempt, offset)


def _read_log(api: Api, path: str, attempt: int, last: int | None) -> tuple[bytes, int]:
    """Return the log, or its end with more than `last` lines, and its size."""
    size = TAIL
    while True:
        headers = {} if last is None else {"Range": f"bytes=-{size}"}
        read = partial(api.send, "GET", path, params={"attempt": attempt}, headers=headers)
        try:
            answer = api.repeated(read)
        except NotFoundError:  # it has written nothing yet
            return b"", 0
        except GanqError as exc:
            if exc.code == "RANGE_NOT_SATISFIABLE":  # empty
                return b"", 0
            raise
        data: bytes = answer.content
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("content-range", ""))
        if last is None or found is None or found[1] == "0":
            return data, int(found[2]) if found else len(data)
        if data.count(b"\n") > last:
            return data, int(found[2])
        size *= 4


def _followed(api: Api, path: str, attempt: int, offset: int) -> Iterator[str]:
    number, pause, since, said = f"{attempt}:{offset}", PAUSE_S[0], time.monotonic(), False
    while True:
        try:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": number}
            with api.stream(path, headers, attempt=attempt) as answer:
                for kind, data, event_id in sse(answer.iter_lines()):
                    pause, since, said = PAUSE_S[0], time.monotonic(), False
                    if kind == "end" or (kind == "line" and data["attempt"] != attempt):
                        return
                    if kind == "line":
                        number = event_id
                        yield data["text"]
        except ServerUnavailableError as exc:
            if time.monotonic() - since > GIVE_UP_S:
                raise
            if not said:
                report([f"{exc.message}; trying again"])
                said = True
        time.sleep(pause)
        pause = min(2 * pause, PAUSE_S[1])


class EventParser:
    """Puts the events of a stream together from its lines."""

    def __init__(self) -> None:
        self._found: dict[str, str] = {}

    def line(self, line: str) -> tuple[str, dict[str, Any], str] | None:
        """Take a line; return the event that it ends: kind, data, id."""
        if line:
            if (part := EVENT.fullmatch(line)) is not None:
                self._found[part[1]] = part[2]
            return None
        found, self._found = self._found, {}
        if "data" not in found:
            return None
        return found.get("event", "message"), json.loads(found["data"]), found.get("id", "")


def sse(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the events of a stream: kind, data, id."""
    events = EventParser()
    yield from (event for event in map(events.line, lines) if event is not None)


# --- images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteImage(Image):
    """An image of a server; its bytes are fetched when they are asked for."""

    _fetch: "Callable[[], bytes] | None" = field(default=None, repr=False)

    def to_bytes(self) -> bytes:
        """
        Return the bytes of the file, or of the archive's member; of an npz the raw pixels.

        Raises:
            StorageError: they are missing, or differ from the manifest.
            ServerUnavailableError: the server does not answer.
        """
        assert self._fetch is not None
        data = self._fetch()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise StorageError(f"image {self.index} arrived with another content")
        return data


def images(api: Api, path: str) -> Iterator[Image]:
    """Yield the published images of a generation; see ganq.images.images_of()."""
    after: int | None = -1
    while after is not None:
        page = api.get(f"{path}/images", after=None if after < 0 else after, limit=1000)
        for one in page["images"]:
            yield image_of(one, _fetcher(api, f"{path}/images/{one['sha256']}"))
        after = page["next_after"]


def image_of(one: dict[str, Any], fetch: "Callable[[], bytes] | None" = None) -> RemoteImage:
    """Return an image from its JSON."""
    return RemoteImage(
        index=one["index"],
        seed=one["seed"],
        sample_index=one["sample_index"],
        score=one["score"],
        sha256=one["sha256"],
        class_name=one["class"],
        record={name: value for name, value in one.items() if value is not None},
        _fetch=fetch,
    )


def _fetcher(api: Api, path: str) -> Callable[[], bytes]:
    return lambda: bytes(api.repeated(lambda: api.send("GET", path)).content)


# --- checkpoints ------------------------------------------------------------------------------


def fetch_checkpoint(api: Api, path: str, chosen: "Checkpoint") -> "Volume":
    """
    Return a folder like a volume that has the generator of a checkpoint; it is fetched once.

    Raises:
        StorageError: what arrived differs from what was registered.
    """
    import platformdirs

    from storage.volume.checkpoints import FACTS, GENERATOR
    from storage.volume.durable import MANIFEST as CHECKPOINT_MANIFEST
    from storage.volume.layout import Volume

    root = Path(platformdirs.user_cache_dir("ganq")) / "checkpoints" / chosen.manifest_sha256
    folder = root / chosen.path
    folder.mkdir(parents=True, exist_ok=True)
    address = f"{path}/checkpoints/{chosen.manifest_sha256}"
    for one in [*api.get(address)["files"], {"name": CHECKPOINT_MANIFEST, "sha256": chosen.manifest_sha256}]:
        if one["name"] in (FACTS, GENERATOR, CHECKPOINT_MANIFEST):
            fetch_file(api, f"{address}/{quote(one['name'], safe='')}", folder / one["name"], one["sha256"])
    return Volume(root)


def fetch_record(api: Api, path: str, job: "Job") -> "Volume":
    """Fetch what is new of a training's metrics and samples; return the folder, laid out like a volume."""
    import platformdirs

    from storage.results.attempts import METRICS
    from storage.volume.durable import write_bytes
    from storage.volume.layout import Volume

    server = hashlib.sha256(api.url.encode()).hexdigest()[:16]
    volume = Volume(Path(platformdirs.user_cache_dir("ganq")) / "records" / f"{server}-{job.created_at:.0f}")
    for attempt in range(1, job.attempt + 1):
        target = volume.attempt(job.id, attempt) / METRICS
        target.parent.mkdir(parents=True, exist_ok=True)
        size = target.stat().st_size if target.exists() else 0
        headers = {"Range": f"bytes={size}-"} if size else {}
        read = partial(api.send, "GET", f"{path}/metrics", params={"attempt": attempt}, headers=headers)
        try:
            answer = api.repeated(read)
        except NotFoundError:  # it has written nothing yet
            continue
        except GanqError as exc:
            if exc.code != "RANGE_NOT_SATISFIABLE":  # else there is nothing new
                raise
            continue
        target.touch()
        with open(target, "r+b") as file:  # at its place: two exports at once write the same bytes
            file.seek(size if answer.status_code == 206 else 0)
            file.write(answer.content)
    for one in api.get(f"{path}/samples")["samples"]:
        target = volume.attempt(job.id, one["attempt"]) / "samples" / f"epoch-{one['epoch']:04d}.png"
        if not target.exists():
            png = api.repeated(partial(api.send, "GET", f"{path}/samples/{one['epoch']}")).content
            target.parent.mkdir(exist_ok=True)
            write_bytes(target, png)
    return volume


def fetch_file(api: Api, address: str, target: Path, sha256: str) -> None:
    """
    Write a file, resumed after what has arrived, when its SHA-256 is right.

    Raises:
        StorageError: what arrived is another content.
    """
    if target.exists():
        return
    part = target.with_name(f"{target.name}{PARTIAL}")

    def arrived() -> int:
        return part.stat().st_size if part.exists() else 0

    def rest() -> bool:
        headers = {"Range": f"bytes={arrived()}-"} if arrived() else {}
        try:
            with api.stream(address, headers) as answer, open(part, "ab") as file:
                if answer.status_code == 200:  # all of it
                    file.truncate(0)
                for data in answer.iter_bytes():
                    file.write(data)
        except GanqError as exc:
            if exc.code != "RANGE_NOT_SATISFIABLE":  # else it is complete
                raise
        return True

    until_done(rest, arrived)
    if _sha256(part) != sha256:
        part.unlink()
        raise StorageError(f"{target.name} arrived with another content", hint="try again")
    part.rename(target)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- results ----------------------------------------------------------------------------------


def download(api: Api, job: "Job", path: str, out: Path, only: str | None) -> Path:
    """
    Copy the result of a generation to a folder: resumable, and each image compared with its SHA-256.

    Args:
        only: 'images', 'grids' or 'best' (the image with the highest score); None: all.

    Raises:
        NotFoundError: the job has no images.
        StorageError: the folder has other files, or what arrived differs from the manifest.
    """
    manifest_sha256 = str((job.result or {}).get("manifest_sha256"))
    known = api.repeated(lambda: api.send("GET", f"{path}/manifest")).content
    if hashlib.sha256(known).hexdigest() != manifest_sha256:
        raise StorageError(f"the manifest of job {job.id} differs from the registered one")
    records = [json.loads(line) for line in known.splitlines()]
    if only == "best":
        return _best(api, path, out, records)
    hashes = _hashes(records)
    out.mkdir(parents=True, exist_ok=True)
    taken = next(iter(_foreign(out, hashes, known)), None)
    if taken is not None:
        raise StorageError(
            f"{out} already holds {taken}: nothing there was touched", hint="give another folder: --out DIR"
        )
    note, folder = out / PARTIAL, ResultFolder(out, hashes)
    done = _resumed_at(note, manifest_sha256)
    files = 0

    def rest() -> bool:
        nonlocal done, files
        with api.stream(f"{path}/result.tar", after=done, only=only) as answer:
            for name, data in _members(answer.iter_bytes(1 << 20)):
                folder.write(name, data)
                done, files = name, files + 1
                if files % 1000 == 0:
                    note.write_text(json.dumps({"manifest": manifest_sha256, "after": done}))
        return True

    try:
        until_done(rest, lambda: done)
    except BaseException:
        if done is not None:
            note.write_text(json.dumps({"manifest": manifest_sha256, "after": done}))
        raise
    missing = [
        name for name in hashes if only in (None, name.partition("/")[0]) and not (out / name).exists()
    ]
    if missing:
        raise StorageError(f"{missing[0]} did not arrive", hint="run the command again")
    note.unlink(missing_ok=True)
    return out


def _hashes(records: list[dict[str, Any]]) -> dict[str, str]:
    """Return the SHA-256 of each file that holds images: of an archive that of the whole."""
    found = {
        one["file"]: one["sha256"]
        for one in records
        if "index" in one and "offset" not in one and "shape" not in one
    }
    shards = [one for one in records if "shard" in one]
    found |= {one["manifest"]: one["sha256"] for one in shards}
    archives = [one for one in records if "archive" in one]
    archives += [archive for one in shards for archive in one["archives"]]
    return found | {one["archive"]: one["sha256"] for one in archives}


def _foreign(out: Path, hashes: dict[str, str], manifest: bytes) -> Iterator[str]:
    """Yield files of another result."""
    there = out / MANIFEST
    if there.exists() and there.read_bytes() != manifest:
        yield MANIFEST
    folder = out / "images"
    files = (one for one in folder.rglob("*") if one.is_file() and not one.name.endswith(PARTIAL))
    for path in islice(files, 1):
        name = path.relative_to(out).as_posix()
        if name not in hashes or _sha256(path) != hashes[name]:
            yield name


def _resumed_at(note: Path, manifest_sha256: str) -> str | None:
    try:
        found = json.loads(note.read_text())
        return str(found["after"]) if found["manifest"] == manifest_sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class ResultFolder:
    """A folder to which the files of a result are written, each complete or not at all."""

    def __init__(self, path: Path, hashes: dict[str, str]) -> None:
        self.path, self.hashes = path, hashes
        self._made: set[str] = set()

    def write(self, name: str, pieces: Iterator[bytes]) -> None:
        """
        Write a file.

        Raises:
            StorageError: its name leads out of the folder, or its content is another one.
        """
        inside, _, own = name.rpartition("/")
        if os.path.isabs(name) or not own or ".." in name.replace("\\", "/").split("/"):
            raise StorageError(f"the server sent {name[:200]!r}, which leads out of the folder")
        folder = os.path.join(self.path, inside)
        if inside not in self._made:
            os.makedirs(folder, exist_ok=True)
            self._made.add(inside)
        temp = os.path.join(folder, f".{own}{PARTIAL}")
        digest = hashlib.sha256()
        try:
            with open(temp, "wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            if name in self.hashes and digest.hexdigest() != self.hashes[name]:
                raise StorageError(f"{name} arrived with another content", hint="run the command again")
            os.rename(temp, os.path.join(folder, own))
        except BaseException:
            with suppress(OSError):
                os.unlink(temp)
            raise


def _members(pieces: Iterator[bytes]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """
    Yield name and content of each file of a tar stream; the content must be read before the next file.

    tarfile's own stream takes three times as long for small files.
    """
    waiting = bytearray()

    def take(size: int) -> bytes:
        while len(waiting) < size:
            if (piece := next(pieces, None)) is None:
                raise ServerUnavailableError("the download broke off")
            waiting.extend(piece)
        data = bytes(waiting[:size])
        del waiting[:size]
        return data

    def content(size: int) -> Iterator[bytes]:
        left = size
        while left:
            data = take(min(left, 1 << 20))
            left -= len(data)
            yield data
        take(-size % BLOCK)

    long_name: dict[str, str] = {}
    while any(header := take(BLOCK)):
        entry = Header.frombuf(header, "utf-8", "surrogateescape")
        if entry.type == tarfile.XHDTYPE:
            text = b"".join(content(entry.size)).decode()
            long_name = dict(
                line.partition(" ")[2].split("=", 1) for line in text.splitlines() if "=" in line
            )
            continue
        yield long_name.pop("path", entry.name), content(int(long_name.pop("size", entry.size)))


def _best(api: Api, path: str, out: Path, records: list[dict[str, Any]]) -> Path:
    known = [one for one in records if "index" in one]
    if any("shard" in one for one in records):  # the manifests of the shards are with the server
        known = [{**one.record, "file": f"{one.sample_index:06d}.png"} for one in images(api, path)]
    scored = [one for one in known if isinstance(one.get("score"), int | float)]
    if not scored:
        raise NotFoundError(
            "no image of this job has a score", hint="submit generate --keep K --of N scores images"
        )
    best = max(scored, key=lambda one: float(one["score"]))
    out.mkdir(parents=True, exist_ok=True)
    name = Path(str(best.get("member") or best["file"])).name
    fetch_file(api, f"{path}/images/{best['sha256']}", out / name, best["sha256"])
    return out / name
