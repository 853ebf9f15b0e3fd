"""Labels, notes and the order of the queue on the command line, in job files and from Python."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import ganq as api
from jobs.errors import DatasetError
from storage.db.store.waiting import Extras

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Job, Lease
    from storage.db.store import JobStore


def test_a_label_is_given_shown_filtered_and_removed(
    ganq: "Ganq", image_folder: Path, job_factory: "Callable[..., Job]"
) -> None:
    job_factory()
    submit = ("submit", "train", "--data", image_folder, "--label", "project=a b", "--label", "stage=1")
    job = ganq(*submit, "--note", "the good one", "--json").json()
    assert (job["labels"], job["note"]) == ({"project": "a b", "stage": "1"}, "the good one")
    assert "LABELS" in ganq("status").out
    listed = ganq("status", "--label", "project=a b", "--label", "stage", "--json").json()
    assert [one["id"] for one in listed] == [2]
    assert "LABELS" not in ganq("status", "--label", "project=none").out
    shown = ganq("status", 2).out
    assert "project=a b  stage=1" in shown
    assert "the good one" in shown
    said = ganq("set", 1, 2, "--label", "project=", "--label", "new=x", "--note", "")
    assert "job 2: label project removed, label new=x, note removed" in said.out
    assert [one["labels"] for one in ganq("status", "--json").json()] == [
        {"new": "x", "stage": "1"},
        {"new": "x"},
    ]


def test_commands_with_filters_take_labels(
    ganq: "Ganq", store: "JobStore", queries: "Queries", running_job_factory: "Callable[..., Lease]"
) -> None:
    for value in ("a", "b"):
        lease = running_job_factory(extras=Extras(labels={"k": value}))
        store.fail(lease, DatasetError("gone"))
    assert ganq("retry", "--all-failed", "--label", "k=a", "--dry-run").out == "would retry job 1: failed\n"
    assert [one["id"] for one in ganq("retry", "--all-failed", "--label", "k=a", "--json").json()] == [3]
    for verb in ("hold", "release", "pause", "resume", "cancel"):
        assert "no job matches" in ganq(verb, "--all", "--label", "k=b").out
        assert [one["id"] for one in ganq(verb, "--all", "--label", "k", "--json").json()] == [3]
    assert ganq("gc", "--label", "k").code == 2
    assert ganq("cancel", 3, "--label", "k").code == 2


@pytest.mark.parametrize("label", ["x", "=y", "a b=c", "k=" + "v" * 300])
def test_what_is_no_label_is_a_usage_error(ganq: "Ganq", image_folder: Path, label: str) -> None:
    assert ganq("submit", "train", "--data", image_folder, "--label", label).code == 2
    assert ganq("set", 1, "--label", label).code == 2


def test_labels_and_conditions_are_in_job_files_and_in_the_output_of_show(
    ganq: "Ganq", image_folder: Path, tmp_path: Path, queries: "Queries"
) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(f"""
        [[job]]
        kind = "train"
        name = "cleanup"
        data = "{image_folder}"
        after-fail = "base"
        begin = 2030-01-01T00:00:00

        [[job]]
        kind = "train"
        name = "base"
        data = "{image_folder}"
        labels = {{ "a/b" = 'it"s', c = "1" }}
        note = "first"

        [[job]]
        kind = "train"
        name = "rates"
        data = "{image_folder}"
        after-any = "cleanup"
        max-running = 1
        sweep = {{ seed = [0, 1] }}
    """)
    said = ganq("submit", "-f", file)
    assert said.code == 0 or "year" in said.err
    file.write_text(file.read_text().replace("2030-01-01T00:00:00", '"now+2h"'))
    assert ganq("submit", "-f", file).code == 0
    base, cleanup, first, second = queries.get_many([1, 2, 3, 4])
    assert queries.waits_for_end(cleanup.id) == [(base.id, "fail", base.state)]
    assert (cleanup.begin_at or 0) > queries.now() + 7000
    assert cleanup.blockers == 2
    assert [(one.throttled, one.blockers) for one in (first, second)] == [(False, 1), (True, 2)]
    for form in ("toml", "json"):
        shown = tmp_path / f"again.{form}"
        shown.write_text(ganq("show", base.id, "--as", form).out)
        new = ganq("submit", "-f", shown, "--json").json()[0]
        assert (new["labels"], new["note"]) == ({"a/b": 'it"s', "c": "1"}, "first")
    assert "--label='a/b=it\"s'" in ganq("show", base.id, "--as", "command").out
    assert "labels={'a/b': 'it\"s', 'c': '1'}" in ganq("show", base.id, "--as", "python").out


def test_conditions_are_shown_and_refused(ganq: "Ganq", image_folder: Path) -> None:
    train = ("submit", "train", "--data", image_folder)
    ganq(*train)
    waits = ganq(*train, "--after-any", 1, "--begin", "now+2h", "--json").json()
    assert waits["status"] == "waiting on 1"
    assert "the end of job 1 (queued)" in ganq("status", 2).out
    assert ganq(*train, "--begin", "now+2h", "--json").json()["status"].startswith("begins 2")
    sweep = ganq(*train, "--sweep", "seed=0-2", "--max-running", 1, "--json").json()["jobs"]
    assert "waiting on its sweep (1 run at once)" in ganq("status", sweep[1]).out
    assert ganq(*train, "--max-running", 1).code == 2
    assert ganq(*train, "--begin", "soon").code == 2
    assert ganq(*train, "--after-any", "nobody").code == 3
    assert ganq(*train, "--after-fail", "nobody", "--dry-run").code == 3


def test_move_says_where_a_job_is_now(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    for _ in range(3):
        job_factory()
    assert ganq("move", 3, "--before", 1).out == "job 3: before job 1 (next)\n"
    assert ganq("move", 2, "--before", 1, "--json").json()[0]["done"] == "before job 1 (1 job ahead)"
    job_factory(user="ada")
    said = ganq("move", 4, "--before", 1)
    assert (said.code, "ganq set 4 --priority 1" in said.err) == (2, True)
    assert ganq("move", 9, "--before", 1).code == ganq("move", 1, "--before", 9).code == 3


def test_python_labels_moves_and_waits(settings_env: dict[str, str], image_folder: Path) -> None:
    with api.connect() as client:
        first = client.train(data=image_folder, labels={"project": "faces"}, note="one")
        second = client.train(data=image_folder, after_any=first, begin="now+2h")
        assert (first.labels, first.note, second.status) == (
            {"project": "faces"},
            "one",
            f"waiting on {first.id}",
        )
        assert list(client.jobs(labels={"project": "faces"})) == [first]
        assert list(client.jobs(labels={"project": None})) == [first]
        third = client.train(data=image_folder).move(before=first)
        third.set(labels={"project": "birds"}, note="two").set(labels={"project": None})
        assert (third.labels, third.note) == ({}, "two")
        with pytest.raises(api.GanqError):
            client.train(data=image_folder, labels={"a b": "c"})
        with pytest.raises(api.GanqError):
            client.train(data=image_folder, max_running=2)
        assert [
            one.status
            for one in client.sweep("train", {"seed": [0, 1]}, data=image_folder, max_running=1).jobs
        ] == [
            "queued",
            "waiting on its sweep (1 run at once)",
        ]
