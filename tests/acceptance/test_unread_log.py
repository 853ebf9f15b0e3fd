"""A log that nobody reads: a full pipe, a terminal that was stopped with Ctrl-S. The work goes on."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from machine import Ganq, part, until

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("backend", ["sqlite"], indirect=True)]

CTRL_S, CTRL_Q = b"\x13", b"\x11"


class Unread:
    """
    Args:
        reader: the end that nobody reads for now.
        writer: the end that the worker's log goes to; nothing more can be written to it.
    """

    def __init__(self, reader: int, writer: int, go_on: Callable[[], object]) -> None:
        self.reader, self.writer, self.go_on = reader, writer, go_on

    def read(self, until_text: str, within_s: float = 20.0) -> str:
        """Read from now on, until this text has come."""
        self.go_on()
        os.set_blocking(self.reader, False)
        said, deadline = b"", time.monotonic() + within_s
        while until_text.encode() not in said and time.monotonic() < deadline:
            with suppress(BlockingIOError):
                said += os.read(self.reader, 1 << 16)
            time.sleep(0.01)
        return said.decode()


@pytest.fixture(params=["pipe", "terminal"])
def unread(request: pytest.FixtureRequest) -> Iterator[Unread]:
    if request.param == "pipe":
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        os.write(writer, b"." * 4096)
        log = Unread(reader, writer, lambda: None)
    else:
        reader, writer = pty.openpty()
        os.write(reader, CTRL_S)
        log = Unread(reader, writer, lambda: os.write(reader, CTRL_Q))
    yield log
    os.close(reader)
    os.close(writer)


def _start(ganq: Ganq, log: Unread, command: str = "worker") -> "subprocess.Popen[bytes]":
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "cli.main", command, "--gpus", "none"],
        env={**ganq.env, "GANQ_LOG_LEVEL": "DEBUG"},
        cwd=ganq.folder,
        stdin=subprocess.DEVNULL,
        stdout=log.writer,
        stderr=log.writer,
        start_new_session=True,
    )
    ganq.workers.append(worker)
    return worker


@pytest.mark.parametrize(
    ("unread", "command"),
    [
        ("pipe", "worker"),
        ("terminal", "up"),
        pytest.param("pipe", "up", marks=pytest.mark.tier2),
        pytest.param("terminal", "worker", marks=pytest.mark.tier2),
    ],
    indirect=["unread"],
)
def test_a_log_without_a_reader_stops_neither_work_nor_sigterm(
    ganq: Ganq, small: list[str], unread: Unread, command: str
) -> None:
    worker = _start(ganq, unread, command)
    job = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    until(lambda: ganq.peek(job)["state"] == "succeeded", within_s=40, what="the job's end")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=20) == 0


def test_what_was_logged_meanwhile_comes_when_a_reader_returns(
    ganq: Ganq, small: list[str], unread: Unread
) -> None:
    worker = _start(ganq, unread)
    job = ganq.json("submit", "train", *small, "--epochs", "1")["id"]
    until(lambda: ganq.peek(job)["state"] == "succeeded", within_s=40, what="the job's end")
    said = unread.read(f"job {job}: succeeded")
    assert "is ready on cpu" in said
    assert f"job {job}: succeeded" in said
    worker.send_signal(signal.SIGTERM)
    assert "has stopped" in unread.read("has stopped")
    assert worker.wait(timeout=20) == 0


def test_the_log_of_a_killed_worker_is_carried_to_its_end(ganq: Ganq, redis_url: str) -> None:
    """Its supervisor drains, and says so, after the process that started it has gone."""
    worker = ganq.start_worker()
    until(lambda: "is ready on cpu" in ganq.log(), what="a worker")
    supervisor = part(worker, "worker.supervisor.loop")
    assert supervisor is not None
    worker.kill()
    supervisor.wait(timeout=20)
    until(lambda: "has stopped" in ganq.log(), within_s=10, what="its last line")


def test_an_error_at_the_start_is_still_seen(ganq: Ganq, tmp_path: Path) -> None:
    done = ganq.run("worker", "--gpus", "none", "--queues", "a b")
    assert done.returncode != 0
    assert "cannot be a queue's name" in done.stderr
