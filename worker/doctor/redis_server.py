"""
Checks of `ganq doctor`: whether Redis accepts and keeps notifications, and who else can access it.

Without Redis jobs only start later, so most findings are warnings; a server that anybody can take over is an
error.
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
MANY_NOTIFICATIONS = 10_000
NEARLY_FULL = 0.9
MAX_ADDRESSES = 4
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
    """Check that Redis answers, keeps notifications, and is protected from others."""
    import redis

    late = f"jobs still run, up to {settings.poll_seconds:.0f} s later"
    try:
        client = _client(settings)
    except ValueError as exc:
        yield error(
            "redis",
            f"GANQ_REDIS_URL={redact(settings.redis_url)} is not the URL of a Redis server: {exc}",
            HINT_URL,
        )
        return
    try:
        # Not PING, which a server that cannot save refuses like a write.
        yield from judge(client.info(), settings, _public_address(settings))
        client.llen(queue_key("default"))  # fails without permission for ganq's keys
    except redis.exceptions.TimeoutError:
        yield warn(
            "redis",
            f"Redis does not answer within {ANSWER_S:.0f} s; {late}",
            "check GANQ_REDIS_URL and the network",
        )
    except redis.exceptions.ConnectionError as exc:
        # Its subclasses mean a server that answers and refuses the connection.
        if isinstance(exc, redis.exceptions.AuthenticationError):
            yield error("redis", f"Redis refuses the user or password: {_first_line(exc)}", HINT_URL)
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
                "redis",
                f"Redis does not answer: {_first_line(exc)}; {late}",
                "start it, or check GANQ_REDIS_URL",
            )
    except redis.exceptions.NoPermissionError as exc:
        yield error(
            "redis",
            f"the Redis user lacks a permission that Celery needs: {_first_line(exc)}",
            "docker/make_secrets.py writes a sufficient ACL",
        )
    except redis.exceptions.RedisError as exc:
        yield error("redis", f"Redis answers with an error: {_first_line(exc)}", HINT_URL)
    finally:
        client.close()


def check_notifications(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check that notifications do not pile up under the keys of this installation."""
    from redis.exceptions import RedisError

    installation = facts.database.installation if facts.database is not None else ""
    queues = [one.strip() for one in settings.queues.split(",") if one.strip()]
    with suppress(RedisError, ValueError), _client(settings) as client:  # check_redis() reports errors
        for key in dict.fromkeys(queue_key(one, prefix) for prefix in (installation, "") for one in queues):
            number = int(client.llen(key))
            if number > MANY_NOTIFICATIONS:
                yield warn(
                    "redis",
                    f"{number:,} notifications are in {key}: no worker fetches them, or others send them",
                    f"ganq workers; redis-cli DEL {key} deletes notifications only, no jobs",
                )


# --- INFO -----------------------------------------------------------------------------------


def judge(facts: dict[str, Any], settings: Settings, public: str | None) -> Iterator[Finding]:
    """
    Check the server's version, protection and persistence.

    Args:
        facts: the answer to INFO.
        public: address at which it accepts commands without a password; None: there is none.
    """
    version = str(facts.get("redis_version", "of an unknown version"))
    name, number = _product(facts, version)
    vulnerable = is_vulnerable(name, number)
    if settings.embedded_redis:
        yield ok("redis", f"{name} {number} answers on a socket that only this user can open")
    elif vulnerable and public:
        yield error(
            "redis",
            f"{name} {number} at {public} can be taken over by any client:"
            f" no password, and known vulnerabilities ({FLAWS})",
            f"{HINT_UPDATE}; give it a password and an ACL: docs/operations.md",
        )
    else:
        if vulnerable:
            yield warn("redis", f"{name} {number} has known vulnerabilities ({FLAWS})", HINT_UPDATE)
        else:
            yield ok("redis", f"{name} {number} answers")
        if public:
            yield warn(
                "redis",
                f"{name} at {public} accepts commands from any client",
                "give it a password and an ACL: docs/operations.md",
            )
    yield from _check_persistence(facts)


def _product(facts: dict[str, Any], version: str) -> tuple[str, str]:
    """Return name and version: of Redis, or of a compatible server that also claims a Redis version."""
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


def _check_persistence(facts: dict[str, Any]) -> Iterator[Finding]:
    """Check that the server accepts notifications and keeps them until they are fetched."""
    if facts.get("role") in ("slave", "replica"):
        yield error("redis", "this server is a read-only replica", "set GANQ_REDIS_URL to the primary")
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    limit, used = int(facts.get("maxmemory", 0)), int(facts.get("used_memory", 0))
    if policy != "noeviction":
        when = f"at {limit / 1e6:,.0f} MB" if limit else "as soon as maxmemory is set"
        evicted = int(facts.get("evicted_keys", 0))
        so_far = f" ({evicted:,} keys so far)" if evicted else ""
        yield warn(
            "redis",
            f"maxmemory-policy is {policy}: {when} it evicts notifications{so_far}; jobs then start late",
            "maxmemory-policy noeviction",
        )
    if limit and used > NEARLY_FULL * limit:
        yield warn(
            "redis",
            f"it uses {used / 1e6:,.0f} of {limit / 1e6:,.0f} MB; when full it refuses notifications",
            "raise maxmemory, or find large keys: redis-cli --bigkeys",
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
            f"{' and '.join(broken)} failed, and by default it then accepts no notifications",
            "free space on its disk, or disable persistence: --save '' --appendonly no",
        )
    elif int(facts.get("aof_enabled", 0)):
        yield ok(
            "redis", "it writes each notification to disk, which ganq does not need: appendonly no is faster"
        )


# --- access by others -----------------------------------------------------------------------


def _public_address(settings: Settings) -> str | None:
    """Return the address that accepts commands of other machines without a password; None: there is none."""
    address = urlsplit(settings.redis_url)
    if address.scheme not in ("redis", "rediss") or not address.hostname:
        return None
    port = address.port or 6379
    # A server that is reached by loopback here may also listen on the network.
    hosts = own_addresses() if is_loopback(address.hostname) else [address.hostname]
    for host in hosts:
        if _accepts_anybody(host, port, tls=address.scheme == "rediss"):
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
    """Return this machine's addresses that other machines can reach."""
    import psutil

    found = []
    for entries in psutil.net_if_addrs().values():
        for one in entries:
            if one.family in (socket.AF_INET, socket.AF_INET6) and "%" not in one.address:
                address = ip_address(one.address)
                if not (address.is_loopback or address.is_link_local):
                    found.append(one.address)
    return found[:MAX_ADDRESSES]


def _accepts_anybody(host: str, port: int, *, tls: bool) -> bool:
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


def _first_line(exc: Exception) -> str:
    return redact((str(exc).strip().splitlines() or [type(exc).__name__])[0]).rstrip(".")
