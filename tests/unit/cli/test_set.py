"""`ganq set` and `ganq retry --all-failed`: what is printed and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ganq as api
from jobs.errors import DatasetError

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore


def test_a_priority_reaches_the_job_that_it_waits_for(
    ganq: "Ganq", queries: "Queries", job_factory: "Callable[..., Job]"
) -> None:
    needed = job_factory().id
    waiting = job_factory(after=[needed]).id
    said = ganq("set", waiting, "--priority", 20, "--name", "soon")
    assert (said.code, said.out) == (0, f"job {waiting} (soon): name soon, priority 20\n")
    assert (queries.get(waiting).own_priority, queries.get(needed).priority) == (20, 20)
    assert (queries.get(needed).own_priority, queries.get(waiting).name) == (0, "soon")


@pytest.mark.parametrize(
    "options", [(), ("--name", "a b"), ("--name", "7"), ("--priority", "5000"), ("2", "--name", "a")]
)
def test_what_cannot_be_set_is_refused(
    ganq: "Ganq", queries: "Queries", job_factory: "Callable[..., Job]", options: tuple[str, ...]
) -> None:
    for _ in range(2):
        job_factory()
    assert ganq("set", 1, *options).code == 2
    assert [queries.get(one).name for one in (1, 2)] == [None, None]


def test_all_failed_jobs_are_retried_once(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    for _ in range(2):
        store.fail(running_job_factory(), DatasetError("gone"))
    assert [one["id"] for one in ganq("retry", "--all-failed", "--since", "1d", "--json").json()] == [3, 4]
    assert "no job matches" in ganq("retry", "--all-failed").out
    assert ganq("retry").code == ganq("retry", 1, "--all-failed").code == 2
    assert ganq("retry", 1, "--since", "1d").code == 2


def test_python_sets_too(settings_env: dict[str, str], image_folder: Path) -> None:
    with api.connect() as client:
        job: Any = client.train(data=image_folder).set(priority=7, name="faces")
        assert (job.name, job._row.own_priority) == ("faces", 7)
        with pytest.raises(api.GanqError):
            job.set(name="a b")
