"""
SQLite for the job table: how connections are set up, and how its WAL stays small.

A write transaction is BEGIN IMMEDIATE: a deferred one that reads first fails at once
with SQLITE_BUSY_SNAPSHOT, whatever the busy timeout says. synchronous=FULL because
NORMAL lost 50 of 50 acknowledged commits in a power cut.
"""

import logging
import os
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import QueuePool

from jobs.errors import DatabaseUnavailableError

log = logging.getLogger("ganq.sqlite")

WAL_RESET_FIXED = (3, 51, 3)
"""Before this version a WAL that is reset during a checkpoint may lose commits; see Wal."""
WAL_BYTES = 16_384_000
"""
From this size on a WAL is moved into the database: four times SQLite's own measure.

In a table of 100,000 a claim writes some fifteen pages, and whoever makes the WAL too long waits for
10 to 20 ms: by that measure one claim in 66, now one in 260.
"""
WAL_KEPT_BYTES = 20_480_000
"""
What is left of the file when the WAL begins anew, so that it seldom has to grow again.

A commit into a file that is there waits for its data alone, one that makes the file longer for the
file system's journal as well: 0.13 and 0.30 ms on ext4.
"""
CHECKPOINT_EVERY_S = 0.5
CHECK_EVERY_S = 0.05
CHECKPOINT_WAIT_S = 0.2


def sqlite_engine(path: Path) -> Engine:
    """
    An engine that makes the file if it is not there now, and never again later.

    A pooled connection must not cross a fork, which is why only processes that never
    fork keep one.
    """
    made = path.exists()

    def connect() -> sqlite3.Connection:
        nonlocal made
        if made and not path.exists():
            raise _vanished(path)
        raw = _open(path, mode="rw" if made else "rwc", timeout_s=30.0)
        made = True
        return raw

    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        creator=connect,
        poolclass=QueuePool,
        pool_size=4,
        max_overflow=8,
        # Behind another connection's commit a connection reads all its pages anew: stay with one.
        pool_use_lifo=True,
    )

    @event.listens_for(engine, "connect")
    def _pragmas(raw: Any, record: Any) -> None:
        raw.execute("PRAGMA busy_timeout = 30000")
        raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("PRAGMA synchronous = FULL")
        raw.execute("PRAGMA foreign_keys = ON")
        raw.execute(f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}")
        raw.execute(f"PRAGMA wal_autocheckpoint = {0 if has_wal_reset_bug() else WAL_BYTES // 4096}")
        record.info["file"] = _identity(path)

    @event.listens_for(engine, "checkout")
    def _same_file(raw: Any, record: Any, proxy: Any) -> None:
        # A file that was deleted lives on for those who have it open: what they write
        # there nobody else ever reads.
        now = _identity(path)
        if now is None:
            raise _vanished(path)
        if now != record.info["file"]:
            raise DisconnectionError("another file stands in its place")

    @event.listens_for(engine, "begin")
    def _begin(conn: Connection) -> None:
        reading = conn.get_execution_options().get("ganq_read", False)
        conn.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def has_wal_reset_bug() -> bool:
    """Whether this SQLite has the defect that Wal works around."""
    return sqlite3.sqlite_version_info < WAL_RESET_FIXED


class Wal:
    """
    Moves the WAL of an SQLite before 3.51.3 into the database, while nobody can commit.

    There, a checkpoint that begins when all is copied, and during which somebody else's
    commit starts the WAL anew, notes the new frames as copied too: they are lost
    (sqlite.org/wal.html, "the WAL-reset bug"). The commit that does that needs the
    write lock, so a checkpoint under the write lock cannot meet it, however many
    processes there are; one checkpointer alone can, at its second checkpoint in a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = Path(f"{path}-wal")
        self.next_at = 0.0

    def maintain(self) -> None:
        """After a commit: a checkpoint if the WAL has grown. Never fails, the commit stands."""
        if not has_wal_reset_bug() or time.monotonic() < self.next_at:
            return
        self.next_at = time.monotonic() + CHECK_EVERY_S
        if not self.exceeds_limit():
            return
        self.next_at = time.monotonic() + CHECKPOINT_EVERY_S
        try:
            self.checkpoint()
        except sqlite3.Error as exc:
            log.debug("the WAL stays for now: %s", exc)

    def checkpoint(self, *, wait_s: float = CHECKPOINT_WAIT_S) -> bool:
        """
        Copy what can be copied.

        Args:
            wait_s: how long to wait for a writer.

        Returns:
            Whether all of the WAL is in the database now; readers may keep some of it.

        Raises:
            sqlite3.OperationalError: a writer took longer than that, or the disk is full.
        """
        # Connections of its own: the pool's wait for half a minute, and here a caller
        # whose work is done waits behind it.
        with (
            closing(_open(self.path, mode="rw", timeout_s=wait_s)) as writer,
            closing(_open(self.path, mode="rw", timeout_s=wait_s)) as copier,
        ):
            for raw in (writer, copier):
                raw.execute("PRAGMA synchronous = FULL")
                raw.execute("PRAGMA wal_autocheckpoint = 0")
            writer.execute("BEGIN IMMEDIATE")
            try:
                _, frames, copied = copier.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            finally:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
        return bool(frames == copied)

    def exceeds_limit(self) -> bool:
        """
        Whether WAL_BYTES have been written since the WAL began anew; its file may be longer.

        Frames of now have the two salts of the header, those that an earlier round has left have others
        (sqlite.org/fileformat2.html, section 4.1).
        """
        try:
            with open(self.file, "rb", buffering=0) as wal:
                header = os.pread(wal.fileno(), 24, 0)
                if len(header) < 24:
                    return False
                frame_bytes = 24 + int.from_bytes(header[8:12], "big")
                last = 32 + WAL_BYTES // frame_bytes * frame_bytes
                return os.pread(wal.fileno(), 8, last + 8) == header[16:]
        except OSError:
            return False


def _open(path: Path, *, mode: str, timeout_s: float) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode={mode}",
        uri=True,
        timeout=timeout_s,
        check_same_thread=False,
        isolation_level=None,
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _vanished(path: Path) -> DatabaseUnavailableError:
    return DatabaseUnavailableError(
        f"the job table has been deleted or moved away ({path})",
        hint="put the file back, or restore a backup; to begin with no jobs, stop the workers first",
    )


class DataVersion:
    """SQLite's number that changes when another connection commits; see Queries.revision()."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def read(self) -> tuple[float, ...]:
        """
        Return numbers to compare with those of the last call.

        It keeps one connection without a transaction: the number is comparable within one alone.

        Raises:
            DatabaseUnavailableError: the file is gone or cannot be read.
        """
        with self._lock:
            found = _identity(self.path)
            if found is None:
                raise _vanished(self.path)
            try:
                if self._raw is None or found != self._file:
                    self._raw = _open(self.path, mode="rw", timeout_s=5.0)
                    self._file = found
                (number,) = self._raw.execute("PRAGMA data_version").fetchone()
            except sqlite3.Error as exc:
                self._raw = None
                raise DatabaseUnavailableError(f"{self.path} cannot be read: {exc}") from exc
            return (float(found[1]), float(number))
