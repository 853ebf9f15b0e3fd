"""Notes and labels of jobs, on both databases."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from tables import Claimer, event_types

from jobs.errors import InvalidTransitionError, SpecError
from jobs.labels import read_filters, read_label
from storage.db.queries import Filter
from storage.db.resubmit import resubmit
from storage.db.store.waiting import Extras

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore


def labelled(**labels: str) -> Extras:
    return Extras(labels=labels)


def test_jobs_are_found_by_all_labels_that_are_given(
    queries: "Queries", job_factory: "Callable[..., Job]"
) -> None:
    first = job_factory(extras=labelled(project="faces", stage="one")).id
    second = job_factory(extras=labelled(project="faces")).id
    job_factory()

    def found(*filters: str) -> list[int]:
        return sorted(queries.ids(Filter(labels=read_filters(filters))))

    assert found("project=faces") == found("project") == [first, second]
    assert found("project=faces", "stage") == [first]
    assert found("project=face") == found("project=faces", "stage=two") == []
    assert queries.labels_of([first, second, 3]) == {
        first: {"project": "faces", "stage": "one"},
        second: {"project": "faces"},
    }
    assert queries.label_texts(10) == ["project=faces", "stage=one"]


def test_labels_and_notes_change_in_any_state_with_an_event_for_each_change(
    database: "Database", store: "JobStore", queries: "Queries", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(extras=labelled(project="faces"))
    store.set_labels(lease.job_id, {"project": "birds", "new": "1"})
    store.succeed(lease, {})
    store.set_labels(lease.job_id, {"project": None, "new": "1"})
    assert queries.labels_of([lease.job_id]) == {lease.job_id: {"new": "1"}}
    assert store.set_note(lease.job_id, "the good one").note == "the good one"
    store.set_note(lease.job_id, "the good one")
    assert store.set_note(lease.job_id, "").note is None
    types = [one for one in event_types(database, lease.job_id) if one.endswith("changed")]
    assert types == ["labels_changed"] * 2 + ["note_changed"] * 2


def test_a_shard_has_the_labels_of_its_parent(
    store: "JobStore", job_factory: "Callable[..., Job]", claim: Claimer
) -> None:
    spec = {"source": 1, "count": 4}
    job_factory(kind="generate", spec=spec, shards=[({**spec, "draws": [0, 3]}, 4)])
    with pytest.raises(InvalidTransitionError, match="is a shard of job 1"):
        store.set_labels(claim().job_id, {"a": "b"})


def test_a_retried_job_keeps_its_labels_and_its_note(
    store: "JobStore", queries: "Queries", job_factory: "Callable[..., Job]"
) -> None:
    old = job_factory(extras=Extras(note="mine", labels={"project": "faces"}))
    store.request_cancel(old.id)
    new = resubmit(queries, store, queries.get(old.id), user="tester")
    assert (new.note, queries.labels_of([new.id])[new.id]) == ("mine", {"project": "faces"})


def test_a_second_submit_with_the_key_adds_no_label(
    queries: "Queries", job_factory: "Callable[..., Job]"
) -> None:
    known = [job_factory(submit_key="k", extras=labelled(a="b")).id for _ in range(2)]
    assert known[0] == known[1]
    assert queries.labels_of(known) == {known[0]: {"a": "b"}}


@pytest.mark.parametrize(
    "text", ["", "=x", "a", "a b=c", "-a=b", "a=b\nc", "a=" + "x" * 257, "k" * 64 + "=v"]
)
def test_what_is_no_label_is_refused(text: Any) -> None:
    with pytest.raises(SpecError):
        read_label(text)
