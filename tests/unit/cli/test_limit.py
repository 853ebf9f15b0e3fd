"""`ganq limit`: set, listed, taken away; and what it cannot take."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.rows import Job


def test_a_limit_is_set_held_listed_and_taken_away(
    ganq: "Ganq", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    for _ in range(3):
        job_factory(user="ada")
    assert ganq("limit").out.startswith("no limits")
    assert "user ada: at most 1 running job" in ganq("limit", "--user", "ada", 1).out
    claim()
    assert claim.or_none() is None
    assert ganq("limit", "--json").json() == [
        {"scope": "user", "name": "ada", "max_running": 1, "running": 1}
    ]
    assert ganq("limit", "--user", "ada", 2, "--json").json()["max_running"] == 2
    claim()
    assert claim.or_none() is None
    assert "no limit" in ganq("limit", "--user", "ada", "none").out
    claim()


def test_a_limit_of_nothing_stops_a_queue(
    ganq: "Ganq", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    job_factory()
    assert ganq("limit", "--queue", "default", 0).code == 0
    assert claim.or_none() is None


def test_a_job_that_a_limit_keeps_from_starting_says_so_and_doctor_names_a_limit_of_nothing(
    ganq: "Ganq", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    for _ in range(2):
        job_factory(user="ada")
    ganq("limit", "--user", "*", 1)
    claim()
    place = "next, when its limit permits: user ada: 1 running, limit 1"
    assert place in ganq("status", 2).out
    assert "whose limit is 0" not in ganq("doctor").out
    ganq("limit", "--user", "ada", 0)
    assert "user ada: 1 running, limit 0" in ganq("status", 2).out
    said = ganq("doctor").out
    assert "1 queued job of the user ada, whose limit is 0" in said
    assert "ganq limit --user ada none" in said
    ganq("limit", "--user", "ada", "none")
    ganq("limit", "--user", "*", "none")
    assert "limit" not in ganq("status", 2).out


def test_jobs_of_another_queue_are_not_before_one(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    job_factory(queue="other")
    job = job_factory()
    assert "in the queue  next" in ganq("status", job.id).out


def test_a_limit_for_each_counts_the_fullest(
    ganq: "Ganq", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    for user in ("ada", "ada", "ben", "cem"):
        job_factory(user=user)
    ganq("limit", "--user", "*", 1)
    ganq("limit", "--user", "ada", 2)
    assert len([lease for lease in (claim.or_none() for _ in range(5)) if lease]) == 4
    listed = {one["name"]: one["running"] for one in ganq("limit", "--json").json()}
    assert listed == {"ada": 2, "*": 1}


@pytest.mark.parametrize(
    "typed",
    [
        ("--user", "ada"),
        (2,),
        ("--user", "ada", "--queue", "default", 2),
        ("--user", "ada", "two"),
        ("--user", "ada", "1000001"),
        ("--user", "a\tb", 2),
    ],
)
def test_what_is_no_limit_is_reported_in_one_line(ganq: "Ganq", typed: Any) -> None:
    said = ganq("limit", *typed)
    assert said.code == 2
    assert said.err.startswith("error: ")
