"""
A split generation keeps its shards until its own success is committed, and makes lost ones again.

Whatever happens to the worker that merges the shards, the job ends with the bytes of a generation
that was never split.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chaos.proxy import Proxy
from machine import Ganq, part, postgres_later, put_to_sleep, until
from results import add_model, attempt_folder, result_files
from services import Postgres
from sqlalchemy import make_url
from tables import event_types, job_row, set_columns, without_backoff

from storage.db.engine import Database
from storage.db.queries import Queries
from storage.gc.policy import Policy
from storage.gc.sweep import Collector
from storage.settings import Settings
from storage.volume.layout import Volume

OPTIONS = ["--from", "m", "--micro-batch", "4", "--grid", "16"]
SPLIT = ["--shard-size", "8"]
WAYS = {
    "count": ["--count", "24"],
    "best": ["--keep", "10", "--of", "24"],
    "tar": ["--count", "24", "--format", "tar"],
}
SHARDS = 3
MERGED = SHARDS + 1
"""The failpoint of a step that each shard and then the whole pass once: the whole comes last."""


def env(points: str, **more: str) -> dict[str, str]:
    return {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": points, **more}


def submit(ganq: Ganq, way: str, *more: str) -> int:
    return int(ganq.json("submit", "generate", *OPTIONS, *WAYS[way], *more)["id"])


def succeeded(database: Database, job: int) -> None:
    def ended() -> bool:
        row = job_row(database, job)
        assert row["state"] not in ("failed", "cancelled"), row["error_message"]
        return bool(row["state"] == "succeeded")

    until(ended, what=f"the success of job {job}")


def bytes_of(ganq: Ganq, database: Database, job: int) -> dict[str, bytes]:
    return result_files(attempt_folder(Path(ganq.env["GANQ_VOLUME"]), job_row(database, job)))


def shard_folders(ganq: Ganq, database: Database, job: int) -> list[Path]:
    volume = Volume(Path(ganq.env["GANQ_VOLUME"]))
    return [volume.job(one.id) for one in Queries(database).shards(job)]


def unsplit(ganq: Ganq, database: Database, way: str) -> dict[str, bytes]:
    """What one worker makes alone, by a worker that runs already."""
    job = submit(ganq, way)
    succeeded(database, job)
    return bytes_of(ganq, database, job)


def shards_ended(ganq: Ganq, database: Database, way: str) -> int:
    """A split job whose shards have succeeded, and which is held back itself."""
    job = submit(ganq, way, *SPLIT, "--hold")
    set_columns(database, job, held=1)
    for shard in Queries(database).shards(job):
        set_columns(database, shard.id, held=0)
    until(
        lambda: all(one.state == "succeeded" for one in Queries(database).shards(job)), what="all the shards"
    )
    return job


@contextmanager
def database_that_goes_away(
    settings: Settings, database_url: str, request: pytest.FixtureRequest
) -> Iterator[tuple[str, Any, Any]]:
    """The URL for a worker, and what takes the database away from it and gives it back."""
    if settings.is_sqlite:
        path = Path(database_url.removeprefix("sqlite:///"))
        aside = path.with_suffix(".away")
        yield database_url, lambda: os.rename(path, aside), lambda: os.rename(aside, path)
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    name = str(make_url(database_url).database)
    with Proxy(postgres.port) as proxy:
        url = postgres.tcp_url(name).replace(f":{postgres.port}/", f":{proxy.port}/")
        yield url, proxy.cut, proxy.heal


@pytest.mark.tier2
def test_a_worker_that_exits_while_the_database_is_unavailable_deletes_no_shard(
    ganq: Ganq, database: Database, settings: Settings, database_url: str, request: pytest.FixtureRequest
) -> None:
    """The merge is done, its success cannot be written, and SIGTERM's budget ends."""
    add_model(settings)
    with database_that_goes_away(settings, database_url, request) as (url, go, come_back):
        points = f"supervisor.before_finish=sleep:3@{MERGED}"
        first = ganq.start_worker("first", **env(points, GANQ_DATABASE_URL=url, GANQ_DRAIN_SECONDS="1"))
        job = submit(ganq, "count", *SPLIT)
        made = Path(ganq.env["GANQ_VOLUME"]) / "jobs" / f"{job:06d}" / "a1" / "manifest.jsonl"
        until(made.exists, what="the merged result")
        folders = shard_folders(ganq, database, job)
        database.dispose()
        go()
        try:
            first.send_signal(signal.SIGTERM)
            first.wait(60)
        finally:
            come_back()
        assert f"job {job}: lease released: the database is unavailable" in ganq.log("first")
    assert job_row(database, job)["state"] != "succeeded"
    assert all(one.is_dir() for one in folders), "deleted before the success was committed"
    ganq.start_worker("second")
    succeeded(database, job)
    until(lambda: not any(one.exists() for one in folders), what="the shards' folders to go")
    assert bytes_of(ganq, database, job) == unsplit(ganq, database, "count")


@postgres_later
def test_a_supervisor_that_lost_its_lease_while_it_merged_deletes_no_shard(
    ganq: Ganq, database: Database, settings: Settings
) -> None:
    """Stopped past its lease, it wakes while another worker merges the same shards."""
    add_model(settings)
    zombie = ganq.start_worker("zombie", **env("merge.adopted=sleep:0.1@1+"))
    job = submit(ganq, "count", *SPLIT)
    until(
        lambda: (job_row(database, job)["progress"] or {}).get("phase") == "merging shards", what="the merge"
    )
    supervisor = part(zombie, "worker.supervisor.loop")
    assert supervisor is not None
    put_to_sleep([supervisor], database)
    try:
        ganq.start_worker("heir", **env("merge.adopted=sleep:0.25@1+"))
        until(lambda: job_row(database, job)["attempt"] == 2, what="the heir's attempt")
        until(lambda: (job_row(database, job)["progress"] or {}).get("done", 0) > 2, what="the heir's merge")
    finally:
        supervisor.resume()
    until(lambda: f"job {job}: lease released: " in ganq.log("zombie"), what="the zombie's own words")
    assert all(one.is_dir() for one in shard_folders(ganq, database, job))
    succeeded(database, job)
    assert job_row(database, job)["attempt"] == 2
    assert bytes_of(ganq, database, job) == unsplit(ganq, database, "count")


@pytest.mark.tier2
def test_kills_while_shards_are_merged_delete_none_and_gc_takes_what_the_last_one_left(
    ganq: Ganq, database: Database, settings: Settings, tmp_path: Path
) -> None:
    """The last kill comes between the commit of the success and the deletion of the shards."""
    add_model(settings)
    (tmp_path / "fired").mkdir()
    points = ["merge.adopted=kill@5", "images.manifest_renamed=kill@1"]
    points += ["supervisor.before_finish=kill@1", "supervisor.finished=kill@1"]
    calm = ganq.start_worker("calm")
    job = shards_ended(ganq, database, "count")
    folders = shard_folders(ganq, database, job)
    calm.send_signal(signal.SIGTERM)
    calm.wait(30)
    ganq.start_worker("w1", **env(";".join(points), GANQ_FAILPOINTS_FIRED=str(tmp_path / "fired")))
    set_columns(database, job, held=0)
    with without_backoff(database):
        succeeded(database, job)
    until(lambda: len(list((tmp_path / "fired").iterdir())) == len(points), what="all the kills")
    assert all(one.is_dir() for one in folders)
    for row in [job, *(one.id for one in Queries(database).shards(job))]:
        set_columns(database, row, finished_at=0.0)
    collector = Collector(database, Volume(settings.volume), Policy(grace_s=0.0))
    swept = collector.sweep(collector.plan())
    assert not swept.failed
    assert not any(one.exists() for one in folders)
    assert bytes_of(ganq, database, job) == unsplit(ganq, database, "count")


@postgres_later
@pytest.mark.parametrize("way", WAYS)
def test_deleted_shards_are_generated_again_and_the_job_ends(
    ganq: Ganq, database: Database, settings: Settings, way: str
) -> None:
    """One shard's folder is gone, one has lost a file; the third is used as it is."""
    add_model(settings)
    ganq.start_worker()
    job = shards_ended(ganq, database, way)
    gone, torn, _ = shard_folders(ganq, database, job)
    shutil.rmtree(gone)
    sorted((torn / "a1").rglob("*.tar" if way == "tar" else "*.png"))[-1].unlink()
    set_columns(database, job, held=0)
    succeeded(database, job)
    assert job_row(database, job)["attempt"] == 1
    assert bytes_of(ganq, database, job) == unsplit(ganq, database, way)
    assert event_types(database, job).count("shard_regenerated") == 2
    folder = attempt_folder(settings.volume, job_row(database, job))
    assert not [one.name for one in folder.iterdir() if ".tmp-" in one.name], "a folder of redrawn shards"


@pytest.mark.tier2
def test_a_job_whose_shards_and_model_were_deleted_fails_and_can_be_retried(
    ganq: Ganq, database: Database, settings: Settings
) -> None:
    """It stood in the queue for ever, and `retry` was refused."""
    model = Volume(settings.volume).job(add_model(settings))
    first = ganq.start_worker("first")
    job = shards_ended(ganq, database, "count")
    first.send_signal(signal.SIGTERM)  # its runner has the model in memory
    first.wait(30)
    for folder in shard_folders(ganq, database, job):
        shutil.rmtree(folder)
    model.rename(model.with_name("aside"))
    set_columns(database, job, held=0)
    ganq.start_worker("second")
    until(lambda: job_row(database, job)["state"] == "failed", what="the failure")
    assert job_row(database, job)["error_code"] == "CHECKPOINT_CORRUPT"
    model.with_name("aside").rename(model)
    again = int(ganq.json("retry", str(job))[0]["id"])
    succeeded(database, again)
    assert bytes_of(ganq, database, again) == unsplit(ganq, database, "count")
