"""
Run storage/datasets/archive_process.py, which reads zips and tars of unknown origin.

A process that exceeds its limits of time or memory ends, and the archive is refused with the limit. A process
that writes nothing is killed.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

from jobs.errors import DatasetError, StorageError
from storage.datasets import archive_process
from storage.datasets.archive_process import FRAME, UNPACK_HINT

WALL_SECONDS = 120.0
"""Without output; a process that reads writes a frame each second."""
KILL_SECONDS = 5.0
"""A killed process that waits for a disk does not end; it is not waited for any longer."""
PIPE_BYTES = 1 << 16
MAX_FRAME_BYTES = 64 << 20
"""A batch of the longest names, or a dataset.json."""


class MemberError(Exception):
    """A member that cannot be read; the message is the reason."""


class ArchiveProcess:
    """
    One child that reads one archive.

    Args:
        source: a plain file.
        command: list, unpack or serve: see storage/datasets/archive_process.py.
        reader: version of the rules for names.
        most_bytes: that the archive may unpack to.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, source: Path, command: str, *, reader: int, most_bytes: int) -> None:
        self.source, self.command, self.most_bytes = source, command, most_bytes
        file = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.size = os.fstat(file).st_size
            # By its path, and -P: the child must import nothing of ours.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(archive_process.__file__)), command]
                + [str(value) for value in (file, reader, most_bytes)],
                cwd="/",
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(file,),
            )
        finally:
            os.close(file)
        assert self.process.stdout is not None
        self._answers: IO[bytes] = self.process.stdout
        os.set_blocking(self._answers.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._answers, selectors.EVENT_READ)
        self._buffer = bytearray()

    def frames(self) -> Iterator[tuple[bytes, bytes]]:
        """
        Yield the frames of the child, up to the end of its answer.

        Raises:
            DatasetError: the archive is refused, or the child died over it.
            StorageError: the child was killed, or waits for a disk.
        """
        while True:
            kind, length = FRAME.unpack(self._exactly(FRAME.size))
            if length > MAX_FRAME_BYTES:
                self._fail("the process that read it answers what it may not")
            data = self._exactly(length)
            if kind == archive_process.REFUSED:
                said, hint = json.loads(data)
                raise DatasetError(f"{self.source} {said}", hint=hint)
            if kind == archive_process.DONE:
                return
            if kind != archive_process.ALIVE:
                yield kind, data

    def ask(self, name: str) -> bytes:
        """
        Return the bytes of one member of a zip.

        Raises:
            MemberError: it cannot be read; the next may.
            DatasetError, StorageError: as frames().
        """
        request = json.dumps(name).encode()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # why, is found out below
            self.process.stdin.write(archive_process.REQUEST.pack(len(request)) + request)
            self.process.stdin.flush()
        found = bytearray()
        for kind, data in self.frames():
            if kind == archive_process.END:
                break
            if kind == archive_process.UNREADABLE:
                raise MemberError(f"broken in the archive: {data.decode(errors='replace')}")
            found += data
            if len(found) > archive_process.MAX_FILE_BYTES + 1:
                self._fail("the process that read it answers what it may not")
        return bytes(found)

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            if not self._selector.select(WALL_SECONDS):
                raise StorageError(
                    f"{self.source} was not read on for {WALL_SECONDS:.0f} s", hint="is its disk reachable?"
                )
            part = os.read(self._answers.fileno(), PIPE_BYTES)
            if not part:
                self._died()
            self._buffer += part
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    def _died(self) -> NoReturn:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)
        code = self.process.returncode
        memory, stall_s, in_all_s = archive_process.limits(
            self.size, self.most_bytes, is_zip=self.command == "serve"
        )
        if code == -signal.SIGXCPU:
            self._fail(
                f"took more CPU time than the limits for one of its size: {stall_s} s without reading on,"
                f" {in_all_s} s in all"
            )
        if code == -signal.SIGKILL:
            raise StorageError(
                f"{self.source}: the process that read it was killed", hint="is the machine short of memory?"
            )
        self._fail(f"crashed the process that read it, whose limit of memory is {memory >> 20} MiB")

    def _fail(self, said: str) -> NoReturn:
        raise DatasetError(f"{self.source} {said}", hint=UNPACK_HINT)

    def close(self) -> None:
        self.process.kill()
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)

    def __enter__(self) -> "ArchiveProcess":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def list_archive(source: Path, *, reader: int, most_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """
    Yield the kind of an archive, then its members: see archive_process.list_members().

    Raises:
        OSError, DatasetError, StorageError: it cannot be opened; as ArchiveProcess.frames().
    """
    with ArchiveProcess(source, "list", reader=reader, most_bytes=most_bytes) as child:
        yield from child.frames()
