"""`ganq doctor` names what is wrong and the way out."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from storage.diagnosis import Finding, check_queued
from worker import diagnosis


def findings(said: Any) -> dict[str, list[dict[str, Any]]]:
    """The findings of `ganq doctor --json` by their check."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in said.json()["findings"]:
        found.setdefault(one["check"], []).append(one)
    return found


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """SQLite, unless the test asks for Postgres: the checks behind the words are the same."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture
def speak(database, make_identity):
    """Has a worker speak, now or some seconds ago: speak('w1', 'idle', ago=90)."""
    from storage.version import version
    from storage.worker_store import WorkerStore

    def say(name: str, state: str = "idle", *, ago: float = 0.0, **changes: Any) -> None:
        who = make_identity(name, **{"host": socket.gethostname(), "version": version(), **changes})
        WorkerStore(database, who).say(state)
        moved = text("UPDATE worker SET seen_at = seen_at - :ago WHERE name = :name")
        database.write(lambda conn: conn.execute(moved, {"ago": ago, "name": name}))

    return say


# --- the whole ----------------------------------------------------------------------------


def test_a_set_up_that_works_has_no_failure(ganq, settings, redis_url, speak):
    settings.volume.mkdir()
    speak("w1")
    said = ganq("doctor")
    assert said.code == 0
    assert " 0 failed" in said.out
    told = findings(ganq("doctor", "--json"))
    for check in ("ganq", "sockets", "database", "sqlite", "schema", "clock", "workers", "redis", "torch"):
        assert [one["verdict"] for one in told[check]] == ["ok"], told[check]


def test_a_machine_that_never_saw_ganq_gets_warnings_and_nothing_is_made(bare_ganq, tmp_path):
    said = bare_ganq("doctor")
    assert said.code == 0
    assert "ganq up or the first ganq submit makes it" in said.out
    assert not (tmp_path / "new-home").exists()


def test_doctor_changes_nothing(ganq, settings, redis_url):
    settings.volume.mkdir()
    before = sorted(path for path in settings.home.rglob("*") if "ganq.db-" not in path.name)
    ganq("doctor")
    assert sorted(path for path in settings.home.rglob("*") if "ganq.db-" not in path.name) == before


def test_no_password_is_shown(ganq, monkeypatch):
    monkeypatch.setenv("GANQ_REDIS_URL", "redis://ada:s3cret@127.0.0.1:1/0")
    for arguments in ((), ("--json",)):
        said = ganq("doctor", *arguments)
        assert "s3cret" not in said.out + said.err
        assert "ada:***@" in said.out


def test_doctor_loads_neither_torch_nor_celery(ganq):
    program = (
        "import sys; from cli.main import main; main(['doctor'])\n"
        "assert {'torch', 'celery', 'torchvision'}.isdisjoint(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


# --- the database -------------------------------------------------------------------------


def test_an_older_schema_fails_with_the_command(ganq, database):
    database.write(lambda conn: conn.execute(text("UPDATE alembic_version SET version_num = '0000'")))
    said = ganq("doctor")
    assert said.code == 1
    assert "→ run: ganq db upgrade" in said.out


def test_a_file_that_is_no_database_fails(ganq, settings):
    Path(settings.database_url.removeprefix("sqlite:///")).write_bytes(b"no database" * 1000)
    said = ganq("doctor", "--json")
    assert said.code == 1
    assert "is not a SQLite database" in findings(said)["database"][0]["said"]


def test_sqlite_on_a_network_file_system_fails(ganq, monkeypatch):
    monkeypatch.setattr("storage.engine.filesystem_type", lambda folder: "nfs4")
    said = ganq("doctor")
    assert said.code == 1
    assert "SQLite cannot be kept on nfs4" in said.out


def test_an_sqlite_with_the_wal_defect_is_told_how_it_is_guarded(ganq, monkeypatch):
    monkeypatch.setattr("storage.diagnosis.WAL_RESET_FIXED", (99, 0, 0))
    assert "before 99.0.0" in findings(ganq("doctor", "--json"))["sqlite"][0]["said"]


def test_a_wal_that_nobody_empties_is_a_warning(ganq, monkeypatch, database, job_factory):
    monkeypatch.setattr("storage.diagnosis.LARGE_WAL_BYTES", 0)
    job_factory()
    told = findings(ganq("doctor", "--json"))["sqlite"]
    assert [one["verdict"] for one in told] == ["ok", "warn"]
    assert "WAL has grown" in told[1]["said"]


def test_a_database_that_this_user_cannot_write_fails(ganq, monkeypatch):
    monkeypatch.setattr("storage.diagnosis.os.access", lambda path, mode: False)
    said = ganq("doctor")
    assert said.code == 1
    assert "cannot be written by this user" in said.out


def test_a_clock_that_is_off_is_a_warning_with_the_direction(ganq, monkeypatch):
    monkeypatch.setattr("storage.queries.Queries.now", lambda self: __import__("time").time() + 3600)
    (clock,) = findings(ganq("doctor", "--json"))["clock"]
    assert clock["verdict"] == "warn"
    assert "3,600 s behind" in clock["said"]


@pytest.mark.parametrize("backend", ["postgres"], indirect=True)
@pytest.mark.parametrize("commit", ["on", "off"])
def test_postgres_is_named_and_a_careless_one_is_a_warning(settings, database, commit):
    from storage.diagnosis import check_job_table

    name = database.engine.url.database
    database.write(
        lambda conn: conn.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = {commit}"))
    )
    told = list(check_job_table(settings))
    assert any(one.said.startswith("Postgres ") and one.verdict == "ok" for one in told)
    assert any("synchronous_commit" in one.said for one in told) is (commit == "off")


def test_a_postgres_that_is_not_there_fails(ganq, monkeypatch):
    monkeypatch.setenv("GANQ_DATABASE_URL", "postgresql://ganq:s3cret@127.0.0.1:1/ganq")
    said = ganq("doctor", "--json")
    assert said.code == 1
    assert "cannot be reached" in findings(said)["database"][0]["said"]
    assert "s3cret" not in said.out


# --- workers and jobs ---------------------------------------------------------------------


def test_silent_workers_and_other_versions_are_named_and_stopped_ones_are_not(ganq, settings, speak):
    late = settings.lease_seconds + 10
    speak("alive", version="0.0.9")
    speak("hung", "busy", ago=late)
    speak("gone", "stopped", ago=late)
    told = [one["said"] for one in findings(ganq("doctor", "--json"))["workers"]]
    assert told[0].startswith("1 alive on 1 host")
    assert any("silent" in line and "hung" in line and "gone" not in line for line in told)
    assert any("alive (0.0.9)" in line for line in told)


def test_a_running_job_of_a_silent_worker_fails_only_if_nobody_can_take_it_back(
    ganq, settings, running_job_factory, speak
):
    running_job_factory()
    speak("w1", "busy", ago=settings.lease_seconds + 10)
    said = ganq("doctor")
    assert said.code == 1
    assert "no worker is alive to take them back: 1" in said.out
    speak("w2")
    said = ganq("doctor")
    assert said.code == 0
    assert "running on a worker that is silent: 1" in said.out


def test_a_queue_that_no_living_worker_serves_fails(ganq, settings, job_factory, speak):
    job_factory()
    job_factory(queue="urgent")
    job_factory(queue="kept", held=True)
    speak("w1")
    speak("w2", queues=("urgent",), ago=settings.lease_seconds + 10)
    said = ganq("doctor")
    assert said.code == 1
    assert "1 queued job in the queue urgent, which no living worker serves" in said.out
    assert "→ ganq worker --queues urgent" in said.out
    assert "1 queued job in the queue default" in said.out
    assert "kept" not in said.out


def test_a_draining_worker_serves_no_queue(settings, queries, speak):
    speak("w1", "draining")
    (told,) = check_queued({"default": 2}, queries.workers(), settings)
    assert isinstance(told, Finding)
    assert told.verdict == "warn"
    assert "no worker is there" in told.said


# --- Redis --------------------------------------------------------------------------------


def test_a_redis_that_is_away_is_a_warning_because_jobs_run_all_the_same(ganq):
    (told,) = findings(ganq("doctor", "--json"))["redis"]
    assert told["verdict"] == "warn"
    assert "jobs run all the same" in told["said"]


def test_a_redis_that_refuses_the_password_fails(settings, redis_url):
    from dataclasses import replace

    told = diagnosis.check_redis(
        replace(settings, redis_url=redis_url.replace("redis://", "redis://ada:wrong@"))
    )
    assert told.verdict == "fail"
    assert "wrong" not in told.said


def test_an_open_redis_on_the_network_is_a_warning(settings, redis_url, monkeypatch):
    monkeypatch.setattr(diagnosis, "LOOPBACK", ())
    from dataclasses import replace

    told = diagnosis.check_redis(replace(settings, redis_url=redis_url))
    assert told.verdict == "warn"
    assert "anybody" in told.said


def test_a_redis_url_that_is_none_fails(settings):
    from dataclasses import replace

    assert diagnosis.check_redis(replace(settings, redis_url="http://127.0.0.1")).verdict == "fail"


def test_an_embedded_redis_without_a_program_fails(settings, monkeypatch):
    from dataclasses import replace

    embedded = replace(settings, redis_url=f"redis+socket://{settings.home}/redis.sock")
    assert "ganq up starts it" in (diagnosis.check_redis(embedded).hint or "")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("worker.local.find_spec", lambda name: None)
    told = diagnosis.check_redis(embedded)
    assert told.verdict == "fail"
    assert "ganq[local]" in (told.hint or "")


# --- volume -------------------------------------------------------------------------------


def test_a_volume_that_is_a_file_fails(ganq, settings):
    settings.volume.write_text("")
    said = ganq("doctor")
    assert said.code == 1
    assert "is not a folder" in said.out


def test_a_volume_that_cannot_be_written_fails(settings, monkeypatch):
    from storage.diagnosis import check_volume

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    settings.volume.mkdir()
    monkeypatch.setattr(Path, "touch", refuse)  # root, who runs tests in containers, may write anywhere
    told = list(check_volume(settings))
    assert [one.verdict for one in told] == ["fail"]
    assert "permission denied" in told[0].said


@pytest.fixture
def file_system(settings, monkeypatch):
    """Has the volume lie on such a file system: file_system('tmpfs', free=1e12, files=12)."""
    from types import SimpleNamespace

    def pretend(kind: str = "ext4", *, free: float = 1e12, files: int = 1_000_000) -> None:
        about = SimpleNamespace(f_bavail=free / 4096, f_frsize=4096, f_files=2_000_000, f_favail=files)
        monkeypatch.setattr("storage.diagnosis.filesystem_type", lambda path: kind)
        monkeypatch.setattr("storage.diagnosis.os.statvfs", lambda path: about)

    settings.volume.mkdir()
    return pretend


@pytest.mark.parametrize(("free", "verdict"), [(1e8, "fail"), (1e9, "warn"), (1e12, "ok")])
def test_room_on_the_volume_decides(settings, file_system, free, verdict):
    from storage.diagnosis import check_volume

    file_system(free=free)
    assert [one.verdict for one in check_volume(settings)] == [verdict]


def test_a_volume_in_memory_and_one_without_room_for_names_are_warnings(settings, file_system):
    from storage.diagnosis import check_volume

    file_system("tmpfs", files=12)
    told = [one.said for one in check_volume(settings) if one.verdict == "warn"]
    assert any("only 12 more files" in line for line in told)
    assert any("gone at the next boot" in line for line in told)


# --- this machine -------------------------------------------------------------------------


@pytest.fixture
def torch_installed(tmp_path, monkeypatch):
    """Puts a distribution of that name before all others: torch_installed('2.9.1', cuda='12.8')."""

    def install(version: str, cuda: str | None = None) -> None:
        about = tmp_path / f"torch-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(
            f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_a_torch_that_is_too_old_fails(torch_installed):
    torch_installed("2.9.1")
    told = diagnosis.check_torch(0)
    assert told.verdict == "fail"
    assert "torch>=2.10" in (told.hint or "")


def test_a_torch_for_the_cpu_fails_where_there_is_a_gpu_and_only_there(torch_installed):
    torch_installed("2.14.1+cpu")
    assert diagnosis.check_torch(0).verdict == "ok"
    told = diagnosis.check_torch(2)
    assert told.verdict == "fail"
    assert "built for the CPU alone" in told.said


@pytest.mark.parametrize(("driver", "verdict"), [("570.86.15", "fail"), ("580.65.06", "ok")])
def test_a_driver_that_is_too_old_for_torchs_cuda_fails(
    torch_installed, tmp_path, monkeypatch, driver, verdict
):
    torch_installed("2.14.1", cuda="13.0")
    said = tmp_path / "driver"
    said.write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    monkeypatch.setattr(diagnosis, "DRIVER", said)
    assert diagnosis.check_torch(1).verdict == verdict


def test_a_driver_that_does_not_answer_fails(ganq, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = ganq("doctor")
    assert said.code == 1
    assert "Driver/library version mismatch" in said.out


def test_a_temporary_folder_too_long_for_sockets_fails(settings, monkeypatch):
    assert diagnosis.check_runtime(settings).verdict == "ok"
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 90)
    assert diagnosis.check_runtime(settings).verdict == "fail"


def test_the_extras_are_those_of_the_package_and_each_has_its_use():
    assert set(diagnosis.extras()) == set(diagnosis.USES)
    assert all(diagnosis.extras().values())


def test_an_extra_that_is_missing_is_no_failure(monkeypatch):
    monkeypatch.setattr(diagnosis, "_installed", lambda name: name != "onnxscript")
    told = {one.said.split()[0]: one for one in diagnosis.check_extras()}
    assert "pip install 'ganq[onnx]'" in told["onnx"].said
    assert told["onnx"].verdict == "ok"
    assert "is installed" in told["faces"].said
