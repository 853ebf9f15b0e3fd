"""State that all pages share: the job table, the volume, caches, permissions."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from jobs.errors import VolumeError
from jobs.states import JobState
from storage.db.engine import Database
from storage.db.queries import Queries
from storage.db.rows import WorkerRow
from storage.reachable import HINT, is_reachable, timeout_message
from storage.settings import Settings
from storage.volume.layout import Volume

T = TypeVar("T")
VOLUME_ANSWER_S = 3.0
VOLUME_ASK_EVERY_S = 5.0
SLOW_S = 2.0
HANGS_S = 12.0
"""Longer than the slowest read on a volume that works: the scores of a million images."""
MAX_HANGING = 64
LOCK_S = 1.0
RECENT_S = 0.5
CLOCK_S = 10.0
"""Seconds after which the clock of the database is read again."""


class Lru(Generic[T]):
    """Thread-safe cache of values with a cost each; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> T | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: T, cost: int) -> T:
        with self._lock:
            if (old := self._kept.pop(key, None)) is not None:
                self.used -= old[1]
            self._kept[key] = (value, cost)
            self.used += cost
            while self.used > self.limit and len(self._kept) > 1:
                _, (_, freed) = self._kept.popitem(last=False)
                self.used -= freed
        return value

    def get_or_make(self, key: Hashable, make: Callable[[], T], cost: Callable[[T], int]) -> T:
        found = self.get(key)
        return found if found is not None else self.put(key, made := make(), cost(made))


class PerRevision:
    """
    Cache of results that are valid until the next commit.

    With `patient`, a slow result is computed again only after twenty times as long as it took, so that a
    busy table of a million jobs is not counted twice a second.
    """

    PATIENCE = 20.0

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[str, float, Any]] = OrderedDict()
        self._locks: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, revision: str, make: Callable[[], T], *, patient: bool = False) -> T:
        with self._lock:
            own = self._locks.setdefault(key, threading.Lock())
        # Of fifty browsers that request the same page at once, one queries the table. After LOCK_S the
        # others do not wait for it any longer.
        locked = own.acquire(timeout=LOCK_S)
        try:
            now = time.monotonic()
            with self._lock:
                kept = self._kept.get(key)
            if kept is not None and (kept[0] == revision or (patient and now < kept[1])):
                found: T = kept[2]
                return found
            made = make()
            took = time.monotonic() - now
            with self._lock:
                self._kept[key] = (revision, now + self.PATIENCE * took, made)
                self._kept.move_to_end(key)
                while len(self._kept) > 500:
                    dropped, _ = self._kept.popitem(last=False)
                    self._locks.pop(dropped, None)
            return made
        finally:
            if locked:
                own.release()


class RecentQueries(Queries):
    """Queries of a change: the workers are at most RECENT_S old, and the time is not read for each."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._workers: tuple[float, list[WorkerRow]] = (float("-inf"), [])
        self._clock: tuple[float, float] = (float("-inf"), 0.0)

    def workers(self) -> list[WorkerRow]:
        read_at, known = self._workers
        if time.monotonic() - read_at > RECENT_S:
            self._workers = time.monotonic(), (known := super().workers())
        return known

    def now(self) -> float:
        read_at, then = self._clock
        if time.monotonic() - read_at > CLOCK_S:
            then = super().now()
            read_at = time.monotonic()
            self._clock = read_at, then
        return then + time.monotonic() - read_at


@dataclass
class Site:
    """Job table, volume and caches of one server."""

    settings: Settings
    database: Database
    allow_changes: bool = False
    revision: Callable[[], str] = field(default=lambda: "0")
    queries: Queries = field(init=False)
    recent: Queries = field(init=False)
    volume: Volume = field(init=False)
    answers: PerRevision = field(default_factory=PerRevision)
    image_cache: Lru[bytes] = field(default_factory=lambda: Lru[bytes](96 << 20))
    """Encoded sheets and thumbnails."""
    api_answers: Lru[Any] = field(default_factory=lambda: Lru[Any](32 << 20))
    """Answers of the REST API with their revision."""
    indexes: Lru[Any] = field(default_factory=lambda: Lru[Any](64 << 20))
    """Read manifests and metrics."""

    def __post_init__(self) -> None:
        self.queries = Queries(self.database)
        self.recent = RecentQueries(self.database)
        self.volume = Volume(self.settings.volume)
        self._asked = float("-inf")
        self._trouble: str | None = None
        self._asking = threading.Lock()
        self._counting = threading.Lock()
        self._hanging = 0

    def volume_trouble(self, asked_before_s: float = VOLUME_ASK_EVERY_S) -> str | None:
        """Return why files cannot be shown, or None. The volume is probed every few seconds."""
        with self._asking:
            if time.monotonic() - self._asked >= asked_before_s:
                root = self.settings.volume
                if not is_reachable(root, VOLUME_ANSWER_S):
                    self._trouble = timeout_message(root, VOLUME_ANSWER_S)
                elif not Path(root).is_dir():
                    self._trouble = f"there is no volume at {root}"
                elif not self.volume.jobs.is_dir() and self.queries.any_begun():
                    self._trouble = f"there are no jobs at {root}, but the job table has jobs with files"
                else:
                    self._trouble = None
                self._asked = time.monotonic()
            return self._trouble

    def on_volume(self, work: Callable[[], T]) -> T:
        """
        Run `work`, which reads the volume, on a separate thread, because the volume may hang.

        If it does not return in time, it is run once more; volume_trouble() then reports the volume, and
        `work` renders without it.

        Raises:
            VolumeError: it hangs again, or too many threads hang.
        """
        for _ in range(2):
            if self._hanging < MAX_HANGING:
                found: Future[T] = Future()
                threading.Thread(target=self._run, args=(work, found), daemon=True).start()
                for patience_s in (SLOW_S, HANGS_S):
                    try:
                        return found.result(timeout=patience_s)
                    except TimeoutError:
                        if found.done():  # the work's own
                            raise
                    if self.volume_trouble(asked_before_s=SLOW_S) is not None:
                        break
        raise VolumeError(timeout_message(self.settings.volume, HANGS_S), hint=HINT)

    def _run(self, work: Callable[[], T], found: "Future[T]") -> None:
        with self._counting:
            self._hanging += 1
        try:
            found.set_result(work())
        except BaseException as exc:
            found.set_exception(exc)
        finally:
            with self._counting:
                self._hanging -= 1

    def newest_revision(self) -> str:
        """
        Return the revision as of now on SQLite, where it costs some microseconds.

        On Postgres it is up to half a second old, and new after each change through this server.
        """
        read = self.database.data_version
        return self.revision() if read is None else f"{self.revision()} {read()}"

    def held(self) -> dict[JobState, int]:
        """Return how many jobs are held or paused, by state."""
        return self.answers.get("held", self.revision(), self.queries.held, patient=True)

    def counts(self) -> dict[str, int]:
        return self.answers.get("counts", self.revision(), self.queries.counts, patient=True)
