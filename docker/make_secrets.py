"""
Make what docker-compose.yml reads: passwords, URLs, the Redis ACL and .env. Run it once.

An existing password is kept, so that it can be run again after a change of paths:

    python3 docker/make_secrets.py [--volume DIR] [--data DIR]
"""

import argparse
import os
import secrets
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "secrets"

# What Celery needs on Redis with remote control off, and nothing else: no CONFIG, no FLUSHALL.
ACL = (
    "user default off\n"
    "user ganq on >{password} resetkeys ~celery* ~ganq* ~_kombu.* ~unacked* resetchannels &/0.* -@all "
    "+ping +info +select +client +command +hello +multi +exec +watch +unwatch +discard +llen +lpush +rpush "
    "+brpop +zadd +zrem +zrange +zrangebyscore +zrevrangebyscore +hset +hget +hdel +sadd +srem +smembers "
    "+sismember +set +get +del +expire +publish +subscribe +unsubscribe +psubscribe +punsubscribe +eval "
    "+evalsha +script|load\n"
)


def keep_or_make(name: str) -> str:
    """A password in a file that only its owner can read."""
    path = FOLDER / name
    if not path.exists():
        write(path, secrets.token_urlsafe(24))
    return path.read_text().strip()


def write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--volume", type=Path, default=HERE.parent / "volume", help="shared folder for results")
    parser.add_argument("--data", type=Path, default=HERE.parent / "data", help="folder that holds your pictures")
    parser.add_argument("--redis-port", type=int, default=6379)
    parser.add_argument("--postgres-port", type=int, default=5432)
    chosen = parser.parse_args()
    volume, data = chosen.volume.resolve(), chosen.data.resolve()
    for folder in (FOLDER, volume, data):
        folder.mkdir(parents=True, exist_ok=True)
    FOLDER.chmod(0o700)
    postgres, redis = keep_or_make("postgres_password"), keep_or_make("redis_password")
    write(FOLDER / "redis.acl", ACL.format(password=redis))
    for name, database_host, redis_host in (
        ("", "postgres:5432", "redis:6379"),
        ("host_", f"127.0.0.1:{chosen.postgres_port}", f"127.0.0.1:{chosen.redis_port}"),
    ):
        write(FOLDER / f"{name}database_url", f"postgresql://ganq:{postgres}@{database_host}/ganq\n")
        write(FOLDER / f"{name}redis_url", f"redis://ganq:{redis}@{redis_host}/0\n")
    write(
        FOLDER / "host.env",
        f"export GANQ_DATABASE_URL_FILE='{FOLDER}/host_database_url'\n"
        f"export GANQ_REDIS_URL_FILE='{FOLDER}/host_redis_url'\n"
        f"export GANQ_VOLUME='{volume}'\n",
    )
    write(
        HERE.parent / ".env",
        f"GANQ_UID={os.getuid()}\nGANQ_GID={os.getgid()}\nGANQ_VOLUME={volume}\nGANQ_DATA_DIR={data}\n"
        f"GANQ_REDIS_PORT={chosen.redis_port}\nGANQ_POSTGRES_PORT={chosen.postgres_port}\n",
    )
    print("docker compose --profile gpu up -d      (or --profile cpu)")
    print(f". {FOLDER / 'host.env'}      then: ganq submit train --data {data}/…")


if __name__ == "__main__":
    main()
