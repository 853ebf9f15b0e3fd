"""`ganq cancel`, `hold`, `release`, `retry`, `open`, `checkpoints`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.states import JobState

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore
    from storage.settings import Settings


def test_cancel_says_what_it_did_queued_or_running(
    ganq: "Ganq",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    running = running_job_factory()
    queued = job_factory(name="faces")
    said = ganq("cancel", running.job_id, "faces")
    assert said.code == 0
    assert f"job {running.job_id}: cancel requested" in said.out
    assert f"job {queued.id} (faces): cancelled" in said.out
    assert queries.get(queued.id).state is JobState.CANCELLED


def test_one_job_that_cannot_be_cancelled_keeps_no_other_from_it(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int], job_factory: "Callable[..., Job]"
) -> None:
    done = trained()
    job = job_factory()
    said = ganq("cancel", done, 99, job.id)
    assert said.code == 1
    assert queries.get(job.id).state is JobState.CANCELLED
    assert f"job {done} has already succeeded" in said.err
    assert "there is no job 99" in said.err
    told = ganq("cancel", 99, 98, "--json")
    assert told.code == 3
    assert [one["error"]["code"] for one in told.json()] == ["JOB_NOT_FOUND"] * 2


def test_hold_and_release(ganq: "Ganq", claim: "Claimer", job_factory: "Callable[..., Job]") -> None:
    job_factory()
    assert "held" in ganq("hold", 1).out
    assert claim.or_none() is None
    assert "released" in ganq("release", 1).out
    claim()
    said = ganq("hold", 1)
    assert said.code == 1
    assert "ganq pause 1" in said.err


def test_retry_makes_a_new_job_with_the_same_spec_and_name(
    ganq: "Ganq", queries: "Queries", trained: Callable[..., int]
) -> None:
    old = trained(name="faces", end="fail")
    said = ganq("retry", old, "--json")
    assert said.code == 0
    new = queries.get(said.json()[0]["id"])
    assert new.id != old
    assert "it now refers" not in said.err
    assert (new.retry_of, new.name, new.spec, new.state) == (
        old,
        "faces",
        queries.get(old).spec,
        JobState.QUEUED,
    )
    assert queries.get(old).state is JobState.FAILED
    assert f"job {old}" in ganq("status", new.id).out


def test_retry_says_that_a_name_leaves_a_job_with_results(ganq: "Ganq", trained: Callable[..., int]) -> None:
    old = trained(name="faces")
    assert f"faces was job {old} (succeeded); it now refers to job {old + 1}" in ganq("retry", old).err


def test_a_job_that_has_not_ended_cannot_be_retried(
    ganq: "Ganq", queries: "Queries", job_factory: "Callable[..., Job]"
) -> None:
    job_factory()
    said = ganq("retry", 1)
    assert said.code == 1
    assert "only an ended job" in said.err
    assert sum(queries.counts().values()) == 1


def test_a_retried_generation_waits_for_a_training_that_has_not_ended(
    ganq: "Ganq", queries: "Queries", store: "JobStore", job_factory: "Callable[..., Job]"
) -> None:
    source = job_factory()
    first = job_factory(kind="generate", spec={"source": source.id, "count": 1}, after=[source.id])
    store.request_cancel(first.id)
    new = ganq("retry", first.id, "--json").json()[0]["id"]
    assert [needed for needed, _ in queries.needs(new)] == [source.id]


def test_an_import_cannot_be_retried(ganq: "Ganq", store: "JobStore") -> None:
    store.add_finished(
        kind="import",
        spec={},
        spec_version=1,
        user="tester",
        name="old-weights",
        files=lambda job_id: ("jobs/000001/a1/checkpoints/epoch-0001", "0" * 64, 1, 1),
    )
    said = ganq("retry", "old-weights")
    assert said.code == 1
    assert "ganq import" in said.err


def test_open_prints_the_folder_of_the_images(
    ganq: "Ganq", trained: Callable[..., int], settings: "Settings"
) -> None:
    job_id = trained()
    samples = settings.volume / "jobs" / f"{job_id:06d}" / "a1" / "samples"
    (settings.volume / "jobs").mkdir(parents=True)
    said = ganq("open", job_id)
    assert said.code == 3, "the folder is not there: the volume may be another"
    assert "GANQ_VOLUME" in said.err
    samples.mkdir(parents=True)
    assert ganq("open", job_id, "--print").out == f"{samples}\n"
    assert ganq("open", job_id, "--json").json()["paths"]["samples"] == str(samples)


def test_open_of_a_job_without_results_is_not_found(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    job_factory()
    said = ganq("open", 1)
    assert said.code == 3
    assert "has no results yet" in said.err


def test_open_of_a_part_points_to_the_whole(
    ganq: "Ganq",
    settings: "Settings",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
) -> None:
    (settings.volume / "jobs").mkdir(parents=True)
    spec = {"source": 1, "count": 4}
    whole = job_factory(kind="generate", spec=spec, shards=[({**spec, "draws": [0, 3]}, 4)])
    part = claim()
    store.succeed(part, {"image_count": 4, "deleted_at": 1.0})
    said = ganq("open", part.job_id)
    assert said.code == 3
    assert f"job {part.job_id} (succeeded) is a shard of job {whole.id}" in said.err
    assert f"→ ganq open {whole.id}" in said.err


def test_checkpoints_are_listed_with_their_paths(
    ganq: "Ganq", trained: Callable[..., int], settings: "Settings", job_factory: "Callable[..., Job]"
) -> None:
    job_id = trained(epochs=6)
    path = settings.volume / "jobs" / f"{job_id:06d}" / "a1" / "checkpoints" / "epoch-0006"
    said = ganq("checkpoints", job_id)
    for part in ("6", "60", "final", "1.0 kB", str(path)):
        assert part in said.out
    assert ganq("checkpoints", job_id, "--json").json()[0]["absolute_path"] == str(path)
    assert "has no checkpoints" in ganq("checkpoints", job_factory().id).out
