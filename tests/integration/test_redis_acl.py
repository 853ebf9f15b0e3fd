"""The Redis user of docker/make_secrets.py may do what Celery needs, and nothing else."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from services import Redis

ROOT = Path(__file__).parents[2]

WORKER = """
import sys
from worker.celery_bridge.app import TASK, make_app
from storage.settings import Settings

app = make_app(Settings.load())
app.conf.worker_redirect_stdouts = False

@app.task(name=TASK)
def heard(job_id):
    print("heard", job_id, flush=True)

app.worker_main(["--quiet", "worker", "--queues", "ganq.default", "--loglevel", "WARNING",
                 "--without-gossip", "--without-mingle", "--pool", "solo"])
"""


def rules() -> list[str]:
    """What the deployed aclfile grants, with the password 'secret'."""
    spec = spec_from_file_location("make_secrets", ROOT / "docker" / "make_secrets.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    (line,) = [one for one in module.ACL.splitlines() if one.startswith("user ganq ")]
    granted: str = line.format(password="secret")
    return granted.split()[2:]


@pytest.fixture
def admin(redis_server: Redis) -> Iterator[Any]:
    """A client that may do everything; the user `ganq` exists while it does."""
    import redis

    with redis.Redis.from_url(redis_server.url, decode_responses=True) as client:
        client.execute_command("ACL", "SETUSER", "ganq", "reset", *rules())
        client.execute_command("ACL", "LOG", "RESET")
        yield client
        client.execute_command("ACL", "DELUSER", "ganq")


@pytest.fixture
def restricted_url(redis_server: Redis, admin: Any) -> str:
    return redis_server.url.replace("redis://", "redis://ganq:secret@")


@pytest.mark.timeout(60)
def test_celery_sends_and_receives_and_is_denied_nothing(
    admin: Any, restricted_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from storage.settings import Settings
    from worker.celery_bridge.app import make_app
    from worker.celery_bridge.notify import try_notify

    monkeypatch.setenv("GANQ_REDIS_URL", restricted_url)
    monkeypatch.setenv("GANQ_HOME", str(tmp_path))
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert try_notify(Settings.load(), 7, "default", "")
        assert worker.stdout is not None
        assert worker.stdout.readline() == "heard 7\n"
    finally:
        worker.send_signal(signal.SIGTERM)
        _, said = worker.communicate(timeout=30)
    assert "NOPERM" not in said
    # What a worker does only every now and then: look for messages that nobody acknowledged.
    with make_app(Settings.load()).connection_for_read() as connection:
        connection.default_channel.qos.restore_visible()
    assert admin.execute_command("ACL", "LOG") == []
    # The message was taken and acknowledged: nothing of it is left.
    assert admin.llen("ganq.default") == 0
    assert admin.hlen("unacked") == 0


@pytest.mark.parametrize(
    "command",
    [
        "CONFIG GET dir",
        "FLUSHALL",
        "KEYS *",
        "ACL LIST",
        "REPLICAOF 127.0.0.1 1",
        "MODULE LIST",
        "SHUTDOWN NOSAVE",
        "SCRIPT FLUSH",
        "GET anothers",
        "PUBLISH anothers hello",
    ],
)
def test_what_celery_does_not_need_is_denied(restricted_url: str, admin: Any, command: str) -> None:
    import redis

    with (
        redis.Redis.from_url(restricted_url) as client,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        client.execute_command(*command.split())
