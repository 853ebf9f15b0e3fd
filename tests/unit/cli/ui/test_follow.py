"""`ganq wait`, `logs` and `events`."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ganq.polling import poll_delay_s
from jobs.errors import DatabaseUnavailableError, DatasetError

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore
    from storage.settings import Settings


@pytest.fixture
def attempt_log(settings: "Settings") -> Any:
    """The log of one attempt, to be written by the test."""
    from storage.volume.layout import Volume

    def path(job_id: Any, attempt: Any) -> Path:
        folder = Volume(settings.volume).attempt(job_id, attempt)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "log.txt"

    return path


def test_wait_is_0_when_all_have_succeeded(ganq: "Ganq", trained: Callable[..., int]) -> None:
    first, second = trained(), trained(name="faces")
    said = ganq("wait", first, "faces", "--json")
    assert said.code == 0
    assert [one["id"] for one in said.json()] == [first, second]


def test_wait_is_1_when_one_has_failed_and_says_why(
    ganq: "Ganq", trained: Callable[..., int], store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    good = trained()
    bad = running_job_factory()
    store.fail(bad, DatasetError("no images", hint="add images"))
    said = ganq("wait", good, bad.job_id)
    assert said.code == 1
    assert f"job {bad.job_id} has failed after 0 s: no images" in said.err
    assert "→ add images" in said.err
    assert f"job {good} has succeeded" in said.err


def test_wait_gives_up_after_its_timeout_with_124(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    job_factory()
    began = time.monotonic()
    said = ganq("wait", 1, "--timeout", 0.2)
    assert said.code == 124
    assert time.monotonic() - began < 5
    assert "still queued" in said.err


@pytest.mark.parametrize("timeout", ["nan", "inf", "-1", "1e10", "soon", ""])
def test_a_timeout_that_would_never_come_is_refused(
    ganq: "Ganq", job_factory: "Callable[..., Job]", timeout: str
) -> None:
    job_factory()
    said = ganq("wait", 1, "--timeout", timeout)
    assert said.code == 2
    assert f"{timeout!r} is not a number of seconds" in said.err


def test_wait_prints_a_line_for_each_change_and_not_for_each_look(
    ganq: "Ganq",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ganq.polling.POLL_S", (0.02, 0.02))
    lease = running_job_factory(name="faces")

    def work() -> None:
        for done in range(10):
            store.heartbeat(lease, {"done": done, "total": 10, "unit": "images", "rate": 1.0})
            time.sleep(0.03)
        store.succeed(lease, {})

    other = threading.Thread(target=work)
    other.start()
    said = ganq("wait", "faces")
    other.join()
    assert said.code == 0
    lines = said.err.splitlines()
    assert len(lines) == 2, "running, succeeded: the progress between is told every ten seconds only"
    assert "running" in lines[0]
    assert "has succeeded" in lines[1]


def test_wait_outlives_a_database_that_is_away(
    ganq: "Ganq", trained: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.db.queries import Queries

    trained()
    monkeypatch.setattr("ganq.polling.POLL_S", (0.01, 0.01))
    real = Queries.get_many
    calls: list[Any] = []

    def sometimes(self: Queries, job_ids: Any) -> Any:
        calls.append(job_ids)
        if len(calls) in (1, 2):
            raise DatabaseUnavailableError("the job table cannot be reached")
        return real(self, job_ids)

    monkeypatch.setattr(Queries, "get_many", sometimes)
    said = ganq("wait", 1)
    assert said.code == 0
    assert said.err.count("waiting for it") == 1


def test_logs_print_all_attempts_and_count_the_last_lines_over_them(
    ganq: "Ganq",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    claim: "Claimer",
    attempt_log: Any,
) -> None:
    lease = running_job_factory()
    store.release(lease, "drain")
    attempt_log(1, 1).write_text("first try\n")
    claim()
    attempt_log(1, 2).write_text("one\ntwo\n\x1b[2Jthree")
    said = ganq("logs", 1)
    assert said.out.index("attempt 1") < said.out.index("first try") < said.out.index("attempt 2")
    assert said.out.endswith("one\ntwo\n[2Jthree\n")
    assert ganq("logs", 1, "-n", 2).out == "two\n[2Jthree\n"
    assert ganq("logs", 1, "-n", 0).out == ""
    assert ganq("logs", 1, "-n", 4).out == said.out == ganq("logs", 1, "-n", 99).out
    assert ganq("logs", 1, "-n", 1, "--all").out.count("attempt") == 2


def test_the_last_lines_of_a_long_log_are_found_from_its_end(
    ganq: "Ganq", running_job_factory: "Callable[..., Lease]", attempt_log: Any
) -> None:
    running_job_factory()
    attempt_log(1, 1).write_text("".join(f"line {n} {'x' * 200}\n" for n in range(2000)))
    lines = ganq("logs", 1, "-n", 700).out.splitlines()
    assert len(lines) == 700
    assert lines[0].startswith("line 1300 ")


def test_logs_of_a_job_that_has_not_begun_or_left_none_say_so(
    ganq: "Ganq",
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
) -> None:
    job_factory()
    said = ganq("logs", 1)
    assert (said.code, said.out) == (0, "")
    assert "has not started" in said.err
    claim()
    (settings.volume / "jobs").mkdir(parents=True)
    assert "has no log" in ganq("logs", 1).err


def test_logs_follow_from_one_attempt_into_the_next_until_the_end(
    ganq: "Ganq",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
    attempt_log: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ganq.logs.POLL_S", 0.02)
    job_factory()

    def work() -> None:
        time.sleep(0.1)
        lease = claim()
        attempt_log(1, 1).write_text("begun\n")
        time.sleep(0.1)
        store.release(lease, "drain")
        time.sleep(0.1)
        lease = claim()
        with open(attempt_log(1, 2), "a") as file:
            file.write("again\nhalf a ")
            file.flush()
            time.sleep(0.1)
            file.write("line\nlast words")
        store.succeed(lease, {})

    other = threading.Thread(target=work)
    other.start()
    said = ganq("logs", 1, "-f")
    other.join()
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line for line in lines if not line.startswith("---")] == [
        "begun",
        "again",
        "half a line",
        "last words",
    ]
    assert "has ended: succeeded" in said.err


def test_events_list_the_history_in_order(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    store.succeed(running_job_factory(), {})
    said = ganq("events", 1)
    kinds = [one["type"] for one in ganq("events", 1, "--json").json()]
    assert kinds == ["submitted", "claimed", "succeeded"]
    assert [line.split("  ")[1] for line in said.out.splitlines()] == kinds


def test_a_short_job_is_looked_at_often_and_a_long_one_seldom() -> None:
    assert poll_delay_s(0.0) == 0.02
    assert poll_delay_s(3600.0) == 0.5
    waited, looks = 0.0, 0
    while waited < 60:
        waited += poll_delay_s(waited)
        looks += 1
    assert looks < 180, "a minute costs few questions"
