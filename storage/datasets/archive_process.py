"""
Reads a zip or tar of unknown origin, in a process that can be killed.

    python -P storage/datasets/archive_process.py list|unpack|serve FD

The archive comes as an open descriptor, answers go out on stdout in frames, and the process is
confined by the operating system to those (storage/sandbox.py). Its memory and CPU time are limited: an
archive may be made so that Python's readers never end (CVE-2024-6232, CVE-2025-8194).
storage/datasets/archives.py is the other end. The file is run by its path and imports nothing of ganq but
the sandbox.

Nothing is extracted to a name that came from outside. What leaves the folder, is no regular file,
or grows without measure when unpacked is left out, with the reason.
"""

import importlib.util
import io
import json
import lzma
import os
import stat
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_FILE_BYTES = 512 << 20
MAX_MEMBERS = 6_000_000
MAX_NAME = 4096
MAX_RATIO = 100
"""Unpacked to packed bytes: pictures hardly shrink, bombs do."""
RATIO_FREE_BYTES = 1 << 20
"""Below this a large ratio is a small file, not a bomb."""
MAX_HEADER_BYTES = 1 << 20
"""A tar's long names and pax headers; tarfile reads them into memory whole."""
MEMORY_BYTES, MEMORY_PER_BYTE, MAX_MEMORY_BYTES = 512 << 20, 16, 6 << 30
"""Of address space: an entry of a zip takes 60 bytes in the file and 900 in Python's list of them."""
STALL_SECONDS = 5
"""Of CPU time without a byte of the archive read that was not read before: 8 KiB unpack within a second."""
ZIP_BYTES_A_SECOND, ZIP_STALL_SECONDS = 1 << 20, 300
"""The list of a zip is read at once; Python takes 5 µs for an entry of 60 bytes."""
BYTES_A_SECOND = 1_000_000
"""Of CPU time in all; the slowest compression of pictures, xz and bzip2, is read ten times as fast."""
MEMBER_SECONDS = 60
"""Of CPU time for one member of a zip."""
CHUNK = 1 << 18
BATCH = 1000
BROKEN = (
    EOFError,
    KeyError,
    OverflowError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What the archive modules raise on broken archives, besides OSError."""

FRAME = struct.Struct(">cI")
"""One letter, and the bytes that follow."""
KIND = b"K"  # zip, tar, or nothing: it is neither
MEMBERS = b"M"  # JSON: [[name, why it is left out, or null], …]
BEGIN, DATA, END = b"B", b"D", b"E"  # of one member: its name, its bytes
UNREADABLE = b"U"  # in the place of END: why
REFUSED = b"X"  # JSON: [what is wrong with the archive, what to do]
ALIVE = b"A"  # the archive is being read
DONE = b"Z"
REQUEST = struct.Struct(">I")
"""Bytes of a name that follow."""


class RefusedError(Exception):
    """
    An archive that is not read on.

    Args:
        said: what is wrong with it; the path goes before.
        hint: what to do.
    """

    def __init__(self, said: str, hint: str) -> None:
        super().__init__(said)
        self.said, self.hint = said, hint


def limits(size: int, *, is_zip: bool) -> tuple[int, int, int]:
    """Bytes of memory, seconds of CPU time without progress, and in all, for an archive of so many bytes."""
    memory = min(MEMORY_BYTES + MEMORY_PER_BYTE * size, MAX_MEMORY_BYTES)
    stall = STALL_SECONDS + (min(size // ZIP_BYTES_A_SECOND, ZIP_STALL_SECONDS) if is_zip else 0)
    return memory, stall, 120 + size // BYTES_A_SECOND


def is_image_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def plain_name(name: str) -> str:
    """`tar -C faces .` writes ./001.png; that is the picture 001.png."""
    return str(PurePosixPath(name))


def _hidden(name: str) -> bool:
    parts = name.split("/")
    return parts[0] == "__MACOSX" or any(one.startswith(".") and one not in (".", "..") for one in parts)


def _unsafe_name(name: str) -> str | None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        return "name leaves the archive"
    return f"name of more than {MAX_NAME} characters" if len(name) > MAX_NAME else None


def _too_dense(unpacked: int, packed: int) -> bool:
    return unpacked > RATIO_FREE_BYTES and unpacked > MAX_RATIO * max(packed, 1)


# --- the child process ------------------------------------------------------------------------


class Answer:
    """Frames on stdout; each one that tells of progress moves the limit on CPU time along."""

    def __init__(self, sandbox: Any, stall_s: int, in_all_s: int | None) -> None:
        self._out = os.fdopen(os.dup(1), "wb", buffering=CHUNK)
        os.dup2(2, 1)  # whatever a library prints must not end up between the frames
        self._sandbox, self._stall_s, self._in_all_s = sandbox, stall_s, in_all_s
        self._granted = self._said = 0.0

    def put(self, kind: bytes, data: bytes = b"") -> None:
        self._out.write(FRAME.pack(kind, len(data)))
        self._out.write(data)

    def flush(self) -> None:
        self._out.flush()

    def progress(self) -> None:
        """A part of the archive is done that was not before."""
        self.renew(self._stall_s)
        if time.monotonic() - self._said > 1.0:
            self._said = time.monotonic()
            self.put(ALIVE)
            self.flush()

    def renew(self, seconds: int) -> None:
        """Grant so many seconds from now on, to a second: each picture need not move the limit."""
        if time.process_time() - self._granted > 1.0:
            self.grant(seconds)

    def grant(self, seconds: int) -> None:
        self._granted = time.process_time()
        left = seconds if self._in_all_s is None else max(self._in_all_s - int(self._granted), 0)
        self._sandbox.grant_seconds(min(seconds, left))


class Watched(io.FileIO):
    """The archive; counts as progress only what lies beyond all that was read before."""

    answer: Answer | None = None
    _furthest = 0

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        here = self.tell()
        if here > self._furthest:
            self._furthest = here
            if self.answer is not None:
                self.answer.progress()
        return count


class BoundedInfo(tarfile.TarInfo):
    """Refuses a header that would fill the memory or lead back before its member is even seen."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # A RefusedError passes through tarfile, which takes its own errors for other formats.
        if self.size < 0:
            raise RefusedError(f"has a header with a size of {self.size} bytes", PACK_AGAIN)
        members = (*tarfile.REGULAR_TYPES, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
        if self.type not in members and self.size > MAX_HEADER_BYTES:
            raise RefusedError(
                f"has a header of {self.size} bytes, and {MAX_HEADER_BYTES} are the limit", PACK_AGAIN
            )
        info: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # not in typeshed
        return info


PACK_AGAIN = "is it a bomb? unpack it yourself, and give the folder"


def _tar_members(archive: tarfile.TarFile, size: int) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """Members that are no folders and not hidden, and why they are left out."""
    budget = size * MAX_RATIO + RATIO_FREE_BYTES
    count = 0
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
        budget -= tarfile.BLOCKSIZE + member.size
        count += 1
        # A size from a pax header may be anything; below zero it leads back to where we were.
        if member.size < 0 or archive.offset <= member.offset:
            raise RefusedError(f"has a member with a size of {member.size} bytes", PACK_AGAIN)
        if budget < 0:
            raise RefusedError(f"unpacks to more than {MAX_RATIO} times its size", "is it a bomb?")
        if count > MAX_MEMBERS:
            raise RefusedError(f"has more than {MAX_MEMBERS} members", "split it")
        if not (member.isdir() or _hidden(member.name)):
            yield member, _unsafe_name(member.name) or (None if member.isreg() else "no regular file")


def _zip_members(archive: zipfile.ZipFile, size: int) -> Iterator[tuple[zipfile.ZipInfo, str | None]]:
    # Members may lie over each other, so that each is within the ratio and their sum is not.
    budget = size * MAX_RATIO + RATIO_FREE_BYTES
    for count, member in enumerate(archive.infolist()):
        if count >= MAX_MEMBERS:
            raise RefusedError(f"has more than {MAX_MEMBERS} members", "split it")
        if member.is_dir() or _hidden(member.filename):
            continue
        kind = stat.S_IFMT(member.external_attr >> 16)
        reason = _unsafe_name(member.filename)
        if kind not in (0, stat.S_IFREG):
            reason = "no regular file"
        elif member.flag_bits & 1:
            reason = "encrypted"
        elif _too_dense(member.file_size, member.compress_size):
            reason = f"unpacks to more than {MAX_RATIO} times its size"
        elif reason is None:
            budget -= member.file_size
            if budget < 0:
                raise RefusedError(f"unpacks to more than {MAX_RATIO} times its size", "is it a bomb?")
        yield member, reason


def _open_tar(file: IO[bytes]) -> tarfile.TarFile:
    file.seek(0)
    return tarfile.open(fileobj=file, mode="r:*", tarinfo=BoundedInfo, encoding="utf-8")


def list_members(file: IO[bytes], size: int, answer: Answer) -> None:
    """Give out every name, in the archive's order."""
    found: Iterator[tuple[str, str | None]]
    if zipfile.is_zipfile(file):
        answer.put(KIND, b"zip")
        answer.grant(limits(size, is_zip=True)[1])
        found = ((one.filename, why) for one, why in _zip_members(zipfile.ZipFile(file), size))
    else:
        try:
            archive = _open_tar(file)
        except tarfile.TarError:
            answer.put(KIND)
            return
        answer.put(KIND, b"tar")
        found = ((one.name, why) for one, why in _tar_members(archive, size))
    batch: list[tuple[str, str | None]] = []
    for name, why in found:
        batch.append((name[:200] if why else plain_name(name), why))
        if len(batch) == BATCH:
            answer.put(MEMBERS, json.dumps(batch).encode())
            answer.progress()
            batch.clear()
    answer.put(MEMBERS, json.dumps(batch).encode())


def unpack(file: IO[bytes], size: int, answer: Answer) -> None:
    """Give out the pictures of a tar in its own order: it cannot be read in another."""
    archive = _open_tar(file)
    for member, why in _tar_members(archive, size):
        if why or not is_image_name(member.name) or member.size > MAX_FILE_BYTES:
            continue
        content = archive.extractfile(member)
        if content is not None:
            answer.put(BEGIN, json.dumps(plain_name(member.name)).encode())
            _give_out(content, answer)
            answer.put(END)


def serve(file: IO[bytes], answer: Answer) -> None:
    """Give out the members of a zip that are asked for, until stdin ends."""
    archive = zipfile.ZipFile(file)
    members = {plain_name(one.filename): one for one in archive.infolist()}
    answer.put(DONE)
    answer.flush()
    requests = sys.stdin.buffer
    while header := requests.read(REQUEST.size):
        name = json.loads(requests.read(*REQUEST.unpack(header)))
        answer.renew(MEMBER_SECONDS)
        try:
            with archive.open(members[name]) as content:
                _give_out(content, answer)
            answer.put(END)
        except (OSError, MemoryError, *BROKEN) as exc:
            answer.put(UNREADABLE, (str(exc) or type(exc).__name__)[:200].encode(errors="replace"))
        answer.flush()


def _give_out(content: IO[bytes], answer: Answer) -> None:
    left = MAX_FILE_BYTES + 1  # one more, so that the reader sees that there is more
    while left > 0 and (data := content.read(min(CHUNK, left))):
        left -= len(data)
        answer.put(DATA, data)


def _load_sandbox() -> Any:
    """The module beside this one, by its path: this process finds nothing of ganq by name."""
    spec = importlib.util.spec_from_file_location("ganq_sandbox", Path(__file__).parents[1] / "sandbox.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_the_rest() -> None:
    """Import what the archive modules import when a file needs it: afterwards no file can be opened."""
    import bz2  # noqa: F401
    import errno  # noqa: F401
    import gzip  # noqa: F401
    import warnings  # noqa: F401

    for encoding in ("cp437", "ascii", "latin-1", "utf-8"):  # of names
        "".encode(encoding)


def main() -> None:
    """Answer one command about the archive that is open."""
    command, number = sys.argv[1], int(sys.argv[2])
    sandbox = _load_sandbox()
    _import_the_rest()
    raw = Watched(number, "rb")
    size = os.fstat(number).st_size
    file = io.BufferedReader(raw)
    memory, stall_s, in_all_s = limits(size, is_zip=command == "serve")
    # Each member of a zip has its own seconds, and there may be millions.
    answer = Answer(sandbox, stall_s, None if command == "serve" else in_all_s)
    sandbox.confine(memory_bytes=memory, cpu_seconds=None)
    answer.grant(stall_s)
    raw.answer = answer
    try:
        if command == "list":
            list_members(file, size, answer)
        elif command == "unpack":
            unpack(file, size, answer)
        else:
            serve(file, answer)
        answer.put(DONE)
    except RefusedError as exc:
        answer.put(REFUSED, json.dumps([exc.said, exc.hint]).encode())
    except MemoryError:
        said = f"needs more than {memory >> 20} MiB of memory to be read, the limit for one of its size"
        answer.put(REFUSED, json.dumps([said, PACK_AGAIN]).encode())
    except (OSError, *BROKEN) as exc:
        said = f"is a broken archive: {str(exc)[:200]}"
        answer.put(REFUSED, json.dumps([said, "pack or download it again"]).encode())
    answer.flush()


if __name__ == "__main__":
    main()
