"""`ganq doctor` names what is wrong and the way out: Redis."""

import socket
import time
from dataclasses import replace

import pytest
from machine import until

from worker.celery_bridge.notify import queue_key
from worker.doctor import redis_server
from worker.doctor.facts import Facts
from worker.doctor.redis_server import check_notifications, check_redis, flaws_of


def test_a_redis_that_is_away_is_a_warning_because_jobs_run_all_the_same(ganq):
    (told,) = ganq("doctor", "--json").findings()["redis"]
    assert told["verdict"] == "warn"
    assert "jobs run all the same" in told["said"]


def look(settings, **changes):
    """What the check finds, worst first."""
    worst = ("bad", "warn", "ok")
    return sorted(check_redis(replace(settings, **changes)), key=lambda one: worst.index(one.verdict))


@pytest.fixture
def said(redis_server):
    """Gives the server a command: said('CONFIG SET maxmemory-policy allkeys-lru'); undone at the end."""
    yield lambda command: redis_server._say(command.encode())
    for command in (
        b"CONFIG SET maxmemory 0",
        b"CONFIG SET maxmemory-policy noeviction",
        b"CONFIG SET save ''",
    ):
        redis_server._say(command)
    redis_server._say(b"CONFIG SET appendonly no")


@pytest.mark.parametrize(
    ("version", "flaws"),
    [
        ("6.2.19", ["CVE-2025-49844"]),
        ("6.2.20", []),
        ("7.0.15", ["CVE-2025-49844"]),
        ("7.2.10", ["CVE-2025-49844", "CVE-2026-23479"]),
        ("7.2.11", ["CVE-2026-23479"]),
        ("7.4.6", ["CVE-2026-23479"]),
        ("8.0.3", ["CVE-2025-49844", "CVE-2026-23479"]),
        ("8.2.2", ["CVE-2026-23479"]),
        ("8.6.2", ["CVE-2026-23479"]),
        ("8.6.3", []),
        ("9.0.0", []),
        ("unknown", []),
    ],
)
def test_known_flaws_are_those_of_the_version(version, flaws):
    assert flaws_of("Redis", version) == flaws
    assert flaws_of("Valkey", version) == []


def test_a_redis_that_is_well_says_its_version(settings, redis_url):
    told = look(settings, redis_url=redis_url)
    assert {one.verdict for one in told} <= {"ok", "warn"}
    assert all("CVE" in one.said for one in told if one.verdict == "warn")


@pytest.mark.parametrize("memory", ["0", "100mb"])
def test_a_policy_that_drops_bells_is_a_warning(settings, redis_url, said, memory):
    said("CONFIG SET maxmemory-policy allkeys-lru")
    said(f"CONFIG SET maxmemory {memory}")
    (told,) = [one for one in look(settings, redis_url=redis_url) if "maxmemory-policy" in one.said]
    assert told.verdict == "warn"
    assert "allkeys-lru" in told.said
    assert told.hint == "maxmemory-policy noeviction"


def test_a_redis_that_is_nearly_full_is_a_warning(settings, redis_url, said):
    said("CONFIG SET maxmemory 1mb")
    assert any("MB; then it refuses" in one.said for one in look(settings, redis_url=redis_url))


def test_an_append_only_file_is_named_as_not_needed(settings, redis_url, said):
    said("CONFIG SET appendonly yes")
    assert any("does not need" in one.said for one in look(settings, redis_url=redis_url))


def test_a_snapshot_that_failed_means_that_bells_are_refused(settings, redis_url, redis_server, said):
    said("CONFIG SET save '3600 1'")
    folder = redis_server.folder / "dump.rdb"
    folder.mkdir()  # where the snapshot would be renamed to
    try:
        said("BGSAVE")
        until(lambda: b"bgsave_status:err" in redis_server._say(b"INFO persistence"), within_s=10)
        told = look(settings, redis_url=redis_url)[0]
        assert told.verdict == "bad"
        assert "its last snapshot failed" in told.said
    finally:
        folder.rmdir()
        said("BGSAVE")
        until(lambda: b"bgsave_status:ok" in redis_server._say(b"INFO persistence"), within_s=10)
        (redis_server.folder / "dump.rdb").unlink()


def test_a_replica_fails(settings, redis_url, said):
    said("REPLICAOF 127.0.0.1 1")
    try:
        assert "replica" in look(settings, redis_url=redis_url)[0].said
    finally:
        said("REPLICAOF NO ONE")


@pytest.mark.parametrize("installation", ["", "aaaa0001"])
def test_bells_that_nobody_fetches_are_a_warning(
    settings, database, redis_url, said, monkeypatch, installation
):
    monkeypatch.setattr(redis_server, "MANY_BELLS", 2)
    database.installation = installation
    key = queue_key("default", installation)
    said(f"LPUSH {key} 1 2 3")
    (told,) = check_notifications(replace(settings, redis_url=redis_url), Facts(database))
    assert f"3 bells lie in {key}" in told.said
    assert told.hint is not None
    assert f"DEL {key}" in told.hint


def test_a_redis_that_refuses_the_password_fails(settings, redis_url):
    (told,) = look(settings, redis_url=redis_url.replace("redis://", "redis://ada:wrong-one@"))
    assert told.verdict == "bad"
    assert "wrong-one" not in told.said


def test_a_user_who_may_not_do_what_celery_needs_fails(settings, redis_url, said):
    said("ACL SETUSER weak on >s3cret-one +ping +info +client +select ~other*")
    try:
        told = look(settings, redis_url=redis_url.replace("redis://", "redis://weak:s3cret-one@"))[0]
        assert told.verdict == "bad"
        assert "docker/make_secrets.py" in (told.hint or "")
        assert "s3cret" not in told.said
    finally:
        said("ACL DELUSER weak")


@pytest.fixture
def network(monkeypatch):
    """Lets 127.0.0.1 stand for an address by which others come: tests listen nowhere else."""
    monkeypatch.setattr(redis_server, "own_addresses", lambda: ["127.0.0.1"])


def test_a_redis_that_obeys_anybody_is_named_and_bad_if_it_can_be_taken_over(
    settings, redis_url, network, monkeypatch
):
    monkeypatch.setattr(redis_server, "flaws_of", lambda name, version: [])
    told = look(settings, redis_url=redis_url)[0]
    assert told.verdict == "warn"
    assert "takes commands from anybody" in told.said
    monkeypatch.setattr(redis_server, "flaws_of", lambda name, version: ["CVE-0000-1"])
    told = look(settings, redis_url=redis_url)[0]
    assert told.verdict == "bad"
    assert "can be taken over by anybody" in told.said


def test_a_password_of_ours_does_not_hide_that_others_need_none(settings, redis_url, network, said):
    said("ACL SETUSER ada on >s3cret-one ~* +@all")
    try:
        url = redis_url.replace("redis://", "redis://ada:s3cret-one@")
        assert any("anybody" in one.said for one in look(settings, redis_url=url))
        said("ACL SETUSER default off")
        from redis import Redis

        with Redis.from_url(url) as ada:
            assert not any("anybody" in one.said for one in look(settings, redis_url=url))
            ada.acl_setuser("default", enabled=True)
    finally:
        said("ACL DELUSER ada")


def test_addresses_of_this_machine_are_those_that_others_can_reach():
    assert not any(redis_server.is_loopback(one) for one in redis_server.own_addresses())


def test_a_redis_url_that_is_none_fails(settings):
    assert look(settings, redis_url="http://127.0.0.1")[0].verdict == "bad"


def test_a_silent_redis_is_waited_for_no_longer_than_stated(settings):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        told = look(settings, redis_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")[0]
    assert "does not answer within 2 s" in told.said
    assert time.monotonic() - began < 2 * redis_server.ANSWER_S + 1


def test_an_embedded_redis_without_a_program_fails(settings, monkeypatch):
    url = f"redis+socket://{settings.home}/redis.sock"
    assert "ganq up starts it" in (look(settings, redis_url=url)[0].hint or "")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("worker.host.embedded_redis.find_spec", lambda name: None)
    told = look(settings, redis_url=url)[0]
    assert told.verdict == "bad"
    assert "ganq[local]" in (told.hint or "")


def test_an_embedded_redis_is_closed_to_others_so_its_version_matters_little(settings, redis_server):
    url = f"redis+socket://{redis_server.folder / 'redis.sock'}"
    assert [one.verdict for one in look(settings, redis_url=url)] == ["ok"]
