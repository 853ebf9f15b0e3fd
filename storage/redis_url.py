"""
Parse GANQ_REDIS_URL once, so that every client connects to Redis in the same way.

redis-py and kombu parse URLs differently: without TLS options redis-py verifies the server's
certificate and kombu does not; they spell `ssl_cert_reqs` and unix sockets differently; kombu
takes ';' in a password for a list of servers. Both get the options that are parsed here.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

HINT_TLS = (
    "name its CA in GANQ_REDIS_URL: rediss://…?ssl_ca_certs=/path/ca.pem;"
    " ssl_cert_reqs=none would trust any server"
)
EXAMPLES = "e.g. redis://host:6379/0, rediss://… with TLS, redis+socket:///path/redis.sock"

_CERT_REQS = {
    **{"required": "required", "cert_required": "required"},
    **{"optional": "optional", "cert_optional": "optional"},
    **{"none": "none", "cert_none": "none"},
}
_TEXTS = (
    *("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data"),
    *("ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_ciphers"),
)
_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")


@dataclass(frozen=True)
class RedisUrl:
    """A parsed Redis URL."""

    scheme: str
    """redis, rediss (TLS) or redis+socket."""
    place: str
    """HOST:PORT, or the socket's path."""
    username: str | None
    password: str | None
    db: int
    tls: dict[str, Any]
    """Arguments of redis-py's SSLConnection; empty without TLS, else with `ssl_cert_reqs`."""
    options: tuple[tuple[str, str], ...]
    """Other options of the query, for redis-py only."""

    @property
    def broker(self) -> str:
        """Return the URL for kombu; its TLS options are separate (`broker_use_ssl`)."""
        query = f"?virtual_host={self.db}" if self.scheme == "redis+socket" and self.db else ""
        path = query if self.scheme == "redis+socket" else f"/{self.db}"
        return f"{self.scheme}://{self._credentials}{self.place}{path}"

    def client(self, **options: Any) -> Any:
        """
        Return a redis-py client, which connects on first use.

        Raises:
            ValueError: an option in the URL that redis-py cannot use.
        """
        from redis import Redis

        scheme = "unix" if self.scheme == "redis+socket" else self.scheme
        query = urlencode((*self.options, ("db", self.db)))
        return Redis.from_url(f"{scheme}://{self._credentials}{self.place}?{query}", **options, **self.tls)

    @property
    def _credentials(self) -> str:
        if self.username is None and self.password is None:
            return ""
        name = quote(self.username or "", safe="")
        return f"{name}@" if self.password is None else f"{name}:{quote(self.password, safe='')}@"


@cache
def parse(url: str) -> RedisUrl:
    """
    Parse a Redis URL.

    Raises:
        ValueError: it is invalid; the message contains no secret.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "redis+socket"):
        raise ValueError("it is not the address of a Redis server")
    try:
        parts.port  # noqa: B018 - reading it is the check
    except ValueError:
        raise ValueError("its port is not a number") from None
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    socket = parts.scheme == "redis+socket"
    path = "" if socket else parts.path.strip("/")
    number = query.pop("db", None) or query.pop("virtual_host", None) or path or "0"
    if not number.isdecimal() or not (path or "0").isdecimal() or (socket and not parts.path):
        raise ValueError("it is not the address of a Redis server")
    tls = {name: query.pop(name) for name in list(query) if name.startswith("ssl_")}
    if tls and parts.scheme != "rediss":
        raise ValueError(f"{min(tls)} is for rediss://, which is Redis with TLS")
    return RedisUrl(
        scheme=parts.scheme,
        place=parts.path if socket else parts.netloc.rpartition("@")[2],
        username=None if parts.username is None else unquote(parts.username) or None,
        password=None if parts.password is None else unquote(parts.password),
        db=int(number),
        tls=_tls(tls) if parts.scheme == "rediss" else {},
        options=tuple(query.items()),
    )


def _tls(given: dict[str, str]) -> dict[str, Any]:
    """
    Return the TLS options for redis-py. The certificate is verified unless they say otherwise.

    Raises:
        ValueError: an unknown option or value.
    """
    read: dict[str, Any] = {"ssl_cert_reqs": "required"}
    for name, value in given.items():
        if name == "ssl_cert_reqs":
            if value.lower() not in _CERT_REQS:
                raise ValueError(f"ssl_cert_reqs={value[:40]} is not required, optional or none")
            read[name] = _CERT_REQS[value.lower()]
        elif name == "ssl_check_hostname":
            if value.lower() not in (*_YES, *_NO):
                raise ValueError(f"ssl_check_hostname={value[:40]} is neither true nor false")
            read[name] = value.lower() in _YES
        elif name == "ssl_min_version":
            if not value.isdecimal():
                raise ValueError(f"ssl_min_version={value[:40]} is not a number; TLS 1.2 is 771, 1.3 is 772")
            read[name] = int(value)
        elif name in ("ssl_include_verify_flags", "ssl_exclude_verify_flags"):
            read[name] = _flags(name, value)
        elif name in _TEXTS:
            read[name] = value
        else:
            raise ValueError(f"there is no option {name[:40]}")
    return read


def _flags(name: str, value: str) -> list[Any]:
    from ssl import VerifyFlags

    try:
        return [VerifyFlags[flag.strip()] for flag in value.strip("[]").split(",")]
    except KeyError as exc:
        raise ValueError(f"{name}: Python's ssl has no flag {exc}") from None


def distrust(exc: BaseException | None) -> str | None:
    """Return why the server's certificate was refused; None if the error has another cause."""
    while exc is not None:
        if type(exc).__name__ == "SSLCertVerificationError":
            return str(getattr(exc, "verify_message", "") or "it does not fit")
        exc = exc.__cause__ or exc.__context__
    return None
