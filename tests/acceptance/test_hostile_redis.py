"""A client that can write to Redis can only notify: forged messages stop nothing and start nothing."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis
from machine import Ganq, part, until
from messages import envelope

from worker.celery_bridge.app import queue_key

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("backend", ["sqlite"], indirect=True)]


FORGED: list[str | bytes] = [
    "garbage",
    b"\xff\xfe",
    "[]",
    envelope(headers={"task": "os.system", "id": "2"}),
    envelope(headers={"task": [1], "id": "3"}),
    envelope(**{"content-type": "application/x-python-serialize"}),
]


def test_forged_messages_stop_no_worker_and_run_nothing(ganq: Ganq, redis_url: str, small: list[str]) -> None:
    worker = ganq.start_worker()
    until(lambda: ganq.present(), what="the worker")
    client = redis.Redis.from_url(redis_url)
    for message in FORGED:
        client.lpush(queue_key("default"), message)
    until(lambda: client.llen(queue_key("default")) == 0, within_s=100, what="all of them read")
    done = ganq.run("submit", "train", *small, "--epochs", "1", "--wait")
    assert done.returncode == 0, done.stderr
    assert worker.poll() is None
    assert len(ganq.json("status")) == 1
    client.close()


def test_duplicate_notifications_run_a_job_once(ganq: Ganq, redis_url: str, small: list[str]) -> None:
    ganq.start_worker()
    until(lambda: ganq.present(), what="the worker")
    job = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    client = redis.Redis.from_url(redis_url)
    for _ in range(20):
        client.lpush(queue_key("default"), envelope(body="W1sxXSwge30sIHt9XQ=="))
    client.close()
    assert ganq.run("wait", str(job), "--timeout", "60").returncode == 0
    until(lambda: ganq.json("workers")[0]["state"] == "idle", what="an idle worker")
    assert ganq.job(job)["attempt"] == 1


def start_up(ganq: Ganq) -> "subprocess.Popen[bytes]":
    """`ganq up` with a Redis of its own."""
    ganq.env.pop("GANQ_REDIS_URL")
    up = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli.main", "up", "--no-web", "--gpus", "none"],
        env=ganq.env,
        cwd=ganq.folder,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    ganq.workers.append(up)
    until(lambda: ganq.present(), what="the worker")
    return up


def test_up_starts_a_killed_redis_again_and_a_notification_is_received(
    ganq: Ganq, small: list[str], settings_env: dict[str, str]
) -> None:
    up = start_up(ganq)

    def servers() -> list[psutil.Process]:
        running = psutil.Process(up.pid).children()
        return [one for one in running if "redis" in one.name() and one.status() != psutil.STATUS_ZOMBIE]

    (first,) = servers()
    first.kill()
    until(lambda: [one for one in servers() if one.pid != first.pid], what="another Redis")

    until(lambda: heard(ganq, small), what="a bell that somebody hears")
    assert up.poll() is None


def heard(ganq: Ganq, small: list[str]) -> bool:
    """Whether a released job's notification reaches a Redis."""
    held = ganq.json("submit", "train", *small, "--hold")["id"]
    said = ganq.run("release", str(held))
    assert said.returncode == 0
    return "Redis does not answer" not in said.stderr


def test_up_replaces_a_redis_whose_socket_was_cleaned_away(
    ganq: Ganq, small: list[str], settings_env: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir(mode=0o1777)
    ganq.env["TMPDIR"] = str(tmp_path / "t")
    up = start_up(ganq)
    (path,) = (tmp_path / "t").glob("ganq-*/redis.sock")
    assert heard(ganq, small)
    path.unlink()
    until(lambda: heard(ganq, small), within_s=15, what="another socket")
    assert up.poll() is None


def test_up_works_where_the_temporary_folder_has_a_long_path(
    ganq: Ganq, small: list[str], settings_env: dict[str, str], tmp_path: Path
) -> None:
    long = tmp_path / ("t" * max(1, 138 - len(str(tmp_path))))
    long.mkdir(mode=0o1777)
    assert len(str(long)) >= 139
    ganq.env["TMPDIR"] = str(long)
    start_up(ganq)
    assert heard(ganq, small)
    assert ganq("health").startswith("healthy: ")
    assert not [path for path in tmp_path.rglob("*") if path.is_socket()], "its path may have been cut off"


def test_up_starts_a_killed_worker_again_and_the_job_continues(
    ganq: Ganq, small: list[str], settings_env: dict[str, str]
) -> None:
    up = start_up(ganq)
    job = ganq.json("submit", "train", *small, "--epochs", "3000", "--checkpoint-seconds", "0.3")["id"]
    until(lambda: ganq.steps(job), what="a checkpoint")
    worker = part(up, "worker")
    assert worker is not None
    worker.send_signal(signal.SIGKILL)
    until(lambda: ganq.peek(job)["attempt"] >= 2, what="another attempt")
    assert up.poll() is None
    ganq("cancel", str(job))
    until(lambda: ganq.peek(job)["state"] == "cancelled", what="the cancel")
