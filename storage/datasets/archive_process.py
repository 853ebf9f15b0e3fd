"""
Reads a zip or tar of unknown origin, in a process that can be killed.

    python -P storage/datasets/archive_process.py list|unpack|serve FD READER MAX_BYTES

The archive comes as an open descriptor, answers go out on stdout in frames, and the process is
confined by the operating system to those (storage/sandbox.py). Its memory and CPU time are limited: an
archive may be made so that Python's readers never end (CVE-2024-6232, CVE-2025-8194).
storage/datasets/archives.py is the other end. The file is run by its path and imports nothing of ganq but
the sandbox and the rules for names.

Nothing is extracted to a name that came from outside. A member that leaves the folder or is not a regular
file is left out, with the reason. An archive that unpacks to more than MAX_BYTES is refused.
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
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

MAX_FILE_BYTES = 512 << 20
MAX_MEMBERS = 6_000_000
MAX_NAME = 4096
MAX_LABELS_BYTES = 32 << 20
"""Of a dataset.json; that of a million images has 30 MB."""
MAX_LABEL_FILES = 3
MAX_RATIO, RATIO_FREE_BYTES = 100, 1 << 20
"""Version 1 of the reader leaves out what unpacks to more than 100 times its size, from 1 MiB on."""
MAX_HEADER_BYTES = 1 << 20
"""A tar's long names and pax headers; tarfile reads them into memory whole."""
MEMORY_BYTES, MEMORY_PER_BYTE, MAX_MEMORY_BYTES = 512 << 20, 16, 6 << 30
"""Of address space: an entry of a zip takes 60 bytes in the file and 900 in Python's list of them."""
STALL_SECONDS = 5
"""Of CPU time without a byte of the archive read that was not read before: 8 KiB unpack within a second."""
MIN_ZIP_BYTES_PER_SECOND, ZIP_STALL_SECONDS = 1 << 20, 300
"""The list of a zip is read at once; Python takes 5 µs for an entry of 60 bytes."""
MIN_BYTES_PER_SECOND, MIN_UNPACKED_BYTES_PER_SECOND = 1_000_000, 200_000_000
"""Of CPU time in all; the slowest compressions, xz and bzip2, are read ten times as fast."""
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
"""Raised by the archive modules on broken archives, besides OSError."""

FRAME = struct.Struct(">cI")
"""One letter, and the bytes that follow."""
KIND = b"K"  # zip, tar, or nothing: it is neither
MEMBERS = b"M"  # JSON: [[name, why it is left out, or null], …]
LABELS = b"L"  # JSON: [name, text] of a dataset.json
BEGIN, DATA, END = b"B", b"D", b"E"  # of one member: its name, its bytes
UNREADABLE = b"U"  # in the place of END: why
REFUSED = b"X"  # JSON: [what is wrong with the archive, what to do]
ALIVE = b"A"  # the archive is being read
DONE = b"Z"
REQUEST = struct.Struct(">I")
"""Bytes of a name that follow."""


class RefusedError(Exception):
    """
    The archive is refused.

    Args:
        said: what is wrong with it; the path is put before it.
        hint: what to do.
    """

    def __init__(self, said: str, hint: str) -> None:
        super().__init__(said)
        self.said, self.hint = said, hint


def limits(size: int, most_bytes: int, *, is_zip: bool) -> tuple[int, int, int]:
    """
    Return bytes of memory, seconds of CPU time without progress, and in all.

    Args:
        size: of the archive, in bytes.
        most_bytes: that it may unpack to.
    """
    memory = min(MEMORY_BYTES + MEMORY_PER_BYTE * size, MAX_MEMORY_BYTES)
    stall = STALL_SECONDS + (min(size // MIN_ZIP_BYTES_PER_SECOND, ZIP_STALL_SECONDS) if is_zip else 0)
    return memory, stall, 120 + size // MIN_BYTES_PER_SECOND + most_bytes // MIN_UNPACKED_BYTES_PER_SECOND


def _unsafe_name(name: str) -> str | None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        return "name leaves the archive"
    return f"name of more than {MAX_NAME} characters" if len(name) > MAX_NAME else None


def _exceeds_ratio(unpacked: int, packed: int) -> bool:
    return unpacked > RATIO_FREE_BYTES and unpacked > MAX_RATIO * max(packed, 1)


# --- the child process ------------------------------------------------------------------------


class Answer:
    """Frames on stdout. Progress extends the limit on CPU time."""

    def __init__(self, sandbox: Any, stall_s: int, in_all_s: int | None) -> None:
        self._out = os.fdopen(os.dup(1), "wb", buffering=CHUNK)
        os.dup2(2, 1)  # output of libraries must not get between the frames
        self._sandbox, self._stall_s, self._in_all_s = sandbox, stall_s, in_all_s
        self._granted = self._said = 0.0

    def put(self, kind: bytes, data: bytes = b"") -> None:
        self._out.write(FRAME.pack(kind, len(data)))
        self._out.write(data)

    def flush(self) -> None:
        self._out.flush()

    def progress(self) -> None:
        """Report that more of the archive has been read, and extend the limit on CPU time."""
        self.renew(self._stall_s)
        if time.monotonic() - self._said > 1.0:
            self._said = time.monotonic()
            self.put(ALIVE)
            self.flush()

    def renew(self, seconds: int) -> None:
        """Allow `seconds` more of CPU time from now on; takes effect at most once a second."""
        if time.process_time() - self._granted > 1.0:
            self.grant(seconds)

    def grant(self, seconds: int) -> None:
        self._granted = time.process_time()
        left = seconds if self._in_all_s is None else max(self._in_all_s - int(self._granted), 0)
        self._sandbox.grant_seconds(min(seconds, left))


class CountingFile(io.FileIO):
    """The archive file. Only bytes beyond all that were read before count as progress."""

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
    """A member whose header is refused if it would fill the memory or lead back in the file."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # A RefusedError passes through tarfile, which takes its own errors for other formats.
        if self.size < 0:
            raise RefusedError(f"has a header with a size of {self.size} bytes", UNPACK_HINT)
        members = (*tarfile.REGULAR_TYPES, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
        if self.type not in members and self.size > MAX_HEADER_BYTES:
            raise RefusedError(
                f"has a header of {self.size} bytes, and {MAX_HEADER_BYTES} are the limit", UNPACK_HINT
            )
        info: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # not in typeshed
        return info


UNPACK_HINT = "is it a bomb? unpack it yourself, and give the folder"


class Rules:
    """
    What an archive may unpack to, and how its names are read.

    Args:
        size: of the archive, in bytes.
        reader: version of the rules for names; the first limits the ratio, too.
        most_bytes: that it may unpack to.
        names: the module storage/datasets/names.py.
    """

    def __init__(self, size: int, reader: int, most_bytes: int, names: Any) -> None:
        self.reader, self.most_bytes, self.names = reader, most_bytes, names
        self._labels = 0
        self._left = size * MAX_RATIO + RATIO_FREE_BYTES if reader == 1 else most_bytes

    def spend(self, unpacked: int) -> None:
        """
        Count what is unpacked.

        Raises:
            RefusedError: it is more than the archive may unpack to.
        """
        self._left -= unpacked
        if self._left < 0 and self.reader == 1:
            raise RefusedError(f"unpacks to more than {MAX_RATIO} times its size", "is it a bomb?")
        if self._left < 0:
            gigabytes = self.most_bytes / 1e9
            raise RefusedError(
                f"unpacks to more than {gigabytes:g} GB",
                f"if it is not an archive bomb, --max-unpacked-gb {max(2 * gigabytes, 1):g} raises the limit",
            )

    def may_hold_labels(self, name: str) -> bool:
        """Return whether a member is a dataset.json at the root, or in a folder there."""
        parts = self.names.canonical(name, self.reader).split("/")
        if self.reader == 1 or parts[-1] != self.names.LABELS or len(parts) > 2:
            return False
        self._labels += 1
        return self._labels <= MAX_LABEL_FILES

    def zip_name(self, member: zipfile.ZipInfo) -> str:
        """Return a member's name; archivers of macOS write UTF-8 without saying so."""
        if self.reader > 1 and not member.flag_bits & 0x800:
            try:
                return member.filename.encode("cp437").decode()
            except ValueError:
                pass
        return member.filename


def _tar_members(archive: tarfile.TarFile, rules: Rules) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """Yield the members that are no folders, and why they are left out."""
    count = 0
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all that it has seen
        count += 1
        # A size from a pax header may be anything; below zero it leads back to where we were.
        if member.size < 0 or archive.offset <= member.offset:
            raise RefusedError(f"has a member with a size of {member.size} bytes", UNPACK_HINT)
        rules.spend(tarfile.BLOCKSIZE + member.size)
        if count > MAX_MEMBERS:
            raise RefusedError(f"has more than {MAX_MEMBERS} members", "split it")
        if not member.isdir():
            yield member, _unsafe_name(member.name) or (None if member.isreg() else "no regular file")


def _zip_members(archive: zipfile.ZipFile, rules: Rules) -> Iterator[tuple[zipfile.ZipInfo, str | None]]:
    # Members may overlap, so that each is small and their sum is not.
    for count, member in enumerate(archive.infolist()):
        if count >= MAX_MEMBERS:
            raise RefusedError(f"has more than {MAX_MEMBERS} members", "split it")
        if member.is_dir() or (rules.reader == 1 and rules.names.is_hidden(member.filename, 1)):
            continue
        kind = stat.S_IFMT(member.external_attr >> 16)
        reason = _unsafe_name(member.filename)
        if kind not in (0, stat.S_IFREG):
            reason = "no regular file"
        elif member.flag_bits & 1:
            reason = "encrypted"
        elif rules.reader == 1 and _exceeds_ratio(member.file_size, member.compress_size):
            reason = f"unpacks to more than {MAX_RATIO} times its size"
        elif reason is None:
            rules.spend(member.file_size)
        yield member, reason


def _open_tar(file: IO[bytes]) -> tarfile.TarFile:
    file.seek(0)
    return tarfile.open(fileobj=file, mode="r:*", tarinfo=BoundedInfo, encoding="utf-8")


def list_members(file: IO[bytes], rules: Rules, answer: Answer, stall_s: int) -> None:
    """Write every name, in the archive's order, and the labels of a dataset.json."""
    found: Iterator[tuple[str, int, str | None, Callable[[], IO[bytes] | None]]]
    if zipfile.is_zipfile(file):
        answer.put(KIND, b"zip")
        answer.grant(stall_s)
        packed = zipfile.ZipFile(file)
        found = (
            (rules.zip_name(one), one.file_size, why, partial(packed.open, one))
            for one, why in _zip_members(packed, rules)
        )
    else:
        try:
            archive = _open_tar(file)
        except tarfile.TarError:
            answer.put(KIND)
            return
        answer.put(KIND, b"tar")
        found = (
            (one.name, one.size, why, partial(archive.extractfile, one))
            for one, why in _tar_members(archive, rules)
        )
    batch: list[tuple[str, str | None]] = []
    for name, size, why, content in found:
        batch.append((name[:200] if why else name, why))
        if why is None and size <= MAX_LABELS_BYTES and rules.may_hold_labels(name):
            opened = content()
            text = opened.read(MAX_LABELS_BYTES + 1).decode(errors="replace") if opened else ""
            answer.put(LABELS, json.dumps([name, text]).encode())
        if len(batch) == BATCH:
            answer.put(MEMBERS, json.dumps(batch).encode())
            answer.progress()
            batch.clear()
    answer.put(MEMBERS, json.dumps(batch).encode())


def unpack(file: IO[bytes], rules: Rules, answer: Answer) -> None:
    """Write the images of a tar in its own order: it cannot be read in another."""
    archive = _open_tar(file)
    for member, why in _tar_members(archive, rules):
        name = rules.names.canonical(member.name, rules.reader)
        if why or not rules.names.is_image_name(name, rules.reader) or member.size > MAX_FILE_BYTES:
            continue
        content = archive.extractfile(member)
        if content is not None:
            answer.put(BEGIN, json.dumps(member.name).encode())
            _send_content(content, answer)
            answer.put(END)


def serve(file: IO[bytes], rules: Rules, answer: Answer) -> None:
    """Write the members of a zip that are requested, until stdin ends."""
    archive = zipfile.ZipFile(file)
    members = {rules.zip_name(one): one for one in archive.infolist()}
    answer.put(DONE)
    answer.flush()
    requests = sys.stdin.buffer
    while header := requests.read(REQUEST.size):
        name = json.loads(requests.read(*REQUEST.unpack(header)))
        answer.renew(MEMBER_SECONDS)
        try:
            with archive.open(members[name]) as content:
                _send_content(content, answer)
            answer.put(END)
        except (OSError, MemoryError, *BROKEN) as exc:
            answer.put(UNREADABLE, (str(exc) or type(exc).__name__)[:200].encode(errors="replace"))
        answer.flush()


def _send_content(content: IO[bytes], answer: Answer) -> None:
    left = MAX_FILE_BYTES + 1  # one more, so that the reader sees that there is more
    while left > 0 and (data := content.read(min(CHUNK, left))):
        left -= len(data)
        answer.put(DATA, data)


def _load(path: Path) -> Any:
    """Load a module by its path: this process finds nothing of ganq by name."""
    spec = importlib.util.spec_from_file_location(f"ganq_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_libraries() -> None:
    """Import what the archive modules import when a file needs it: afterwards no file can be opened."""
    import bz2  # noqa: F401
    import errno  # noqa: F401
    import gzip  # noqa: F401
    import warnings  # noqa: F401

    for encoding in ("cp437", "ascii", "latin-1", "utf-8"):  # of names
        "".encode(encoding)


def main() -> None:
    """Answer one command about the archive that is open."""
    command = sys.argv[1]
    number, reader, most_bytes = map(int, sys.argv[2:5])
    sandbox = _load(Path(__file__).parents[1] / "sandbox.py")
    names = _load(Path(__file__).with_name("names.py"))
    _import_libraries()
    raw = CountingFile(number, "rb")
    size = os.fstat(number).st_size
    file = io.BufferedReader(raw)
    rules = Rules(size, reader, most_bytes, names)
    memory, stall_s, in_all_s = limits(size, most_bytes, is_zip=command == "serve")
    # Each member of a zip has its own seconds, and there may be millions.
    answer = Answer(sandbox, stall_s, None if command == "serve" else in_all_s)
    sandbox.confine(memory_bytes=memory, cpu_seconds=None)
    answer.grant(stall_s)
    raw.answer = answer
    try:
        if command == "list":
            list_members(file, rules, answer, limits(size, most_bytes, is_zip=True)[1])
        elif command == "unpack":
            unpack(file, rules, answer)
        else:
            serve(file, rules, answer)
        answer.put(DONE)
    except RefusedError as exc:
        answer.put(REFUSED, json.dumps([exc.said, exc.hint]).encode())
    except MemoryError:
        said = f"needs more than {memory >> 20} MiB of memory to be read, the limit for one of its size"
        answer.put(REFUSED, json.dumps([said, UNPACK_HINT]).encode())
    except (OSError, *BROKEN) as exc:
        said = f"is a broken archive: {str(exc)[:200]}"
        answer.put(REFUSED, json.dumps([said, "pack or download it again"]).encode())
    answer.flush()


if __name__ == "__main__":
    main()
