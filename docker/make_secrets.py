"""
Make what docker-compose.yml reads: passwords, URLs, the Redis ACL and .env. Run it once.

It can be run again, to move a folder or a port: passwords are kept, and so is
all other settings of .env.

    python3 docker/make_secrets.py [--volume DIR] [--data DIR]

It needs nothing but Python, because it runs before anything is installed.
"""

import argparse
import os
import re
import secrets
import shlex
import socket
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "secrets"
ENV = HERE.parent / ".env"

# Containers never run as root: a root that makes the secrets gives them to this user, the image's own.
UNPRIVILEGED = 10001

# What Celery needs on Redis with remote control off, and nothing else: no CONFIG, no FLUSHALL.
ACL = (
    "user default off\n"
    "user ganq on >{password} resetkeys ~celery* ~ganq* ~_kombu.* ~unacked* resetchannels &/0.* -@all "
    "+ping +info +select +client +command +hello +multi +exec +watch +unwatch +discard +llen +lpush +rpush "
    "+brpop +zadd +zrem +zrange +zrangebyscore +zrevrangebyscore +hset +hget +hdel +sadd +srem +smembers "
    "+sismember +set +get +del +expire +publish +subscribe +unsubscribe +psubscribe +punsubscribe +eval "
    "+evalsha +script|load\n"
)


def owner() -> tuple[int, int]:
    """Return the user and group that own the files and that the containers run as."""
    if os.getuid() != 0:
        return os.getuid(), os.getgid()
    user, group = int(os.environ.get("SUDO_UID", 0)), int(os.environ.get("SUDO_GID", 0))
    return (user, group) if user else (UNPRIVILEGED, UNPRIVILEGED)


def give(path: Path, to: tuple[int, int]) -> None:
    """Change the owner of a path, if this process is root."""
    if os.getuid() == 0:
        os.chown(path, *to)


def write(path: Path, text: str) -> None:
    """Write a file that only its owner can read, in one step: what is there is always whole."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    give(beside, owner())
    beside.replace(path)


def keep_or_make(name: str) -> str:
    """Return the password in a file; make a new one of URL-safe letters if there is none."""
    path = FOLDER / name
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = secrets.token_urlsafe(24)
    write(path, kept)
    return kept


def read_env() -> dict[str, str]:
    """Return the settings of .env in order, without quotes."""
    lines = ENV.read_text().splitlines() if ENV.exists() else []
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {key.strip(): value.strip().strip("'\"") for key, _, value in pairs}


def write_env(values: dict[str, str]) -> None:
    """Set these in .env and leave its other lines, comments too, as they are."""
    lines = ENV.read_text().splitlines() if ENV.exists() else []
    kept = [line for line in lines if line.partition("=")[0].strip() not in values]
    # Single quotes: nothing between them is a variable to compose.
    write(ENV, "".join(f"{line}\n" for line in kept + [f"{key}='{value}'" for key, value in values.items()]))


def folder(text: str) -> Path:
    """Return an absolute path that is valid in .env and in a mount."""
    path = Path(text).expanduser().resolve()
    if re.search(r"['\n\r:]", str(path)):
        raise argparse.ArgumentTypeError(
            f"{path} has a quote, a colon or a line break; choose another folder"
        )
    return path


def port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return int(text)


def options() -> argparse.Namespace:
    """Parse the options; the defaults are those in .env."""
    before = read_env()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    volume = before.get("GANQ_VOLUME") or str(HERE.parent / "volume")
    data = before.get("GANQ_DATA_DIR") or str(HERE.parent / "data")
    parser.add_argument("--volume", type=folder, default=volume, help="shared folder for results")
    parser.add_argument("--data", type=folder, default=data, help="folder that holds your images")
    for name, usual in (("redis", "6379"), ("postgres", "5432")):
        parser.add_argument(
            f"--{name}-port",
            type=port,
            default=before.get(f"GANQ_{name.upper()}_PORT") or usual,
            help="on this machine's loopback",
        )
    return parser.parse_args()


def main() -> None:
    chosen = options()
    user, group = owner()
    for path in (FOLDER, chosen.volume, chosen.data):
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        # A folder that was there keeps its owner, but for the one whose insides are ours.
        if new or path == FOLDER:
            give(path, (user, group))
    FOLDER.chmod(0o700)
    postgres, redis = keep_or_make("postgres_password"), keep_or_make("redis_password")
    keep_or_make("web_token")
    write(FOLDER / "redis.acl", ACL.format(password=redis))
    for name, database_at, redis_at in (
        ("", "postgres:5432", "redis:6379"),
        ("host_", f"127.0.0.1:{chosen.postgres_port}", f"127.0.0.1:{chosen.redis_port}"),
    ):
        write(FOLDER / f"{name}database_url", f"postgresql://ganq:{postgres}@{database_at}/ganq\n")
        write(FOLDER / f"{name}redis_url", f"redis://ganq:{redis}@{redis_at}/0\n")
    exports = {
        "GANQ_DATABASE_URL_FILE": FOLDER / "host_database_url",
        "GANQ_REDIS_URL_FILE": FOLDER / "host_redis_url",
        "GANQ_VOLUME": chosen.volume,
    }
    lines = (f"export {key}={shlex.quote(str(value))}\n" for key, value in exports.items())
    write(FOLDER / "host.env", "".join(lines))
    write_env(
        {
            "GANQ_UID": str(user),
            "GANQ_GID": str(group),
            "GANQ_NODE": re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[:40] or "node",
            "GANQ_VOLUME": str(chosen.volume),
            "GANQ_DATA_DIR": str(chosen.data),
            "GANQ_REDIS_PORT": str(chosen.redis_port),
            "GANQ_POSTGRES_PORT": str(chosen.postgres_port),
        }
    )
    example = shlex.quote(f"{chosen.data}/…")
    print("docker compose --profile gpu up -d      (or --profile cpu)")
    link = f"http://127.0.0.1:{read_env().get('GANQ_WEB_PORT', '8311')}/?token="
    print(f'echo "{link}$(cat {shlex.quote(str(FOLDER / "web_token"))})"      prints the link of the page')
    print(f". {shlex.quote(str(FOLDER / 'host.env'))}      then: ganq submit train --data {example}")


if __name__ == "__main__":
    main()
