"""
Where ganq keeps its things and how long it waits: environment GANQ_*, then ganq.toml, then defaults.

A secret may come from a file (GANQ_DATABASE_URL_FILE), so that it stands in no
process list and no log.
"""

import getpass
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jobs.errors import ConfigError

PREFIX = "GANQ_"
SECRETS = ("database_url", "redis_url")
USER_LETTERS = 64  # what the job table's column holds


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings, resolved. Seconds are floats; tests make them small."""

    home: Path
    """State of a single machine: database, embedded Redis, default volume, ganq.toml."""
    volume: Path
    """The folder that all machines share: jobs, checkpoints, pictures."""
    database_url: str
    """SQLAlchemy URL: sqlite:///… on one machine, postgresql://… on several."""
    redis_url: str
    """Broker URL; redis+socket://… is the embedded one."""
    data: str | None = None
    """Default data set for `ganq submit train`."""
    user: str = ""
    """Who submits; the name of the operating system's user by default."""
    queues: str = "default"
    """Queues that a worker serves, separated by commas."""
    heartbeat_seconds: float = 10.0
    progress_seconds: float = 2.0
    wishes_seconds: float = 1.0
    lease_seconds: float = 60.0
    """Silence after which a job is taken back from its worker."""
    reap_seconds: float = 5.0
    poll_seconds: float = 15.0
    """How often an idle worker looks at the table without being rung."""
    ring_again_seconds: float = 120.0
    drain_seconds: float = 60.0
    stall_seconds: float = 600.0
    """A running job that reports nothing for so long is taken as hung; 0 never."""
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
        """Sockets and locks of this machine; short, because a socket's path has at most 107 bytes."""
        import hashlib
        import tempfile

        mark = hashlib.sha256(str(self.home).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"ganq-{os.getuid()}-{mark}"

    def redacted(self) -> dict[str, Any]:
        """All settings as JSON, passwords masked."""
        return {
            f.name: redact(str(value)) if isinstance(value := getattr(self, f.name), str | Path) else value
            for f in fields(self)
        }

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """
        Raises:
            ConfigError: a value that cannot work, by the name of its setting.
        """
        env = os.environ if env is None else env
        home = Path(env.get(f"{PREFIX}HOME") or _default_home()).expanduser().absolute()
        config = env.get(f"{PREFIX}CONFIG")
        if config and not Path(config).is_file():
            raise ConfigError(
                f"GANQ_CONFIG={config} is no file", hint="write one, or unset GANQ_CONFIG to do without"
            )
        given = _from_toml(Path(config or home / "ganq.toml"))
        given.update(_from_env(env))
        values: dict[str, Any] = {
            "home": home,
            "volume": home / "volume",
            "database_url": f"sqlite:///{home / 'ganq.db'}",
            "redis_url": "",
            "user": _default_user(),
        }
        kinds = {f.name: f.type for f in fields(cls)}
        for name, raw in given.items():
            if name not in kinds:
                known = ", ".join(sorted(set(kinds) - {"home"}))
                raise ConfigError(f"there is no setting {name!r}", hint=f"settings: {known}")
            if kinds[name] is float:
                values[name] = _seconds(name, raw)
            elif name == "volume":
                values[name] = Path(str(raw)).expanduser().absolute()
            elif name != "home":
                values[name] = str(raw)
        values["database_url"] = _database_url(values["database_url"])
        if len(values["user"]) > USER_LETTERS:
            raise ConfigError(f"GANQ_USER has more than {USER_LETTERS} letters", hint="choose a shorter one")
        settings = cls(**values)
        if not settings.redis_url:
            socket = settings.runtime / "redis.sock"
            settings = cls(**{**values, "redis_url": f"redis+socket://{socket}"})
        return settings


def _default_home() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("ganq"))


def _default_user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid{os.getuid()}"


def _from_env(env: Mapping[str, str]) -> dict[str, Any]:
    names = {f.name for f in fields(Settings)}
    given: dict[str, Any] = {}
    for name in names:
        key = f"{PREFIX}{name.upper()}"
        if name in SECRETS and env.get(f"{key}_FILE"):
            try:
                given[name] = Path(env[f"{key}_FILE"]).read_text().strip()
            except OSError as exc:
                raise ConfigError(
                    f"{key}_FILE cannot be read: {(exc.strerror or str(exc)).lower()}",
                    hint=f"check {env[f'{key}_FILE']}",
                ) from exc
        elif env.get(key):
            given[name] = env[key]
    return given


def _from_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_mode & 0o002:
        raise ConfigError(f"{path} can be written by everybody", hint=f"chmod o-w {path}")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
        raise ConfigError(f"{path} is no valid TOML: {exc}", hint="see docs/operations.md") from exc


def _seconds(name: str, raw: Any) -> float:
    try:
        value = float(raw)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < 1e9:
        raise ConfigError(f"{PREFIX}{name.upper()}={raw} is no number of seconds", hint="e.g. 10")
    return value


def _database_url(url: str) -> str:
    """Name the driver, so that a plain postgresql:// works as people write it."""
    for scheme in ("postgresql://", "postgres://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url.removeprefix(scheme)
    if url.startswith(("postgresql+psycopg://", "sqlite:///")):
        return url
    raise ConfigError(
        f"GANQ_DATABASE_URL={redact(url)} is neither SQLite nor Postgres",
        hint="e.g. sqlite:////var/lib/ganq/ganq.db or postgresql://user@host/ganq",
    )


# Up to the last @, because a password may hold one; better a host masked than a password shown.
_PASSWORD = re.compile(r"(\w+://[^:/@\s]*):\S+@")
_PASSWORD_OPTION = re.compile(r"(\bpassword=)[^&\s]+", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redact(text: str) -> str:
    """Mask passwords in URLs and strip control characters, before anything is shown or logged."""
    return _CONTROL.sub("", _PASSWORD_OPTION.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text)))
