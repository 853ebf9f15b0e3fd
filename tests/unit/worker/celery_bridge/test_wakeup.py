"""Celery's processes and the supervisor talk over one wake-up socket."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.celery_bridge.wakeup import WakeSocket, send_received, wait_until_idle


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gq-") as short:
        yield Path(short) / "wake-7.sock"


def test_a_received_notification_is_distinguished_from_its_task_and_comes_first(path: Path) -> None:
    server = WakeSocket(path)
    send_received(str(path))
    replies: list[str] = []
    task = threading.Thread(target=lambda: replies.extend(wait_until_idle(str(path))))
    task.start()
    try:
        assert server.accept() is None
        waiting = server.accept()
        assert waiting is not None
        server.hold(waiting, "claimed 7")
        task.join(0.2)
        assert task.is_alive(), "the task occupies Celery's pool process while the supervisor works"
        server.release()
        task.join(5)
        assert replies == ["claimed 7", "idle"]
    finally:
        server.close()


def test_without_a_supervisor_neither_blocks(path: Path) -> None:
    send_received(str(path))
    assert list(wait_until_idle(str(path))) == []
