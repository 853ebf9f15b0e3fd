"""`ganq gc`: what it prints, by which exit code it ends, and what other commands then say."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from volumes import Files, grow_old

from storage.volume.layout import Volume

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.engine import Database
    from storage.db.rows import Lease
    from storage.db.store import JobStore
    from storage.settings import Settings


@pytest.fixture
def files(store: "JobStore", settings: "Settings") -> Files:
    return Files(store, Volume(settings.volume))


@pytest.fixture
def crashed(files: Files, running_job_factory: "Callable[..., Lease]", store: "JobStore") -> Any:
    """A job with 210 bytes of images and grids each that were never published, ended long ago."""
    lease = running_job_factory(kind="generate")
    files.write_images(lease)
    store.crashed(lease, "killed")
    files.attempts_ended_long_ago(lease.job_id)
    return lease


@pytest.fixture
def old(files: Files, running_job_factory: "Callable[..., Lease]", store: "JobStore") -> Any:
    """A training that succeeded long ago, with its checkpoint."""
    lease = running_job_factory(name="faces")
    files.checkpoint(lease, 2, kind="final")
    store.succeed(lease, {"bit_exact": True})
    files.ended_long_ago(lease.job_id)
    return lease


def test_nothing_to_delete_is_reported_and_is_no_failure(ganq: "Ganq", files: Files) -> None:
    said = ganq("gc")
    assert (said.code, said.out) == (0, "nothing to delete\n")


def test_a_dry_run_shows_numbers_and_sizes_and_deletes_nothing(
    ganq: "Ganq", files: Files, crashed: Any
) -> None:
    folder = files.volume.attempt(crashed.job_id, 1)
    said = ganq("gc", "--dry-run")
    assert said.code == 0
    row = next(line for line in said.out.splitlines() if line.startswith("unpublished results"))
    assert row.split()[-3:] == ["3", "429", "B"]
    assert "3 files and folders, 429 B: would be deleted (--dry-run)" in said.out
    assert "--jobs and --datasets" in said.err
    assert "images" not in said.out
    assert (folder / "images" / "000002.png").exists()
    listed = ganq("gc", "--dry-run", "--paths").out
    assert "jobs/000001/a1/images  210 B  unpublished results" in listed
    said = ganq("gc")
    assert "3 files and folders, 429 B: deleted" in said.out
    assert not (folder / "images").exists()


def test_json_names_each_thing_with_its_reason_and_job(ganq: "Ganq", files: Files, crashed: Any) -> None:
    told = ganq("gc", "--json").json()
    assert (told["dry_run"], told["count"], told["bytes"]) == (False, 3, 429)
    assert told["reasons"] == {"unpublished results": {"count": 3, "bytes": 429}}
    assert {"path": "jobs/000001/a1/images", "bytes": 210, "job": 1}.items() <= {
        key: value for item in told["items"] if item["path"].endswith("images") for key, value in item.items()
    }.items()
    assert told["failed"] == []
    assert ganq("gc", "--json").json()["items"] == []


def test_an_attempt_that_ended_within_a_lease_is_left_alone(
    ganq: "Ganq", files: Files, running_job_factory: "Callable[..., Lease]", store: "JobStore"
) -> None:
    lease = running_job_factory(kind="generate")
    files.write_images(lease)
    store.crashed(lease, "killed")
    assert ganq("gc").out == "nothing to delete\n"


def test_results_of_old_jobs_are_deleted_on_request_and_every_command_says_so(
    ganq: "Ganq", files: Files, old: Any
) -> None:
    assert ganq("gc", "--dry-run").out == "nothing to delete\n"
    assert ganq("gc", "--jobs", "--named", "--older-than", "365d").out == "nothing to delete\n"
    said = ganq("gc", "--jobs", "--named")
    assert said.code == 0
    assert "results of an old job" in said.out
    page = ganq("status", "faces").out
    assert "succeeded" in page
    assert "deleted by ganq gc" in page
    assert "results_deleted" in ganq("events", "faces").out
    opened = ganq("open", "faces")
    assert opened.code == 3
    assert "were deleted by ganq gc" in opened.err
    assert "has no checkpoints" in ganq("checkpoints", "faces").out
    assert ganq("logs", "faces").out == "began\n"
    drawn = ganq("submit", "generate", "--count", 4)
    assert drawn.code == 3, "a training without a checkpoint is no model"
    named = ganq("submit", "generate", "--count", 4, "--from", "faces")
    assert named.code == 3
    assert "were deleted by ganq gc" in named.err


def test_decoded_data_sets_are_deleted_on_request(ganq: "Ganq", files: Files) -> None:
    cache = files.volume.dataset("a" * 64)
    cache.mkdir()
    (cache / "images.u8").write_bytes(b"x" * 3 * 8 * 8)
    (cache / "index.json").write_text(
        '{"count": 1, "size": 8, "source": "/faces", "classes": [], "labels": [], "created_at": 1}'
    )
    grow_old(cache, 40 * 86400)
    assert ganq("gc").out == "nothing to delete\n"
    assert ganq("gc", "--datasets", "--older-than", "50d").out == "nothing to delete\n"
    assert "unused data set" in ganq("gc", "--datasets").out
    assert os.listdir(files.volume.datasets) == []


@pytest.mark.parametrize("age", ["", "30", "d", "-1d", "1w", "9999999d"])
def test_an_age_that_is_none_is_a_usage_error(ganq: "Ganq", files: Files, age: str) -> None:
    said = ganq("gc", "--jobs", "--older-than", age)
    assert said.code == 2
    assert "--older-than" in said.err


def test_an_age_without_what_it_is_for_is_a_usage_error(ganq: "Ganq", files: Files) -> None:
    said = ganq("gc", "--older-than", "30d")
    assert said.code == 2
    assert "--older-than requires --datasets, --jobs or --rows" in said.err


def test_a_volume_of_another_job_table_fails_with_a_hint(
    ganq: "Ganq", files: Files, crashed: Any, database: "Database"
) -> None:
    from tables import set_columns

    set_columns(database, crashed.job_id, created_at=1.0)
    said = ganq("gc", "--json")
    assert said.code == 1
    error = said.error()
    assert error["code"] == "VOLUME_UNAVAILABLE"
    assert "not this job table's volume" in error["message"]
    assert "GANQ_VOLUME" in error["hint"]
    assert (files.volume.attempt(crashed.job_id, 1) / "images").exists()


def test_without_a_job_table_nothing_is_looked_at(bare_ganq: "Ganq") -> None:
    said = bare_ganq("gc")
    assert said.code == 3
    assert "there are no jobs yet" in said.err


def test_a_note_says_what_looks_like_garbage_and_stays(ganq: "Ganq", files: Files, crashed: Any) -> None:
    files.volume.job(2).mkdir()
    said = ganq("gc", "--dry-run")
    assert "note: jobs/000002 stays: the table ends at job 1" in said.err


def test_a_full_disk_names_gc(tmp_path: Path) -> None:
    import errno

    from jobs.errors import DiskFullError
    from storage.volume.durable import raise_storage_error

    with pytest.raises(DiskFullError) as caught:
        raise_storage_error(OSError(errno.ENOSPC, "full"), tmp_path)
    assert "ganq gc --dry-run" in (caught.value.hint or "")


def test_a_named_training_stays_unless_named_ones_are_asked_for(ganq: "Ganq", files: Files, old: Any) -> None:
    said = ganq("gc", "--jobs")
    assert (said.code, said.out) == (0, "nothing to delete\n")
    assert "kept: job 1: faces is a named training; --named deletes those, too" in said.err
    assert ganq("gc", "--jobs", "--dry-run", "--json").json()["spared"][0]["name"] == "faces"
    assert files.all_there()
    assert ganq("gc", "--named").code == 2
