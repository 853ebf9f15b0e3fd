"""Two installations on one Redis database do not take each other's notifications."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from machine import Ganq, until
from messages import notification
from services import Postgres
from sqlalchemy import text

from worker.celery_bridge.app import queue_key

# Where an idle worker looks at the table every few minutes only, a job that starts at once was notified.
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("backend", ["postgres"], indirect=True)]
PATIENT = {"GANQ_POLL_SECONDS": "300", "GANQ_RING_AGAIN_SECONDS": "300"}


def be(ganq: Ganq, installation: str) -> None:
    """Test databases are copies of one: give this one an id of its own, as `ganq db upgrade` does."""
    values = {"new": installation}
    ganq.table.write(lambda conn: conn.execute(text("UPDATE schema_info SET installation = :new"), values))


@pytest.fixture
def other(
    ganq: Ganq, postgres: Postgres, _postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ganq]:
    """A second installation on the same Redis: its own job table, home and volume."""
    home: Path = tmp_path_factory.mktemp("other")
    name = postgres.create(template=_postgres_template)
    own = {"GANQ_HOME": str(home), "GANQ_VOLUME": str(home / "v"), "GANQ_DATABASE_URL": postgres.url(name)}
    second = Ganq({**ganq.env, **PATIENT, **own}, home)
    yield second
    second.stop()
    postgres.drop(name)


@pytest.mark.tier2
def test_each_installation_receives_its_own_notifications_alone(
    ganq: Ganq, other: Ganq, redis_url: str, small: list[str]
) -> None:
    ganq.env |= PATIENT
    be(ganq, "aaaa0001")
    be(other, "bbbb0002")
    for one in (other, ganq):  # who waits longest at a list is served first
        one.start_worker()
        until(one.present, what="the worker")
    with redis.Redis.from_url(redis_url) as client:
        until(lambda: len(client.client_list()) > 4, what="two workers that listen")
        for one in (ganq, ganq, other, ganq):
            done = one.run("submit", "train", *small, "--epochs", "1", "--wait")
            assert done.returncode == 0, done.stderr  # within the time of run(), shorter than a poll
        assert not [key for key in client.keys("ganq.*") if client.llen(key)]


@pytest.mark.tier2_on("postgres")
def test_a_worker_still_understands_a_command_of_the_previous_version(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    """Until all are upgraded: version 0.2.0 and older have one list for all installations."""
    ganq.env |= PATIENT
    ganq.start_worker()
    until(ganq.present, what="the worker")
    job = ganq.json("submit", "train", *small, "--epochs", "1", "--hold")["id"]
    ganq.table.write(lambda conn: conn.execute(text("UPDATE job SET held = 0 WHERE id = :id"), {"id": job}))
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(queue_key("default"), notification(job))
    assert ganq.run("wait", str(job), "--timeout", "60").returncode == 0


def test_the_keys_of_an_installation_fit_the_acl(backend: str) -> None:
    assert queue_key("default", "aaaa0001") == "ganq.aaaa0001.default"
    assert queue_key("default") == "ganq.default"
