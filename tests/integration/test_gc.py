"""What `ganq gc` deletes and what it leaves, with real rows and real files (FAULTS F29, F48, I9)."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tables import Claimer, beat_of, event_types, set_columns
from volumes import Files, grow_old, listing

from jobs.errors import DatabaseUnavailableError, LeaseLostError, VolumeError
from storage.db.engine import Database
from storage.db.rows import Job, Lease
from storage.db.store.pins import lock_checkpoints
from storage.gc.policy import Policy, Reason
from storage.gc.sweep import Collector, CollectorBusyError, Plan, Swept, alone
from storage.volume.layout import Volume
from worker.supervisor.assignment import make_assignment

if TYPE_CHECKING:
    from storage.db.queries import Queries
    from storage.db.rows import WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings

DAY_S = 86400.0


@pytest.fixture
def volume(settings: "Settings") -> Volume:
    return Volume(settings.volume)


@pytest.fixture
def files(store: "JobStore", volume: Volume) -> Files:
    return Files(store, volume)


@pytest.fixture
def gc(database: Database, volume: Volume) -> Any:
    """Plans and sweeps at once; ended attempts need no grace here."""

    def run(**policy: Any) -> tuple[Plan, Swept]:
        garbage = Collector(database, volume, Policy(**{"grace_s": 0.0, **policy}))
        plan = garbage.plan()
        return plan, garbage.sweep(plan)

    return run


def reasons(plan: Plan) -> dict[str, Reason]:
    return {item.path: item.reason for item in plan.items}


# --- what attempts leave ------------------------------------------------------------------


def test_what_a_crashed_attempt_left_is_deleted_and_what_rows_point_to_stays(
    files: Files, gc: Any, store: "JobStore", running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    kept = files.checkpoint(lease, 1)
    lost = files.checkpoint(lease, 2, register=False)
    torn = lost.with_name("epoch-0003.tmp-0123abcd")
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"x" * 500)
    sample = files.folder(lease) / "samples" / "epoch-0002.png.tmp-0123abcd"
    sample.touch()
    store.crashed(lease, "killed")
    plan, swept = gc()
    assert reasons(plan) == {
        files.volume.relative(lost): Reason.UNREGISTERED,
        files.volume.relative(torn): Reason.UNFINISHED,
        files.volume.relative(sample): Reason.UNFINISHED,
    }
    assert next(item.bytes for item in plan.items if item.path.endswith("abcd")) == 500
    assert swept.gone == plan.items
    assert not lost.exists()
    assert not torn.exists()
    assert not sample.exists()
    assert (kept / "MANIFEST.json").is_file()
    folder = files.volume.attempt(lease.job_id, 1)
    assert sorted(os.listdir(folder)) == ["checkpoints", "log.txt", "metrics.jsonl", "samples"]
    assert gc()[0].items == []


def test_a_checkpoint_without_a_row_stays_while_its_job_has_no_other_to_continue_from(
    files: Files,
    gc: Any,
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
) -> None:
    """After a failover: retention has deleted what the rows point to, and the newest row is lost."""
    lease = running_job_factory()
    gone = files.checkpoint(lease, 1)
    lost = files.checkpoint(lease, 2, register=False)
    shutil.rmtree(gone)
    store.release(lease, "drain")
    assert gc()[0].items == []
    assert lost.is_dir()
    store.succeed(claim(), {})
    assert reasons(gc()[0]) == {files.volume.relative(lost): Reason.UNREGISTERED}


def test_a_running_attempt_is_left_alone(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    files.checkpoint(lease, 1, register=False)
    files.write_images(lease)
    (files.volume.job(lease.job_id) / "spec.json.tmp-0123abcd").touch()
    grow_old(files.volume.job(lease.job_id))
    before = listing(files.volume.root)
    assert gc()[0].items == []
    assert listing(files.volume.root) == before


def test_an_attempt_that_has_just_ended_is_left_alone_for_a_while(
    files: Files, gc: Any, store: "JobStore", running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    lost = files.checkpoint(lease, 1, register=False)
    store.crashed(lease, "killed")
    assert gc(grace_s=60.0)[0].items == []
    files.attempts_ended_long_ago(lease.job_id, 61.0)
    gc(grace_s=60.0)
    assert not lost.exists()


def test_published_images_stay_and_those_of_earlier_attempts_go(
    files: Files,
    gc: Any,
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
) -> None:
    first = running_job_factory(kind="generate")
    unpublished = files.write_images(first)
    store.release(first, "drain")
    second = claim()
    published = files.write_images(second)
    store.succeed(second, {"image_count": 3})
    plan, _ = gc()
    assert set(reasons(plan).values()) == {Reason.UNPUBLISHED}
    assert sorted(os.listdir(unpublished)) == ["log.txt", "metrics.jsonl", "samples"]
    assert {"images", "grids", "manifest.jsonl"} <= set(os.listdir(published))


def test_what_a_cancelled_job_has_generated_is_deleted(
    files: Files, gc: Any, store: "JobStore", running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory(kind="generate")
    folder = files.write_images(lease)
    store.request_cancel(lease.job_id)
    store.cancel_done(lease)
    gc()
    assert not (folder / "images").exists()


def test_what_a_zombie_writes_after_its_rescue_is_deleted_the_next_time(
    files: Files,
    gc: Any,
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
) -> None:
    zombie = running_job_factory()
    good = files.checkpoint(zombie, 1)
    store.requeue_lost(beat_of(store, zombie.job_id), "silent")
    heir = claim()
    files.checkpoint(heir, 2)
    gc()
    late = files.checkpoint(zombie, 3, register=False)
    with pytest.raises(LeaseLostError):
        store.register_checkpoint(
            zombie, kind="epoch", epoch=3, step=30, path="p", manifest_sha256="0" * 64, size=1
        )
    gc()
    assert not late.exists()
    assert good.exists()
    assert files.all_there()


def test_an_attempt_that_the_table_does_not_know_is_left_alone(
    files: Files, gc: Any, store: "JobStore", running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    files.folder(lease)
    store.crashed(lease, "killed")
    newer = files.volume.checkpoints(lease.job_id, 2) / "epoch-0009"
    newer.mkdir(parents=True)
    grow_old(files.volume.job(lease.job_id))
    gc()
    assert newer.exists(), "a table from a backup knows fewer attempts than the volume"


def part_of(files: Files, running_job_factory: Callable[..., Lease], whole: Job) -> Lease:
    lease = running_job_factory(kind="generate")
    set_columns(files.database, lease.job_id, part_of=whole.id)
    files.write_images(lease)
    files.store.succeed(lease, {"image_count": 3})
    return lease


def test_a_shard_is_deleted_once_its_parent_is_published(
    files: Files,
    gc: Any,
    store: "JobStore",
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
    claim: Claimer,
) -> None:
    whole = job_factory(kind="generate")
    part = part_of(files, running_job_factory, whole)
    gc()
    assert (files.volume.attempt(part.job_id, 1) / "images").is_dir()
    gathering = claim()
    assert gathering.job_id == whole.id
    folder = files.write_images(gathering)
    store.succeed(gathering, {"image_count": 3})
    plan, _ = gc()
    assert reasons(plan) == {f"jobs/{part.job_id:06d}": Reason.SHARD}
    assert not files.volume.job(part.job_id).exists()
    assert (folder / "images").is_dir()


def test_the_images_of_a_part_go_when_its_whole_was_cancelled(
    files: Files,
    gc: Any,
    store: "JobStore",
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
) -> None:
    whole = job_factory(kind="generate")
    part = part_of(files, running_job_factory, whole)
    store.request_cancel(whole.id)
    gc()
    assert not (files.volume.attempt(part.job_id, 1) / "images").exists()
    assert (files.volume.attempt(part.job_id, 1) / "log.txt").exists()


# --- names that belong to no attempt ------------------------------------------------------

TEMPS = (
    ".probe-0123abcd",
    "jobs/.import-0123456789ab",
    "jobs/.import-0123456789ab.tmp-0123abcd",
    f"datasets/{'a' * 64}.tmp-0123abcd",
    f"datasets/{'a' * 64}.tmp-old-0123abcd",
    "datasets/.unpack-x1y2z3",
)


@pytest.mark.parametrize("name", TEMPS)
def test_a_nameless_temporary_is_deleted_when_it_is_old_enough(files: Files, gc: Any, name: Any) -> None:
    path = files.volume.root / name
    path.mkdir()
    (path / "half").write_bytes(b"x" * 100)
    gc()
    assert path.exists(), "its writer may be at it"
    grow_old(path)
    (path / "half").write_bytes(b"x")  # a writer at the innermost file
    gc()
    assert path.exists()
    grow_old(path)
    plan, _ = gc()
    assert reasons(plan) == {name: Reason.UNFINISHED}
    assert not path.exists()


def test_an_archive_that_a_running_training_reads_stays_however_old(
    files: Files, gc: Any, store: "JobStore", database: Database, running_job_factory: Callable[..., Lease]
) -> None:
    unpacked = files.volume.datasets / ".unpack-x1y2z3"
    unpacked.mkdir()
    grow_old(unpacked, 5 * 3600)
    lease = running_job_factory()
    from sqlalchemy import update

    from storage.db.tables import attempt, utcnow

    began = update(attempt).where(attempt.c.job_id == lease.job_id)
    database.write(lambda conn: conn.execute(began.values(started_at=utcnow() - 6 * 3600)))
    gc()
    assert unpacked.exists(), "it may be reading it since it began"
    cache = files.volume.dataset("b" * 64)
    cache.mkdir()
    (cache / "index.json").write_text("{}")
    store.pin_inputs(lease, {"fingerprint": "b" * 64})
    gc()
    assert not unpacked.exists(), "it has decoded its images, and reads that"


def test_what_others_have_put_on_the_volume_stays(files: Files, gc: Any) -> None:
    for name in ("notes.txt", "jobs/mine", "jobs/1", "jobs/.hidden", "datasets/faces", "latest/mine"):
        (files.volume.root / name).mkdir()
    (files.volume.latest / "elsewhere").symlink_to("/nowhere/at/all")
    grow_old(files.volume.root)
    before = listing(files.volume.root)
    assert gc(jobs_s=0.0, datasets_s=0.0)[0].items == []
    assert listing(files.volume.root) == before


def test_our_own_links_that_point_nowhere_go(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    files.folder(lease)
    files.volume.point_latest("good", files.volume.attempt(lease.job_id, 1))
    files.volume.point_latest("bad", files.volume.attempt(lease.job_id, 7))
    gc()
    assert (files.volume.latest / "bad").is_symlink(), "it is young: whoever made it may still be at work"
    for name in ("good", "bad"):
        grow_old(files.volume.latest / name)
    plan, _ = gc()
    assert reasons(plan) == {"latest/bad": Reason.LINK}
    assert os.listdir(files.volume.latest) == ["good"]


def test_a_link_that_was_made_again_since_it_was_planned_stays(
    files: Files, database: Database, volume: Volume, running_job_factory: Callable[..., Lease]
) -> None:
    lease = running_job_factory()
    files.folder(lease)
    volume.point_latest("faces", volume.attempt(lease.job_id, 7))
    grow_old(volume.latest / "faces")
    garbage = Collector(database, volume)
    plan = garbage.plan()
    assert len(plan.items) == 1
    volume.point_latest("faces", volume.attempt(lease.job_id, 1))
    assert garbage.sweep(plan).gone == []
    assert (volume.latest / "faces" / "log.txt").exists()


def test_a_folder_without_a_job_is_deleted_if_it_is_old_and_the_table_is_newer(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease], database: Database
) -> None:
    for _ in range(3):
        files.folder(running_job_factory())
    from storage.db.tables import job

    database.write(lambda conn: conn.execute(job.delete().where(job.c.id == 2)))
    orphan = files.volume.job(2)
    gc()
    assert orphan.exists(), "an import may be committing"
    grow_old(orphan)
    plan, _ = gc()
    assert reasons(plan) == {"jobs/000002": Reason.NO_JOB}
    assert not orphan.exists()


def test_folders_newer_than_the_table_stay_because_it_may_be_a_copy(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease]
) -> None:
    files.folder(running_job_factory())
    newer = files.volume.job(2) / "a1" / "images"
    newer.mkdir(parents=True)
    grow_old(files.volume.job(2))
    plan, _ = gc()
    assert plan.items == []
    assert "the table ends at job 1" in plan.notes[0]
    assert newer.exists()


# --- a wrong volume, a database that is away ---------------------------------------------


def leave_something(files: Files, lease: Lease) -> None:
    files.checkpoint(lease, 1, register=False)
    files.store.crashed(lease, "killed")


def test_the_volume_of_another_job_table_is_refused(
    files: Files,
    gc: Any,
    store: "JobStore",
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
    volume: Volume,
) -> None:
    for _ in range(3):
        leave_something(files, running_job_factory())
    for number in range(1, 4):  # the same ids, other jobs: as the other table's volume looks from here
        set_columns(files.database, number, created_at=12345.0 + number)
    before = listing(volume.root)
    with pytest.raises(VolumeError, match="not this job table's volume"):
        gc(jobs_s=0.0, datasets_s=0.0)
    assert listing(volume.root) == before


def test_a_volume_where_most_folders_have_no_job_is_refused(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease], volume: Volume
) -> None:
    leave_something(files, running_job_factory())
    for number in (2, 3):
        volume.job(number).mkdir()
    before = listing(volume.root)
    with pytest.raises(VolumeError, match="2 have no job"):
        gc()
    assert listing(volume.root) == before


def test_one_folder_of_another_job_is_left_alone(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease], database: Database
) -> None:
    leases = [running_job_factory() for _ in range(3)]
    for lease in leases:
        leave_something(files, lease)
    set_columns(database, leases[0].job_id, created_at=12345.0)
    plan, _ = gc()
    assert {item.job_id for item in plan.items} == {2, 3}
    assert any("job 1 of another table" in note for note in plan.notes)


def test_a_folder_from_before_the_time_of_submission_was_written_is_known_by_its_spec(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease]
) -> None:
    import json

    leases = [running_job_factory(), running_job_factory()]
    for lease, spec in zip(leases, (leases[0].job.spec, {"data": "/others"}), strict=True):
        leave_something(files, lease)
        path = files.volume.job(lease.job_id) / "spec.json"
        path.write_text(json.dumps({"job": lease.job_id, "spec": spec}))
    plan, _ = gc()
    assert {item.job_id for item in plan.items} == {1}


def test_a_volume_that_is_not_there_is_reported_and_not_made(
    database: Database, settings: "Settings", volume: Volume
) -> None:
    with pytest.raises(VolumeError, match="there is no volume"):
        Collector(database, volume).plan()
    assert not settings.volume.exists()


@pytest.mark.tier2
def test_with_the_database_away_nothing_is_deleted(
    files: Files, settings: "Settings", running_job_factory: Callable[..., Lease], volume: Volume
) -> None:
    leave_something(files, running_job_factory())
    garbage = Collector(files.database, volume, Policy(grace_s=0.0))
    plan = garbage.plan()
    assert plan.items
    before = listing(volume.root)
    from dataclasses import replace

    away = Database(replace(settings, database_url="postgresql+psycopg://ganq@127.0.0.1:1/ganq"))
    away.read = partial(away.read, patience_s=0.1)  # type: ignore[method-assign]
    for doomed in (lambda: Collector(away, volume).plan(), lambda: Collector(away, volume).sweep(plan)):
        with pytest.raises(DatabaseUnavailableError):
            doomed()
    assert listing(volume.root) == before


# --- links --------------------------------------------------------------------------------


def test_no_link_on_the_volume_is_followed(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease], store: "JobStore", tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    for name in ("images", "checkpoints", "precious"):
        (outside / name).mkdir(parents=True)
        (outside / name / "precious.txt").write_text("mine")
    grow_old(outside)
    before = listing(outside)
    lease = running_job_factory(kind="generate")
    folder = files.folder(lease)
    (folder / "images").symlink_to(outside / "images")
    (folder / "checkpoints").symlink_to(outside / "checkpoints")
    tree = folder / "grids.tmp-0123abcd"
    tree.mkdir()
    (tree / "down").symlink_to(outside / "precious")
    (files.volume.root / "jobs" / "000099").symlink_to(outside)
    (files.volume.datasets / ".unpack-abc").symlink_to(outside)
    grow_old(files.volume.datasets / ".unpack-abc")
    store.crashed(lease, "killed")
    plan, swept = gc()
    assert {"jobs/000001/a1/images", "datasets/.unpack-abc"} <= set(reasons(plan))
    assert swept.failed == []
    assert listing(outside) == before
    assert not (folder / "images").is_symlink(), "the link itself is nobody's"
    assert (folder / "checkpoints").is_symlink()


def test_a_folder_that_becomes_a_link_after_planning_is_not_followed(
    files: Files,
    database: Database,
    volume: Volume,
    running_job_factory: Callable[..., Lease],
    tmp_path: Path,
) -> None:
    lease = running_job_factory(kind="generate")
    folder = files.write_images(lease)
    files.store.crashed(lease, "killed")
    garbage = Collector(database, volume, Policy(grace_s=0.0))
    plan = garbage.plan()
    outside = tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    before = listing(outside)
    swept = garbage.sweep(plan)
    assert swept.gone == []
    assert listing(outside) == before


def test_jobs_as_a_link_is_not_looked_into(
    files: Files, gc: Any, running_job_factory: Callable[..., Lease], tmp_path: Path, volume: Volume
) -> None:
    leave_something(files, running_job_factory())
    (volume.root / "jobs").rename(tmp_path / "jobs")
    (volume.root / "jobs").symlink_to(tmp_path / "jobs")
    plan, _ = gc()
    assert plan.items == []
    assert "jobs is a link" in plan.notes[0]


# --- killed half-way, two at once, in use ------------------------------------------------


def run_gc(env: dict[str, str], *arguments: str, failpoints: str = "") -> "subprocess.CompletedProcess[str]":
    extra = {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": failpoints} if failpoints else {}
    return subprocess.run(
        [sys.executable, "-P", "-m", "cli.main", "gc", *arguments],
        env={**os.environ, **env, **extra},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "failpoint", ["gc.results_deleted=kill", "gc.renamed=kill@2", "gc.deleting=kill@3", "gc.deleted=kill@2"]
)
def test_a_gc_that_is_killed_anywhere_is_finished_by_the_next(
    files: Files,
    settings_env: dict[str, str],
    running_job_factory: Callable[..., Lease],
    store: "JobStore",
    queries: "Queries",
    failpoint: str,
) -> None:
    crashed = running_job_factory(kind="generate")
    files.write_images(crashed)
    store.crashed(crashed, "killed")
    store.hold(crashed.job_id, held=True)  # or a slow machine would find it claimable again before `needed`
    files.attempts_ended_long_ago(crashed.job_id)
    old = running_job_factory()
    files.checkpoint(old, 1, kind="final")
    store.succeed(old, {"bit_exact": True})
    files.ended_long_ago(old.job_id)
    needed = running_job_factory()
    kept = files.checkpoint(needed, 1)
    files.checkpoint(needed, 2, register=False)
    killed = run_gc(settings_env, "--jobs", failpoints=failpoint)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert files.all_there(), "a row points at what was deleted"
    # Without --jobs: what was begun is finished, and nothing more is begun.
    assert run_gc(settings_env).returncode == 0
    assert list(files.volume.root.rglob(".trash-*")) == []
    assert files.all_there()
    assert run_gc(settings_env, "--jobs").returncode == 0
    assert sorted(os.listdir(files.volume.attempt(old.job_id, 1))) == ["log.txt", "metrics.jsonl"]
    assert sorted(os.listdir(files.volume.attempt(crashed.job_id, 1))) == [
        "log.txt",
        "metrics.jsonl",
        "samples",
    ]
    assert kept.exists()
    assert "nothing to delete" in run_gc(settings_env, "--jobs").stdout
    assert event_types(files.database, old.job_id).count("results_deleted") == 1


def test_a_second_gc_refuses_while_one_is_at_work(
    files: Files, settings_env: dict[str, str], database: Database
) -> None:
    with alone(database):
        done = run_gc(settings_env)
        assert done.returncode == 1
        assert "another ganq gc is running" in done.stderr
        assert run_gc(settings_env, "--dry-run").returncode == 0
    with alone(database):
        pass


def test_the_lock_of_a_gc_that_was_killed_is_free(
    files: Files, settings_env: dict[str, str], running_job_factory: Callable[..., Lease], database: Database
) -> None:
    lease = running_job_factory()
    files.checkpoint(lease, 1, register=False)
    files.store.crashed(lease, "killed")
    files.attempts_ended_long_ago(lease.job_id)
    assert run_gc(settings_env, failpoints="gc.renamed=kill").returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10  # Postgres notices that the session's socket has closed
    while True:
        try:
            with alone(database):
                return
        except CollectorBusyError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_two_sweeps_of_one_plan_do_no_harm_to_each_other(
    files: Files,
    database: Database,
    volume: Volume,
    running_job_factory: Callable[..., Lease],
    store: "JobStore",
) -> None:
    # All are claimed before the first crashes: it can be claimed again after two seconds.
    for lease in [running_job_factory(kind="generate") for _ in range(10)]:
        files.write_images(lease, count=20)
        store.crashed(lease, "killed")
    plan = Collector(database, volume, Policy(grace_s=0.0)).plan()
    done: list[Swept] = []

    def sweep() -> None:
        done.append(Collector(database, volume, Policy(grace_s=0.0)).sweep(plan))

    threads = [threading.Thread(target=sweep) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(len(one.gone) for one in done) == len(plan.items) == 30
    assert [one.failed for one in done] == [[], [], []]
    assert not list(volume.root.rglob("*.png.tmp*"))
    assert not list(volume.root.rglob("images"))


@pytest.mark.parametrize(("code", "exit_code"), [("EBUSY", 0), ("ENOTEMPTY", 0), ("EACCES", 1)])
def test_what_cannot_be_deleted_is_reported_and_is_deleted_the_next_time(
    files: Files,
    settings_env: dict[str, str],
    running_job_factory: Callable[..., Lease],
    store: "JobStore",
    code: str,
    exit_code: int,
) -> None:
    lease = running_job_factory(kind="generate")
    folder = files.write_images(lease)
    store.crashed(lease, "killed")
    files.attempts_ended_long_ago(lease.job_id)
    done = run_gc(settings_env, failpoints=f"gc.deleting=raise:{code}@2")
    assert done.returncode == exit_code, done.stderr
    assert ("kept:" if exit_code == 0 else "could not be deleted") in done.stderr
    assert len(list(folder.glob(".trash-*"))) == 1
    assert run_gc(settings_env).returncode == 0
    assert sorted(os.listdir(folder)) == ["log.txt", "metrics.jsonl", "samples"]


# --- results of old jobs ------------------------------------------------------------------


def old_training(files: Files, running_job_factory: Callable[..., Lease], **changes: object) -> Lease:
    lease = running_job_factory(**changes)
    files.checkpoint(lease, 1)
    files.checkpoint(lease, 2, kind="final")
    files.store.succeed(lease, {"bit_exact": True, "epoch": 2})
    files.ended_long_ago(lease.job_id)
    return lease


def test_results_of_old_jobs_are_deleted_on_request_and_the_row_says_so(
    files: Files, gc: Any, queries: "Queries", running_job_factory: Callable[..., Lease], volume: Volume
) -> None:
    lease = old_training(files, running_job_factory)
    assert gc()[0].items == []
    assert gc(jobs_s=365 * DAY_S)[0].items == []
    plan, _ = gc(jobs_s=30 * DAY_S)
    assert set(reasons(plan).values()) == {Reason.RESULTS}
    assert sorted(os.listdir(volume.attempt(lease.job_id, 1))) == ["log.txt", "metrics.jsonl"]
    assert (volume.job(lease.job_id) / "spec.json").exists()
    assert queries.checkpoints(lease.job_id) == []
    job = queries.get(lease.job_id)
    assert job.state == "succeeded"
    assert job.result is not None
    assert job.result["epoch"] == 2
    assert abs(job.result["deleted_at"] - queries.now()) < 60
    assert event_types(files.database, lease.job_id)[-1] == "results_deleted"
    from jobs.errors import JobNotFoundError

    with pytest.raises(JobNotFoundError):
        queries.newest_model()


@pytest.mark.parametrize("how", ["draws", "draws, running", "goes on", "after", "reads its images"])
def test_what_a_waiting_or_running_job_needs_stays(
    files: Files,
    gc: Any,
    job_factory: Callable[..., Job],
    claim: Claimer,
    running_job_factory: Callable[..., Lease],
    volume: Volume,
    how: str,
) -> None:
    old = old_training(files, running_job_factory)
    before = listing(volume.job(old.job_id))
    generate = {"source": old.job_id, "checkpoint": "best", "count": 1}
    if how.startswith("draws"):
        job_factory(kind="generate", spec=generate, held=how == "draws")
        assert (claim.or_none() is not None) is ("running" in how)
    elif how == "goes on":
        job_factory(spec={"data": "/pictures", "continue_from": old.job_id})
    elif how == "after":
        job_factory(after=[old.job_id])
    else:
        job_factory(spec={"data": str(volume.attempt(old.job_id, 1) / "images")})
    assert gc(jobs_s=0.0)[0].items == []
    assert listing(volume.job(old.job_id)) == before
    assert files.all_there()


def test_a_job_that_is_needed_again_since_it_was_planned_keeps_its_results(
    files: Files,
    database: Database,
    volume: Volume,
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
) -> None:
    old = old_training(files, running_job_factory)
    garbage = Collector(database, volume, Policy(grace_s=0.0, jobs_s=0.0))
    plan = garbage.plan()
    assert len(plan.items) == 2
    before = listing(volume.job(old.job_id))
    job_factory(kind="generate", spec={"source": old.job_id, "checkpoint": "best", "count": 1})
    swept = garbage.sweep(plan)
    assert swept.gone == []
    assert len(swept.kept) == 2
    assert listing(volume.job(old.job_id)) == before
    assert len(files.registered(old.job_id)) == 2


def test_an_import_is_never_deleted_for_its_age(
    files: Files, gc: Any, store: "JobStore", running_job_factory: Callable[..., Lease], volume: Volume
) -> None:
    files.folder(running_job_factory())
    imported = store.add_finished(
        kind="import",
        spec={},
        spec_version=1,
        user="tester",
        name="old-weights",
        files=lambda job_id: (f"jobs/{job_id:06d}/a1/checkpoints/import", "0" * 64, 1, 1),
    )
    there = volume.checkpoints(imported.id, 1) / "import"
    there.mkdir(parents=True)
    files.ended_long_ago(imported.id)
    grow_old(volume.job(imported.id))
    assert gc(jobs_s=0.0)[0].items == []
    assert there.exists()


# --- data sets ----------------------------------------------------------------------------


@pytest.fixture
def decoded(files: Files, tmp_path: Path) -> Any:
    """A real data set on the volume, decoded long ago: (its source, its fingerprint)."""
    from PIL import Image

    from storage.datasets.cache import open_images

    source = tmp_path / "faces"
    source.mkdir()
    for shade in (10, 20, 30):
        Image.new("RGB", (16, 16), (shade, shade, shade)).save(source / f"{shade}.png")
    images = open_images(files.volume, str(source), 16)
    grow_old(files.volume.dataset(images.fingerprint))
    return str(source), images.fingerprint


def test_a_data_set_is_deleted_on_request_when_unused(
    files: Files, gc: Any, decoded: Any, running_job_factory: Callable[..., Lease], store: "JobStore"
) -> None:
    source, fingerprint = decoded
    lease = running_job_factory(spec={"data": source, "size": 16})
    store.pin_inputs(lease, {"fingerprint": fingerprint})
    store.succeed(lease, {})
    assert gc()[0].items == []
    assert gc(datasets_s=30 * DAY_S)[0].items == [], "a run that ended just now has used it"
    files.ended_long_ago(lease.job_id)
    plan, _ = gc(datasets_s=30 * DAY_S)
    assert reasons(plan) == {f"datasets/{fingerprint}": Reason.DATASET}
    assert os.listdir(files.volume.datasets) == []


@pytest.mark.parametrize("how", ["queued", "pinned", "reading something", "young"])
def test_a_data_set_in_use_is_kept(
    files: Files,
    gc: Any,
    decoded: Any,
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
    store: "JobStore",
    how: str,
) -> None:
    source, fingerprint = decoded
    if how == "queued":
        job_factory(spec={"data": source, "size": 16})
    elif how == "pinned":
        lease = running_job_factory(spec={"data": "/moved/elsewhere", "size": 16})
        store.pin_inputs(lease, {"fingerprint": fingerprint})
    elif how == "reading something":
        running_job_factory(spec={"data": "/a/copy/of/it", "size": 16})
    else:
        os.utime(files.volume.dataset(fingerprint) / "index.json")
    assert gc(datasets_s=DAY_S)[0].items == []
    assert files.volume.dataset(fingerprint).exists()


# --- uploads ------------------------------------------------------------------------------


def uploaded(volume: Volume, letter: str, *contents: bytes, linked: bool = True) -> Path:
    """A data set as web/api/uploads.py stores it, uploaded long ago; returns its folder."""
    folder = volume.uploads / "datasets" / (letter * 32)
    for number, content in enumerate(contents):
        sha256 = hashlib.sha256(content).hexdigest()
        blob = volume.uploads / "blobs" / sha256[:2] / sha256
        blob.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            blob.write_bytes(content)
        if linked:
            folder.mkdir(parents=True, exist_ok=True)
            os.link(blob, folder / f"{number}.png")
    grow_old(volume.uploads)
    return folder


def blobs_of(volume: Volume) -> set[bytes]:
    return {path.read_bytes() for path in (volume.uploads / "blobs").rglob("*") if path.is_file()}


def test_an_upload_that_was_not_completed_can_be_resumed_for_a_day(volume: Volume, gc: Any) -> None:
    uploaded(volume, "a", b"of a data set")
    uploaded(volume, "b", b"of none", linked=False)
    part = next((volume.uploads / "blobs").iterdir()) / f"{'c' * 64}.part"
    part.write_bytes(b"half of")
    temp = volume.uploads / "datasets" / f".{'d' * 32}-0123abcd"
    temp.mkdir()
    assert [item.bytes for item in gc()[0].items] == [7]  # of the blob without a data set
    assert part.exists()
    grow_old(part)
    grow_old(temp)
    plan, _ = gc()
    assert set(reasons(plan).values()) == {Reason.UNFINISHED}
    assert not part.exists()
    assert not temp.exists()
    assert blobs_of(volume) == {b"of a data set"}


@pytest.mark.parametrize("how", ["queued", "kept", "ended just now", "touched"])
def test_an_uploaded_data_set_goes_on_request_when_no_job_needs_it(
    files: Files,
    volume: Volume,
    gc: Any,
    store: "JobStore",
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
    how: str,
) -> None:
    first, second = uploaded(volume, "a", b"one", b"both"), uploaded(volume, "b", b"both", b"two")
    spec = {"data": str(second), "size": 16}
    if how == "queued":
        job_factory(spec=spec)
    elif how != "touched":
        lease = running_job_factory(spec=spec)
        store.succeed(lease, {})
        if how == "kept":
            store.keep(lease.job_id, kept=True)
            files.ended_long_ago(lease.job_id)
    else:
        os.utime(second)
    assert gc()[0].items == []
    plan, _ = gc(datasets_s=DAY_S)
    assert [(item.path, item.reason, item.bytes) for item in plan.items] == [
        (f"uploads/datasets/{'a' * 32}", Reason.UPLOAD, 3)
    ]
    assert not first.exists()
    assert blobs_of(volume) == {b"both", b"two"}


def test_an_uploaded_data_set_that_is_submitted_since_it_was_planned_stays(
    database: Database, volume: Volume, job_factory: Callable[..., Job]
) -> None:
    used, touched = uploaded(volume, "a", b"one"), uploaded(volume, "b", b"two")
    garbage = Collector(database, volume, Policy(datasets_s=DAY_S))
    plan = garbage.plan()
    assert len(plan.items) == 2
    job_factory(spec={"data": str(used / "0.png"), "size": 16})
    os.utime(touched)
    assert [why for _, why in garbage.sweep(plan).kept] == ["a job reads it"] * 2
    assert used.exists()
    assert touched.exists()
    assert len(blobs_of(volume)) == 2


def test_a_data_set_that_a_job_opens_while_it_is_renamed_is_given_back(
    files: Files, database: Database, volume: Volume, decoded: Any, running_job_factory: Callable[..., Lease]
) -> None:
    from storage.datasets.cache import open_cached

    source, fingerprint = decoded
    garbage = Collector(database, volume, Policy(datasets_s=DAY_S))
    plan = garbage.plan()
    assert len(plan.items) == 1
    running_job_factory(spec={"data": source, "size": 16})
    swept = garbage.sweep(plan)
    assert swept.gone == []
    assert [why for _, why in swept.kept] == ["a job reads it"]
    assert open_cached(volume, fingerprint) is not None


# --- races --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gc_in_a_tight_loop_beside_claims_saves_crashes_and_rescues_takes_nothing_that_counts(
    files: Files,
    database: Database,
    volume: Volume,
    store: "JobStore",
    claim: Claimer,
    job_factory: Callable[..., Job],
) -> None:
    stopping = threading.Event()
    problems: list[str] = []

    def collect() -> None:
        while not stopping.is_set():
            garbage = Collector(database, volume, Policy(grace_s=0.0))
            swept = garbage.sweep(garbage.plan())
            problems.extend(f"{item.path}: {why}" for item, why in swept.failed)

    collectors = [threading.Thread(target=collect) for _ in range(2)]
    for one in collectors:
        one.start()
    try:
        deadline = time.monotonic() + 4
        rounds = 0
        while time.monotonic() < deadline:
            job_factory()
            lease = claim()
            own = [files.checkpoint(lease, epoch) for epoch in (1, 2)]
            stray = files.checkpoint(lease, 3, register=False)
            assert stray.exists(), "a running attempt is writing this"
            newest = volume.relative(own[1])
            older = [one.id for one in files.registered(lease.job_id) if one.path != newest]
            for gone in store.forget_checkpoints(lease, older):
                shutil.rmtree(volume.absolute(gone.path), ignore_errors=True)  # as the supervisor does
            if rounds % 2:
                store.requeue_lost(beat_of(store, lease.job_id), "silent")
            else:
                store.succeed(lease, {})
            assert own[1].exists()
            rounds += 1
    finally:
        stopping.set()
        for one in collectors:
            one.join(30)
    assert problems == []
    assert files.all_there()
    garbage = Collector(database, volume, Policy(grace_s=0.0))
    garbage.sweep(garbage.plan())
    assert garbage.plan().items == []
    assert list(volume.root.rglob(".trash-*")) == []


# --- F29: retention against a job that chooses -------------------------------------------


def generation(job_factory: Callable[..., Job], claim: Claimer, source: int, which: str) -> Lease:
    job_factory(kind="generate", spec={"source": source, "checkpoint": which, "count": 1}, priority=2**31 - 1)
    lease = claim()
    assert lease.job.kind == "generate"
    return lease


def test_a_checkpoint_that_is_let_go_between_choosing_and_pinning_is_chosen_again(
    files: Files,
    store: "JobStore",
    database: Database,
    running_job_factory: Callable[..., Lease],
    job_factory: Callable[..., Job],
    claim: Claimer,
) -> None:
    from storage.db.queries import Queries

    training = running_job_factory()
    files.checkpoint(training, 1)

    class Meanwhile(Queries):
        """The training saves, and lets the old one go, just after the choice."""

        saved = False

        def choose_checkpoint(self, job_id: Any, which: Any) -> Any:
            chosen = super().choose_checkpoint(job_id, which)
            if not self.saved:
                self.saved = True
                files.checkpoint(training, 2)
                for gone in store.forget_checkpoints(training, [chosen.id]):
                    shutil.rmtree(files.volume.absolute(gone.path))
            return chosen

    lease = generation(job_factory, claim, training.job_id, "last")
    pinned = make_assignment(lease, store, Meanwhile(database))["inputs"]["checkpoint"]
    assert pinned["epoch"] == 2
    assert files.volume.absolute(pinned["path"]).is_dir()


def test_retention_waits_for_a_pin_that_is_being_committed(
    files: Files,
    store: "JobStore",
    database: Database,
    running_job_factory: Callable[..., Lease],
    job_factory: Callable[..., Job],
    claim: Claimer,
) -> None:
    training = running_job_factory()
    files.checkpoint(training, 1)
    (row,) = files.registered(training.job_id)
    lease = generation(job_factory, claim, training.job_id, "last")
    let_go: list[object] = []
    forgetting = threading.Thread(
        target=lambda: let_go.extend(store.forget_checkpoints(training, [row.id])), daemon=True
    )
    with database.engine.begin() as conn:
        from sqlalchemy import update

        from storage.db.tables import job

        assert lock_checkpoints(conn, [row.id])
        forgetting.start()
        time.sleep(0.3)
        conn.execute(update(job).where(job.c.id == lease.job_id).values(inputs={"checkpoint_id": row.id}))
    forgetting.join(30)
    assert let_go == []
    assert [one.id for one in files.registered(training.job_id)] == [row.id]


def test_an_epoch_that_a_waiting_job_names_is_not_let_go(
    files: Files,
    store: "JobStore",
    running_job_factory: Callable[..., Lease],
    job_factory: Callable[..., Job],
) -> None:
    training = running_job_factory()
    for epoch in (1, 2, 3):
        files.checkpoint(training, epoch)
    one, two, _ = files.registered(training.job_id)
    spec = {"source": training.job_id, "checkpoint": "1", "count": 1}
    waiting = job_factory(kind="generate", spec=spec, held=True)
    assert [gone.epoch for gone in store.forget_checkpoints(training, [one.id, two.id])] == [2]
    store.request_cancel(waiting.id)
    assert [gone.epoch for gone in store.forget_checkpoints(training, [one.id])] == [1]


@pytest.mark.slow
def test_a_training_that_saves_at_every_step_never_takes_what_a_generation_has_pinned(
    files: Files,
    store: "JobStore",
    queries: "Queries",
    running_job_factory: Callable[..., Lease],
    job_factory: Callable[..., Job],
    make_identity: "Callable[..., WorkerIdentity]",
    claim: Claimer,
) -> None:
    training = running_job_factory()
    files.checkpoint(training, 1)
    stopping = threading.Event()

    def train() -> None:
        epoch = 1
        while not stopping.is_set():
            epoch += 1
            files.checkpoint(training, epoch)
            old = [one.id for one in files.registered(training.job_id)[:-1]]
            for gone in store.forget_checkpoints(training, old):
                shutil.rmtree(files.volume.absolute(gone.path))

    thread = threading.Thread(target=train)
    thread.start()
    pinned: list[Path] = []
    try:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            lease = generation(job_factory, claim, training.job_id, "last")
            order = make_assignment(lease, store, queries)
            pinned.append(files.volume.absolute(order["inputs"]["checkpoint"]["path"]))
            assert all((one / "MANIFEST.json").is_file() for one in pinned)
    finally:
        stopping.set()
        thread.join(30)
    assert len(pinned) > 5
