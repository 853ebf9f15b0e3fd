"""
F9: a worker that stood still for longer than its lease comes back and can do no harm.

Supervisor and runner are stopped (SIGSTOP) at a chosen point, another worker takes the
job over and ends it, then both are let go (SIGCONT). The zombie must change no row,
say that it lost the job, kill its runner if that has begun, and leave a folder that nothing points at.
"""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from machine import Ganq, StoppedInAWriteError, bury, part, put_to_sleep, until
from results import add_model, attempt_folder, lines, verify_manifest
from tables import everything_of, job_row

from storage.db.engine import Database

if TYPE_CHECKING:
    from storage.settings import Settings

GENERATE = ["submit", "generate", "--from", "m", "--micro-batch", "4", "--count", "40", "--grid", "16"]

GENERATE_POINTS = [
    "supervisor.claimed",
    "generate.drawn@3",
    "images.written@9",
    "images.images_renamed",
    "images.published",
    "runner.worked",
    "supervisor.before_finish",
]
TRAIN_POINTS = ["train.stepped@3", "folder.renamed", "supervisor.before_register", "supervisor.before_finish"]
SMALL_POINTS = ["supervisor.before_finish"]


def stopped(process: psutil.Process | None) -> bool:
    return process is not None and process.status() == psutil.STATUS_STOPPED


class Zombie:
    """The first worker, stopped at a failpoint."""

    def __init__(self, ganq: Ganq, point: str) -> None:
        name, _, times = point.partition("@")
        self.worker = ganq.start_worker(
            "zombie", GANQ_ENABLE_FAILPOINTS="1", GANQ_FAILPOINTS=f"{name}=stop@{times or 1}"
        )
        until(lambda: part(self.worker, "worker.runner.main"), what="the zombie's runner")
        self.ganq = ganq
        self.parts: list[psutil.Process] = []

    def sleep(self) -> None:
        """Wait for the failpoint, then stop the processes that still run."""

        def at_the_point() -> bool:
            self.parts = [
                one for one in (part(self.worker, f"worker.{p}") for p in ("supervisor", "runner")) if one
            ]
            return any(map(stopped, self.parts))

        until(at_the_point, what="the point")
        put_to_sleep(self.parts, self.ganq.table)

    def wake(self) -> None:
        for one in reversed(self.parts):
            one.resume()


def zombie_run(ganq: Ganq, database: Database, point: str, *submit: str) -> dict[str, Any]:
    """Stop a zombie until its job has ended elsewhere; return the job, checked against its second attempt."""
    for last in (False, False, True):
        zombie = Zombie(ganq, point)
        job = int(ganq.json(*submit)["id"])
        try:
            zombie.sleep()
            break
        except StoppedInAWriteError:
            if last:
                raise
            bury(zombie.worker)
            ganq("cancel", str(job))
    try:
        assert job_row(database, job)["attempt"] == 1
        ganq.start_worker("heir")
        until(lambda: job_row(database, job)["state"] == "succeeded", what="the heir's success")
        before = everything_of(database, job)
    finally:
        zombie.wake()
    until(lambda: f"job {job}: lease released: " in ganq.log("zombie"), what="the zombie's own words")
    runner = zombie.parts[-1]
    if point == "supervisor.claimed":
        assert f"job {job}: lease released: lost before it began" in ganq.log("zombie"), "it had begun"
    else:
        with suppress(psutil.NoSuchProcess):
            runner.wait(timeout=10)
        assert not runner.is_running() or runner.status() == psutil.STATUS_ZOMBIE, (
            "its runner still holds the GPU"
        )
    after = everything_of(database, job)
    for old, new in zip(before, after, strict=True):
        assert new == old, "a zombie changed the table"
    row = ganq.job(job)
    assert [one["outcome"] for one in row["attempts"]] == ["lost", "succeeded"]
    assert row["attempt"] == 2
    return row


def check_pictures(ganq: Ganq, row: dict[str, Any]) -> None:
    volume = Path(ganq.env["GANQ_VOLUME"])
    folder = attempt_folder(volume, row)
    assert folder.name == "a2"
    assert verify_manifest(folder, manifest_sha256=row["result"]["manifest_sha256"]) == 40
    assert [one["index"] for one in lines(folder)] == list(range(40))


def check_checkpoints(ganq: Ganq, row: dict[str, Any]) -> None:
    volume = Path(ganq.env["GANQ_VOLUME"])
    registered = ganq.json("checkpoints", str(row["id"]))
    assert registered
    own = {one["path"] for one in registered if one["attempt"] == 1}
    found = {
        path.parent.relative_to(volume).as_posix() for path in volume.rglob("a1/checkpoints/*/MANIFEST.json")
    }
    assert own <= found
    for one in registered:
        assert f"/a{one['attempt']}/" in one["path"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
@pytest.mark.parametrize("point", SMALL_POINTS)
def test_f09_a_zombie_that_generates_changes_nothing(
    ganq: Ganq, database: Database, settings: "Settings", backend: str, point: Any
) -> None:
    add_model(settings)
    check_pictures(ganq, zombie_run(ganq, database, point, *GENERATE))


@pytest.mark.tier2
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_f09_a_zombie_registers_no_checkpoint(
    ganq: Ganq, database: Database, small: list[str], backend: str
) -> None:
    options = ["--epochs", "2", "--save-every", "1"]
    row = zombie_run(ganq, database, "supervisor.before_register", "submit", "train", *small, *options)
    check_checkpoints(ganq, row)
    assert {one["attempt"] for one in ganq.json("checkpoints", str(row["id"]))} == {2}


@pytest.mark.tier2
@pytest.mark.parametrize("point", GENERATE_POINTS)
def test_f09_at_every_point_of_a_generation(
    ganq: Ganq, database: Database, settings: "Settings", point: Any
) -> None:
    add_model(settings)
    check_pictures(ganq, zombie_run(ganq, database, point, *GENERATE))


@pytest.mark.tier2
@pytest.mark.parametrize("point", TRAIN_POINTS)
def test_f09_at_every_point_of_a_training(
    ganq: Ganq, database: Database, small: list[str], point: Any
) -> None:
    options = ["--epochs", "2", "--save-every", "1"]
    row = zombie_run(ganq, database, point, "submit", "train", *small, *options)
    check_checkpoints(ganq, row)
