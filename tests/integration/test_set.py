"""`ganq set` and `ganq retry --all-failed`, on both databases."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from jobs.errors import DatasetError, InvalidTransitionError

if TYPE_CHECKING:
    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore


def test_a_queued_and_a_running_job_get_another_name_with_an_event(
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    running = running_job_factory(name="old").job_id
    for job_id in (job_factory(name="old").id, running):
        assert store.rename(job_id, "new").name == "new"
        store.rename(job_id, "new")
        renames = [one.detail for one in queries.events(job_id) if one.type == "renamed"]
        assert renames == [{"from": "old", "to": "new"}]


def test_an_ended_job_keeps_its_name(store: "JobStore", running_job_factory: "Callable[..., Lease]") -> None:
    lease = running_job_factory(name="old")
    store.succeed(lease, {})
    with pytest.raises(InvalidTransitionError, match="already succeeded"):
        store.rename(lease.job_id, "new")


def test_failed_jobs_are_retried_once_and_their_dependants_with_them(
    store: "JobStore",
    queries: "Queries",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    from storage.db.queries import Filter
    from storage.db.resubmit import resubmit

    lease: Any = running_job_factory()
    waiting = job_factory(after=[lease.job_id])
    store.fail(lease, DatasetError("gone"))
    assert str(queries.get(waiting.id).state) == "failed"
    assert queries.to_retry(Filter()) == [lease.job_id]
    assert queries.to_retry(Filter(since=queries.now() + 60)) == []
    assert queries.to_retry(Filter(user="nobody")) == []
    resubmit(queries, store, queries.get(lease.job_id), user="tester")
    assert queries.to_retry(Filter()) == []
