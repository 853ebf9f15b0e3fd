"""`ganq pause` and `resume`: what they say of jobs in each state, and which jobs the filters select."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tables import beat_of

import ganq as api
from jobs.errors import DiskFullError
from jobs.states import StopReason

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore


def test_pause_says_what_it_did_to_queued_and_running_jobs(
    ganq: "Ganq",
    queries: "Queries",
    store: "JobStore",
    claim: "Claimer",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    lease = running_job_factory(name="faces")
    job_factory()
    said = ganq("pause", 1, 2, "--reason", "demo")
    assert said.code == 0
    assert "job 1 (faces): pause requested: " in said.out
    assert "saves a checkpoint and stops; ganq resume 1 continues it" in said.out
    assert "job 2: held; ganq resume 2 lets it start" in said.out
    assert ganq("status", 1, "--json").json()["status"] == "pausing"
    assert store.stop_requests(lease).pause
    store.release(lease, StopReason.PAUSE)
    assert ganq("status", 1, "--json").json()["status"] == "paused"
    shown = ganq("status", 1).out
    assert "ago: demo" in shown
    assert "→ ganq resume 1 continues it" in shown
    assert ganq("status", 1, "--json").json()["hold"]["reason"] == "demo"
    assert claim.or_none() is None
    assert "job 1 (faces): resumed" in ganq("resume", 1).out
    assert claim().job_id == 1
    assert [(one.type, (one.detail or {}).get("reason")) for one in queries.events(1)][2:5] == [
        ("pause_requested", "demo"),
        ("requeued", "pause"),
        ("hold_released", None),
    ]


@pytest.mark.parametrize("how", ["lost", "crashed", "retried", "drained"])
def test_a_job_that_is_being_paused_is_held_however_its_attempt_ends(
    ganq: "Ganq",
    store: "JobStore",
    claim: "Claimer",
    running_job_factory: "Callable[..., Lease]",
    how: str,
) -> None:
    lease = running_job_factory()
    ganq("pause", 1)
    if how == "lost":
        store.requeue_lost(beat_of(store, 1), "silent")
    elif how == "crashed":
        store.crashed(lease, "killed")
    elif how == "retried":
        store.fail(lease, DiskFullError("full"))
    else:
        store.release(lease, StopReason.DRAIN)
    assert ganq("status", 1, "--json").json()["status"] == "paused"
    assert claim.or_none() is None


def test_a_pause_can_be_withdrawn_and_an_ended_job_cannot_be_paused(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    assert "only a queued job" in ganq("resume", 1).err, "it is not paused"
    ganq("pause", 1)
    assert "resumed" in ganq("resume", 1).out
    assert not store.stop_requests(lease).pause
    store.succeed(lease, {})
    said = ganq("pause", 1)
    assert (said.code, "already succeeded" in said.err) == (1, True)
    assert ganq("pause", 9).code == 3


def test_filters_select_what_can_be_paused_or_resumed_and_a_dry_run_changes_nothing(
    ganq: "Ganq",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    running_job_factory()
    job_factory(user="ada")
    ganq("hold", job_factory(user="ada").id)
    assert ganq("pause", "--all", "--user", "ada", "--dry-run").out == "would pause job 2: queued\n"
    dry = ganq("pause", "--all", "--dry-run", "--json").json()
    assert [(one["id"], one["would"]) for one in dry] == [(2, "pause"), (1, "pause")]
    assert [queries.get(one).held for one in (1, 2, 3)] == [False, False, True]
    assert [one["id"] for one in ganq("pause", "--all", "--json").json()] == [2, 1]
    assert [one["id"] for one in ganq("resume", "--all", "--json").json()] == [3, 2, 1]
    assert "no job matches" in ganq("resume", "--all").out
    assert ganq("pause").code == ganq("resume", 1, "--all").code == 2
    assert ganq("hold", "--all", "--dry-run").out.count("would hold") == 2, "not the running one"
    assert "would cancel job 1: running" in ganq("cancel", 1, "--dry-run").out
    assert queries.get(1).cancel_requested_at is None


def test_waiting_for_a_pause_gives_up_and_keeps_the_request(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    said = ganq("pause", 1, "--wait", "--timeout", "0")
    assert said.code == 124
    assert "has not stopped yet" in said.err
    assert store.stop_requests(lease).pause


def test_pausing_a_split_generation_stops_its_shards_and_keeps_those_that_have_ended(
    ganq: "Ganq", store: "JobStore", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    spec = {"source": 1, "count": 12}
    shards = [({**spec, "draws": [first, first + 3]}, 4) for first in (0, 4, 8)]
    whole = job_factory(kind="generate", spec=spec, shards=shards)
    first, second = claim(), claim()
    store.succeed(first, {"image_count": 4})
    assert "generates the other shards" in ganq("pause", whole.id).out
    assert store.stop_requests(second).pause
    assert ganq("status", whole.id, "--json").json()["status"] == "pausing"
    store.release(second, StopReason.PAUSE)
    assert ganq("status", whole.id, "--json").json()["status"] == "paused"
    assert "4/12 images" in ganq("status", whole.id).out
    assert claim.or_none() is None
    assert "ganq pause 1" in ganq("pause", second.job_id).err
    ganq("resume", whole.id)
    assert {claim().job_id, claim().job_id} == {second.job_id, second.job_id + 1}


def test_python_pauses_too(settings_env: dict[str, str], image_folder: Path) -> None:
    with api.connect() as client:
        job = client.train(data=image_folder).pause(reason="demo", wait=1.0)
        assert job.status == "held"
        assert job.resume().status == "queued"
