"""Retention of checkpoints."""

import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pytest
from volumes import Files

from storage.db.rows import Checkpoint
from storage.volume.layout import Volume
from worker.supervisor import retention
from worker.supervisor.retention import Retention, prunable

if TYPE_CHECKING:
    from storage.db.queries import Queries
    from storage.db.rows import Lease
    from storage.db.store import JobStore


def row(id: int, kind: str, epoch: int, metric: float | None = None) -> Checkpoint:
    return Checkpoint(
        id, 1, 1, kind, epoch, epoch * 10, f"jobs/000001/a1/checkpoints/{id}", "0", 1, metric, 0.0
    )


def gone(rows: list[Checkpoint], **policy: int) -> list[int]:
    return [one.id for one in prunable(rows, **{"keep_last": 2, "keep_every": 0, **policy})]


def test_the_last_epochs_stay_and_older_ones_go() -> None:
    assert gone([row(n, "epoch", n * 5) for n in range(1, 6)]) == [1, 2, 3]


def test_a_resume_point_is_deleted_when_a_newer_checkpoint_is_there() -> None:
    assert gone([row(1, "resume", 1), row(2, "resume", 2)]) == [1]
    assert gone([row(1, "resume", 1), row(2, "epoch", 5)]) == [1]


def test_the_newest_checkpoint_always_stays() -> None:
    assert gone([row(1, "resume", 1)]) == []


def test_every_mth_epoch_the_best_and_the_final_stay() -> None:
    rows = [row(n, "epoch", n * 5, metric=abs(n - 3)) for n in range(1, 9)] + [row(9, "final", 40)]
    assert gone(rows, keep_every=20) == [1, 2, 5, 6]


def test_an_import_is_never_pruned() -> None:
    assert gone([row(1, "import", 0), row(2, "epoch", 1)]) == []


def test_the_k_best_of_the_measured_epochs_stay() -> None:
    rows = [row(n, "epoch", n * 5, metric=abs(n - 3)) for n in range(1, 8)] + [row(8, "epoch", 40)]
    assert gone(rows, keep_best=0) == [1, 2, 3, 4, 5, 6]
    assert gone(rows) == [1, 2, 4, 5, 6]
    assert gone(rows, keep_best=3) == [1, 5, 6]


def test_the_best_are_those_that_were_measured() -> None:
    rows = [row(n, "epoch", n * 5) for n in range(1, 6)]
    assert gone(rows, keep_best=5) == [1, 2, 3]


def test_of_the_folders_that_go_the_newest_outlives_its_row_for_a_stated_time(
    store: "JobStore",
    queries: "Queries",
    volume: Volume,
    running_job_factory: "Callable[..., Lease]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A standby that lacks the last commits still has its row."""
    files, lease = Files(store, volume), running_job_factory()

    def delete(job_id: int, paths: Sequence[str]) -> None:
        for path in paths:
            shutil.rmtree(volume.absolute(path))

    going = Retention(store, queries, delete)
    first = files.checkpoint(lease, 1, kind="resume")
    second = files.checkpoint(lease, 2, kind="resume")
    assert going.prune(lease) == [volume.relative(first)]
    going.delete_due()
    assert [one.epoch for one in queries.checkpoints(lease.job_id)] == [2]
    assert first.is_dir()

    monkeypatch.setattr(retention, "KEEP_PREVIOUS_S", 0.0)
    third = files.checkpoint(lease, 3, kind="resume")
    assert going.prune(lease) == [volume.relative(second)]
    assert not first.exists(), "one folder is kept, however fast checkpoints follow each other"
    assert second.is_dir()
    going.delete_due()
    assert not second.exists()
    assert third.is_dir()
