"""
What `ganq doctor` finds out about Redis: whether bells arrive and stay, and who else may ring.

Losing it costs latency alone, so little here is bad; a server that strangers can take over is.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from jobs.errors import GanqError
from storage import redis_url
from storage.settings import Settings, redact
from worker.celery_bridge.notify import queue_key
from worker.doctor.check import Finding, error, ok, warn
from worker.doctor.facts import Facts

ANSWER_S = 2.0
MANY_BELLS = 10_000
NEARLY_FULL = 0.9
OWN_ADDRESSES = 4
HINT_URL = (
    "GANQ_REDIS_URL is redis://USER:PASSWORD@HOST:6379/0, best in a file that GANQ_REDIS_URL_FILE names"
)
HINT_UPDATE = "update Redis (8.6.3 or newer), or the distribution's package if that was patched"

FIXED = (8, 6, 3)
"""The first release without CVE-2025-49844 (6.2.20 has the fix, too) and CVE-2026-23479 (7.2 and newer)."""
FIXED_6_2 = (6, 2, 20)
FLAWS = "CVE-2025-49844, CVE-2026-23479"


def _client(settings: Settings) -> Any:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return redis_url.parse(settings.redis_url).client(
        socket_connect_timeout=ANSWER_S,
        socket_timeout=ANSWER_S,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )


def check_redis(settings: Settings) -> Iterator[Finding]:
    """Whether the doorbell answers, keeps what it takes, and is closed to strangers."""
    import redis

    late = f"jobs run all the same, up to {settings.poll_seconds:.0f} s later"
    try:
        client = _client(settings)
    except ValueError as exc:
        yield error(
            "redis", f"GANQ_REDIS_URL={redact(settings.redis_url)} is no URL of a Redis: {exc}", HINT_URL
        )
        return
    try:
        # Not PING, which one that cannot save refuses as it does a write.
        yield from judge(client.info(), settings, _open_to_others(settings))
        client.llen(queue_key("default"))  # which a user without rights to ganq's keys may not
    except redis.exceptions.TimeoutError:
        yield warn(
            "redis",
            f"Redis does not answer within {ANSWER_S:.0f} s; {late}",
            "check GANQ_REDIS_URL and the network",
        )
    except redis.exceptions.ConnectionError as exc:
        # Its subclasses tell of a server that is there and turns us away.
        if isinstance(exc, redis.exceptions.AuthenticationError):
            yield error("redis", f"Redis refuses the user or password: {_first(exc)}", HINT_URL)
        elif why := redis_url.distrust(exc):
            yield error(
                "redis",
                f"the certificate of Redis is not trusted ({why}), so no client connects; {late}",
                redis_url.HINT_TLS,
            )
        elif settings.embedded_redis:
            yield _embedded_redis_is_down(late)
        else:
            yield warn(
                "redis", f"Redis does not answer: {_first(exc)}; {late}", "start it, or check GANQ_REDIS_URL"
            )
    except redis.exceptions.NoPermissionError as exc:
        yield error(
            "redis",
            f"its user may not do what Celery needs: {_first(exc)}",
            "docker/make_secrets.py writes the ACL that is enough",
        )
    except redis.exceptions.RedisError as exc:
        yield error("redis", f"Redis answers, but not as it should: {_first(exc)}", HINT_URL)
    finally:
        client.close()


def check_notifications(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Whether notifications pile up under the keys of this installation."""
    from redis.exceptions import RedisError

    installation = facts.database.installation if facts.database is not None else ""
    queues = [one.strip() for one in settings.queues.split(",") if one.strip()]
    with suppress(RedisError, ValueError), _client(settings) as client:  # check_redis() says what is wrong
        for key in dict.fromkeys(queue_key(one, mark) for mark in (installation, "") for one in queues):
            number = int(client.llen(key))
            if number > MANY_BELLS:
                yield warn(
                    "redis",
                    f"{number:,} bells lie in {key}: no worker fetches them, or a stranger rings",
                    f"ganq workers; redis-cli DEL {key} loses nothing but bells",
                )


# --- what INFO says -----------------------------------------------------------------------


def judge(facts: dict[str, Any], settings: Settings, strangers: str | None) -> Iterator[Finding]:
    """
    Args:
        facts: what INFO says.
        strangers: where anybody may give commands; None: nowhere.
    """
    version = str(facts.get("redis_version", "of an unknown version"))
    name, number = _product(facts, version)
    vulnerable = is_vulnerable(name, number)
    if settings.embedded_redis:
        yield ok("redis", f"{name} {number} answers on a socket that only this user can open")
    elif vulnerable and strangers:
        yield error(
            "redis",
            f"{name} {number} at {strangers} can be taken over by anybody who reaches it:"
            f" no password, and known vulnerabilities ({FLAWS})",
            f"{HINT_UPDATE}; give it a password and an ACL: docs/operations.md",
        )
    else:
        if vulnerable:
            yield warn("redis", f"{name} {number} has known vulnerabilities ({FLAWS})", HINT_UPDATE)
        else:
            yield ok("redis", f"{name} {number} answers")
        if strangers:
            yield warn(
                "redis",
                f"{name} at {strangers} takes commands from anybody who reaches it",
                "give it a password and an ACL: docs/operations.md",
            )
    yield from _keeping(facts)


def _product(facts: dict[str, Any], version: str) -> tuple[str, str]:
    """Redis, or one of those that speak like it and claim a version of Redis, too."""
    for key, name in (("valkey_version", "Valkey"), ("dragonfly_version", "Dragonfly")):
        if key in facts:
            return name, str(facts[key])
    return "Redis", version


def is_vulnerable(name: str, version: str) -> bool:
    """Return whether a client can run code in a Redis of this version; False for other servers."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if name != "Redis" or numbers is None:
        return False
    number = tuple(map(int, numbers.groups()))
    return number < FIXED and not (number[:2] == (6, 2) and number >= FIXED_6_2)


def _keeping(facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether it takes bells, and keeps them until they are fetched."""
    if facts.get("role") in ("slave", "replica"):
        yield error(
            "redis", "this Redis is a replica, which takes no bells", "GANQ_REDIS_URL names the primary"
        )
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    most, used = int(facts.get("maxmemory", 0)), int(facts.get("used_memory", 0))
    if policy != "noeviction":
        when = f"at {most / 1e6:,.0f} MB" if most else "as soon as maxmemory is set"
        evicted = int(facts.get("evicted_keys", 0))
        so_far = f" ({evicted:,} keys so far)" if evicted else ""
        yield warn(
            "redis",
            f"maxmemory-policy is {policy}: {when} it drops bells{so_far}, and their jobs start late",
            "maxmemory-policy noeviction",
        )
    if most and used > NEARLY_FULL * most:
        yield warn(
            "redis",
            f"it uses {used / 1e6:,.0f} of its {most / 1e6:,.0f} MB; then it refuses or drops bells",
            "raise maxmemory, or find out what else lies in it: redis-cli --bigkeys",
        )
    broken = [
        what
        for key, what in (
            ("rdb_last_bgsave_status", "its last snapshot"),
            ("aof_last_write_status", "its last write to the append-only file"),
        )
        if facts.get(key, "ok") != "ok"
    ]
    if broken:
        yield error(
            "redis",
            f"{' and '.join(broken)} failed, and by default it then takes no bells",
            "make room on its disk, or keep nothing: --save '' --appendonly no",
        )
    elif int(facts.get("aof_enabled", 0)):
        yield ok("redis", "it writes each bell to disk, which ganq does not need: appendonly no is faster")


# --- who else may ring --------------------------------------------------------------------


def _open_to_others(settings: Settings) -> str | None:
    """The address at which somebody without a password is obeyed, from beyond this machine; or None."""
    address = urlsplit(settings.redis_url)
    if address.scheme not in ("redis", "rediss") or not address.hostname:
        return None
    port = address.port or 6379
    # A server that we reach by loopback may listen to the network as well.
    hosts = own_addresses() if is_loopback(address.hostname) else [address.hostname]
    for host in hosts:
        if _obeys_anybody(host, port, tls=address.scheme == "rediss"):
            return f"{host}:{port}"
    return None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def own_addresses() -> list[str]:
    """Addresses of this machine by which others reach it."""
    import psutil

    found = []
    for entries in psutil.net_if_addrs().values():
        for one in entries:
            if one.family in (socket.AF_INET, socket.AF_INET6) and "%" not in one.address:
                address = ip_address(one.address)
                if not (address.is_loopback or address.is_link_local):
                    found.append(one.address)
    return found[:OWN_ADDRESSES]


def _obeys_anybody(host: str, port: int, *, tls: bool) -> bool:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    extra: dict[str, Any] = {"ssl_cert_reqs": "none", "ssl_check_hostname": False} if tls else {}
    client = redis.Redis(
        host=host,
        port=port,
        ssl=tls,
        socket_connect_timeout=1.0,
        socket_timeout=1.0,
        retry=Retry(NoBackoff(), 0),
        **extra,
    )
    try:
        return bool(client.ping())
    except (redis.exceptions.RedisError, OSError):
        return False
    finally:
        client.close()


def _embedded_redis_is_down(late: str) -> Finding:
    from worker.host.embedded_redis import redis_server

    try:
        program = redis_server()
    except GanqError as exc:
        return error("redis", exc.message, exc.hint)
    return warn("redis", f"the embedded Redis ({program}) is not running; {late}", "ganq up starts it")


def _first(exc: Exception) -> str:
    return redact((str(exc).strip().splitlines() or [type(exc).__name__])[0]).rstrip(".")
