"""What a worker reports to systemd (sd_notify): ready when it works, alive only while its main loop runs."""

import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from machine import LATER, Ganq, part, until

pytestmark = pytest.mark.slow

WATCHDOG_S = 2.0


@pytest.fixture
def backend() -> str:
    """The protocol does not depend on the database."""
    return "sqlite"


class Systemd:
    """The receiving end of $NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.lines: list[str] = []

    def said(self, what: str) -> bool:
        """Return whether a line that begins so has come since the last forget()."""
        while True:
            try:
                self.lines += self.socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return any(line.startswith(what) for line in self.lines)

    def forget(self) -> None:
        self.said("")
        self.lines.clear()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    receiver = Systemd(tmp_path / "notify")
    yield receiver
    receiver.socket.close()


def environment(systemd: Systemd) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}


def test_the_watchdog_is_fed_only_while_the_supervisor_runs(
    ganq: Ganq, redis_url: str, systemd: Systemd
) -> None:
    worker = ganq.start_worker(**environment(systemd))
    until(lambda: systemd.said("READY=1"), what="READY=1")
    supervisor = part(worker, "worker.supervisor.loop")
    assert supervisor is not None
    assert systemd.said("STATUS=w1 is idle")
    assert "NOTIFY_SOCKET" not in supervisor.environ()  # NotifyAccess=main: only the launcher may report
    systemd.forget()
    until(lambda: systemd.said("WATCHDOG=1"), within_s=WATCHDOG_S, what="WATCHDOG=1")

    supervisor.suspend()
    try:
        time.sleep(WATCHDOG_S / 2)  # one may be under way
        systemd.forget()
        time.sleep(2 * WATCHDOG_S)
        assert not systemd.said("WATCHDOG=1"), "a stopped supervisor was reported as alive"
    finally:
        supervisor.resume()
    until(lambda: systemd.said("WATCHDOG=1"), what="WATCHDOG=1 after the supervisor went on")

    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert systemd.said("STOPPING=1")


@LATER
def test_a_service_of_several_workers_is_alive_only_if_each_of_them_is(
    ganq: Ganq, redis_url: str, systemd: Systemd
) -> None:
    fleet = ganq.start_worker(options=("--cpu-workers", "2"), **environment(systemd))
    until(lambda: systemd.said("READY=1"), what="READY=1")
    supervisors = [
        one
        for one in psutil.Process(fleet.pid).children(recursive=True)
        if "worker.supervisor.loop" in one.cmdline()
    ]
    assert len(supervisors) == 2
    supervisors[1].suspend()
    try:
        time.sleep(WATCHDOG_S / 2)
        systemd.forget()
        time.sleep(2 * WATCHDOG_S)
        assert not systemd.said("WATCHDOG=1")
    finally:
        supervisors[1].resume()


def test_ganq_up_reports_when_it_can_take_jobs(ganq: Ganq, redis_url: str, systemd: Systemd) -> None:
    ganq.env |= environment(systemd)
    up = ganq.start_up()
    until(lambda: systemd.said("READY=1"), what="READY=1")
    assert ganq.present() != []
    up.send_signal(signal.SIGTERM)
    assert up.wait(60) == 0
    assert systemd.said("STOPPING=1")
