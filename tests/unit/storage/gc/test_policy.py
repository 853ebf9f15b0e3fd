"""What is garbage, decided from facts alone; and that deleting goes by no link."""

import os
from pathlib import Path, PurePosixPath

import pytest

from jobs.states import JobState
from storage.gc.delete import delete_tree, opened
from storage.gc.policy import (
    AttemptSeen,
    JobFacts,
    JobSeen,
    Policy,
    Reason,
    leftovers,
    old_enough,
    why_kept,
)


def facts(**changes: object) -> JobFacts:
    values = {
        "id": 12,
        "kind": "train",
        "state": JobState.SUCCEEDED,
        "attempt": 1,
        "created_at": 1.0,
        "ended_age_s": 1000.0,
        "attempts": {1: 1000.0},
    }
    return JobFacts(**{**values, **changes})  # type: ignore[arg-type]


def names(job: JobFacts, *there: str, policy: Policy | None = None) -> dict[str, Reason]:
    seen = JobSeen("jobs/000012", (), (AttemptSeen(1, there),))
    return dict(leftovers(job, seen, policy or Policy()))


def test_a_shard_and_what_has_not_ended_are_never_old() -> None:
    assert old_enough(facts(), 1000.0)
    assert not old_enough(facts(), 1001.0)
    assert not old_enough(facts(part_of=3), 0.0), "it goes with its whole"
    assert not old_enough(facts(state=JobState.RUNNING, ended_age_s=None), 0.0)


def test_imports_named_trainings_and_kept_jobs_are_deleted_only_on_an_explicit_request() -> None:
    by_age, named = Policy(jobs_s=0.0), Policy(jobs_s=0.0, named_models=True)
    asked_for = Policy(jobs_s=0.0, only=frozenset({12}))
    for job, policies in (
        (facts(kind="train"), {by_age, named, asked_for}),
        (facts(kind="train", name="faces"), {named, asked_for}),
        (facts(kind="generate", name="faces"), {by_age, named, asked_for}),
        (facts(kind="import"), {asked_for}),
        (facts(kind="train", kept=True), set()),
    ):
        assert {one for one in (by_age, named, asked_for) if why_kept(job, one) is None} == policies
    assert why_kept(facts(), Policy(jobs_s=0.0, only=frozenset({13}))) is not None


def test_names_that_ganq_does_not_give_are_never_garbage() -> None:
    failed = facts(state=JobState.FAILED)
    assert names(failed, "notes.tmp-final.txt", ".trash-bin", "images-mine", "my-images", "export") == {}
    assert set(names(failed, "images", "grids", "manifest.jsonl", "shard-00001.tar").values()) == {
        Reason.UNPUBLISHED
    }


def test_a_job_whose_results_were_given_up_leaves_what_a_killed_gc_did_not_reach() -> None:
    there = ("images", "checkpoints", "samples", "log.txt", "metrics.jsonl")
    assert names(facts(), *there) == {}
    assert set(names(facts(results_deleted=True), *there)) == {
        "jobs/000012/a1/images",
        "jobs/000012/a1/checkpoints",
        "jobs/000012/a1/samples",
    }


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "a1").mkdir(parents=True)
    (folder / "a1" / "precious.txt").write_text("mine")
    return folder


def test_a_folder_that_is_reached_by_a_link_is_not_opened(tmp_path: Path, outside: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "jobs").mkdir(parents=True)
    (volume / "jobs" / "000001").symlink_to(outside)
    for path in ("jobs/000001", "jobs/000001/a1"):
        with pytest.raises(OSError), opened(volume, PurePosixPath(path)):
            pass
    with opened(volume, PurePosixPath("jobs")) as folder:
        assert os.listdir(folder) == ["000001"]


def test_deleting_takes_links_and_leaves_what_they_point_to(tmp_path: Path, outside: Path) -> None:
    doomed = tmp_path / "doomed"
    (doomed / "deep").mkdir(parents=True)
    (doomed / "deep" / "link").symlink_to(outside)
    (doomed / "deep" / "file").write_text("x")
    with opened(tmp_path, PurePosixPath()) as folder:
        delete_tree(folder, "doomed")
        delete_tree(folder, "doomed")  # another gc was faster
    assert not doomed.exists()
    assert (outside / "a1" / "precious.txt").read_text() == "mine"
