"""`ganq status` and its sisters that only look: the words must be true."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs.errors import DiskFullError
from jobs.specs import TrainSpec
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.engine import Database
    from storage.db.rows import Job, Lease, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings


def row_of(said: Any, job_id: Any) -> Any:
    return next(line for line in said.out.splitlines() if line.split()[0] == str(job_id))


def test_a_running_job_shows_epoch_rate_eta_and_worker(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(name="faces")
    store.heartbeat(
        lease, {"done": 250, "total": 1000, "unit": "images", "rate": 25.0, "epoch": 1, "epochs": 4}
    )
    row = row_of(ganq("status"), 1)
    for part in ("faces", "train", "running", "epoch 1/4 25%", "25/s", "30 s", "w1"):
        assert part in row
    told = ganq("status", "--json").json()[0]
    assert (told["fraction"], told["eta_seconds"]) == (0.25, 30.0)


def test_a_generation_shows_its_images(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(kind="generate")
    store.heartbeat(lease, {"done": 640, "total": 1000, "unit": "images", "rate": None})
    assert "640/1,000 images 64%" in row_of(ganq("status"), 1)


def test_a_phase_that_is_not_the_work_is_named_and_promises_no_end(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    store.heartbeat(lease, {"done": 5, "total": 10, "rate": 5.0, "phase": "reading images"})
    assert "reading images" in row_of(ganq("status"), 1)
    assert ganq("status", 1, "--json").json()["eta_seconds"] is None


def test_progress_that_is_nonsense_breaks_no_table(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    store.heartbeat(lease, {"done": "x", "total": 0, "rate": "fast", "epoch": None, "unit": "\x1b[2J"})
    said = ganq("status")
    assert said.code == 0
    assert "\x1b" not in said.out


def test_status_texts_are_true_for_jobs_that_do_not_move(
    ganq: "Ganq",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    cancelling = running_job_factory()
    store.request_cancel(cancelling.job_id)
    held = job_factory(held=True)
    waiting = job_factory(after=[held.id])
    later = running_job_factory()
    store.fail(later, DiskFullError("no room left"))
    ended = job_factory()
    store.request_cancel(ended.id)
    said = ganq("status")
    assert "cancelling" in row_of(said, cancelling.job_id)
    assert "held" in row_of(said, held.id)
    assert f"waiting on {held.id}" in row_of(said, waiting.id)
    assert "retry in" in row_of(said, later.job_id)
    assert "DISK_FULL" in row_of(said, later.job_id)
    assert "cancelled" in row_of(said, ended.id)


def test_a_job_whose_worker_became_unresponsive_is_not_called_running(
    ganq: "Ganq",
    database: "Database",
    running_job_factory: "Callable[..., Lease]",
    worker_identity: "WorkerIdentity",
) -> None:
    from sqlalchemy import text

    from storage.db.workers import WorkerStore

    WorkerStore(database, worker_identity).report("busy", 1)
    running_job_factory()
    assert "running" in row_of(ganq("status"), 1)
    database.write(lambda conn: conn.execute(text("UPDATE worker SET seen_at = seen_at - 90")))
    assert "unresponsive for 1 min 3" in row_of(ganq("status"), 1)
    assert ganq("workers", "--json").json()[0]["status"] == "unresponsive"
    assert "unresponsive" in ganq("workers").out


def test_a_worker_is_shown_with_its_job_device_and_version(
    ganq: "Ganq",
    database: "Database",
    make_identity: "Callable[..., WorkerIdentity]",
    running_job_factory: "Callable[..., Lease]",
) -> None:
    from storage.db.workers import WorkerStore

    worker = make_identity("node7-gpu3", device="gpu3 (H100)")
    job = running_job_factory(worker).job_id
    WorkerStore(database, worker).report("busy", job)
    out = ganq("workers").out
    assert out.splitlines()[1].split()[:3] == ["node7-gpu3", "busy", str(job)]
    for part in ("gpu3 (H100)", "testhost", "0.1.0", "0 s ago"):
        assert part in out


def test_the_list_is_newest_first_limited_and_says_so(
    ganq: "Ganq", job_factory: "Callable[..., Job]"
) -> None:
    for _ in range(25):
        job_factory()
    said = ganq("status")
    lines = said.out.splitlines()
    assert [int(line.split()[0]) for line in lines[1:-1]] == list(range(25, 5, -1))
    assert "25 jobs: 25 queued" in lines[-1]
    assert "--all" in lines[-1]
    assert len(ganq("status", "--limit", 3).out.splitlines()) == 5
    assert len(ganq("status", "--all").out.splitlines()) == 27
    assert len(ganq("status", "--json").json()) == 20
    assert len(ganq("status", "--json", "--all").json()) == 25
    assert len(ganq("status", "--before", 10**30, "--json").json()) == 20
    assert "4 match the filter" in ganq("status", "--before", 5).out
    assert "--all or --limit N" not in ganq("status", "--state", "running").out


def test_the_parts_that_are_listed_are_counted_and_no_others(
    ganq: "Ganq", store: "JobStore", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    spec = {"source": 1, "count": 4}
    shards = [({**spec, "draws": [first, first]}, 1) for first in range(4)]
    whole = job_factory(kind="generate", spec=spec, shards=shards)
    job_factory(kind="generate")
    claim()

    def footer(*options: Any) -> Any:
        return ganq("status", *options).out.splitlines()[-1]

    assert footer() == "2 jobs: 1 queued, 1 running"
    newest = " · newest 2 shown; --all shows all, ganq status ID shows one"
    assert footer("--shards") == "6 jobs: 4 queued, 2 running"
    assert footer("--parts", "--limit", 2) == f"6 jobs: 4 queued, 2 running{newest}"
    assert footer(whole.id, "--parts") == f"job {whole.id} has 4 shards: 3 queued, 1 running"
    assert footer(whole.id, "--parts", "--limit", 2).endswith(newest)
    assert footer(whole.id, "--parts", "--state", "running").endswith(" · 1 match the filter")
    assert footer(6, "--parts") == "job 6 has no shards"


def test_filters_choose_by_state_kind_user_and_name(
    ganq: "Ganq", store: "JobStore", job_factory: "Callable[..., Job]"
) -> None:
    job_factory(name="faces")
    job_factory(name="faces-2", user="ada")
    job_factory(kind="generate")
    store.request_cancel(1)

    def ids(*options: Any) -> Any:
        return [one["id"] for one in ganq("status", "--json", *options).json()]

    assert ids("--state", "cancelled") == [1]
    assert ids("--state", "cancelled", "--state", "queued") == [3, 2, 1]
    assert ids("--kind", "generate") == [3]
    assert ids("--user", "ada") == [2]
    assert ids("--name", "face") == [2, 1]
    assert ids("--name", "face", "--state", "queued") == [2]
    assert ganq("status", "--kind", "paint").code == 2
    assert ganq("status", "--state", "sleeping").code == 2
    assert ganq("status", 1, "--kind", "train").code == 2


def test_all_jobs_as_json_come_in_pages_with_their_states(
    ganq: "Ganq", job_factory: "Callable[..., Job]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.db.queries.PAGE", 4)
    first = job_factory()
    for _ in range(9):
        job_factory(after=[first.id])
    told = ganq("status", "--json", "--all").json()
    assert [one["id"] for one in told] == list(range(10, 0, -1))
    assert told[0]["status"] == "waiting on 1"


def test_one_job_is_shown_whole(
    ganq: "Ganq", store: "JobStore", settings: "Settings", running_job_factory: "Callable[..., Lease]"
) -> None:
    from jobs.errors import DatasetError
    from storage.volume.layout import Volume

    lease = running_job_factory(name="faces", spec={"data": "/pictures/faces", "epochs": 4})
    folder = Volume(settings.volume).attempt(1, 1)
    (folder / "samples").mkdir(parents=True)
    (folder / "log.txt").write_text("reading\n\x1b[31mred ink\n")
    store.register_checkpoint(
        lease,
        kind="epoch",
        epoch=2,
        step=20,
        path="jobs/000001/a1/checkpoints/epoch-0002",
        manifest_sha256="0" * 64,
        size=10,
    )
    store.fail(lease, DatasetError("too many images are broken", hint="ganq dataset check"))
    said = ganq("status", "faces")
    for part in (
        "job 1 · faces · train",
        "failed",
        "too many images are broken [BAD_DATASET]",
        "→ ganq dataset check",
        "/pictures/faces",
        "failed after",
        "w1",
        "1 checkpoint, newest at epoch 2",
        str(folder / "samples"),
        "ganq open 1",
        "submitted",
        "claimed",
        "red ink",
    ):
        assert part in said.out, part
    assert "\x1b" not in said.out
    told = ganq("status", "faces", "--json").json()
    assert told["error"]["code"] == "BAD_DATASET"
    assert told["attempts"][0]["outcome"] == "failed"
    assert "lease_token" not in told["attempts"][0]
    assert told["log_tail"][-1].endswith("red ink")
    assert told["checkpoints"][0]["epoch"] == 2


def test_a_queued_job_knows_its_place(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    job_factory()
    job_factory()
    job_factory(priority=5)
    assert "2 jobs ahead" in ganq("status", 2).out
    assert "next" in ganq("status", 3).out
    assert ganq("status", 2, "--json").json()["queue_position"] == 3


def test_a_queued_job_that_no_worker_would_take_says_so(
    ganq: "Ganq", job_factory: "Callable[..., Job]", speak: Callable[..., None]
) -> None:
    job = job_factory(queue="nights")

    def place() -> Any:
        return next(line for line in ganq("status", job.id).out.splitlines() if "in the queue" in line)

    assert "next, but no worker is running" in place()
    speak("w1")
    assert "next, but no running worker serves the queue nights   (ganq worker --queues nights)" in place()
    for state, ago in (("idle", 90), ("draining", 0), ("stopped", 0)):
        speak("w2", state, ago=ago, queues=("default", "nights"))
        assert "no running worker serves" in place(), state
    speak("w2", "busy", queues=("default", "nights"))
    assert place() == "in the queue  next"


def test_a_finished_job_says_where_its_results_are_and_that_they_are_bit_exact(
    ganq: "Ganq", trained: Callable[..., int], settings: "Settings"
) -> None:
    job_id = trained()
    samples = settings.volume / "jobs" / f"{job_id:06d}" / "a1" / "samples"
    samples.mkdir(parents=True)
    said = ganq("status", job_id)
    assert f"samples  {samples}" in said.out
    assert "bit-exact" in said.out


def test_images_of_a_generation_that_did_not_end_are_no_result(
    ganq: "Ganq", store: "JobStore", settings: "Settings", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(kind="generate")
    images = settings.volume / "jobs" / "000001" / "a1" / "images"
    images.mkdir(parents=True)
    assert "images" not in ganq("status", 1, "--json").json()["paths"]
    store.succeed(lease, {"image_count": 4})
    assert ganq("status", 1, "--json").json()["paths"]["images"] == str(images)


def test_a_job_that_has_succeeded_shows_all_of_its_work_done(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    store.heartbeat(
        lease, {"done": 58, "total": 60, "unit": "images", "rate": 4.0, "epoch": 58, "epochs": 60}
    )
    store.succeed(lease, {})
    row = row_of(ganq("status"), 1)
    assert "epoch 60/60" in row
    assert "%" not in row
    assert "4.0/s" not in row
    store.succeed(running_job_factory(kind="generate"), {"image_count": 1000})
    assert "1,000 images" in row_of(ganq("status"), 2)


def test_a_training_that_stopped_early_is_not_shown_as_complete(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(name="pat", spec={"data": "/pictures", "epochs": 400})
    told = {"done": 1312, "total": 76800, "unit": "images", "epoch": 6, "epochs": 400}
    store.heartbeat(lease, told)
    store.succeed(lease, {"epoch": 7, "images": 1344, "stopped": "stopped early at epoch 7"})
    assert "epoch 7, stopped early" in ganq("status").out
    assert "400/400" not in ganq("status", "pat").out
    facts = ganq("status", "pat", "--json").json()["progress"]
    assert (facts["done"], facts["total"], facts["epoch"]) == (1344, 76800, 7)


def test_a_training_that_ended_before_its_first_heartbeat_shows_all_of_its_epochs(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(spec={"data": "/pictures", "epochs": 2})
    store.succeed(lease, {})
    assert "epoch 2/2" in ganq("status").out


def test_only_a_run_that_repeats_itself_is_said_to_have_no_best_checkpoint(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    for metric, said in (({"last": 2.0}, True), ({"last": 2.0, "best": 1.0}, False), ({}, False)):
        lease = running_job_factory(
            spec={"data": "/p", "metric": "kid", "feature_network": "random", "feature_sha256": None}
        )
        store.succeed(lease, {"metric": metric})
        assert ("kid/random 2 at the end; no checkpoint" in ganq("status", lease.job_id).out) == said


def test_a_metric_on_a_users_network_has_one_name_wherever_it_is_shown(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    spec = {"data": "/p", "metric": "fid", "feature_network": "/nets/i.pth", "feature_sha256": "ab12cd34" * 8}
    lease = running_job_factory(spec=spec)
    store.register_checkpoint(
        lease, kind="final", epoch=2, step=8, path="c", manifest_sha256="0" * 64, size=1, metric=7.5
    )
    store.succeed(lease, {"metric": {"key": "fid@ab12cd34", "last": 7.5, "best": 7.5, "best_epoch": 2}})
    assert "fid@ab12cd34 7.5 at epoch 2" in ganq("status", lease.job_id).out
    assert "metric: fid@ab12cd34" in ganq("checkpoints", lease.job_id).out


def test_a_training_without_a_metric_says_why(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    store.succeed(lease, {"no_metric": "the run is so short"})
    assert "none: the run is so short" in ganq("status", lease.job_id).out


def test_a_training_that_counts_its_images_is_shown(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    """What a run has written into its result is a number here, and a path for a generation."""
    lease = running_job_factory()
    store.succeed(lease, {"epoch": 2, "step": 12, "images": 192, "bit_exact": True})
    assert ganq("status", lease.job_id).code == 0
    assert "images" not in ganq("status", lease.job_id, "--json").json()["paths"]


def test_a_name_means_its_newest_job(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    job_factory(name="faces")
    job_factory(name="faces")
    assert ganq("status", "faces", "--json").json()["id"] == 2


def test_watch_needs_a_terminal(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    job_factory()
    said = ganq("status", "--watch")
    assert said.code == 2
    assert "ganq wait" in said.err


def on_a_terminal(*argv: Any, columns: Any = 100, lines: Any = 30, until: Any = b"", **variables: Any) -> Any:
    """What a command draws on a real terminal; interrupted by Ctrl-C once `until` was drawn."""
    reader, writer = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "LINES": str(lines)}
    env.pop("NO_COLOR", None)
    env |= variables
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *argv], stdout=writer, stderr=writer, stdin=writer, env=env
    )
    os.close(writer)
    drawn = b""
    interrupted = False
    while True:
        try:
            part = os.read(reader, 65536)
        except OSError:  # Linux's way to say that the other side was closed
            break
        if not part:
            break
        drawn += part
        if until and until in drawn and not interrupted:
            process.send_signal(2)
            interrupted = True
    os.close(reader)
    return process.wait(20), drawn.decode()


@pytest.mark.parametrize(
    ("variables", "coloured"), [({}, True), ({"TERM": "dumb"}, False), ({"NO_COLOR": "1"}, False)], ids=str
)
def test_status_texts_have_colours_on_a_terminal_unless_they_are_unwanted(
    ganq: "Ganq", variables: Any, coloured: bool
) -> None:
    code, drawn = on_a_terminal("status", "999", **variables)
    assert code == 3
    assert "there is no job 999" in drawn
    assert ("\x1b[31m" in drawn) is coloured
    _, drawn = on_a_terminal("doctor", lines=60, **variables)
    assert "database" in drawn
    assert ("\x1b[32m" in drawn) is coloured


def test_a_terminal_gets_bars_and_colours(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(name="faces")
    store.heartbeat(lease, {"done": 5, "total": 10, "unit": "images", "rate": 5.0, "epoch": 2, "epochs": 4})
    code, drawn = on_a_terminal("status")
    assert code == 0
    assert "█████─────" in drawn
    assert "\x1b[" in drawn
    _, drawn = on_a_terminal("status", columns=46)
    header, row, *_ = re.sub(r"\x1b\[[0-9;]*m", "", drawn).splitlines()
    assert len(row.rstrip()) <= 46, "the terminal would break the line"
    assert "AGE" not in header
    assert "running" in row


def test_no_color_is_respected_on_a_terminal(
    ganq: "Ganq", job_factory: "Callable[..., Job]", monkeypatch: pytest.MonkeyPatch
) -> None:
    job_factory()
    import cli.ui.output

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(cli.ui.output, "on_terminal", lambda: True)
    assert "\x1b[3" not in ganq("status").out


def test_watch_redraws_until_ctrl_c(ganq: "Ganq", job_factory: "Callable[..., Job]") -> None:
    job_factory(name="faces")
    code, drawn = on_a_terminal("status", "--watch", until=b"queued")
    assert code == 130
    assert "faces" in drawn
    assert "Traceback" not in drawn


def test_watching_a_job_on_a_small_screen_keeps_its_log_in_sight_and_ends_with_its_end(
    ganq: "Ganq", store: "JobStore", settings: "Settings", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory(name="faces", spec=TrainSpec.create(data="/x").to_json())
    folder = Volume(settings.volume).attempt(lease.job_id, 1)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(f"line {n}\n" for n in range(30)))
    store.succeed(lease, {"epoch": 2, "step": 12, "images": 192})
    code, drawn = on_a_terminal("status", "faces", "--watch", lines=20)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)
    page = shown[shown.rindex("job 1") :].rstrip().splitlines()
    assert code == 0
    assert len(page) < 20
    assert "succeeded" in page[2]
    assert "  line 29" in [one.rstrip() for one in page]
    assert "options" not in drawn
    assert "lr_g" not in ganq("status", "faces").out
    assert "lr_g" in ganq("status", "faces", "--full").out


def test_what_is_watched_is_drawn_once_more_after_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from cli import status

    monkeypatch.setattr(status, "REFRESH_S", 0)
    over: list[str] = []
    drawn: list[bool] = []

    def draw() -> str:
        drawn.append(bool(over))
        over.append("it ends just after it was drawn")
        return ""

    assert status._watch(draw, lambda: bool(over)) == 0
    assert drawn == [False, True]


@pytest.mark.parametrize("word", ["99", "fac"])
def test_the_shell_completes_ids_and_names(
    ganq: "Ganq", job_factory: "Callable[..., Job]", monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    job_factory(name="faces")
    monkeypatch.setenv("_GANQ_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"ganq wait {word}")
    monkeypatch.setenv("COMP_CWORD", "2")
    said = ganq()
    assert said.code == 0
    assert said.out.strip() == ("plain,faces" if word == "fac" else "")


@pytest.mark.parametrize(
    ("command", "offered"),
    [
        ("status", {"1", "2", "3", "images"}),
        ("cancel", {"2", "3", "images"}),
        ("pause", {"2", "3", "images"}),
        ("retry", {"1"}),
        ("push", {"1", "2"}),
        ("submit generate", {"1", "2"}),
        ("submit train --init-from", {"1", "2"}),
        ("submit train --continue", {"1", "2"}),
    ],
)
def test_the_shell_offers_the_jobs_that_a_command_is_for(
    ganq: "Ganq",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    offered: set[str],
) -> None:
    job_factory()
    store.succeed(claim(), {})
    job_factory()
    job_factory(kind="generate", name="images")
    words = f"ganq {command} "
    monkeypatch.setenv("_GANQ_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    said = ganq()
    assert {line.removeprefix("plain,") for line in said.out.split()} == offered


def test_completion_without_a_job_table_is_silent_and_makes_none(
    bare_ganq: "Ganq", monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("_GANQ_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "ganq wait ")
    monkeypatch.setenv("COMP_CWORD", "2")
    said = bare_ganq()
    assert (said.out.strip(), said.err) == ("", "")
    assert not (tmp_path / "new-home").exists()


def test_a_training_that_reports_how_many_images_it_saw_has_a_page(
    ganq: "Ganq", store: "JobStore", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    job_factory()
    store.succeed(claim(), {"images": 640})
    assert ganq("status", 1, "--json").json()["state"] == "succeeded"
    assert ganq("status", 1).code == 0


def test_a_user_column_appears_with_the_jobs_of_others(
    ganq: "Ganq",
    settings: "Settings",
    database: "Database",
    job_factory: "Callable[..., Job]",
    claim: "Claimer",
    make_identity: "Callable[..., WorkerIdentity]",
) -> None:
    from storage.db.workers import WorkerStore

    job_factory(user=settings.user)
    assert "USER" not in ganq("status").out
    job_factory(user="grace", priority=9)
    assert "grace" in row_of(ganq("status"), 2)
    assert settings.user in row_of(ganq("status"), 1)
    claim()
    WorkerStore(database, make_identity("w1")).report("busy", 2)
    assert "grace" in ganq("workers").out


def test_a_job_whose_worker_stopped_sending_heartbeats_has_no_rate_no_eta_and_a_hint(
    ganq: "Ganq",
    database: "Database",
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    worker_identity: "WorkerIdentity",
) -> None:
    from sqlalchemy import text

    from storage.db.workers import WorkerStore

    WorkerStore(database, worker_identity).report("busy", 1)
    lease = running_job_factory()
    store.heartbeat(lease, {"done": 5, "total": 10, "rate": 282.8, "epoch": 2, "epochs": 4})
    assert "283/s" in row_of(ganq("status"), 1)
    database.write(lambda conn: conn.execute(text("UPDATE worker SET seen_at = seen_at - 40")))
    assert "283/s" not in row_of(ganq("status"), 1)
    assert ganq("status", 1, "--json").json()["eta_seconds"] is None
    database.write(lambda conn: conn.execute(text("UPDATE worker SET seen_at = seen_at - 40")))
    page = ganq("status", 1).out
    assert "unresponsive for 1 min 2" in page
    assert "start a worker (ganq up)" in page
    assert "images/s" not in page


def test_a_split_job_with_active_shards_is_running_in_list_filter_and_footer(
    ganq: "Ganq", job_factory: "Callable[..., Job]", claim: "Claimer"
) -> None:
    spec = {"source": 1, "count": 2}
    parts = [({**spec, "draws": [first, first]}, 1) for first in range(2)]
    whole = job_factory(kind="generate", spec=spec, shards=parts)
    waiting = job_factory(kind="generate", spec=spec, shards=parts, held=True)
    claim()

    def ids(*options: Any) -> Any:
        return [job["id"] for job in ganq("status", "--json", *options).json()]

    assert "running" in row_of(ganq("status"), whole.id)
    assert ids("--state", "running") == [whole.id]
    assert ids("--state", "queued") == [waiting.id]
    assert ids("--state", "running", "--state", "queued") == [waiting.id, whole.id]
    assert ganq("status").out.splitlines()[-1] == "2 jobs: 1 queued, 1 running"


def test_since_lists_recent_jobs_with_dates_and_changed_options(
    ganq: "Ganq", database: "Database", job_factory: "Callable[..., Job]"
) -> None:
    from sqlalchemy import text

    spec = TrainSpec.create(data="/x", lr_g=0.5).to_json()
    job_factory(spec=spec)
    job_factory(spec=spec)
    old = text("UPDATE job SET created_at = created_at - 3 * 86400 WHERE id = 1")
    database.write(lambda conn: conn.execute(old))
    assert [job["id"] for job in ganq("status", "--since", "2d", "--json").json()] == [2]
    row = row_of(ganq("status", "--since", "7d"), 1)
    assert "lr-g=0.5" in row
    assert "beta1" not in row
    assert "reader" not in row
    assert "keep-duplicates" not in row
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", row)
    assert "lr-g=0.5" not in ganq("status").out


def test_the_list_of_failed_jobs_has_their_reasons(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    from jobs.errors import DatasetError

    store.fail(running_job_factory(), DatasetError("too many images are broken"))
    assert "too many images are broken" in row_of(ganq("status", "--state", "failed"), 1)


def test_a_training_that_diverged_or_collapsed_says_so_in_the_list(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    running, recovered, ended = (running_job_factory() for _ in range(3))
    for lease in (running, recovered):
        store.add_event(lease, "diverged", {"step": 7, "reason": "loss_d is about 10^9"})
    store.add_event(recovered, "rolled_back", {"to_step": 4})
    store.succeed(ended, {"epoch": 6, "warning": "collapsed: all images are equal"})
    said = ganq("status")
    assert "diverged" in row_of(said, running.job_id)
    assert "diverged" not in row_of(said, recovered.job_id)
    assert "collapsed" in row_of(said, ended.job_id)
    told = {job["id"]: job["warning"] for job in ganq("status", "--json").json()}
    assert told == {
        running.job_id: "diverged: loss_d is about 10^9",
        recovered.job_id: None,
        ended.job_id: "collapsed: all images are equal",
    }
    assert ganq("status", running.job_id, "--json").json()["verdict"] == "diverged: loss_d is about 10^9"


def test_a_long_reason_is_cut_in_the_list_and_whole_in_the_page_of_the_job(
    ganq: "Ganq", store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    from jobs.errors import DatasetError

    reason = "too many images are broken: " + ", ".join(map(str, range(60)))
    store.fail(running_job_factory(), DatasetError(reason))
    assert "too many images are broken: 0, 1" in row_of(ganq("status"), 1)
    assert len(row_of(ganq("status"), 1)) < 140
    assert reason in ganq("status", 1).out


def test_a_machine_without_the_volume_says_so_instead_of_no_results(
    ganq: "Ganq", settings: "Settings", trained: Callable[..., int]
) -> None:
    job_id = trained()
    for command in (("logs", job_id), ("open", job_id), ("export", job_id)):
        said = ganq(*command)
        assert said.code == 1, command
        assert f"this machine does not see the volume at {settings.volume}" in said.err
        assert "GANQ_VOLUME" in said.err
    assert "does not see the volume" in ganq("status", job_id).out
    assert "not evaluated" not in ganq("status", job_id).out
    assert ganq("status", job_id).code == 0


def test_json_has_the_standard_keys_and_for_now_those_of_0_2_beside_them(
    ganq: "Ganq", job_factory: "Callable[..., Job]"
) -> None:
    first = job_factory()
    waiting = job_factory(after=[first.id])
    told = ganq("status", waiting.id, "--json").json()
    assert told["waiting_on"] == told["waits_for"] == [first.id]
    assert told["preemptions"] == told["yields"] == 0
    assert told["shards"] is told["parts"] is None
    assert told["shard_of"] is told["part_of"] is None
    assert ganq("status", "--parts", "--json").code == 0, "an option of 0.2"
