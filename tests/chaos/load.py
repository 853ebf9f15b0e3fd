"""The load of the random mode: small jobs of every kind, and what users do with them."""

import random
import secrets
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.invariants import ENDS
from chaos.stage import Stage
from messages import notification

from jobs.errors import DatabaseUnavailableError, JobError, SpecError
from jobs.kinds import SPEC_VERSION, kind_named
from jobs.specs import GenerateSpec, Spec, TrainSpec
from storage.db.queries import Queries
from storage.db.rows import Job
from storage.db.store import JobStore

IN_FLIGHT = 9
"""Jobs that wait or run at once, at most: what is left must end soon when nobody disturbs any more."""

SMALL: dict[str, Any] = {"size": 16, "ngf": 4, "ndf": 4, "nz": 8, "batch": 8, "device": "cpu"}
TRAININGS: list[dict[str, Any]] = [
    {**SMALL, "recipe": "dcgan", "epochs": 4, "save_every": 1},
    {**SMALL, "recipe": "sngan", "epochs": 3, "save_every": 1, "checkpoint_seconds": 0.2},
    {**SMALL, "recipe": "sngan", "size": 24, "epochs": 3, "save_every": 2, "keep_last": 1},
]
PICTURES: list[dict[str, Any]] = [
    {"count": 40},
    {"keep": 5, "of": 30},
    {"seeds": ((3, 20), (50, 60))},
    {"count": 30, "shard_size": 8},
]
GENERATE: dict[str, Any] = {"micro_batch": 4, "grid": 16, "device": "cpu", "checkpoint": "last"}


class Load:
    """Submits, cancels, holds, retries and notifies; remembers what was accepted."""

    def __init__(self, stage: Stage, faces: Path, rng: random.Random) -> None:
        self.stage = stage
        self.faces = faces
        self.rng = rng
        self.store = JobStore(stage.database)
        self.queries = Queries(stage.database)
        self.accepted: list[int] = []
        self.counts: Counter[str] = Counter()
        self.notified = 0

    # --- submit ---------------------------------------------------------------------------

    def submit(
        self, spec: Spec, *, after: Sequence[int] = (), retry_of: int | None = None, **how: Any
    ) -> Job:
        """Submit as `ganq submit` does, but in this process."""
        kind = kind_named(spec.kind)
        job = self.store.submit(
            kind=spec.kind,
            spec=spec.to_json(),
            spec_version=SPEC_VERSION,
            submit_key=secrets.token_hex(16),
            user=self.rng.choice(("ann", "bob")),
            priority=kind.priority,
            preemptible=kind.preemptible,
            after=after,
            retry_of=retry_of,
            shards=[(shard.to_json(), shard.image_count) for shard in spec.split()],
            max_workers=getattr(spec, "max_workers", 0),
            **how,
        )
        self.accepted.append(job.id)
        self.counts[spec.kind] += 1
        self.notify(job.id)
        return job

    def train(self, which: int) -> Job:
        return self.submit(TrainSpec.create(data=str(self.faces), **TRAININGS[which]))

    def generate(self, which: int, source: int, *, after: bool = False) -> Job:
        spec = GenerateSpec.create(source=source, **GENERATE, **PICTURES[which])
        return self.submit(spec, after=[source] if after else [])

    def notify(self, job_id: int, times: int = 1) -> None:
        for _ in range(times):
            self.notified += 1
            self.stage.push(notification(job_id, self.notified))

    # --- the random part --------------------------------------------------------------------

    def step(self) -> str | None:
        """
        Perform one random action; return what was done, or None if the database is unavailable or
        enough jobs wait.
        """
        if not self.stage.database_up:
            return None
        try:
            return self._step()
        except (DatabaseUnavailableError, JobError, SpecError) as exc:
            # An action may be refused: a job has just ended, or its dependency has.
            return f"refused: {exc.message}"

    def _step(self) -> str | None:
        jobs = self._jobs()
        open_ = [one for one in jobs if one.state not in ENDS and one.part_of is None]
        trained = [one.id for one in jobs if one.kind == "train" and one.state == "succeeded"]
        ways = {
            "train": 4.0 * (len(open_) < IN_FLIGHT),
            "generate": 4.0 * (len(open_) < IN_FLIGHT and bool(trained)),
            "chain": 2.0 * (len(open_) < IN_FLIGHT - 2),
            "retry": 1.0 * (len(open_) < IN_FLIGHT),
            "command": 0.5 * (len(open_) < IN_FLIGHT and bool(trained)),
            "cancel": 0.8,
            "hold": 0.5,
            "pause": 0.5,
            "release": 1.0,
            "notifications": 1.5,
        }
        way = self.rng.choices(list(ways), list(ways.values()))[0]
        return getattr(self, f"_{way}")(jobs, open_, trained)  # type: ignore[no-any-return]

    def _jobs(self) -> list[Any]:
        from chaos.invariants import look

        return [one for one in look(self.stage.database).jobs.values() if one.kind != "import"]

    def _train(self, *_: Any) -> str:
        return f"train {self.train(self.rng.randrange(len(TRAININGS))).id}"

    def _generate(self, jobs: Any, open_: Any, trained: list[int]) -> str:
        job = self.generate(self.rng.randrange(len(PICTURES)), self.rng.choice(trained))
        return f"generate {job.id}"

    def _chain(self, *_: Any) -> str:
        first = self.train(self.rng.randrange(len(TRAININGS)))
        second = self.generate(self.rng.randrange(len(PICTURES)), first.id, after=True)
        return f"train {first.id}, then generate {second.id}"

    def _retry(self, jobs: list[Any], *_: Any) -> str | None:
        ended = [one for one in jobs if one.state in ("failed", "cancelled") and one.part_of is None]
        if not ended:
            return None
        old = self.rng.choice(ended)
        spec = kind_named(old.kind).spec_class().from_json(old.spec)
        after = [old.spec["source"]] if old.kind == "generate" else []
        return f"retry {old.id} as {self.submit(spec, after=after, retry_of=old.id).id}"

    def _command(self, jobs: Any, open_: Any, trained: list[int]) -> str | None:
        """Submit one job through the installed command line."""
        source = str(self.rng.choice(trained))
        done = self.stage.ganq.run(
            *("submit", "generate", "--from", source, "--count", "40", "--checkpoint", "last"),
            *("--micro-batch", "4", "--grid", "16", "--device", "cpu", "--json"),
        )
        if done.returncode != 0:
            return f"refused: {done.stderr.strip()}"
        import json

        self.accepted.append(int(json.loads(done.stdout)["id"]))
        self.counts["generate"] += 1
        return f"ganq submit generate {self.accepted[-1]}"

    def _cancel(self, jobs: Any, open_: list[Any], *_: Any) -> str | None:
        if not open_:
            return None
        job = self.rng.choice(open_)
        self.store.request_cancel(job.id)
        self.counts["cancels"] += 1
        return f"cancel {job.id} ({job.state})"

    def _hold(self, jobs: Any, open_: list[Any], *_: Any) -> str | None:
        waiting = [one for one in open_ if one.state == "queued" and not one.held]
        if not waiting:
            return None
        job = self.rng.choice(waiting)
        self.store.hold(job.id, held=True)
        self.counts["holds"] += 1
        return f"hold {job.id}"

    def _pause(self, jobs: Any, open_: list[Any], *_: Any) -> str | None:
        free = [one for one in open_ if not one.held]
        if not free:
            return None
        job = self.rng.choice(free)
        self.store.pause(job.id)
        self.counts["pauses"] += 1
        return f"pause {job.id} ({job.state})"

    def _release(self, jobs: Any, open_: list[Any], *_: Any) -> str | None:
        held = [one for one in open_ if one.held]
        if not held:
            return None
        self.store.hold(held[0].id, held=False)
        self.notify(held[0].id)
        return f"release {held[0].id}"

    def _notifications(self, jobs: list[Any], *_: Any) -> str | None:
        """Send duplicate notifications, in any order, also for jobs that have ended."""
        if not jobs:
            return None
        chosen = [self.rng.choice(jobs).id for _ in range(5)]
        for job_id in chosen:
            self.notify(job_id, times=3)
        self.counts["notifications"] += 15
        return f"notifications for {chosen}"

    def release_all(self) -> None:
        for one in self._jobs():
            if one.held and one.state in ("queued", "running") and one.part_of is None:
                with suppress(JobError):
                    self.store.hold(one.id, held=False)
