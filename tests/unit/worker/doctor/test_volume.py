"""`ganq doctor` reports problems and what to do about them: the volume."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from sqlalchemy import text

from storage.datasets.cache import open_images
from storage.volume.durable import make_folder
from storage.volume.filesystems import Mount, mount_of
from storage.volume.layout import Volume
from storage.volume.ownership import quarantine
from worker.doctor.check import Finding
from worker.doctor.facts import Facts
from worker.doctor.volume import (
    check_orphans,
    check_registered,
    check_room,
    check_same_volume,
    check_volume,
)

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.engine import Database
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore
    from storage.settings import Settings


def test_a_volume_that_is_a_file_fails(ganq: "Ganq", settings: "Settings") -> None:
    settings.volume.write_text("")
    result = ganq("doctor")
    assert result.code == 1
    assert "is not a folder" in result.out


def test_a_volume_that_cannot_be_written_fails(settings: "Settings", monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    settings.volume.mkdir()
    monkeypatch.setattr(Path, "touch", refuse)  # root, who runs tests in containers, may write anywhere
    reported = list(check_volume(settings))
    assert [one.level for one in reported] == ["error"]
    assert "permission denied" in reported[0].message


@pytest.fixture
def file_system(settings: "Settings", monkeypatch: pytest.MonkeyPatch) -> Any:
    """Simulate the volume's file system: file_system('tmpfs', free=1e12, files=12)."""
    from types import SimpleNamespace

    def pretend(kind: str = "ext4", *, free: float = 1e12, files: int = 1_000_000) -> None:
        about = SimpleNamespace(
            f_bavail=free / 4096, f_frsize=4096, f_files=2_000_000, f_favail=files, f_blocks=1e9
        )
        mount = Mount("/", kind, "server:/export", frozenset({"rw"}))
        monkeypatch.setattr("worker.doctor.volume.mount_of", lambda *_: mount)
        monkeypatch.setattr("worker.doctor.volume.os.statvfs", lambda path: about)

    settings.volume.mkdir()
    return pretend


@pytest.mark.parametrize(("free", "level"), [(1e8, "error"), (1e9, "warn"), (1e12, "ok")])
def test_room_on_the_volume_decides(settings: "Settings", file_system: Any, free: float, level: str) -> None:
    file_system(free=free)
    assert [one.level for one in check_volume(settings)] == [level]


def test_a_volume_in_memory_and_one_without_room_for_names_are_warnings(
    settings: "Settings", file_system: Any
) -> None:
    file_system("tmpfs", files=12)
    reported = [one.message for one in check_volume(settings) if one.level == "warn"]
    assert any("only 12 more files" in line for line in reported)
    assert any("lost at the next boot" in line for line in reported)


# --- how it is mounted --------------------------------------------------------------------


@pytest.fixture
def mounted(settings: "Settings", tmp_path: Path) -> Any:
    """Check the volume with simulated mount options: mounted('nfs4', 'rw,soft,vers=4.2')."""
    settings.volume.mkdir()

    def check(kind: str, options: str) -> list[Finding]:
        table = tmp_path / "mountinfo"
        point = str(settings.volume).replace(" ", "\\040")
        table.write_text(
            f"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
            f"90 22 0:51 / {point} rw,relatime shared:50 - {kind} nas:/export/ganq {options}\n"
        )
        return list(check_volume(settings, table))

    return check


def test_an_nfs_that_is_mounted_soft_fails_and_a_hard_one_with_lookupcache_is_well(mounted: Any) -> None:
    reported = mounted("nfs4", "rw,vers=4.2,soft,timeo=600")
    assert [one.level for one in reported if "mounted soft" in one.message] == ["error"]
    assert [one.hint for one in reported if one.level == "warn"] == ["mount it with lookupcache=positive"]
    reported = mounted("nfs4", "rw,vers=4.2,hard,timeo=600,lookupcache=pos")
    assert [one.level for one in reported] == ["ok"]
    assert "nfs4 (shared)" in reported[0].message


def test_an_nfs_that_remembers_what_is_not_there_is_a_warning(mounted: Any) -> None:
    assert [one.level for one in mounted("nfs", "rw,hard,vers=3")] == ["ok", "warn"]


def test_cifs_is_a_warning_unless_hard_and_fails_with_loose_caching(mounted: Any) -> None:
    assert any("mounted soft" in one.message for one in mounted("cifs", "rw,cache=strict"))
    assert [one.level for one in mounted("cifs", "rw,hard,cache=strict")] == ["ok"]
    assert any(one.level == "error" for one in mounted("smb3", "rw,hard,cache=loose"))


def test_a_volume_in_a_containers_own_layer_is_a_warning(mounted: Any) -> None:
    assert any("deleted with it" in one.message for one in mounted("overlay", "rw,lowerdir=/x"))


def test_a_mount_is_found_by_its_device_where_one_hides_another(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    number = folder.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    table = tmp_path / "mountinfo"
    point = str(folder).replace(" ", "\\040")
    table.write_text(
        f"1 1 {device} / / rw - ext4 /dev/a rw\n2 1 0:99 / {point} rw - nfs x:/ rw,soft\nbroken line\n"
    )
    assert (found := mount_of(folder, table)) is not None
    assert found.kind == "ext4"
    table.write_text(f"1 1 0:98 / / rw - ext4 /dev/a rw\n2 1 {device} / {point} rw - nfs x:/ rw,soft\n")
    assert mount_of(folder, table) == Mount(str(folder), "nfs", "x:/", frozenset({"rw", "soft"}))
    assert mount_of(folder, tmp_path / "absent") is None


# --- what the job table knows of it -------------------------------------------------------


@pytest.fixture
def facts(settings: "Settings", database: "Database") -> Any:
    """Facts from the job table, as the checks of the volume get them."""
    from worker.doctor.jobs import check_jobs_and_workers

    settings.volume.mkdir(exist_ok=True)

    def read() -> Facts:
        found = Facts(database=database)
        list(check_jobs_and_workers(settings, found))
        return found

    return read


def checkpoint(store: "JobStore", lease: Any, *, size: int, step: int = 10) -> None:
    store.register_checkpoint(
        lease,
        kind="epoch",
        epoch=step,
        step=step,
        path=f"jobs/{lease.job_id:06d}/a1/checkpoints/{step}",
        manifest_sha256="0" * 64,
        size=size,
    )


@pytest.mark.parametrize(("free", "level"), [(7e9, "error"), (20e9, "warn"), (60e9, "ok")])
def test_room_is_measured_by_the_last_checkpoints_of_what_runs(
    settings: "Settings",
    facts: Any,
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    file_system_of: Any,
    free: float,
    level: str,
) -> None:
    first, second = running_job_factory(), running_job_factory()
    checkpoint(store, first, size=9_000_000_000, step=5)
    checkpoint(store, first, size=1_000_000_000)
    checkpoint(store, second, size=3_000_000_000)
    found = facts()
    file_system_of(free)
    (reported,) = check_room(settings, found)
    assert reported.level == level
    assert "the next two checkpoints of 2 running jobs need 8.0 GB" in reported.message


@pytest.fixture
def file_system_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    from types import SimpleNamespace

    def pretend(free: float) -> None:
        about = SimpleNamespace(f_bavail=free / 4096, f_frsize=4096)
        monkeypatch.setattr("worker.doctor.volume.os.statvfs", lambda path: about)

    return pretend


def test_without_a_checkpoint_there_is_nothing_to_measure_room_by(
    settings: "Settings", facts: Any, running_job_factory: "Callable[..., Lease]"
) -> None:
    running_job_factory()
    assert list(check_room(settings, facts())) == []


def test_a_job_whose_folder_is_not_here_shows_that_this_is_another_volume(
    settings: "Settings", facts: Any, database: "Database", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    assert list(check_same_volume(settings, facts())) == []  # it may not have created it yet
    database.write(lambda conn: conn.execute(text("UPDATE attempt SET started_at = started_at - 100")))
    (reported,) = check_same_volume(settings, facts())
    assert reported.level == "error"
    assert f"{lease.job_id} on w1" in reported.message
    (settings.volume / "jobs" / f"{lease.job_id:06d}" / "a1").mkdir(parents=True)
    (reported,) = check_same_volume(settings, facts())
    assert reported.level == "ok"


def test_unreferenced_files_are_counted_and_not_deleted(
    settings: "Settings",
    facts: Any,
    store: "JobStore",
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    lease = running_job_factory()
    folder = settings.volume / "jobs" / f"{lease.job_id:06d}"
    image = folder / "a1" / "images" / "0.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x" * 2_000_000)
    (folder / "spec.json").write_text(json.dumps({"job": lease.job_id, "spec": lease.job.spec}))
    (reported,) = check_orphans(settings, facts())
    assert (reported.level, reported.message.split(":")[0]) == (
        "ok",
        "none",
    )  # its attempt still writes there
    store.release(lease, "drain")
    database.write(lambda conn: conn.execute(text("UPDATE attempt SET ended_at = ended_at - 100")))
    (reported,) = check_orphans(settings, facts())
    assert reported.level == "ok"
    assert "1 unreferenced item on the volume, 2.0 MB" in reported.message
    assert image.exists()


def test_missing_checkpoints_are_reported_with_their_jobs(
    settings: "Settings", facts: Any, store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    for epoch in (1, 2):
        path = f"jobs/{lease.job_id:06d}/a1/checkpoints/epoch-{epoch:04d}"
        store.register_checkpoint(
            lease, kind="epoch", epoch=epoch, step=epoch, path=path, manifest_sha256="0" * 64, size=1
        )
        make_folder(settings.volume / path)
        (settings.volume / path / "MANIFEST.json").touch()
    assert list(check_registered(settings, facts())) == []
    (settings.volume / path / "MANIFEST.json").unlink()
    (reported,) = check_registered(settings, facts())
    assert reported.level == "error"
    assert "1 of the newest 2 checkpoints are not on the volume" in reported.message
    assert f"those of jobs {lease.job_id}:" in reported.message
    assert path in reported.message


def test_folders_that_were_set_aside_are_named(
    settings: "Settings", facts: Any, job_factory: "Callable[..., Job]"
) -> None:
    job_factory()
    make_folder(settings.volume / "jobs" / "000001")
    former = quarantine(Volume(settings.volume), 1)
    reported = next(iter(check_orphans(settings, facts())))
    assert (reported.level, former.name in reported.message) == ("warn", True)


def test_a_volume_of_another_job_table_fails(
    settings: "Settings", facts: Any, job_factory: "Callable[..., Job]"
) -> None:
    job_factory()
    for number in range(2, 30):
        (settings.volume / "jobs" / f"{number:06d}" / "a1").mkdir(parents=True)
    (reported,) = check_orphans(settings, facts())
    assert reported.level == "error"
    assert "is not this job table's volume" in reported.message


# --- decoded data sets ------------------------------------------------------------------------


def test_doctor_reads_the_decoded_data_sets_when_it_is_asked_to(
    ganq: "Ganq", settings: "Settings", tmp_path: Path
) -> None:
    volume = Volume(settings.volume)
    folders = []
    for number in range(3):
        faces = tmp_path / f"faces{number}"
        faces.mkdir()
        Image.new("RGB", (20, 20), (number, 9, 9)).save(faces / "a.png")
        folders.append(volume.dataset(open_images(volume, str(faces), 16).fingerprint))
    whole = ganq("doctor", "--verify-data")
    assert "3 decoded data sets intact" in whole.out
    about = (folders[0] / "images.u8").stat()
    (folders[0] / "images.u8").write_bytes(bytes(about.st_size))
    (folders[1] / "index.json").write_text("{torn")
    index = json.loads((folders[2] / "index.json").read_text())
    del index["checksums"]
    (folders[2] / "index.json").write_text(json.dumps(index))
    result = ganq("doctor", "--verify-data", "--json")
    assert result.code == 1
    found = [one for one in json.loads(result.out)["findings"] if one["check"] == "datasets"]
    by_folder = {
        folder: one["message"] for one in found for folder in folders if str(folder) in one["message"]
    }
    assert "1 of 1 blocks are not what was written" in by_folder[folders[0]]
    assert "its index is broken" in by_folder[folders[1]]
    assert [one["level"] for one in found] == ["error", "error", "ok"]
    assert "1 of an older ganq" in found[-1]["message"]
    assert "checksums" not in json.loads((folders[2] / "index.json").read_text()), "doctor changes nothing"
    assert "datasets" not in ganq("doctor").out
