"""`ganq doctor` reports problems and what to do about them: Redis."""

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from machine import until

from worker.celery_bridge.notify import queue_key
from worker.doctor import redis_server
from worker.doctor.facts import Facts
from worker.doctor.redis_server import check_notifications, check_redis, is_vulnerable

if TYPE_CHECKING:
    from services import Redis
    from unit.conftest import Ganq

    from storage.db.engine import Database
    from storage.settings import Settings


def test_an_unavailable_redis_is_a_warning_because_jobs_still_run(ganq: "Ganq") -> None:
    (reported,) = ganq("doctor", "--json").findings()["redis"]
    assert reported["level"] == "warn"
    assert "jobs still run" in reported["message"]


def look(settings: "Settings", **changes: Any) -> Any:
    """Return the findings, worst first."""
    worst = ("error", "warn", "ok")
    return sorted(check_redis(replace(settings, **changes)), key=lambda one: worst.index(one.level))


@pytest.fixture
def command(redis_server: "Redis") -> Iterator[Any]:
    """Send commands to the server: command('CONFIG SET maxmemory-policy allkeys-lru'); undone at the end."""
    yield lambda command: redis_server._say(command.encode())
    for command in (
        b"CONFIG SET maxmemory 0",
        b"CONFIG SET maxmemory-policy noeviction",
        b"CONFIG SET save ''",
    ):
        redis_server._say(command)
    redis_server._say(b"CONFIG SET appendonly no")


@pytest.mark.parametrize(
    ("version", "vulnerable"),
    [
        ("6.2.19", True),
        ("6.2.20", False),
        ("7.0.15", True),
        ("7.2.11", True),
        ("8.6.2", True),
        ("8.6.3", False),
        ("9.0.0", False),
        ("unknown", False),
    ],
)
def test_a_version_with_a_known_vulnerability_is_recognised(version: str, vulnerable: bool) -> None:
    assert is_vulnerable("Redis", version) is vulnerable
    assert not is_vulnerable("Valkey", version)


def test_a_healthy_redis_is_reported_with_its_version(settings: "Settings", redis_url: str) -> None:
    reported = look(settings, redis_url=redis_url)
    assert {one.level for one in reported} <= {"ok", "warn"}
    assert all("CVE" in one.message for one in reported if one.level == "warn")


@pytest.mark.parametrize("memory", ["0", "100mb"])
def test_a_policy_that_evicts_notifications_is_a_warning(
    settings: "Settings", redis_url: str, command: Any, memory: str
) -> None:
    command("CONFIG SET maxmemory-policy allkeys-lru")
    command(f"CONFIG SET maxmemory {memory}")
    (reported,) = [one for one in look(settings, redis_url=redis_url) if "maxmemory-policy" in one.message]
    assert reported.level == "warn"
    assert "allkeys-lru" in reported.message
    assert reported.hint == "maxmemory-policy noeviction"


def test_a_redis_that_is_nearly_full_is_a_warning(settings: "Settings", redis_url: str, command: Any) -> None:
    command("CONFIG SET maxmemory 1mb")
    assert any("MB; when full it refuses" in one.message for one in look(settings, redis_url=redis_url))


def test_an_append_only_file_is_named_as_not_needed(
    settings: "Settings", redis_url: str, command: Any
) -> None:
    command("CONFIG SET appendonly yes")
    assert any("does not need" in one.message for one in look(settings, redis_url=redis_url))


def test_a_snapshot_that_failed_means_that_notifications_are_refused(
    settings: "Settings", redis_url: str, redis_server: "Redis", command: Any
) -> None:
    command("CONFIG SET save '3600 1'")
    folder = redis_server.folder / "dump.rdb"
    folder.mkdir()  # where the snapshot would be renamed to
    try:
        command("BGSAVE")
        until(lambda: b"bgsave_status:err" in redis_server._say(b"INFO persistence"), within_s=10)
        reported = look(settings, redis_url=redis_url)[0]
        assert reported.level == "error"
        assert "its last snapshot failed" in reported.message
    finally:
        folder.rmdir()
        command("BGSAVE")
        until(lambda: b"bgsave_status:ok" in redis_server._say(b"INFO persistence"), within_s=10)
        (redis_server.folder / "dump.rdb").unlink()


def test_a_replica_fails(settings: "Settings", redis_url: str, command: Any) -> None:
    command("REPLICAOF 127.0.0.1 1")
    try:
        assert "replica" in look(settings, redis_url=redis_url)[0].message
    finally:
        command("REPLICAOF NO ONE")


@pytest.mark.parametrize("installation", ["", "aaaa0001"])
def test_notifications_that_are_not_fetched_are_a_warning(
    settings: "Settings",
    database: "Database",
    redis_url: str,
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
    installation: str,
) -> None:
    monkeypatch.setattr(redis_server, "MANY_NOTIFICATIONS", 2)
    database.installation = installation
    key = queue_key("default", installation)
    command(f"LPUSH {key} 1 2 3")
    (reported,) = check_notifications(replace(settings, redis_url=redis_url), Facts(database))
    assert f"3 notifications are in {key}" in reported.message
    assert reported.hint is not None
    assert f"DEL {key}" in reported.hint


def test_a_redis_that_refuses_the_password_fails(settings: "Settings", redis_url: str) -> None:
    (reported,) = look(settings, redis_url=redis_url.replace("redis://", "redis://ada:wrong-one@"))
    assert reported.level == "error"
    assert "wrong-one" not in reported.message


def test_a_user_who_may_not_do_what_celery_needs_fails(
    settings: "Settings", redis_url: str, command: Any
) -> None:
    command("ACL SETUSER weak on >s3cret-one +ping +info +client +select ~other*")
    try:
        reported = look(settings, redis_url=redis_url.replace("redis://", "redis://weak:s3cret-one@"))[0]
        assert reported.level == "error"
        assert "docker/make_secrets.py" in (reported.hint or "")
        assert "s3cret" not in reported.message
    finally:
        command("ACL DELUSER weak")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat 127.0.0.1 as a public address: the tests' server listens on no other."""
    monkeypatch.setattr(redis_server, "own_addresses", lambda: ["127.0.0.1"])


def test_an_unprotected_redis_is_a_warning_and_an_error_if_it_can_be_taken_over(
    settings: "Settings", redis_url: str, network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "is_vulnerable", lambda name, version: False)
    reported = look(settings, redis_url=redis_url)[0]
    assert reported.level == "warn"
    assert "accepts commands from any client" in reported.message
    monkeypatch.setattr(redis_server, "is_vulnerable", lambda name, version: True)
    reported = look(settings, redis_url=redis_url)[0]
    assert reported.level == "error"
    assert "can be taken over by any client" in reported.message


def test_a_password_in_the_url_does_not_hide_that_others_need_none(
    settings: "Settings", redis_url: str, network: None, command: Any
) -> None:
    command("ACL SETUSER ada on >s3cret-one ~* +@all")
    try:
        url = redis_url.replace("redis://", "redis://ada:s3cret-one@")
        assert any("any client" in one.message for one in look(settings, redis_url=url))
        command("ACL SETUSER default off")
        from redis import Redis

        with Redis.from_url(url) as ada:
            assert not any("any client" in one.message for one in look(settings, redis_url=url))
            ada.acl_setuser("default", enabled=True)
    finally:
        command("ACL DELUSER ada")


def test_addresses_of_this_machine_are_those_that_others_can_reach() -> None:
    assert not any(redis_server.is_loopback(one) for one in redis_server.own_addresses())


def test_a_redis_url_that_is_none_fails(settings: "Settings") -> None:
    assert look(settings, redis_url="http://127.0.0.1")[0].level == "error"


def test_a_redis_that_does_not_answer_is_waited_for_no_longer_than_stated(settings: "Settings") -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        reported = look(settings, redis_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")[0]
    assert "does not answer within 2 s" in reported.message
    assert time.monotonic() - began < 2 * redis_server.ANSWER_S + 1


def test_an_embedded_redis_without_a_program_fails(
    settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis+socket://{settings.home}/redis.sock"
    assert "ganq up starts it" in (look(settings, redis_url=url)[0].hint or "")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("worker.host.embedded_redis.find_spec", lambda name: None)
    reported = look(settings, redis_url=url)[0]
    assert reported.level == "error"
    assert "ganq[local]" in (reported.hint or "")


def test_an_embedded_redis_is_closed_to_others_so_its_version_matters_little(
    settings: "Settings", redis_server: "Redis"
) -> None:
    url = f"redis+socket://{redis_server.folder / 'redis.sock'}"
    assert [one.level for one in look(settings, redis_url=url)] == ["ok"]
