"""The faults of the random mode: each is drawn from the seed, injected, and repaired later."""

import heapq
import itertools
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

import psutil
from chaos.invariants import look
from chaos.stage import INTERVALS, LEASE_S, Stage

from jobs.errors import DatabaseUnavailableError

WEIGHTS = {
    "kill_supervisor": 2.0,
    "kill_runner": 2.0,
    "kill_pool": 1.0,
    "kill_launcher": 1.0,
    "kill_tree": 2.0,
    "pause_supervisor": 1.0,
    "zombie_supervisor": 3.0,
    "zombie_tree": 2.0,
    "pause_runner": 1.0,
    "drain": 2.0,
    "kill_redis": 1.0,
    "stop_redis": 1.0,
    "crash_postgres": 1.0,
    "halt_postgres": 1.0,
    "lock_sqlite": 1.0,
    "hang_volume": 1.0,
}

WHILE_MERGING = {"zombie_merge": 15.0, "leave_merge": 15.0}
"""While some worker merges shards, which is seldom and short."""


class Faults:
    """
    Injects one fault at a time; its repair is due later, while other faults are injected.

    Repairs run in a thread of their own: the main thread may wait for a lock that a stopped supervisor holds.
    """

    def __init__(self, stage: Stage, rng: random.Random) -> None:
        self.stage = stage
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.killed: dict[int, float] = {}
        """Process id of each supervisor that was killed → when, in seconds since 1970."""
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._busy: set[str] = set()
        """Workers and servers that a fault is at: one at a time."""
        self._lock = threading.RLock()
        self.merging: list[str] = []
        self._ending, self._mended = threading.Event(), threading.Event()
        threading.Thread(target=self._mend, name="mender", daemon=True).start()

    def act(self) -> str | None:
        """Inject one fault; return what was done, or None if it could not be applied."""
        # Without the lock: the answer may have to wait until this object repairs something.
        self.merging = self._workers_that_merge()
        weights = WEIGHTS | (WHILE_MERGING if self.merging else {})
        name = self.rng.choices(list(weights), list(weights.values()))[0]
        with self._lock:
            done: str | None = getattr(self, f"_{name}")()
        return done

    def _workers_that_merge(self) -> list[str]:
        """Return the workers that merge the shards of a generation."""
        if not self.stage.database_up:
            return []
        with suppress(DatabaseUnavailableError):
            return [
                row.worker
                for row in look(self.stage.database).jobs.values()
                if row.state == "running" and (row.progress or {}).get("phase") == "merging shards"
            ]
        return []

    def _mend(self) -> None:
        while True:
            ending = self._ending.wait(0.05)
            with self._lock:
                while self._due and (ending or self._due[0][0] <= time.monotonic()):
                    heapq.heappop(self._due)[2]()
            if ending:
                break
        self._mended.set()
        # A server that this thread has started gets a signal from the kernel when the thread ends.
        threading.Event().wait()

    def tend(self) -> None:
        """Restart the workers that have exited."""
        with self._lock:
            for name in self.stage.names:
                if name not in self._busy and not self.stage.running(name):
                    self.stage.start(name)

    def heal(self) -> None:
        """Repair everything now, and inject nothing more."""
        self._ending.set()
        self._mended.wait()
        self._busy.clear()
        for one in self.stage.alive():
            with suppress(psutil.NoSuchProcess):
                one.resume()
        self.tend()

    def _later(self, seconds: float, busy: str, mend: Callable[[], None]) -> None:
        self._busy.add(busy)

        def work() -> None:
            mend()
            self._busy.discard(busy)

        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), work))

    def _worker(self, of: Sequence[str] | None = None) -> str | None:
        """Return a running worker, of these, without a fault."""
        names = [one for one in self.stage.names if of is None or one in of]
        free = [one for one in names if one not in self._busy and self.stage.running(one)]
        return self.rng.choice(free) if free else None

    # --- kills ------------------------------------------------------------------------------

    def _kill(self, what: str) -> str | None:
        name = self._worker()
        process = self.stage.process(name, what) if name else None
        if name is None or process is None:
            return None
        if what in ("supervisor", "launcher"):
            # Without its launcher a supervisor drains and exits by itself: it is not killed.
            self._note_death(name, what)
        with suppress(psutil.NoSuchProcess):
            process.kill()
        self.counts["kills"] += 1
        if what == "launcher":
            self._later(self.rng.uniform(0.5, 3.0), name, lambda: None)
        return f"kill the {what} of {name}"

    def _note_death(self, name: str, what: str) -> None:
        supervisor = self.stage.process(name, "supervisor")
        if what != "launcher" and supervisor is not None:
            self.killed[supervisor.pid] = time.time()

    def _kill_supervisor(self) -> str | None:
        return self._kill("supervisor")

    def _kill_runner(self) -> str | None:
        return self._kill("runner")

    def _kill_pool(self) -> str | None:
        return self._kill("pool")

    def _kill_launcher(self) -> str | None:
        return self._kill("launcher")

    def _kill_tree(self) -> str | None:
        name = self._worker()
        if name is None:
            return None
        self._note_death(name, "tree")
        for one in self.stage.family(name):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        self.counts["kills"] += 1
        self._later(self.rng.uniform(0.5, 4.0), name, lambda: None)
        return f"kill all of {name}"

    # --- stops ------------------------------------------------------------------------------

    def _stop(self, parts: tuple[str, ...], seconds: float, *, of: Sequence[str] | None = None) -> str | None:
        name = self._worker(of)
        if name is None:
            return None
        found = [self.stage.process(name, one) for one in parts]
        chosen = [one for one in found if one is not None]
        for one in chosen:
            with suppress(psutil.NoSuchProcess):
                one.suspend()

        def wake() -> None:
            for one in reversed(chosen):
                with suppress(psutil.NoSuchProcess):
                    one.resume()

        self.counts["stops"] += 1
        self._later(seconds, name, wake)
        return f"stop {' and '.join(parts)} of {name} for {seconds:.1f} s"

    def _pause_supervisor(self) -> str | None:
        return self._stop(("supervisor",), self.rng.uniform(0.2, 0.6 * LEASE_S))

    def _zombie_supervisor(self) -> str | None:
        """Stop a supervisor; its runner continues and has messages for it when it wakes."""
        return self._stop(("supervisor",), self.rng.uniform(1.2, 2.5) * LEASE_S)

    def _zombie_merge(self) -> str | None:
        """Stop a supervisor while its runner and that of the next worker merge the same shards."""
        return self._stop(("supervisor",), self.rng.uniform(1.2, 2.5) * LEASE_S, of=self.merging)

    def _zombie_tree(self) -> str | None:
        return self._stop(("launcher", "supervisor", "runner"), self.rng.uniform(1.2, 2.5) * LEASE_S)

    def _pause_runner(self) -> str | None:
        return self._stop(("runner",), self.rng.uniform(0.5, 2 * LEASE_S))

    # --- drains -----------------------------------------------------------------------------

    def _drain(self) -> str | None:
        name = self._worker()
        if name is None:
            return None
        worker = self.stage.workers[name]
        worker.send_signal(signal.SIGTERM)
        self.counts["drains"] += 1
        self._later(self.rng.uniform(1.0, 5.0), name, lambda: None)
        return f"drain {name}"

    def _leave_merge(self) -> str | None:
        """Terminate a worker that merges shards while the database is unavailable beyond its drain time."""
        name = self._worker(self.merging)
        if name is None or "database" in self._busy:
            return None
        seconds = INTERVALS["drain_seconds"] + self.rng.uniform(1.0, 3.0)
        self.stage.hide_database()
        self._later(seconds, "database", self.stage.show_database)
        self.stage.workers[name].send_signal(signal.SIGTERM)
        self._later(seconds + 1.0, name, lambda: None)
        self.counts["drains"] += 1
        return f"drain {name} while it merges shards, without a database for {seconds:.1f} s"

    # --- servers ----------------------------------------------------------------------------

    def _kill_redis(self) -> str | None:
        if "redis" in self._busy:
            return None
        self.stage.kill_redis()
        self.counts["kills"] += 1
        seconds = self.rng.uniform(0.1, 4.0)
        self._later(seconds, "redis", self.stage.start_redis)
        self.counts["restarts"] += 1
        return f"kill Redis; empty after {seconds:.1f} s"

    def _stop_redis(self) -> str | None:
        if "redis" in self._busy:
            return None
        self.stage.stop_redis()
        self.counts["stops"] += 1
        seconds = self.rng.uniform(0.5, 6.0)
        self._later(seconds, "redis", self.stage.continue_redis)
        return f"stop Redis for {seconds:.1f} s"

    def _crash_postgres(self) -> str | None:
        if self.stage.postgres is None or "database" in self._busy:
            return None
        self.stage.crash_postgres()
        self.stage.start_postgres()
        self.counts["restarts"] += 1
        return "restart Postgres at once (immediate)"

    def _halt_postgres(self) -> str | None:
        if self.stage.postgres is None or "database" in self._busy:
            return None
        self.stage.halt_postgres()
        self.counts["restarts"] += 1
        seconds = self.rng.uniform(0.5, 4.0)
        self._later(seconds, "database", self.stage.start_postgres)
        return f"stop Postgres for {seconds:.1f} s"

    def _lock_sqlite(self) -> str | None:
        if self.stage.postgres is not None or "database" in self._busy:
            return None
        seconds = self.rng.uniform(0.5, 3.0)
        self.stage.lock_sqlite(seconds)
        self.counts["stops"] += 1
        self._later(seconds, "database", lambda: None)
        return f"lock SQLite for {seconds:.1f} s"

    # --- the volume -------------------------------------------------------------------------

    def _hang_volume(self) -> str | None:
        """Hang the volume of one worker; the others continue."""
        if self.stage.mount is None or "volume" in self._busy:
            return None
        self.stage.mount.hang()
        self.counts["stops"] += 1
        seconds = self.rng.uniform(0.5, 4 * LEASE_S)
        self._later(seconds, "volume", self.stage.mount.go_on)
        return f"hang the volume of {self.stage.names[0]} for {seconds:.1f} s"
