"""`ganq doctor` reports problems and what to do about them: workers and jobs, and how checks run."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cli.doctor import _wrapped
from cli.ui import output
from worker.doctor.check import Finding, Probe, ok, within
from worker.doctor.jobs import Waiting, check_queued

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.settings import Settings

# --- the whole ----------------------------------------------------------------------------


def test_a_set_up_that_works_has_no_failure(
    ganq: "Ganq", settings: "Settings", redis_url: str, speak: Callable[..., None]
) -> None:
    settings.volume.mkdir()
    speak("w1")
    result = ganq("doctor")
    assert result.code == 0
    assert " 0 errors" in result.out
    reported = ganq("doctor", "--json").findings()
    for check in ("ganq", "files", "sockets", "database", "sqlite", "schema", "clock", "workers", "torch"):
        assert [one["level"] for one in reported[check]] == ["ok"], reported[check]


def test_the_json_keys_of_the_version_before_are_kept_beside_the_new_ones(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANQ_REDIS_URL", "http://127.0.0.1")
    (found,) = ganq("doctor", "--json").findings()["settings"]
    assert (found["level"], found["verdict"]) == ("error", "bad")
    assert found["message"] == found["said"]


def test_on_a_terminal_lines_break_between_words_and_a_path_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(output, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    path = "/a/path/that/is/longer/than/what/is/left/of/the/line/here"
    first, *others = _wrapped(f"what lies at {path} is nobody's", 16).split("\n")
    assert first == "what lies at"
    assert others == [" " * 16 + path, " " * 16 + "is nobody's"]


def test_a_machine_that_never_saw_ganq_gets_warnings_and_nothing_is_made(
    bare_ganq: "Ganq", tmp_path: Path
) -> None:
    result = bare_ganq("doctor")
    assert result.code == 0
    assert "ganq up or the first ganq submit creates it" in result.out
    assert not (tmp_path / "new-home").exists()


def test_doctor_changes_nothing(ganq: "Ganq", settings: "Settings", redis_url: str) -> None:
    settings.volume.mkdir()
    before = sorted(path for path in settings.home.rglob("*") if "ganq.db-" not in path.name)
    ganq("doctor")
    assert sorted(path for path in settings.home.rglob("*") if "ganq.db-" not in path.name) == before


def test_no_password_is_shown(ganq: "Ganq", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANQ_REDIS_URL", "redis://ada:s3cret@127.0.0.1:1/0")
    for arguments in ((), ("--json",)):
        result = ganq("doctor", *arguments)
        assert "s3cret" not in result.out + result.err
        assert "ada:***@" in result.out


def test_doctor_loads_neither_torch_nor_celery(ganq: "Ganq") -> None:
    program = (
        "import sys; from cli.main import main; main(['doctor'])\n"
        "assert {'torch', 'celery', 'torchvision'}.isdisjoint(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


# --- workers and jobs ---------------------------------------------------------------------


def test_unresponsive_workers_and_other_versions_are_named_and_stopped_ones_are_not(
    ganq: "Ganq", settings: "Settings", speak: Callable[..., None]
) -> None:
    late = settings.lease_seconds + 10
    speak("alive", version="0.0.9")
    speak("hung", "busy", ago=late)
    speak("gone", "stopped", ago=late)
    messages = [one["message"] for one in ganq("doctor", "--json").findings()["workers"]]
    assert messages[0].startswith("1 alive on 1 host")
    assert any("unresponsive" in line and "hung" in line and "gone" not in line for line in messages)
    assert any("alive (0.0.9)" in line for line in messages)


def test_a_running_job_of_an_unresponsive_worker_fails_only_if_no_other_can_requeue_it(
    ganq: "Ganq",
    settings: "Settings",
    running_job_factory: "Callable[..., Lease]",
    speak: Callable[..., None],
) -> None:
    running_job_factory()
    speak("w1", "busy", ago=settings.lease_seconds + 10)
    result = ganq("doctor")
    assert result.code == 1
    assert "no other worker can requeue them: 1" in result.out
    speak("w2")
    result = ganq("doctor")
    assert result.code == 0
    assert "running on an unresponsive worker: 1" in result.out


def test_a_queue_that_no_running_worker_serves_fails(
    ganq: "Ganq", settings: "Settings", job_factory: "Callable[..., Job]", speak: Callable[..., None]
) -> None:
    job_factory()
    job_factory(queue="urgent")
    job_factory(queue="kept", held=True)
    speak("w1")
    speak("w2", queues=("urgent",), ago=settings.lease_seconds + 10)
    result = ganq("doctor")
    assert result.code == 1
    assert "1 queued job in the queue urgent, which no running worker serves" in result.out
    assert "→ start ganq worker --queues urgent" in result.out
    assert "1 queued job in the queue default" in result.out
    assert "kept" not in result.out


def test_a_draining_worker_serves_no_queue(
    settings: "Settings", queries: "Queries", speak: Callable[..., None]
) -> None:
    speak("w1", "draining")
    (reported,) = check_queued([Waiting("default", "train", 1, 2)], queries.workers(), settings)
    assert isinstance(reported, Finding)
    assert reported.level == "warn"
    assert "no worker is running" in reported.message


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"kind": "dream", "spec_version": 99}, "of the kind 'dream'"),
        ({"spec_version": 99}, "of a newer ganq (spec 99"),
    ],
)
def test_a_job_that_no_worker_of_this_version_takes_fails(
    ganq: "Ganq",
    settings: "Settings",
    job_factory: "Callable[..., Job]",
    speak: Callable[..., None],
    changes: Any,
    word: str,
) -> None:
    job_factory(spec={}, **changes)
    speak("w1")
    result = ganq("doctor")
    assert result.code == 1
    assert word in result.out
    speak("w2", version="99.0")  # which jobs that one can run is not known here
    result = ganq("doctor")
    assert result.code == 0
    assert word in result.out
    assert "a worker of ganq 99.0 may" in result.out


# --- how probes are run -------------------------------------------------------------------


def test_a_probe_that_hangs_keeps_its_findings_and_delays_no_other() -> None:
    def look() -> Iterator[Any]:
        yield ok("x", "first")
        time.sleep(60)
        yield ok("x", "never")

    began = time.monotonic()
    reported = list(Probe("x", look, within_s=0.3, hint="pull the plug"))
    assert time.monotonic() - began < 2
    assert [(one.level, one.message) for one in reported] == [
        ("ok", "first"),
        ("error", "no answer within 0 s"),
    ]
    assert reported[1].hint == "pull the plug"


def test_a_probe_that_fails_is_reported_without_a_password() -> None:
    def look() -> Iterator[Any]:
        raise RuntimeError("lost redis://ada:s3cret@host")
        yield

    (reported,) = Probe("x", look, within_s=5, hint="")
    assert reported.level == "error"
    assert "RuntimeError: lost redis://ada:***@host" in reported.message


def test_an_answer_in_time_is_passed_on_and_so_is_an_error() -> None:
    assert within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        within(0.1, lambda: time.sleep(30))


def test_a_password_is_masked_wherever_a_server_repeats_it(settings: "Settings") -> None:
    from dataclasses import replace

    from cli.doctor import _masker

    masked = _masker(replace(settings, redis_url="redis://ada:s3cret%2Fbell@127.0.0.1:1/0"))
    assert masked("refused: s3cret/bell, as in s3cret%2Fbell") == "refused: ***, as in ***"
