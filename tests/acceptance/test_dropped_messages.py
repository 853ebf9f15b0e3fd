"""Messages in Redis that are no plain notification are dropped unread: they hold no memory and no process."""

import base64
import json
import subprocess
import uuid
import zlib
from typing import Any

import psutil
import pytest
import redis
from machine import Ganq, until
from messages import envelope

from worker.celery_bridge.app import TASK, queue_key

# Where an idle worker looks at the table every few minutes only, a job that starts at once was notified.
pytestmark = [pytest.mark.slow, pytest.mark.parametrize("backend", ["postgres"], indirect=True)]

KEY = queue_key("default")
NUMBER = 20_000
LATER = "2099-01-01T00:00:00+00:00"
ARGUMENTS = [[1], {}, {}]


def task(body: object = ARGUMENTS, **headers: object) -> str:
    """A message for ganq's task, with something in its headers that no notification has."""
    message = json.loads(envelope(base64.b64encode(json.dumps(body).encode()).decode()))
    message["headers"].update(headers)
    message["properties"]["delivery_tag"] = str(uuid.uuid4())
    return json.dumps(message)


def unlike(message: str, **parts: object) -> str:
    return json.dumps({**json.loads(message), **parts})


BOMB = base64.b64encode(zlib.compress(b"[" + b"1," * 20_000_000)).decode()
STRANGE = {
    "expires": task(expires=LATER),
    "a time limit": task(timelimit=[0.001, 0.001]),
    "an old protocol with an eta": unlike(
        task({"task": TASK, "id": "1", "eta": LATER, "args": [1]}), headers={}
    ),
    "both protocols at once": task({"task": TASK, "id": "1", "eta": LATER, "args": [1], "kwargs": {}}),
    "compression": unlike(
        envelope(BOMB), headers={**json.loads(task())["headers"], "compression": "application/x-gzip"}
    ),
    "a callback": task([[1], {}, {"callbacks": [{"task": TASK, "args": [1], "kwargs": {}, "options": {}}]}]),
    "a long body": task([["x" * 1_000_000], {}, {}]),
    "another task": task(task="os.system"),
    "no id": task(id=None),
    "no tag": unlike(task(), properties={"body_encoding": "base64"}),
    "no message": "[]",
}


def celery_bytes(worker: "subprocess.Popen[bytes]") -> int:
    """What Celery's two processes hold: the launcher and its pool."""
    launcher = psutil.Process(worker.pid)
    own = [one for one in launcher.children() if "worker.supervisor.loop" not in " ".join(one.cmdline())]
    return sum(one.memory_info().rss for one in (launcher, *own))


@pytest.fixture
def worker(ganq: Ganq, redis_url: str) -> Any:
    ganq.env |= {"GANQ_POLL_SECONDS": "300", "GANQ_RENOTIFY_SECONDS": "300"}
    running = ganq.start_worker()
    until(lambda: ganq.present(), what="the worker")
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(KEY, task())
        until(lambda: client.llen(KEY) == 0, what="a notification that is heard")
    return running


def heard(ganq: Ganq, small: list[str]) -> None:
    done = ganq.run("submit", "train", *small, "--epochs", "1", "--wait")
    assert done.returncode == 0, done.stderr  # within the time of run(), which is shorter than a poll


@pytest.mark.tier2
def test_messages_with_an_eta_hold_no_memory_and_a_notification_is_received(
    ganq: Ganq, redis_url: str, small: list[str], worker: Any
) -> None:
    before = celery_bytes(worker)
    with redis.Redis.from_url(redis_url) as client, client.pipeline() as pipe:
        for number in range(NUMBER):
            pipe.lpush(KEY, task(id=f"eta-{number}", eta=LATER))
        pipe.execute()
        until(lambda: client.llen(KEY) == 0, within_s=60, what="all of them read")
        kept = client.hlen("unacked"), (celery_bytes(worker) - before) // 1_000_000
    assert kept[0] == 0, kept
    assert kept[1] < 15, kept
    heard(ganq, small)
    lines = [line for line in ganq.log().splitlines() if "dropped" in line]
    assert 1 <= len(lines) <= 3
    assert len(ganq.log()) < 20_000


def test_strange_messages_end_nothing_and_a_notification_is_received(
    ganq: Ganq, redis_url: str, small: list[str], worker: Any
) -> None:
    before = celery_bytes(worker)
    pool = psutil.Process(worker.pid).children()
    with redis.Redis.from_url(redis_url) as client:
        client.lpush(KEY, *STRANGE.values())
        until(lambda: client.llen(KEY) == 0, within_s=60, what="all of them read")
        assert client.hlen("unacked") == 0
    assert celery_bytes(worker) - before < 15e6
    heard(ganq, small)
    assert psutil.Process(worker.pid).children() == pool
    assert "Traceback" not in ganq.log()
    assert len(ganq.json("status")) == 1


def test_each_strange_message_is_reported_from_a_notification(backend: str) -> None:
    from worker.celery_bridge.notify import is_notification, message

    assert is_notification(json.loads(message("default", 7)))
    assert is_notification(json.loads(task()))
    for what, strange in STRANGE.items():
        assert not is_notification(json.loads(strange)), what
    forgeries: list[Any] = [
        None,
        1,
        "x",
        {},
        {"headers": []},
        {"headers": {"task": TASK, "id": "1"}, "body": 1},
    ]
    for forged in forgeries:
        assert not is_notification(forged)
