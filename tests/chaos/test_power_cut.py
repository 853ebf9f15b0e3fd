"""
F27: the power goes at a random moment, and all that the table calls committed is there afterwards.

Volume and job table lie on an ext4 file system in an image file. The loop device writes
into that file only what the kernel has sent to the disk: a copy of the *file* is what a
power cut leaves (a copy of the device would show pages that only memory has). To copy one
moment, everything that runs is stopped (SIGSTOP) and the device's counters must stand
still. ext4's journal commits by itself every 5 s; here every 10 minutes, so that only
fsync and its kin make anything durable. The first test shows that the method is right.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from chaos import writer
from chaos.guards import without
from chaos.invariants import assert_invariants
from machine import Ganq, until
from results import add_model

from storage.db.engine import Database
from storage.db.queries import Filter, Queries
from storage.volume.durable import write_bytes
from storage.volume.layout import Volume

pytestmark = [pytest.mark.tier2, pytest.mark.timeout(600)]

IMAGE_MB = 192
OPTIONS = "loop,commit=600"
CUTS = 6
KEEP_LAST = 3


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


class Disk:
    """An ext4 file system in a file, mounted."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "disk.img"
        self.mount = folder / "disk"
        self.mount.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(IMAGE_MB * 1024 * 1024)
        lazy = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        run("mkfs.ext4", "-q", "-F", "-E", lazy, str(self.image))
        run("mount", "-o", OPTIONS, str(self.image), str(self.mount))
        device = run("findmnt", "-n", "-o", "SOURCE", str(self.mount))
        self.counters = Path("/sys/block") / Path(device).name / "stat"

    def copy(self, target: Path) -> Path:
        """What a power cut at this moment would leave; the caller has stopped all writers."""
        for _ in range(200):
            before = self.counters.read_text()
            in_flight = int(before.split()[8])
            shutil.copyfile(self.image, target)
            if not in_flight and self.counters.read_text() == before:
                return target
            time.sleep(0.05)
        raise AssertionError("the disk does not come to rest")

    def unmount(self) -> None:
        run("umount", "-l", str(self.mount))


@contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Power is back: the journal is replayed."""
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "loop", str(image), str(folder))
    try:
        yield folder
    finally:
        run("umount", str(folder))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("mkfs.ext4", "mount", "findmnt"))):
        pytest.skip("a power cut needs root, mkfs.ext4 and mount")
    try:
        disk = Disk(tmp_path)
    except OSError as exc:
        pytest.skip(f"no file system in a file can be mounted here: {exc}")
    yield disk
    disk.unmount()


def test_the_method_loses_what_was_not_synced_and_keeps_what_was(disk: Disk, tmp_path: Path) -> None:
    (disk.mount / "unsynced").write_bytes(b"x" * 100_000)
    write_bytes(disk.mount / "synced", b"y" * 100_000)
    (disk.mount / "unsynced too").write_bytes(b"x" * 100_000)
    with open(disk.mount / "content only", "wb") as file:
        file.write(b"z" * 100_000)
    os.rename(disk.mount / "content only", disk.mount / "renamed, not synced")
    with mounted(disk.copy(tmp_path / "copy.img"), tmp_path / "after") as after:
        assert (after / "synced").read_bytes() == b"y" * 100_000
        for name in ("unsynced", "unsynced too", "renamed, not synced"):
            assert not (after / name).exists() or (after / name).stat().st_size == 0, name


def environment(home: Path) -> dict[str, str]:
    """Settings of a machine whose whole home is on the disk."""
    seconds = {"heartbeat": 0.2, "progress": 0.1, "wishes": 0.1, "lease": 2, "reap": 0.2, "poll": 0.3}
    return {
        "GANQ_HOME": str(home),
        "GANQ_USER": "tester",
        "GANQ_REDIS_URL": "redis://127.0.0.1:1/0",
        **{f"GANQ_{name.upper()}_SECONDS": str(value) for name, value in seconds.items()},
    }


def all_of(ganq: Ganq) -> list[psutil.Process]:
    found = []
    for worker in ganq.workers:
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(worker.pid)
            found += [leader, *leader.children(recursive=True)]
    return found


@contextmanager
def everything_stopped(ganq: Ganq) -> Iterator[None]:
    processes = all_of(ganq)
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.suspend()
    try:
        yield
    finally:
        for one in reversed(processes):
            with suppress(psutil.NoSuchProcess):
                one.resume()


def committed(home: Path) -> tuple[set[int], set[str], set[int]]:
    """(jobs, checkpoint paths, jobs that succeeded) that anybody can see in the table."""
    database = Database(writer.settings_of(home))
    try:
        queries = Queries(database)
        jobs = queries.page(Filter(), limit=1000)
        paths = {one.path for job in jobs for one in queries.checkpoints(job.id)}
        return {job.id for job in jobs}, paths, {job.id for job in jobs if job.state == "succeeded"}
    finally:
        database.dispose()


def cuts_while_it_works(disk: Disk, tmp_path: Path, faces: Path, seed: int, **worker_env: str) -> list[str]:
    """
    Cut the power several times while a training saves, images are made and jobs are submitted.

    Returns:
        What was wrong after a cut, in words; empty if nothing was.
    """
    draw = random.Random(seed)
    home = disk.mount / "home"
    home.mkdir()
    ganq = Ganq(environment(home), tmp_path)
    ganq("db", "upgrade")
    add_model(writer.settings_of(home))
    wrong: list[str] = []
    kept = 0
    try:
        ganq.start_worker(**worker_env)
        small = ["--size", "16", "--ngf", "4", "--ndf", "4", "--nz", "8", "--batch", "16"]
        pace = ["--epochs", "60", "--save-every", "1", "--keep-last", str(KEEP_LAST)]
        ganq("submit", "train", "--data", str(faces), *small, *pace, "--priority", "0")
        until(lambda: committed(home)[1] and len(committed(home)[1]) > 2, what="checkpoints")
        for cut in range(CUTS):
            ganq("submit", "generate", "--from", "m", "--count", "200", "--priority", "100")
            time.sleep(draw.uniform(0.3, 2.0))
            with everything_stopped(ganq):
                copy = disk.copy(tmp_path / f"cut{cut}.img")
                seen = committed(home)
            with mounted(copy, tmp_path / "after") as after:
                try:
                    kept += check_after(after / "home", seen)
                except AssertionError as exc:
                    wrong.append(f"cut {cut}: {exc}")
                except Exception as exc:
                    wrong.append(f"cut {cut}: {type(exc).__name__}: {exc}")
            copy.unlink()
    finally:
        for worker in ganq.workers:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        psutil.wait_procs(all_of(ganq), timeout=10)
        until(lambda: not users_of(disk.mount), what="all processes gone from the disk")
    print(f"F27 seed {seed}: {CUTS} power cuts, {kept} committed things whole, wrong: {len(wrong)}")
    return wrong


def users_of(mount: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["pid", "environ"]):
        if (process.info["environ"] or {}).get("GANQ_HOME", "").startswith(str(mount)):
            found.append(process.info["pid"])
    return found


def newer(path: str, paths: set[str]) -> list[str]:
    """
    Return the later checkpoints of the same job.

    A worker may stop between the fsync of a commit and the moment in which other processes see it. If that
    commit deletes an old checkpoint, the row is visible before the cut and rightly gone after it.
    """
    job, epoch = Path(path).parts[1], Path(path).name
    return [one for one in paths if Path(one).parts[1] == job and Path(one).name > epoch]


def check_after(home: Path, seen: tuple[set[int], set[str], set[int]]) -> int:
    """Everything that was visible before the cut is there after it and verifies."""
    jobs, paths, succeeded = committed(home)
    assert seen[0] <= jobs, f"accepted jobs are gone: {seen[0] - jobs}"
    assert seen[2] <= succeeded, f"jobs that had succeeded have not: {seen[2] - succeeded}"
    gone = {one for one in seen[1] - paths if len(newer(one, paths)) < KEEP_LAST}
    assert not gone, f"registered checkpoints are gone: {gone}"
    checkpoints, results = writer.check(home)  # and SQLite's integrity_check
    settings = writer.settings_of(home)
    database = Database(settings)
    try:
        assert_invariants(database, Volume(settings.volume))
    finally:
        database.dispose()
    return checkpoints + results + len(jobs)


@pytest.mark.parametrize("seed", [1, 2])
def test_f27_all_that_was_committed_survives_a_power_cut(
    disk: Disk, tmp_path: Path, faces: Path, seed: int
) -> None:
    assert cuts_while_it_works(disk, tmp_path, faces, seed) == []


def test_f27_without_fsync_the_same_cuts_lose_what_was_committed(
    disk: Disk, tmp_path: Path, faces: Path
) -> None:
    """The power test: a harness that finds nothing without the guard would prove nothing with it."""
    assert cuts_while_it_works(disk, tmp_path, faces, 1, **without("fsync"))


def test_f27_an_import_survives_a_power_cut(disk: Disk, tmp_path: Path) -> None:
    home = disk.mount / "home"
    home.mkdir()
    env = {**os.environ, **environment(home)}
    ganq = [sys.executable, "-P", "-m", "cli.main"]
    subprocess.run([*ganq, "db", "upgrade"], env=env, check=True, capture_output=True)
    from safetensors.torch import save_file

    from jobs.networks.dcgan import Architecture

    save_file(
        Architecture(size=16, nz=8, ngf=4, ndf=4).build_generator(1).state_dict(), tmp_path / "g.safetensors"
    )
    subprocess.run(
        [*ganq, "import", str(tmp_path / "g.safetensors"), "--name", "m"],
        env=env,
        check=True,
        capture_output=True,
    )
    with mounted(disk.copy(tmp_path / "copy.img"), tmp_path / "after") as after:
        assert check_after(after / "home", committed(home)) == 2
