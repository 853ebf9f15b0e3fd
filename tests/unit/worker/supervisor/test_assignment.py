"""The inputs of a job are pinned at its first attempt."""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from tables import Claimer, recorded, set_columns

from jobs.errors import CheckpointNotFoundError, NotFoundError
from storage.db.rows import Checkpoint
from worker.supervisor.assignment import evenly_spaced, make_assignment

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore


def row(id: int, kind: str, epoch: int, metric: float | None = None) -> Checkpoint:
    return Checkpoint(
        id, 1, 1, kind, epoch, epoch * 10, f"jobs/000001/a1/checkpoints/{id}", "0", 1, metric, 0.0
    )


def test_a_generation_reads_the_checkpoint_that_its_first_attempt_chose(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = running_job_factory()

    def save(epoch: int) -> None:
        store.register_checkpoint(
            training,
            kind="epoch",
            epoch=epoch,
            step=epoch,
            path=f"p{epoch}",
            manifest_sha256="0" * 64,
            size=1,
        )

    save(1)
    spec = {"source": training.job_id, "checkpoint": "last", "count": 4}
    lease = None
    job_factory(kind="generate", spec=spec, priority=9)
    lease = claim()
    assert make_assignment(lease, store, queries)["inputs"]["checkpoint"]["epoch"] == 1
    save(2)
    store.release(lease, "drain")
    again = claim()
    assert again.attempt == 2
    assert make_assignment(again, store, queries)["inputs"]["checkpoint"]["epoch"] == 1


def test_a_run_that_starts_from_another_reads_what_was_best_when_its_first_attempt_began(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = running_job_factory()

    def save(lease: Any, epoch: int) -> None:
        store.register_checkpoint(
            lease,
            kind="epoch",
            epoch=epoch,
            step=epoch,
            path=f"p{lease.job_id}-{epoch}",
            manifest_sha256="0" * 64,
            size=1,
        )

    save(training, 1)
    job_factory(kind="train", spec={"init_from": training.job_id}, priority=9)
    lease = claim()
    assert make_assignment(lease, store, queries)["inputs"]["checkpoint"]["epoch"] == 1
    save(training, 2)
    store.release(lease, "drain")
    again = claim()
    assert (again.job_id, again.attempt) == (lease.job_id, 2)
    assert make_assignment(again, store, queries)["inputs"]["checkpoint"]["epoch"] == 1
    pinned = queries.checkpoints(training.job_id)[0]
    assert store.forget_checkpoints(training, [pinned.id]) == [], "a start that may be read again stays"


def test_a_grid_of_epochs_reads_those_that_were_kept_when_its_first_attempt_began(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = running_job_factory()

    def save(epoch: int, kind: str = "epoch") -> None:
        store.register_checkpoint(
            training, kind=kind, epoch=epoch, step=epoch, path=f"p{epoch}", manifest_sha256="0" * 64, size=1
        )

    for epoch in (5, 10, 15):
        save(epoch)
    save(16, "resume")
    store.forget_checkpoints(training, [queries.checkpoints(training.job_id)[1].id])
    job_factory(kind="generate", spec={**SPEC, "source": training.job_id}, priority=9)
    lease = claim()
    first = make_assignment(lease, store, queries)["inputs"]
    assert [one["epoch"] for one in first["checkpoints"]] == [5, 15]
    assert first["checkpoint"]["epoch"] == 16
    save(20)
    store.release(lease, "drain")
    assert make_assignment(claim(), store, queries)["inputs"] == first


SPEC = {"checkpoint": "last", "count": 4, "grid_epochs": True}


def test_many_epochs_are_thinned_evenly_and_one_step_has_one_row() -> None:
    rows = [row(n, "epoch", n * 5) for n in range(1, 101)]
    shown = [one.id for one in evenly_spaced([*rows, row(101, "final", 500)], 12)]
    assert (len(shown), shown[0], shown[-1]) == (12, 1, 101)
    assert {later - one for one, later in pairwise(shown[:-1])} == {9}
    assert [one.id for one in evenly_spaced(rows[:3], 12)] == [1, 2, 3]


def test_a_generation_without_a_checkpoint_to_read_is_refused(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = running_job_factory()
    job_factory(
        kind="generate", spec={"source": training.job_id, "checkpoint": "best", "count": 1}, priority=9
    )
    with pytest.raises(CheckpointNotFoundError):
        make_assignment(claim(), store, queries)


def test_a_training_gets_its_checkpoints_newest_first(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    claim: Claimer,
) -> None:
    lease = running_job_factory()
    for step in (1, 2, 3):
        store.register_checkpoint(
            lease, kind="epoch", epoch=step, step=step, path=f"p{step}", manifest_sha256="0" * 64, size=1
        )
    store.release(lease, "drain")
    assert [one["step"] for one in make_assignment(claim(), store, queries)["checkpoints"]] == [3, 2, 1]


def test_a_first_attempt_does_not_ask_for_checkpoints_that_it_cannot_have(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    job_factory()
    lease = claim()
    with recorded(database) as asked:
        assert make_assignment(lease, store, queries)["checkpoints"] == []
    assert not any("checkpoint" in statement for statement, _ in asked)


def evaluation(source: int | None, **changes: Any) -> dict[str, Any]:
    return {"source": source, "path": None, "checkpoint": "best", "data": "/pictures", "size": 16, **changes}


def test_an_evaluation_reads_the_checkpoint_and_the_images_of_the_training(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = running_job_factory(spec={"data": "/pictures", "size": 16})
    store.pin_inputs(training, {"fingerprint": "f" * 64})
    store.register_checkpoint(
        training, kind="final", epoch=4, step=4, path="p", manifest_sha256="0" * 64, size=1
    )
    store.succeed(training, {})
    job_factory(kind="evaluate", spec=evaluation(training.job_id))
    inputs = make_assignment(claim(), store, queries)["inputs"]
    assert (inputs["checkpoint"]["epoch"], inputs["fingerprint"]) == (4, "f" * 64)
    job_factory(kind="evaluate", spec=evaluation(training.job_id, data="/others"))
    assert "fingerprint" not in make_assignment(claim(), store, queries)["inputs"]
    job_factory(kind="evaluate", spec=evaluation(None, path="/made"))
    assert make_assignment(claim(), store, queries)["inputs"] == {}


def test_an_evaluation_of_a_generation_reads_the_attempt_that_was_published(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = running_job_factory(spec={"data": "/pictures", "size": 16})
    store.pin_inputs(training, {"fingerprint": "f" * 64})
    store.succeed(training, {})
    drawing = running_job_factory(kind="generate", spec={"source": training.job_id, "checkpoint": "best"})
    store.succeed(drawing, {"manifest_sha256": "1" * 64})
    job_factory(kind="evaluate", spec=evaluation(drawing.job_id))
    lease = claim()
    inputs = make_assignment(lease, store, queries)["inputs"]
    assert inputs["pictures"] == {"job_id": drawing.job_id, "attempt": 1, "manifest_sha256": "1" * 64}
    assert inputs["fingerprint"] == "f" * 64
    assert queries.get(lease.job_id).inputs == inputs


def test_an_evaluation_of_deleted_images_is_refused(
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = running_job_factory(spec={})
    store.succeed(training, {})
    drawing = running_job_factory(kind="generate", spec={"source": training.job_id, "checkpoint": "best"})
    store.succeed(drawing, {"manifest_sha256": "1" * 64, "deleted_at": 1.0})
    job_factory(kind="evaluate", spec=evaluation(drawing.job_id))
    with pytest.raises(NotFoundError, match="has no images"):
        make_assignment(claim(), store, queries)


def test_only_the_parent_of_a_split_job_reads_its_shards(
    database: "Database",
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    model = running_job_factory()
    store.register_checkpoint(
        model, kind="final", epoch=1, step=1, path="p", manifest_sha256="0" * 64, size=1
    )
    store.succeed(model, {})
    spec = {"source": model.job_id, "checkpoint": "last", "count": 4}
    whole = job_factory(kind="generate", spec=spec, shards=[({**spec, "draws": [0, 3]}, 4)])

    part = claim()
    assert part.job.part_of == whole.id
    assert make_assignment(part, store, queries)["shards"] == []
    store.succeed(part, {"manifest_sha256": "1" * 64})
    gathering = claim()
    assert gathering.job_id == whole.id
    assert make_assignment(gathering, store, queries)["shards"] == [
        {"job_id": part.job_id, "attempt": 1, "manifest_sha256": "1" * 64, "draws": [0, 3], "build": None}
    ]

    archives = [{"archive": "shard-00000.tar", "bytes": 1, "sha256": "0"}]
    files: dict[str, Any] = {"image_count": 4, "bytes": 400, "manifest_bytes": 90, "archives": archives}
    set_columns(database, part.job_id, result={"manifest_sha256": "1" * 64, "warning": "collapsed", **files})
    (pointer,) = make_assignment(gathering, store, queries)["shards"]
    images = files.pop("image_count")
    assert (pointer["files"], pointer["all_equal"]) == ({"images": images, **files}, True)

    training = running_job_factory()
    with recorded(database) as seen:
        make_assignment(training, store, queries)
    assert seen == [], "all that a first attempt of a training needs stands in its row"
