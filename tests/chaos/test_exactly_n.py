"""
Generation that is killed, stopped or notified too often ends with exactly the requested images.

Rows F2, F7 and F15 of docs/fault-matrix.md. What must be true afterwards is always the
same: indices 0…N−1, every hash right, no file besides, and the bytes of an undisturbed run.
"""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
from chaos.invariants import assert_invariants
from machine import Ganq, until
from results import add_model, attempt_folder, lines, result_files, verify_manifest
from tables import job_row, without_backoff

from storage.db.engine import Database
from storage.results.reader import names_of_result
from storage.volume.layout import Volume
from worker.celery_bridge.app import queue_key

if TYPE_CHECKING:
    from storage.settings import Settings

sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

OPTIONS = ["--from", "m", "--micro-batch", "4", "--grid", "16"]
WAYS = {
    "count": ["--count", "60"],
    "best": ["--keep", "10", "--of", "60"],
    "seeds": ["--seeds", "3-20,50-70,1000"],
    "tar": ["--count", "60", "--format", "tar"],
    "npz": ["--keep", "40", "--of", "60", "--format", "npz"],
}
PICTURES = {"count": 60, "best": 10, "seeds": 40, "tar": 60, "npz": 40}

RUNNER_POINTS = [
    "runner.assigned",
    "generate.loaded",
    "generate.drawn@1",
    "generate.drawn@7",
    "images.written@1",
    "images.written@9",
    "images.synced",
    "images.images_renamed",
    "images.grids_renamed",
    "images.renamed",
    "images.manifest_renamed",
    "images.published",
    "runner.worked",
]
SUPERVISOR_POINTS = ["supervisor.claimed", "supervisor.before_finish", "supervisor.finished"]
FEW = [
    "supervisor.claimed",
    "generate.drawn@7",
    "images.written@9",
    "images.synced",
    "images.renamed",
    "images.manifest_renamed",
    "supervisor.before_finish",
    "supervisor.finished",
]
"""What tier 1 has time for; tier 2 has all of them."""
PATIENCE_S = 400.0


def failpoints(tmp_path: Path, points: list[str]) -> dict[str, str]:
    """Environment in which each point kills the first process that comes by, and no other."""
    fired = tmp_path / "fired"
    fired.mkdir(exist_ok=True)
    entries = []
    for point in points:
        name, _, times = point.partition("@")
        entries.append(f"{name}=kill@{times or 1}")
    return {
        "GANQ_ENABLE_FAILPOINTS": "1",
        "GANQ_FAILPOINTS": ";".join(entries),
        "GANQ_FAILPOINTS_FIRED": str(fired),
    }


def submit(ganq: Ganq, way: str) -> int:
    return int(ganq.json("submit", "generate", *OPTIONS, *WAYS[way])["id"])


def finished(ganq: Ganq, job: int) -> Path:
    """The folder of a job that succeeded, after all that can be checked of it has been."""
    row = ganq.job(job)
    assert row["state"] == "succeeded", row["error"]
    folder = attempt_folder(Path(ganq.env["GANQ_VOLUME"]), row)
    verify_manifest(folder, manifest_sha256=row["result"]["manifest_sha256"])
    others = {one.name for one in folder.iterdir()} - set(names_of_result(folder))
    assert others <= {"log.txt", "metrics.jsonl"}, "a file that nobody asked for"
    return folder


def undisturbed(ganq: Ganq, ways: list[str]) -> dict[str, dict[str, bytes]]:
    """The bytes of each way to ask, from a worker that nobody troubles."""
    worker = ganq.start_worker("calm")
    jobs = {way: submit(ganq, way) for way in ways}
    for job in jobs.values():
        assert ganq.run("wait", str(job), "--timeout", "60").returncode == 0
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    return {way: result_files(finished(ganq, job)) for way, job in jobs.items()}


def sweep(ganq: Ganq, database: Database, tmp_path: Path, points: dict[str, list[str]]) -> None:
    """Kill one job of each way at all its points, one after the other; compare with the undisturbed."""
    calm = undisturbed(ganq, list(points))
    for way, chosen in points.items():
        result = killed_at(ganq, database, tmp_path / way, way, chosen)
        assert sum("index" in line for line in lines(result)) == PICTURES[way]  # an archive has a line, too
        assert result_files(result) == calm[way]


def killed_at(ganq: Ganq, database: Database, folder: Path, way: str, points: list[str]) -> Path:
    """Returns the folder of a job that met all these points and succeeded all the same."""
    folder.mkdir()
    environment = failpoints(folder, points)
    workers = [ganq.start_worker(f"{way}{n}", **environment) for n in range(2)]
    job = submit(ganq, way)
    with without_backoff(database):
        # The table itself is asked: a command each time would take a core from the workers.
        until(lambda: job_row(database, job)["state"] == "succeeded", within_s=PATIENCE_S, what=way)
    expected = {point.partition("@")[0] for point in points}
    until(lambda: {one.name for one in (folder / "fired").iterdir()} == expected, what="all points")
    # Past the commit a kill costs nothing: the job had ended.
    assert ganq.job(job)["attempt"] == len(expected - {"supervisor.finished"}) + 1
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    for worker in workers:
        assert worker.wait(30) == 0
    return finished(ganq, job)


@pytest.mark.tier2
@sqlite_only
def test_a_generation_killed_at_its_phases_ends_with_exactly_its_images(
    ganq: Ganq, database: Database, settings: "Settings", tmp_path: Path
) -> None:
    """F2. One job, killed once at each of these."""
    add_model(settings)
    sweep(ganq, database, tmp_path, {"count": FEW})


def split_and_killed(ganq: Ganq, database: Database, tmp_path: Path, way: str, points: list[str]) -> None:
    """One job in four parts, two workers, each of these points kills once, in a part or in the gathering."""
    calm = undisturbed(ganq, [way])
    environment = failpoints(tmp_path, [*points, "merge.adopted@5"])
    for number in range(2):
        ganq.start_worker(f"w{number}", **environment)
    job = int(ganq.json("submit", "generate", *OPTIONS, *WAYS[way], "--shard-size", "16")["id"])
    with without_backoff(database):
        until(lambda: job_row(database, job)["state"] == "succeeded", within_s=PATIENCE_S, what=way)
    fired = {one.name for one in (tmp_path / "fired").iterdir()}
    assert fired >= {"merge.adopted", "images.renamed", "supervisor.before_finish"}
    result = finished(ganq, job)
    assert sum("index" in line for line in lines(result)) == PICTURES[way]
    assert result_files(result) == calm[way]
    assert_invariants(database, Volume(Path(ganq.env["GANQ_VOLUME"])))


@pytest.mark.tier2
@sqlite_only
def test_a_split_generation_whose_shards_are_killed_has_the_bytes_of_one_that_was_not_split(
    ganq: Ganq, database: Database, settings: "Settings", tmp_path: Path
) -> None:
    """F2 for parts: what one worker alone would have made."""
    add_model(settings)
    split_and_killed(
        ganq,
        database,
        tmp_path,
        "count",
        ["images.renamed", "supervisor.claimed", "supervisor.before_finish"],
    )


@pytest.mark.tier2
@pytest.mark.parametrize("way", WAYS)
def test_every_request_may_be_split_and_killed(
    ganq: Ganq, database: Database, settings: "Settings", tmp_path: Path, way: Any
) -> None:
    add_model(settings)
    points = {one.partition("@")[0]: one for one in reversed(RUNNER_POINTS)}
    split_and_killed(ganq, database, tmp_path, way, [*points.values(), *SUPERVISOR_POINTS])


@pytest.mark.tier2
@pytest.mark.parametrize("way", ["count", "best", "seeds", "tar", "npz"])
def test_every_request_survives_a_kill_at_every_phase(
    ganq: Ganq, database: Database, settings: "Settings", tmp_path: Path, way: Any
) -> None:
    """F2 in full: --count, --keep/--of and --seeds, first and later images, both databases."""
    add_model(settings)
    points = reversed(RUNNER_POINTS) if way == "count" else RUNNER_POINTS  # the first or the later images
    chosen = {one.partition("@")[0]: one for one in points}
    sweep(ganq, database, tmp_path, {way: [*chosen.values(), *SUPERVISOR_POINTS]})


@pytest.mark.tier2
@sqlite_only
def test_other_ways_to_ask_are_the_same_after_a_kill_while_they_are_written(
    ganq: Ganq, database: Database, settings: "Settings", tmp_path: Path
) -> None:
    """F2 for --keep/--of, --seeds and archives."""
    add_model(settings)
    few = ["images.written@9", "images.renamed"]
    sweep(ganq, database, tmp_path, {"best": few, "seeds": few, "tar": few, "npz": few})


@pytest.mark.tier2
@sqlite_only
def test_drained_and_notified_fifty_times_it_still_makes_each_image_once(
    ganq: Ganq, redis_url: str, database: Database, settings: "Settings"
) -> None:
    """F7 and F15: SIGTERM in generation, duplicate and reordered notifications; another worker finishes."""
    from messages import notification

    add_model(settings)
    calm = undisturbed(ganq, ["count"])
    slow = {"GANQ_ENABLE_FAILPOINTS": "1", "GANQ_FAILPOINTS": "generate.drawn=sleep:0.2@1+"}
    first = ganq.start_worker("first", **slow)
    job = submit(ganq, "count")
    other = submit(ganq, "seeds")
    client = redis.Redis.from_url(redis_url)
    for number in range(50):
        client.lpush(queue_key("default"), notification(other if number % 2 else job, number))
    until(lambda: (job_row(database, job)["progress"] or {}).get("done"), what="the first images")
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    assert job_row(database, job)["state"] == "queued"
    ganq.start_worker("second")
    ganq.start_worker("third")
    for number in range(50):
        client.lpush(queue_key("default"), notification(job, 100 + number))
    client.close()
    assert ganq.run("wait", str(job), str(other), "--timeout", "60").returncode == 0
    assert result_files(finished(ganq, job)) == calm["count"]
    finished(ganq, other)
    assert [one["outcome"] for one in ganq.job(job)["attempts"]] == ["requeued", "succeeded"]
    assert ganq.job(other)["attempt"] == 1
