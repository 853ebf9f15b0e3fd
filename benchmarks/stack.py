"""Fixtures of the benchmarks: a data set, warm peer processes, and `ganq up`."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.in_process import loop_seconds
from jobs.kinds import SPEC_VERSION, kind_named
from jobs.specs import Spec
from jobs.states import JobState
from storage.db.queries import Queries
from storage.db.rows import Job
from storage.db.schema import open_database, upgrade
from storage.db.store import JobStore
from storage.settings import Settings
from storage.volume.layout import Volume
from worker.celery_bridge.notify import try_notify
from worker.host.embedded_redis import worker_command
from worker.host.process import bound_to_this

FACES = 1280
STYLE = "adventurer"
READY_S = 90.0


def faces(work: Path, count: int = FACES) -> Path:
    """Make an ImageFolder tree of `count` demo faces, 96×96, once for all benchmarks of a run."""
    from storage.datasets.synthetic import make_faces

    tree = work / f"faces-{count}"
    if not (tree / "all").is_dir():
        make_faces(tree / "all", style=STYLE, count=count, size=96)
    return tree


class Child:
    """A warm process that runs commands, one JSON line each."""

    def __init__(
        self, module: str, *arguments: str, env: Mapping[str, str] | None = None, cores: Collection[int] = ()
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(**(env or {})),
            preexec_fn=partial(os.sched_setaffinity, 0, cores) if cores else None,
        )
        self._answer()

    def __call__(self, do: str, **order: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with code {self.process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def clean_environment(**more: str) -> dict[str, str]:
    """Return the environment without the caller's GANQ_* settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GANQ_")} | more


class Queue:
    """
    `ganq up` with one warm CPU worker in a separate home, and a client.

    Args:
        workers: options of `ganq up`; one worker on all cores by default.
        cores: CPU affinity of all processes; that of this process by default.
        env: additional environment, e.g. GANQ_DATABASE_URL; SQLite and the embedded Redis by default.
    """

    def __init__(
        self,
        home: Path,
        *,
        workers: tuple[str, ...] = ("--gpus", "none"),
        cores: Collection[int] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.workers, self.cores = workers, cores or os.sched_getaffinity(0)
        self.env = clean_environment(GANQ_HOME=str(home), **(env or {}))
        self.settings = Settings.load(self.env)
        home.mkdir(parents=True, exist_ok=True)
        self.log = open(home / "up.log", "ab")  # noqa: SIM115 - it is written to later

    def __enter__(self) -> Self:
        self._make_tables()
        self.up = subprocess.Popen(
            # It ends with this process, however that ends.
            bound_to_this(signal.SIGTERM, worker_command("up", *self.workers)),
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        os.sched_setaffinity(self.up.pid, self.cores)  # before it starts child processes, which inherit it
        self.database = open_database(self.settings)
        self.store, self.queries = JobStore(self.database), Queries(self.database)
        deadline = time.monotonic() + READY_S
        wanted = int(self.workers[1]) if self.workers[0] == "--cpu-workers" else 1
        # It may be busy at once, if an earlier run was stopped during a job.
        while sum(one.state in ("idle", "busy") for one in self.queries.workers()) < wanted:
            if self.up.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ganq up did not start: {Path(self.log.name).read_text()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.dispose()
        self.up.terminate()
        self.up.wait(timeout=120)
        self.log.close()

    def _make_tables(self) -> None:
        if self.settings.is_sqlite:
            open_database(self.settings, create=True).dispose()
            return
        from storage.db.engine import Database

        database = Database(self.settings)
        upgrade(database)
        database.dispose()

    def submit(self, spec: Spec) -> Job:
        """Submit a job and notify workers, as `ganq submit` does."""
        job = self.store.submit(
            kind=spec.kind,
            spec=spec.to_json(),
            spec_version=SPEC_VERSION,
            submit_key=secrets.token_hex(16),
            user="benchmark",
            priority=kind_named(spec.kind).priority,
            will_notify=True,
            shards=[(shard.to_json(), shard.image_count) for shard in spec.split()],
        )
        for one in (self.queries.shards(job.id) if job.blockers else []) or [job]:
            if not try_notify(self.settings, one.id, one.queue, self.database.installation):
                self.store.not_notified(one.id)
        return job

    def wait(self, job: Job, every_s: float = 0.02) -> Job:
        """
        Wait for the end of a job as `ganq wait` does.

        Polling uses CPU time of the job, so the interval grows: a tenth of the elapsed time, at most a
        quarter of a second.

        Raises:
            RuntimeError: it did not succeed.
        """
        began = time.monotonic()
        while not (job := self.queries.get(job.id)).state.terminal:
            time.sleep(max(every_s, min((time.monotonic() - began) / 10, 0.25)))
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"job {job.id} {job.state}: {job.error_message}")
        return job

    def train(self, spec: Spec, begun: Callable[[Job], None] = lambda job: None) -> dict[str, float]:
        """Run a training from submit to success; return in_process.train()'s values and the longest stall."""
        begun(job := self.submit(spec))
        job = self.wait(job, every_s=0.05)
        lines = (self.attempt(job) / "metrics.jsonl").read_text().splitlines()
        assert job.result is not None
        return {
            "images": job.result["images"],
            "loop_s": loop_seconds([json.loads(line) for line in lines]),
            "whole_s": _whole_s(job),
            "stall_s": job.result["longest_stall_s"],
        }

    def generate(self, spec: Spec, begun: Callable[[Job], None] = lambda job: None) -> dict[str, float]:
        """Run a generation from submit to success."""
        return self.generate_job(spec, begun)[0]

    def generate_job(
        self, spec: Spec, begun: Callable[[Job], None] = lambda job: None
    ) -> tuple[dict[str, float], Job]:
        """Run a generation, and return its job, too."""
        begun(job := self.submit(spec))
        job = self.wait(job, every_s=0.01)
        assert job.result is not None
        return {"images": job.result["image_count"], "whole_s": _whole_s(job)}, job

    def attempt(self, job: Job) -> Path:
        return Volume(self.settings.volume).attempt(job.id, job.attempt)

    def pointer(self, job: Job) -> dict[str, Any]:
        """Return the last checkpoint of a job, for benchmarks.in_process."""
        last = self.queries.checkpoints(job.id)[-1]
        return {"path": last.path, "manifest_sha256": last.manifest_sha256}


def _whole_s(job: Job) -> float:
    """Return the seconds from submit to success, by the database's clock."""
    assert job.finished_at is not None
    return job.finished_at - job.created_at


def with_rates(measured: Mapping[str, float]) -> dict[str, float]:
    """Add images per second, in total and, if it is known, of the loop."""
    rates = {
        name.replace("_s", "_rate"): measured["images"] / measured[name]
        for name in ("loop_s", "whole_s")
        if name in measured
    }
    return {**measured, **rates}


_aside: list[Path] = []


def quarantine(folder: Path) -> None:
    """
    Move a folder aside for the next round; clear() deletes it at the end.

    ext4 does not reuse an inode that was freed within the last minutes, and skips each of them for every
    new file: after 10,000 deletions a new file took 640 µs instead of 40.
    """
    if folder.exists():
        _aside.append(folder.rename(folder.with_name(f"{folder.name}.{len(_aside)}.old")))


def clear() -> None:
    """Delete the folders that were moved aside."""
    while _aside:
        shutil.rmtree(_aside.pop(), ignore_errors=True)
