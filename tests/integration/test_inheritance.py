"""A job that waits lends its priority to what it waits for, for claims and for preemption."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tables import Claimer, job_row, set_columns

from jobs.errors import DatasetError, InvalidTransitionError
from jobs.states import JobState
from storage.db.store import JobStore

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, WorkerIdentity
    from storage.volume.layout import Volume

KINDS = ("train", "generate", "evaluate")
FAILS = DatasetError("no images")


def priority(database: Any, job_id: int) -> int:
    return int(job_row(database, job_id)["priority"])


def claimed(claim: Any, store: JobStore) -> list[int]:
    """The order in which one worker runs all that can be run."""
    order = []
    while (lease := claim.or_none()) is not None:
        order.append(lease.job_id)
        store.succeed(lease, {})
    return order


def test_an_urgent_job_goes_before_what_is_between_it_and_the_job_that_it_waits_for(
    store: JobStore, job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    training = job_factory(priority=0)
    fillers = [job_factory(priority=5).id for _ in range(3)]
    urgent = job_factory(kind="generate", priority=10, after=[training.id])
    assert claimed(claim, store) == [training.id, urgent.id, *fillers]


def test_inherited_priority_reaches_through_a_chain_and_both_arms_of_a_fork(
    database: "Database",
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    root = job_factory()
    arms = [job_factory(after=[root.id]) for _ in range(2)]
    whole = job_factory(after=[one.id for one in arms])
    filler = job_factory(priority=5)
    urgent = job_factory(priority=10, after=[whole.id])
    needed = [root.id, *(one.id for one in arms), whole.id]
    assert {priority(database, one) for one in needed} == {10}
    assert claimed(claim, store) == [*needed, urgent.id, filler.id]


def test_the_shards_of_a_split_job_inherit_the_priority_of_the_parent(
    database: "Database",
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    training = job_factory()
    specs = [({"source": training.id, "count": 4}, 4)] * 4
    whole = job_factory(kind="generate", priority=1, after=[training.id], shards=specs, max_workers=2)
    filler = job_factory(priority=5)
    urgent = job_factory(kind="evaluate", priority=10, after=[whole.id])
    order = claimed(claim, store)
    assert order[0] == training.id
    assert order[-3:] == [whole.id, urgent.id, filler.id]
    assert len(order) == 8


def test_inherited_priority_ends_with_the_dependant(
    database: "Database",
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    root = job_factory()
    training = job_factory(after=[root.id])
    filler = job_factory(priority=5)
    urgent = job_factory(priority=10, after=[training.id])
    less = job_factory(priority=3, after=[training.id])
    assert [priority(database, one.id) for one in (root, training)] == [10, 10]
    store.request_cancel(urgent.id)
    assert [priority(database, one.id) for one in (root, training)] == [3, 3]
    store.request_cancel(less.id)
    assert [priority(database, one.id) for one in (root, training)] == [0, 0]
    assert claimed(claim, store) == [filler.id, root.id, training.id]


@pytest.mark.parametrize("way", ["cancel_many", "another need fails", "held"])
def test_inherited_priority_ends_however_the_dependant_ends(
    database: "Database",
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    way: str,
) -> None:
    training = job_factory()
    other = job_factory(priority=20)
    urgent = job_factory(priority=10, after=[training.id, other.id])
    assert priority(database, training.id) == 10
    if way == "cancel_many":
        assert list(store.cancel_many([urgent.id])) == [(urgent.id, True)]
    elif way == "held":
        store.hold(urgent.id, held=True)
    else:
        lease = claim()
        assert lease.job_id == other.id
        store.fail(lease, FAILS)
    assert priority(database, training.id) == 0
    if way == "held":
        store.hold(urgent.id, held=False)
        assert priority(database, training.id) == 10


def test_a_new_priority_reaches_the_shards_and_what_they_wait_for(
    database: "Database", store: JobStore, job_factory: "Callable[..., Job]"
) -> None:
    training = job_factory()
    shards = [({"source": training.id, "count": 4}, 4)] * 2
    whole = job_factory(kind="generate", priority=5, after=[training.id], shards=shards)
    ids = [training.id, whole.id, whole.id + 1, whole.id + 2]
    for level in (8, 2):
        assert store.set_priority(whole.id, level).own_priority == level
        assert [priority(database, one) for one in ids] == [level] * 4
    with pytest.raises(InvalidTransitionError):
        store.set_priority(whole.id + 1, 3)


def test_a_held_job_raises_no_priority_until_it_is_released(
    database: "Database", store: JobStore, job_factory: "Callable[..., Job]"
) -> None:
    training = job_factory()
    urgent = job_factory(priority=10, after=[training.id], held=True)
    assert priority(database, training.id) == 0
    store.hold(urgent.id, held=False)
    assert priority(database, training.id) == 10


def test_a_sweep_raises_the_priority_too(
    database: "Database", store: JobStore, job_factory: "Callable[..., Job]"
) -> None:
    training = job_factory()
    spec = {"data": "/pictures"}
    made = store.submit_sweep(
        [spec, spec],
        names=["a", "b"],
        submit_key="k",
        kind="train",
        spec_version=1,
        user="tester",
        priority=7,
        after=[training.id],
    )
    assert priority(database, training.id) == 7
    assert len(list(store.cancel_many(made.job_ids))) == 2
    assert priority(database, training.id) == 0


def test_a_running_training_that_an_urgent_job_waits_for_is_not_preempted_by_less(
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
) -> None:
    job_factory(preemptible=True)
    training = claim()
    urgent = job_factory(priority=10, after=[training.job_id])
    between = job_factory(priority=5)
    set_columns(store.database, between.id, created_at=1.0)
    assert store.request_preemption(training, worker_identity, kinds=KINDS) is None
    store.request_cancel(urgent.id)
    assert store.request_preemption(training, worker_identity, kinds=KINDS) == between.id


def test_a_running_training_is_preempted_by_what_an_urgent_job_waits_for(
    store: JobStore,
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    worker_identity: "WorkerIdentity",
) -> None:
    job_factory(preemptible=True)
    running = claim()
    needed = job_factory()
    assert store.request_preemption(running, worker_identity, kinds=KINDS) is None
    job_factory(priority=10, after=[needed.id])
    set_columns(store.database, needed.id, created_at=1.0)
    assert store.request_preemption(running, worker_identity, kinds=KINDS) == needed.id


def test_what_a_worker_pins_beside_it_keeps_the_own_priority(
    database: "Database",
    store: JobStore,
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
) -> None:
    """A worker of an older version merges what it pins with what it finds, and knows nothing of loans."""
    job_factory(priority=2)
    training = claim()
    urgent = job_factory(priority=10, after=[training.job_id])
    store.pin_inputs(training, {"fingerprint": "f"})
    found = queries.get(training.job_id)
    assert (found.priority, found.own_priority, (found.inputs or {})["fingerprint"]) == (10, 2, "f")
    store.request_cancel(urgent.id)
    assert priority(database, training.job_id) == 2


def test_status_shows_inherited_priority_and_retry_does_not_keep_it(
    store: JobStore,
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    settings_env: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    volume: "Volume",
) -> None:
    import json

    from cli.main import main

    training = job_factory(spec={"data": "/pictures", "size": 16})
    urgent = job_factory(priority=10, after=[training.id])
    assert main(["status", str(training.id)]) == 0
    assert f"priority 0, raised to 10 by job {urgent.id}" in capsys.readouterr().out
    assert main(["status", str(training.id), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["priority"], told["effective_priority"]) == (0, 10)
    store.fail(claim(), FAILS)
    assert main(["retry", str(training.id), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)[0]["id"]
    assert queries.get(again).priority == 0


def expected(rows: dict[int, Any], own: dict[int, int], needs: dict[int, list[int]]) -> dict[int, int]:
    """By the definition: the highest of the own and those of all that wait and are not held."""
    effective = dict(own)
    for one in sorted(rows, reverse=True):  # what waits is newer than what it waits for
        row = rows[one]
        if row.state is JobState.QUEUED and not row.held:
            for needed in needs.get(one, ()):
                if not rows[needed].state.terminal:
                    effective[needed] = max(effective[needed], effective[one])
    return effective


@pytest.mark.parametrize("seed", range(4))
def test_after_any_history_each_open_job_has_the_highest_priority_that_waits_for_it(
    store: JobStore,
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    claim: Claimer,
    seed: Any,
) -> None:
    dice = random.Random(seed)
    own: dict[int, int] = {}
    needs: dict[int, list[int]] = {}
    running: list[Any] = []
    for _ in range(60):
        rows = {one: queries.get(one) for one in own}
        alive = [one for one, row in rows.items() if row.state not in (JobState.FAILED, JobState.CANCELLED)]
        queued = [one for one, row in rows.items() if row.state is JobState.QUEUED]
        what = dice.choice(
            ["submit"] * 4 + ["cancel", "hold", "release", "claim", "succeed", "fail", "priority"]
        )
        if what == "submit":
            after = dice.sample(alive, min(len(alive), dice.randrange(3)))
            level = dice.randrange(10)
            held = dice.random() < 0.1
            made = job_factory(priority=level, after=after, held=held).id
            own[made], needs[made] = level, after
        elif what == "cancel" and queued:
            store.request_cancel(dice.choice(queued))
        elif what in ("hold", "release") and queued:
            store.hold(dice.choice(queued), held=what == "hold")
        elif what == "priority" and queued:
            chosen = dice.choice(queued)
            own[chosen] = dice.randrange(10)
            assert store.set_priority(chosen, own[chosen]).own_priority == own[chosen]
        elif what == "claim" and (lease := claim.or_none()) is not None:
            running.append(lease)
        elif what in ("succeed", "fail") and running:
            lease = running.pop(dice.randrange(len(running)))
            store.succeed(lease, {}) if what == "succeed" else store.fail(lease, FAILS)
        rows = {one: queries.get(one) for one in own}
        wanted = expected(rows, own, needs)
        found = {one: row.priority for one, row in rows.items() if not row.state.terminal}
        assert found == {one: wanted[one] for one in found}, what
