"""The checker itself: it is silent about a healthy table and volume, and speaks about each that is broken."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chaos.invariants import Memory, assert_invariants, look, unfinished, violations
from chaos.invariants_volume import leftovers, runners, two_runners, unequal_trainings
from sqlalchemy import delete, insert, text, update
from sqlalchemy.event import listen, remove
from tables import Claimer, beat_of, set_columns
from volumes import Files

from jobs.context import GeneratedImage
from jobs.errors import DatasetError
from storage.db.engine import Database
from storage.db.rows import Lease
from storage.db.store import JobStore
from storage.db.tables import attempt, checkpoint, event, job, utcnow
from storage.results.writer import ImageFiles
from storage.volume.durable import write_folder
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from storage.db.rows import Job
    from storage.settings import Settings

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


@dataclass
class World:
    """A table and a volume with one job of every fate."""

    database: Database
    store: JobStore
    volume: Volume
    files: Files
    train: int = 0
    generate: int = 0
    cancelled: int = 0
    failed: int = 0
    waiting: int = 0
    running: Lease = field(init=False)

    def violations(self, **how: Any) -> list[str]:
        return violations(self.database, self.volume, **how)

    def write(self, statement: Any) -> None:
        self.database.write(lambda conn: conn.execute(statement))

    def event(self, job_id: int, type: str, attempt: int | None = None) -> None:
        self.write(insert(event).values(job_id=job_id, at=utcnow(), type=type, attempt=attempt))

    @property
    def images(self) -> Path:
        return self.volume.attempt(self.generate, 1)

    def final(self) -> Path:
        return self.volume.checkpoints(self.train, 2) / "final"


@pytest.fixture
def world(
    database: Database,
    store: JobStore,
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
) -> World:
    volume = Volume(settings.volume)
    world = World(database, store, volume, Files(store, volume))
    first = running_job_factory()
    world.train = first.job_id
    world.files.checkpoint(first, 1)
    store.requeue_lost(beat_of(store, first.job_id), "silent")
    second = claim()
    world.files.checkpoint(second, 2)
    world.files.checkpoint(second, 3, kind="final")
    store.succeed(second, {"step": 30})

    world.generate = job_factory(
        kind="generate", spec={"source": world.train, "count": 3}, after=[world.train]
    ).id
    lease = claim()
    pinned = world.files.registered(world.train)[-1]
    assert store.pin_inputs(lease, {"checkpoint_id": pinned.id}) is not None
    folder = volume.attempt(lease.job_id, lease.attempt)
    sink = ImageFiles(folder)
    drawn = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    sink.add(GeneratedImage(pixels, {"seed": index}) for index, pixels in enumerate(drawn))
    sink.add_grid("grid-0000", drawn[0])
    sink.add_file("film.gif", b"a film of three images")
    made = sink.publish()
    spec = {"job": lease.job_id, "spec": lease.job.spec, "submitted_at": lease.job.created_at}
    (volume.job(lease.job_id) / "spec.json").write_text(json.dumps(spec))
    store.succeed(lease, made)

    world.cancelled = job_factory().id
    store.request_cancel(world.cancelled)
    lease = running_job_factory()
    world.failed = lease.job_id
    store.fail(lease, DatasetError("no images", hint="bring some"))
    world.running = running_job_factory()
    world.files.checkpoint(world.running, 1)
    world.waiting = job_factory(kind="generate", after=[world.running.job_id]).id
    return world


def test_a_healthy_table_and_volume_violate_nothing(world: World, settings: "Settings") -> None:
    assert_invariants(world.database, world.volume, secrets=["canary"])
    assert unfinished(look(world.database), [world.train, world.cancelled, world.failed]) == []


def test_all_violations_are_reported_at_once(world: World) -> None:
    shutil.rmtree(world.final())
    world.event(world.cancelled, "failed")
    with pytest.raises(AssertionError, match=r"(?s)2 violations.*I1.*I7"):
        assert_invariants(world.database, world.volume)


def change(world: World, job_id: int, **values: Any) -> None:
    set_columns(world.database, job_id, **values)


def reopen(world: World) -> None:
    """As if both the index and the compare-and-set had failed."""
    world.write(text("DROP INDEX uq_attempt_open"))
    world.write(update(attempt).where(attempt.c.job_id == world.train).values(ended_at=None, outcome=None))


def overlap(world: World) -> None:
    late = update(attempt).where(attempt.c.job_id == world.train, attempt.c.number == 1)
    world.write(late.values(ended_at=utcnow() + 10))


def jump(world: World) -> None:
    gone = delete(attempt).where(attempt.c.job_id == world.train, attempt.c.number == 1)
    world.write(gone)


def stale_checkpoint(world: World) -> None:
    late = update(checkpoint).where(checkpoint.c.job_id == world.train, checkpoint.c.attempt == 1)
    world.write(late.values(created_at=utcnow() + 10))


def stale_order(world: World) -> None:
    copy = (
        "SELECT job_id, 1, kind, epoch, step, replace(path, 'a2', 'a1'), manifest_sha256, bytes, created_at"
    )
    columns = "job_id, attempt, kind, epoch, step, path, manifest_sha256, bytes, created_at"
    world.write(text(f"INSERT INTO checkpoint ({columns}) {copy} FROM checkpoint WHERE kind = 'final'"))


def strange_folder(world: World) -> None:
    world.write(update(checkpoint).where(checkpoint.c.job_id == world.train).values(attempt=2))


def other_attempts_result(world: World) -> None:
    world.images.rename(world.images.with_name("a2"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def torn_link(world: World) -> None:
    world.volume.latest.mkdir(exist_ok=True)
    (world.volume.latest / "generate").symlink_to(world.images / "images.tmp-12345678")


def temporary(world: World) -> None:
    new = world.final().with_name("final.tmp-12345678")
    world.final().rename(new)
    moved = update(checkpoint).where(checkpoint.c.path == world.volume.relative(world.final()))
    world.write(moved.values(path=world.volume.relative(new)))


BREAKS: dict[str, tuple[str, Callable[[World], Any]]] = {
    "a second end": ("I1", lambda w: w.event(w.train, "cancelled", 2)),
    "a way out of the end": ("I1", lambda w: w.event(w.train, "claimed", 3)),
    "an end that is not in the history": (
        "I1",
        lambda w: w.write(delete(event).where(event.c.type == "failed")),
    ),
    "an end without its time": ("I1", lambda w: change(w, w.failed, finished_at=None)),
    "a time without an end": ("I1", lambda w: change(w, w.waiting, finished_at=1.0)),
    "a success that no attempt had": (
        "I1",
        lambda w: w.write(update(attempt).where(attempt.c.number == 2).values(outcome="failed")),
    ),
    "two attempts open": ("I3", reopen),
    "an open attempt of a job that waits": ("I3", lambda w: change(w, w.running.job_id, state="queued")),
    "attempts at one time": ("I3", overlap),
    "a missing attempt": ("I3", jump),
    "another lease": ("I3", lambda w: change(w, w.running.job_id, lease_token="f" * 32)),
    "a claim of a running job": ("I3", lambda w: w.event(w.running.job_id, "claimed", 2)),
    "an attempt left out": ("I3", lambda w: w.event(w.waiting, "claimed", 2)),
    "a blocker too many": ("I2", lambda w: change(w, w.waiting, blockers=2)),
    "a blocker forgotten": ("I2", lambda w: change(w, w.waiting, blockers=0)),
    "a job that runs before what it needs": ("I2", lambda w: change(w, w.waiting, state="running")),
    "a checkpoint after its attempt": ("I4", stale_checkpoint),
    "a checkpoint of an attempt that others followed": ("I4", stale_order),
    "a checkpoint in another attempt's folder": ("I4", strange_folder),
    "a word of a stale attempt": ("I4", lambda w: w.event(w.train, "checkpoint", 1)),
    "a result of another attempt": ("I4", other_attempts_result),
    "an image missing": ("I5", lambda w: (w.images / "images" / "000001.png").unlink()),
    "an image too many": ("I5", lambda w: (w.images / "images" / "000003.png").touch()),
    "an image changed": ("I5", lambda w: flip(w.images / "images" / "000001.png")),
    "another manifest": ("I5", lambda w: flip(w.images / "manifest.jsonl")),
    "fewer than asked": ("I5", lambda w: change(w, w.generate, spec={"source": w.train, "count": 4})),
    "a grid missing": ("I5", lambda w: (w.images / "grids" / "grid-0000.png").unlink()),
    "a film changed": ("I5", lambda w: flip(w.images / "grids" / "film.gif")),
    "a stray file": ("I5", lambda w: (w.images / "images.tmp-12345678").mkdir()),
    "a checkpoint gone": ("I7", lambda w: shutil.rmtree(w.final())),
    "a checkpoint changed": ("I7", lambda w: flip(w.final() / "generator.safetensors")),
    "a manifest changed": ("I7", lambda w: flip(w.final() / "MANIFEST.json")),
    "a file cut": ("I7", lambda w: os.truncate(w.final() / "generator.safetensors", 10)),
    "a file beside": ("I7", lambda w: (w.final() / "more").touch()),
    "a temporary name": ("I7", temporary),
    "a way out of the volume": ("I7", lambda w: w.write(update(checkpoint).values(path="../../etc"))),
    "a pinned checkpoint gone": ("I7", lambda w: change(w, w.waiting, inputs={"checkpoint_id": 999})),
    "one of many pinned gone": (
        "I7",
        lambda w: change(w, w.waiting, inputs={"checkpoint_ids": [w.files.registered(w.train)[0].id, 999]}),
    ),
    "a torn spec": ("I7", lambda w: os.truncate(w.volume.job(w.train) / "spec.json", 5)),
    "a link to something temporary": ("I7", torn_link),
    "an unknown code": ("I10", lambda w: change(w, w.failed, error_code="OOPS")),
    "a failure without a reason": ("I10", lambda w: change(w, w.failed, error_message=None)),
    "a success with an error": ("I10", lambda w: change(w, w.train, error_code="DISK_FULL")),
    "a traceback": ("I10", lambda w: change(w, w.failed, error_message="Traceback (most recent call last)")),
    "a secret in the table": ("I10", lambda w: change(w, w.failed, error_hint="password canary")),
    "a secret in a log": ("I10", lambda w: (w.volume.attempt(w.train, 1) / "log.txt").write_text("canary")),
}


@sqlite_only
@pytest.mark.parametrize("what", BREAKS)
def test_each_violation_is_reported(world: World, what: Any) -> None:
    law, harm = BREAKS[what]
    harm(world)
    found = world.violations(secrets=["canary"])
    assert any(one.startswith(f"{law}:") for one in found), found


@sqlite_only
def test_what_was_deleted_after_the_snapshot_is_no_violation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    import chaos.invariants as checker

    early = look(world.database)
    gone = checkpoint.c.path == world.volume.relative(world.final())
    world.write(delete(checkpoint).where(gone))
    shutil.rmtree(world.final())
    monkeypatch.setattr(checker, "look", lambda database: early)
    assert world.violations() == []


@sqlite_only
def test_with_the_clock_set_no_times_are_compared(world: World) -> None:
    overlap(world)
    stale_checkpoint(world)
    assert world.violations(clock=False) == []


@sqlite_only
def test_a_memory_saves_the_second_hash_but_not_the_second_look(world: World) -> None:
    memory = Memory()
    assert world.violations(memory=memory) == []
    flip(world.final() / "generator.safetensors")
    assert world.violations(memory=memory) == []
    assert len(world.violations()) == 1
    shutil.rmtree(world.final())
    assert len(world.violations(memory=memory)) == 1


@sqlite_only
def test_jobs_that_have_not_ended_or_are_missing_are_reported(world: World) -> None:
    found = unfinished(look(world.database), [world.train, world.waiting, 999])
    assert found == [
        f"I2: job {world.waiting} is still queued (attempt 0)",
        "I2: job 999 was accepted, and is not in the table",
    ]


@sqlite_only
def test_trainings_of_one_spec_that_differ_are_reported(
    world: World, running_job_factory: Callable[..., Lease]
) -> None:
    from safetensors.numpy import save_file

    for bits in (1.0, 1.0, 2.0):
        lease = running_job_factory(spec={"data": "/other"})
        target = world.volume.checkpoints(lease.job_id, 1) / "final"
        state = {"g.w": np.full(3, bits, dtype=np.float32)}
        digest, size = write_folder(target, {"state.safetensors": partial(save_file, state)})
        path = world.volume.relative(target)
        facts: dict[str, Any] = {"epoch": 1, "step": 1, "path": path, "manifest_sha256": digest, "size": size}
        world.store.register_checkpoint(lease, kind="final", **facts)
        world.store.succeed(lease, {})
    world.write(delete(job).where(job.c.id == world.train))
    ids = [row.id for row in look(world.database).jobs.values() if row.spec == {"data": "/other"}]
    expected = f"I6: trainings of one spec ended with different bits: {[ids[:2], ids[2:]]}"
    assert unequal_trainings(look(world.database), world.volume) == [expected]


@sqlite_only
def test_what_gc_leaves_is_reported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.gc.sweep import Collector, Plan

    assert world.running is not None
    world.store.succeed(world.running, {})
    stray = world.volume.checkpoints(world.train, 1) / "epoch-0009"
    stray.mkdir()
    (stray.parent / "epoch-0010.tmp-12345678").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "plan", lambda self: Plan())
        found = leftovers(world.database, world.volume)
    assert len([one for one in found if one.startswith("I9: gc has left")]) == 3
    assert leftovers(world.database, world.volume) == []
    assert not stray.exists()
    assert_invariants(world.database, world.volume)


def test_two_runners_of_one_worker_are_reported(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    mine = {**os.environ, "GANQ_VOLUME": str(tmp_path), "GANQ_WORKER_NAME": "w1"}
    command = [sys.executable, "-c", "import time; time.sleep(60)", "worker.runner.main"]
    both = [subprocess.Popen(command, env=mine) for _ in range(2)]
    other = subprocess.Popen(command, env={**mine, "GANQ_WORKER_NAME": "w2"})
    try:
        before = runners(volume)
        assert before == {"w1": {one.pid for one in both}, "w2": {other.pid}}
        assert len(two_runners(before, runners(volume))) == 1
        both[0].kill()
        both[0].wait()
        assert two_runners(before, runners(volume)) == []
    finally:
        for one in (*both, other):
            one.kill()
            one.wait()


def test_the_checker_sees_one_moment_though_jobs_move_meanwhile(
    database: Database, job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    made = job_factory()
    moved: list[Lease] = []

    def meanwhile(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "FROM dependency" in statement and not moved:  # after the jobs, before their attempts
            moved.append(claim())

    listen(database.engine, "before_cursor_execute", meanwhile)
    seen = look(database)
    remove(database.engine, "before_cursor_execute", meanwhile)
    assert moved[0].job_id == made.id
    assert (seen.jobs[made.id].state, seen.attempts[made.id]) == ("queued", [])
