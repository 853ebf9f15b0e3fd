"""`ganq health`: what it concludes from a supervisor's words, and from the job table."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from worker.host import live_supervisors as health
from worker.host.live_supervisors import Status, judge

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.settings import Settings

# --- what a supervisor says of itself -----------------------------------------------------

WELL = {
    "worker": "w1",
    "pid": 7,
    "state": "busy",
    "job_id": 12,
    "loop_s": 3.0,
    "heartbeat_s": 1.0,
    "report_s": 9.0,
    "database_s": 4.0,
    "draining_s": None,
    "dead_threads": [],
    "away_after_s": 30.0,
    "drain_seconds": 60.0,
}


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({}, Status.HEALTHY, "is busy with job 12"),
        ({"state": "draining", "draining_s": 80.0}, Status.HEALTHY, "is draining with job 12"),
        ({"state": "draining", "draining_s": 95.0}, Status.UNHEALTHY, "longer than it may"),
        ({"dead_threads": ["heartbeat"]}, Status.UNHEALTHY, "its heartbeat has died"),
        ({"loop_s": 181.0}, Status.UNHEALTHY, "loop has been stuck"),
        ({"heartbeat_s": 181.0}, Status.UNHEALTHY, "heartbeat thread has been stuck"),
        ({"report_s": 31.0}, Status.DEGRADED, "has accepted no heartbeat"),
        ({"database_s": 31.0}, Status.DEGRADED, "has not answered for 31 s"),
        # Waiting for the database is no fault of the worker, for however long.
        ({"database_s": 999.0, "loop_s": 999.0, "heartbeat_s": 999.0}, Status.DEGRADED, "has not answered"),
        ({"database_s": 999.0, "dead_threads": ["recovery"]}, Status.UNHEALTHY, "recovery has died"),
    ],
)
def test_a_worker_is_judged_by_what_it_can_help(changes: dict[str, Any], status: Status, word: str) -> None:
    told = judge({**WELL, **changes})
    assert (told.status, told.healthy) == (status, status is not Status.UNHEALTHY)
    assert word in told.why


@pytest.fixture
def supervisor(settings: "Settings") -> Iterator[Any]:
    """A socket like a supervisor's that answers each who asks with these bytes; None: never."""
    listeners = []

    def listen(answer: bytes | None) -> None:
        settings.runtime.mkdir(mode=0o700, exist_ok=True)
        path = settings.runtime / f"live-{os.getpid()}.sock"
        path.unlink(missing_ok=True)
        path.with_suffix(".json").write_text(json.dumps({"worker": "w1", "pid": os.getpid()}))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        listeners.append(listener)
        if answer is not None:

            def serve() -> None:
                line, _ = listener.accept()
                with line:
                    line.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()

    yield listen
    for one in listeners:
        one.close()
    shutil.rmtree(settings.runtime, ignore_errors=True)


@pytest.mark.parametrize("answer", [b"", b"[]\n", b"no json\n", b'{"worker": "w1"}\n'])
def test_a_supervisor_that_answers_nonsense_is_unhealthy(
    ganq: "Ganq", supervisor: Any, answer: bytes
) -> None:
    supervisor(answer)
    said = ganq("health")
    assert (said.code, said.out.count("\n")) == (1, 1)
    assert "broke off its answer" in said.out


def test_one_whose_queue_of_askers_is_full_is_unhealthy(
    ganq: "Ganq", supervisor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ANSWER_S", 0.2)
    supervisor(None)
    for _ in range(4):
        said = ganq("health")
        assert said.code == 1
        assert "does not answer" in said.out


def test_an_invalid_status_answer_counts_as_none(ganq: "Ganq", settings: "Settings", supervisor: Any) -> None:
    supervisor(None)
    (settings.runtime / "live-1.json").write_text("[1, 2")
    (settings.runtime / "live-2.json").write_text('{"worker": "w2"}')
    assert ganq("health", "--worker", "w2").code == 1


# --- the job table, where no supervisor is found ------------------------------------------


def test_a_worker_of_this_host_that_speaks_is_healthy(ganq: "Ganq", speak: Callable[..., None]) -> None:
    speak("w1", "busy")
    said = ganq("health")
    assert (said.code, said.out) == (0, "healthy: w1 is busy, by the job table\n")
    assert ganq("health", "--worker", "w1").code == 0


def test_a_worker_of_another_host_makes_this_one_no_healthier(
    ganq: "Ganq", speak: Callable[..., None]
) -> None:
    speak("w1", host="elsewhere")
    said = ganq("health")
    assert (said.code, said.out) == (1, "unhealthy: no worker runs on this machine\n")
    assert ganq("health", "--worker", "w1").code == 0
    assert ganq("health", "--worker", "w2").code == 1


def test_silence_is_measured_in_heartbeats_and_the_lease(
    ganq: "Ganq", settings: "Settings", speak: Callable[..., None]
) -> None:
    limit = 3 * settings.heartbeat_seconds + settings.lease_seconds
    speak("w1", ago=limit - 1.0)
    assert ganq("health").code == 0
    speak("w1", ago=limit + 1.0)
    said = ganq("health")
    assert said.code == 1
    assert "has been unresponsive for" in said.out


def test_one_silent_worker_makes_a_machine_unhealthy_and_one_that_stopped_does_not(
    ganq: "Ganq", settings: "Settings", speak: Callable[..., None]
) -> None:
    speak("w1")
    speak("w2", "stopped")
    assert ganq("health").code == 0
    speak("w3", ago=100)
    assert ganq("health").code == 1


def test_a_worker_that_has_stopped_is_not_healthy(ganq: "Ganq", speak: Callable[..., None]) -> None:
    speak("w1", "stopped")
    said = ganq("health")
    assert (said.code, said.out) == (1, "unhealthy: w1 has stopped\n")


def test_every_failure_of_health_is_one_line_and_exit_code_1(
    bare_ganq: "Ganq", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = bare_ganq("health")
    assert (said.code, said.out.count("\n")) == (1, 1)
    monkeypatch.setenv("GANQ_LEASE_SECONDS", "soon")
    said = bare_ganq("health")
    assert (said.code, said.out.count("\n")) == (1, 1)


def test_a_job_table_that_does_not_answer_is_waited_for_no_longer_than_stated(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.health.TABLE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("GANQ_DATABASE_URL", f"postgresql://ada:s3cret@127.0.0.1:{port}/ganq")
        said = ganq("health", "--json")
    assert said.code == 1
    (told,) = said.json()["workers"]
    assert told["why"] == "no worker found, and the job table does not answer"
