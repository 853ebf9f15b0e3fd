"""
SQLite for the job table: connections, and WAL checkpoints.

Write transactions use BEGIN IMMEDIATE, because a deferred one that reads first fails with
SQLITE_BUSY_SNAPSHOT despite the busy timeout. synchronous=FULL, because NORMAL lost 50 of 50 acknowledged
commits in a power cut.
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
"""Before this version, a reset of the WAL during a checkpoint may lose commits; see Wal."""
WAL_BYTES = 16_384_000
"""
Size of the WAL from which a checkpoint runs: four times SQLite's default.

In a table of 100,000 jobs a claim writes about fifteen pages, and a checkpoint takes 10 to 20 ms: with the
default one claim in 66 waits for it, now one in 260.
"""
WAL_KEPT_BYTES = 20_480_000
"""
Size to which the file is truncated when the WAL is reset, so that it rarely has to grow.

A commit that makes the file longer also waits for the file system's journal: 0.30 instead of 0.13 ms on ext4.
"""
CHECKPOINT_EVERY_S = 0.5
CHECK_EVERY_S = 0.05
CHECKPOINT_WAIT_S = 0.2


def sqlite_engine(path: Path) -> Engine:
    """
    Return an engine that creates a missing file now, but not if it is deleted later.

    Pooled connections must not be used after a fork.
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
        # After another connection's commit a connection reads all its pages again: reuse the last one.
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
        # A deleted file still exists for processes that have it open, but no other process would read
        # what they write.
        now = _identity(path)
        if now is None:
            raise _vanished(path)
        if now != record.info["file"]:
            raise DisconnectionError("the file was replaced")

    @event.listens_for(engine, "begin")
    def _begin(conn: Connection) -> None:
        reading = conn.get_execution_options().get("ganq_read", False)
        conn.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


def has_wal_reset_bug() -> bool:
    """Return whether this SQLite has the bug that Wal works around."""
    return sqlite3.sqlite_version_info < WAL_RESET_FIXED


class Wal:
    """
    Runs the checkpoints of SQLite before 3.51.3 under the write lock.

    In those versions, a checkpoint that starts when all is copied, and during which a commit resets the
    WAL, marks the new frames as copied, and they are lost (sqlite.org/wal.html, "the WAL-reset bug"). That
    commit needs the write lock, so that it cannot run during a checkpoint that holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = Path(f"{path}-wal")
        self.next_at = 0.0

    def maintain(self) -> None:
        """Run a checkpoint after a commit if the WAL has grown; ignore its errors."""
        if not has_wal_reset_bug() or time.monotonic() < self.next_at:
            return
        self.next_at = time.monotonic() + CHECK_EVERY_S
        if not self.exceeds_limit():
            return
        self.next_at = time.monotonic() + CHECKPOINT_EVERY_S
        try:
            self.checkpoint()
        except sqlite3.Error as exc:
            log.debug("WAL checkpoint postponed: %s", exc)

    def checkpoint(self, *, wait_s: float = CHECKPOINT_WAIT_S) -> bool:
        """
        Run a checkpoint.

        Args:
            wait_s: time to wait for a writer.

        Returns:
            Whether all of the WAL is in the database now; readers may prevent that.

        Raises:
            sqlite3.OperationalError: a writer took longer, or the disk is full.
        """
        # Separate connections with a short timeout, because a caller whose commit is done waits for this.
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
        Return whether WAL_BYTES have been written since the last reset; the file may be longer.

        Current frames have the two salts of the header, older frames have others
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
        hint="put the file back, or restore a backup; to start without jobs, stop the workers first",
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
