"""A volume that is full or read-only delays a job, says so, and costs nothing that was there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Ganq, until

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("backend", ["sqlite"], indirect=True)]


class Mount:
    """A small file system of the test's own at the volume's place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def __str__(self) -> str:
        return str(self.folder)


@pytest.fixture
def volume(settings_env: dict[str, str], backend: str) -> Iterator[Mount]:
    folder = Path(settings_env["GANQ_VOLUME"])
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "ganq-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    yield Mount(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


def queued_with(ganq: Ganq, job: int, code: str) -> bool:
    found = ganq.job(job)
    return found["state"] == "queued" and (found["error"] or {}).get("code") == code


def test_a_full_volume_is_reported_and_the_job_continues_when_there_is_room(
    volume: Mount, ganq: Ganq, small: list[str]
) -> None:
    ganq.start_worker()
    ganq("submit", "train", *small, "--epochs", "1", "--name", "m", "--wait")
    used = sum(one.stat().st_size for one in volume.folder.rglob("*") if one.is_file())
    volume.remount(f"size={used // 4096 * 4 + 400}k")
    job = ganq.json("submit", "generate", "--from", "m", "--count", "3000", "--grid", "0")["id"]
    until(lambda: queued_with(ganq, job, "DISK_FULL"), what="DISK_FULL in status")
    found = ganq.job(job)
    assert "free" in found["error"]["message"]
    assert "GANQ_VOLUME" in found["error"]["hint"]
    assert not list((volume.folder / "jobs").rglob("images*")), "half a result was left behind"
    volume.remount("size=256m")
    assert ganq.run("wait", str(job), "--timeout", "60").returncode == 0
    assert ganq.job(job)["error"] is None


def test_a_read_only_volume_is_reported_and_waited_for(volume: Mount, ganq: Ganq, small: list[str]) -> None:
    ganq.start_worker()
    ganq("submit", "train", *small, "--epochs", "1", "--name", "m", "--wait")
    volume.remount("ro")
    job = ganq.json("submit", "generate", "--from", "m", "--count", "10")["id"]
    until(lambda: queued_with(ganq, job, "VOLUME_UNAVAILABLE"), what="VOLUME_UNAVAILABLE in status")
    volume.remount("rw")
    assert ganq.run("wait", str(job), "--timeout", "60").returncode == 0


def test_a_worker_on_a_read_only_volume_refuses_to_start(volume: Mount, ganq: Ganq) -> None:
    volume.remount("ro")
    done = ganq.run("worker", "--gpus", "none")
    assert done.returncode == 1
    assert done.stderr.count("\n") <= 2, done.stderr
    assert "read-only" in done.stderr
    assert "GANQ_VOLUME" in done.stderr
