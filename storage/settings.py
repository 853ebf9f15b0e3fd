"""
Settings: from the environment (GANQ_*), then ganq.toml, then defaults.

A secret may be read from a file (GANQ_DATABASE_URL_FILE), so that no process list and no log contains it.
"""

import os
import re
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobs.errors import ConfigError
from storage.users import USER_HINT, is_user_name, this_account, user_name

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

PREFIX = "GANQ_"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
SECRETS = ("database_url", "redis_url", "api_token")
MAX_SECRET_CHARACTERS = 65_536  # of a file with a secret


SOCKET_BYTES = 107
"""Maximum length of the path of a unix socket."""
LONGEST_SOCKET_NAME = "wake-4194304.sock"
MAX_WEBHOOK_TIMEOUT_S = 20.0
"""Less than the lease of a webhook (storage/db/webhooks.py), so that attempts do not overlap."""


def socket_fits(path: Path) -> bool:
    """Return whether a unix socket can have this path."""
    return len(os.fsencode(path)) <= SOCKET_BYTES


@dataclass(frozen=True)
class Given:
    """A value and its source."""

    value: Any
    setting: str
    """Its name there: GANQ_VOLUME in the environment, volume in ganq.toml."""
    file: str | None = None
    """None for a variable of the environment."""

    def __str__(self) -> str:
        """'GANQ_VOLUME=pictures', or "volume = 'pictures' in /home/ada/ganq.toml"; passwords masked."""
        shown = redact(self.value)[:200] if isinstance(self.value, str) else self.value
        if self.file is None:
            return f"{self.setting}={shown}"
        return f"{self.setting} = {shown!r} in {self.file}"

    @property
    def place(self) -> str:
        """Return the source without the value."""
        return self.setting if self.file is None else f"{self.setting} in {self.file}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, resolved. Seconds are floats; tests make them small."""

    home: Path
    """State of a single machine: database, embedded Redis, default volume, ganq.toml."""
    volume: Path
    """The folder that all machines share: jobs, checkpoints, images."""
    database_url: str
    """SQLAlchemy URL: sqlite:///… on one machine, postgresql://… on several."""
    redis_url: str
    """Broker URL; redis+socket://… is the embedded one."""
    api_url: str = ""
    """URL of a server: jobs are submitted and read through its REST API instead of the job table."""
    api_token: str = field(default="", repr=False)
    """Token for that server."""
    api_seconds: float = 30.0
    """Time without an answer after which that server counts as away; a command then tries again."""
    api_paths: str = ""
    """Folders of the server that a REST request may name, separated by colons; an admin may name any path."""
    data: str | None = None
    """Default data set for `ganq submit train`."""
    user: str = ""
    """Name of the submitting user; by default that of the operating system's account."""
    queues: str = "default"
    """Queues that a worker serves, separated by commas."""
    heartbeat_seconds: float = 10.0
    progress_seconds: float = 2.0
    cancel_poll_seconds: float = 1.0
    """How often a worker checks whether its job was cancelled or preempted."""
    lease_seconds: float = 60.0
    """Time without a heartbeat after which a job is requeued."""
    reap_seconds: float = 2.0
    """Interval at which each worker checks for jobs of dead or unresponsive workers."""
    poll_seconds: float = 15.0
    """Interval at which an idle worker polls the table."""
    renotify_seconds: float = 120.0
    """Time after which the notification of a queued job is repeated."""
    drain_seconds: float = 60.0
    stall_seconds: float = 600.0
    """Time without progress after which a running job counts as stalled; 0: never."""
    volume_seconds: float = 60.0
    """Time without an answer of the volume after which a worker requeues its job."""
    stuck_seconds: float = 120.0
    """A worker whose main loop has not iterated for so long sends no heartbeat."""
    metrics_port: str = ""
    """Where a worker serves Prometheus metrics: 9200 (on the loopback), 0.0.0.0:9200; empty: nowhere."""
    webhook_hosts: str = ""
    """Hosts that webhooks may reach, separated by commas: 'hooks.example', '*.lab.example'; empty: all."""
    webhook_networks: str = ""
    """Networks of private addresses that webhooks may reach, separated by commas: '10.0.0.0/8'."""
    webhook_command: str = ""
    """The command of webhooks whose URL is 'command'; the event is on its standard input."""
    webhook_delivery: str = "on"
    """'off': the workers and the server of the page on this machine deliver no webhooks."""
    webhook_retry_seconds: float = 5.0
    """Pause before the first repetition; the later ones are multiples: worker/webhooks/deliver.py."""
    webhook_timeout_seconds: float = 15.0
    log_level: str = "INFO"
    log_format: str = "text"
    """'text' for people, 'json' for machines."""

    @property
    def is_sqlite(self) -> bool:
        return self.database_url.startswith("sqlite")

    @property
    def embedded_redis(self) -> bool:
        return self.redis_url.startswith("redis+socket://")

    @property
    def runtime(self) -> Path:
        """
        The folder of this machine's sockets.

        In /tmp where the path of the temporary folder is too long for a socket.
        """
        import hashlib
        import tempfile

        # Resolved, so that two spellings of one home give one runtime folder.
        mark = hashlib.sha256(os.fsencode(self.home.resolve())).hexdigest()[:12]
        name = f"ganq-{os.getuid()}-{mark}"
        folder = Path(tempfile.gettempdir()) / name
        return folder if socket_fits(folder / LONGEST_SOCKET_NAME) else Path("/tmp") / name

    @property
    def allowed_folders(self) -> list[Path]:
        """The folders of `api_paths`."""
        return [Path(one) for one in self.api_paths.split(":") if one.strip()]

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """
        Return host and port of `metrics_port`; None if it is empty.

        Raises:
            ValueError: it is neither PORT nor HOST:PORT.
        """
        if not self.metrics_port:
            return None
        host, _, port = self.metrics_port.rpartition(":")
        if not (port.isdecimal() and port.isascii() and 0 < int(port) < 65536):
            raise ValueError(f"{self.metrics_port[:40]!r} is not a port")
        return host or "127.0.0.1", int(port)

    @property
    def webhook_networks_allowed(self) -> "list[IPv4Network | IPv6Network]":
        """
        The networks of `webhook_networks`.

        Raises:
            ValueError: one is malformed.
        """
        from ipaddress import ip_network

        return [
            ip_network(one.strip(), strict=False) for one in self.webhook_networks.split(",") if one.strip()
        ]

    def redacted(self) -> dict[str, Any]:
        """Return all settings as JSON, with masked passwords."""
        return {
            f.name: "***"
            if f.name == "api_token" and self.api_token
            else redact(str(value))
            if isinstance(value := getattr(self, f.name), str | Path)
            else value
            for f in fields(self)
        }

    def _check_together(self, told: Mapping[str, Given]) -> None:
        """
        Check settings that depend on each other.

        Args:
            told: where each value comes from.

        Raises:
            ConfigError: intervals with which no lease could be kept, or an unknown way to log.
        """
        for name in ("heartbeat", "cancel_poll", "reap", "poll", "lease", "volume", "stuck", "api"):
            if not getattr(self, f"{name}_seconds") > 0:
                raise ConfigError(f"{told[f'{name}_seconds']} must be more than 0", hint="e.g. leave it out")
        if self.lease_seconds < 3 * self.heartbeat_seconds:
            raise ConfigError(
                f"{told['lease_seconds']} is less than three heartbeats of "
                f"{self.heartbeat_seconds:g} s: live workers would lose their jobs",
                hint="raise it, or lower GANQ_HEARTBEAT_SECONDS",
            )
        try:
            _ = self.metrics_address
        except ValueError as exc:
            raise ConfigError(
                f"{told['metrics_port']} is not a port", hint="PORT or HOST:PORT, e.g. 9200 or 0.0.0.0:9200"
            ) from exc
        try:
            _ = self.webhook_networks_allowed
        except ValueError as exc:
            raise ConfigError(
                f"{told['webhook_networks']} are no networks", hint="e.g. 10.0.0.0/8,127.0.0.0/8"
            ) from exc
        if self.webhook_delivery not in ("on", "off"):
            raise ConfigError(f"{told['webhook_delivery']} is neither", hint="on or off")
        if not 0 < self.webhook_timeout_seconds <= MAX_WEBHOOK_TIMEOUT_S:
            raise ConfigError(
                f"{told['webhook_timeout_seconds']} is not possible",
                hint=f"more than 0 and at most {MAX_WEBHOOK_TIMEOUT_S:.0f} seconds",
            )
        for folder in self.allowed_folders:
            if not folder.is_absolute():
                raise ConfigError(
                    f"{told['api_paths'].place}: {folder} is not an absolute path",
                    hint="folders separated by colons, e.g. /data/faces:/data/cats",
                )
        if self.log_level.upper() not in LOG_LEVELS:
            raise ConfigError(f"{told['log_level']} is not valid", hint=f"one of {', '.join(LOG_LEVELS)}")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"{told['log_format']} is not valid", hint="text or json")

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """
        Read the settings.

        Raises:
            ConfigError: a value is invalid.
        """
        env = os.environ if env is None else env
        try:
            home = Path(env.get(f"{PREFIX}HOME") or _default_home()).expanduser().absolute()
        except RuntimeError as exc:  # of a path with ~
            raise ConfigError("this account has no home folder", hint="set GANQ_HOME to a folder") from exc
        if home.exists() and not home.is_dir():
            raise ConfigError(
                f"GANQ_HOME={home} is not a folder", hint="name a folder; ganq makes it if need be"
            )
        config = env.get(f"{PREFIX}CONFIG")
        if config and not Path(config).is_file():
            raise ConfigError(
                f"GANQ_CONFIG={config} is not a file", hint="write one, or unset GANQ_CONFIG to do without"
            )
        given = _from_toml(Path(config or home / "ganq.toml"))
        given.update(_from_env(_with_new_names(env)))
        values: dict[str, Any] = {
            "home": home,
            "volume": home / "volume",
            "database_url": f"sqlite:///{home / 'ganq.db'}",
            "redis_url": "",
            "user": this_account(),
        }
        kinds = {f.name: f.type for f in fields(cls)}
        for name, one in given.items():
            if kinds[name] is float:
                values[name] = _seconds(one, getattr(cls, name))
            elif name == "volume":
                values[name] = _volume(one)
            else:
                values[name] = str(one.value)
        told = {
            name: given.get(name) or Given(values.get(name, getattr(cls, name, None)), PREFIX + name.upper())
            for name in kinds
        }
        values["database_url"] = _database_url(values["database_url"], told["database_url"])
        if values["redis_url"]:
            _check_redis_url(values["redis_url"], told["redis_url"])
        values["user"] = user_name(values["user"])
        if not is_user_name(values["user"]):
            raise ConfigError(
                f"{told['user'].place} has characters that do not belong in a name", hint=USER_HINT
            )
        settings = cls(**values)
        settings._check_together(told)
        if not settings.redis_url:
            socket = settings.runtime / "redis.sock"
            settings = cls(**{**values, "redis_url": f"redis+socket://{socket}"})
        return settings


WORKER_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
"""What a queue or a submit key may be called: safe in a shell, a table and a Redis key."""
NAME_HINT = "letters, digits, '.', '_', ':' and '-', at most 64"


def _default_home() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("ganq"))


RENAMED = {"wishes_seconds": "cancel_poll_seconds", "ring_again_seconds": "renotify_seconds"}
"""Settings of ganq 0.2 that have another name now; the old one is accepted with a notice."""
_noticed: set[str] = set()


def _notice_once(old: str, new: str, *, beside: bool) -> None:
    """Print to stderr, once in a process, that a setting has a new name."""
    what = f"notice: {old} is ignored: {new} is set, too" if beside else f"notice: {old} is now called {new}"
    if what not in _noticed:
        _noticed.add(what)
        with suppress(OSError, AttributeError):  # a closed or missing stderr
            print(what, file=sys.stderr)


def _with_new_names(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with each renamed variable under its new name; the new one wins."""
    env = dict(env)
    for old, new in ((f"{PREFIX}{a.upper()}", f"{PREFIX}{b.upper()}") for a, b in RENAMED.items()):
        if value := env.pop(old, None):
            _notice_once(old, new, beside=bool(env.get(new)))
            env[new] = env.get(new) or value
    return env


def _from_env(env: Mapping[str, str]) -> dict[str, Given]:
    names = {f.name for f in fields(Settings)} - {"home"}
    given: dict[str, Given] = {}
    for name in names:
        key = f"{PREFIX}{name.upper()}"
        if name in SECRETS and (path := env.get(f"{key}_FILE")):
            try:
                with open(path, encoding="utf-8") as file:
                    said = file.read(MAX_SECRET_CHARACTERS + 1).strip()
            except (OSError, UnicodeDecodeError) as exc:
                why = exc.strerror if isinstance(exc, OSError) and exc.strerror else "it is no text"
                raise ConfigError(f"{key}_FILE cannot be read: {why.lower()}", hint=f"check {path}") from exc
            if len(said) > MAX_SECRET_CHARACTERS:
                raise ConfigError(f"{key}_FILE is not a file with an address", hint=f"check {path}")
            if not said:
                raise ConfigError(f"{path} is empty, which {key}_FILE names", hint="write the value into it")
            given[name] = Given(said, key, path)
        elif env.get(key):
            given[name] = Given(env[key], key)
    return given


def _from_toml(path: Path) -> dict[str, Given]:
    return {name: Given(value, name, str(path)) for name, value in _read_toml(path).items()}


def _read_toml(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    if not path.is_file():
        raise ConfigError(f"{path} is not a regular file", hint="make it one, or remove it")
    if path.stat().st_mode & 0o002:
        raise ConfigError(f"{path} is writable by all users", hint=f"chmod o-w {path}")
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}", hint="see docs/operations.md") from exc
    if "home" in said:
        raise ConfigError(
            f"home cannot be set in {path}",
            hint=f"set {PREFIX}HOME in the environment: it says where ganq.toml is",
        )
    for old, new in RENAMED.items():
        if old in said:
            _notice_once(f"{old} in {path}", new, beside=new in said)
            said.setdefault(new, said.pop(old))
            said.pop(old, None)
    known = {f.name for f in fields(Settings)} - {"home"}
    if unknown := [name for name in said if name not in known]:
        raise ConfigError(
            f"there is no setting {unknown[0]!r} (in {path})",
            hint=f"settings: {', '.join(sorted(known))}",
        )
    return said


def _seconds(given: Given, usual: float) -> float:
    try:
        value = float(given.value)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < 1e9:
        raise ConfigError(f"{given} is not a number of seconds", hint=f"e.g. {usual:g}")
    return value


def _volume(given: Given) -> Path:
    """Return the volume's path, which must be absolute."""
    try:
        path = Path(str(given.value)).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"{given} needs a home folder that is not there", hint="write it out") from exc
    if not str(given.value).strip():
        raise ConfigError(f"{given} is empty", hint="name a folder, or leave it out")
    if not path.is_absolute():
        there = Given(str(path.absolute()), given.setting, given.file)
        raise ConfigError(f"{given} is a relative path, which differs from place to place", hint=str(there))
    return path


def _database_url(url: str, given: Given) -> str:
    """Return the URL with its driver, so that a plain postgresql:// works."""
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            url = "postgresql+psycopg://" + url.removeprefix(scheme)
    if url.startswith("postgresql+psycopg://"):
        _check_port(url, given)
        return url
    if url.startswith("sqlite:////"):
        return url
    raise ConfigError(
        f"{given} is neither Postgres nor an absolute SQLite path",
        hint="e.g. sqlite:////var/lib/ganq/ganq.db (four slashes) or postgresql://user@host/ganq",
    )


def _check_redis_url(url: str, given: Given) -> None:
    """Check the Redis URL."""
    from storage import redis_url

    try:
        address = redis_url.parse(url)
    except ValueError as exc:
        raise ConfigError(f"{given}: {exc}", hint=redis_url.EXAMPLES) from exc
    if address.scheme == "redis+socket" and not socket_fits(Path(address.place)):
        raise ConfigError(
            f"{given.place} is too long for a socket: {SOCKET_BYTES} bytes are possible",
            hint="choose a shorter path",
        )


def _check_port(url: str, given: Given) -> None:
    try:
        urlsplit(url).port  # noqa: B018 - reading it is the check
    except ValueError as exc:
        raise ConfigError(f"{given}: its port is not a number", hint="e.g. :5432, :6379") from exc


_PASSWORD = re.compile(r"(\w+://[^:/@\s]*):\S+@")
_PASSWORD_OPTION = re.compile(r"(\b(?:ssl_)?password=)[^&\s]+", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redact(text: str) -> str:
    """Mask passwords in URLs and strip control characters, before anything is shown or logged."""
    return _CONTROL.sub("", _PASSWORD_OPTION.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text)))
