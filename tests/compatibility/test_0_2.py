"""A home and a volume that ganq 0.2 has written: their jobs are shown, go on, and end as they would have."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import Ganq, postgres_later
from PIL import Image
from sqlalchemy import create_engine, text

HERE = Path(__file__).parent
OLD_HOME = {"sqlite": "/tmp/old/home", "postgres": "/tmp/old/pghome"}
"""Where the homes stood when they were made: specs name their data by its absolute path."""
WHOLE, INTERRUPTED, IMAGES = 4, 5, 3

pytestmark = pytest.mark.slow


@pytest.fixture
def old(backend: str, request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[Any]:
    """The command line of today on that home."""
    home = tmp_path / "home"
    with tarfile.open(HERE / f"ganq-0.2-{backend}.tar.xz") as archive:
        archive.extractall(home, filter="data")
    url = f"sqlite:///{home / 'ganq.db'}"
    if backend == "postgres":
        server = request.getfixturevalue("postgres")
        name = server.create()
        url = server.url(name)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as conn:
        if backend == "postgres":
            dump = (home / "dump.sql").read_text().splitlines()
            commands = "\n".join(line for line in dump if not line.startswith(("\\", "--")))
            conn.exec_driver_sql(commands.replace("%", "%%"))
            conn.execute(text("SET search_path TO public"))
        cast = "::json" if backend == "postgres" else ""
        moved = f"UPDATE job SET spec = replace(CAST(spec AS text), '{OLD_HOME[backend]}', '{home}'){cast}"
        conn.execute(text(moved))
    engine.dispose()
    env = {"GANQ_HOME": str(home), "GANQ_USER": "ada", "GANQ_REDIS_URL": redis_url}
    if backend == "postgres":
        env["GANQ_DATABASE_URL"] = url
    ganq = Ganq(env, tmp_path)
    del ganq.env["OMP_NUM_THREADS"]  # the stored home was made with all threads of two cores
    yield ganq
    ganq.stop()
    if backend == "postgres":
        server.drop(name)


def require_same_build(job: int, ganq: Ganq) -> None:
    """Skip what compares bits where torch, processor or threads are not those of the stored training."""
    folder = Path(ganq.env["GANQ_HOME"]) / "volume" / "jobs" / f"{job:06d}"
    build = json.loads((folder / "a1/checkpoints/final/state.json").read_text())["build"]
    ask = (
        "import json, torch\nfrom jobs.device import build_fingerprint\n"
        "print(json.dumps(build_fingerprint(torch.device('cpu'), deterministic=True)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask], env=ganq.env, capture_output=True, text=True, check=True
    )
    here = json.loads(done.stdout)
    different = [name for name, value in here.items() if build[name] != value]
    if different:
        pytest.skip(f"bits are not compared: {', '.join(different)} differ from the stored home's")


def final_sha256(ganq: Ganq, job: int) -> dict[str, str]:
    """The files of a job's final checkpoint."""
    volume = Path(ganq.env["GANQ_HOME"]) / "volume"
    (final,) = [one for one in ganq.json("checkpoints", str(job)) if one["kind"] == "final"]
    manifest = json.loads((volume / final["path"] / "MANIFEST.json").read_text())
    return {one["name"]: one["sha256"] for one in manifest["files"] if one["name"].endswith(".safetensors")}


def image_sha256s(ganq: Ganq, job: int) -> list[str]:
    """The images of a generation, in order."""
    folder = Path(ganq.env["GANQ_HOME"]) / "volume" / "jobs" / f"{job:06d}"
    (manifest,) = folder.glob("a*/manifest.jsonl")
    return [json.loads(line)["sha256"] for line in manifest.read_text().splitlines()]


@postgres_later
@pytest.mark.tier2_on("sqlite")
def test_jobs_of_0_2_are_shown_under_todays_names_and_end_as_they_would_have(old: Any) -> None:
    refused = old.run("status")
    assert (refused.returncode, "ganq db upgrade" in refused.stderr) == (1, True), (
        "and nothing is changed unasked"
    )
    old("db", "upgrade")
    listed = {one["id"]: one for one in old.json("status")}
    assert [listed[one]["state"] for one in (1, 2, 3, WHOLE)] == ["succeeded"] * 4
    assert old.json("status", "2")["spec"]["recipe"] == "dcgan"
    assert old.json("status", "2")["spec"]["fake_reuse"] == "until-g-step"
    noticed = old.run("status").stderr
    assert "wishes_seconds in" in noticed
    assert "is now called cancel_poll_seconds" in noticed

    old.start_worker()
    old("wait", *map(str, range(1, 10)), "--timeout", "400")
    states = {one["id"]: one["state"] for one in old.json("status")}
    assert set(states.values()) == {"succeeded"}, old.log()

    resumed = old.json("status", str(INTERRUPTED))
    assert resumed["attempt"] > 1
    assert resumed["result"]["resumed_from"]
    require_same_build(WHOLE, old)
    assert resumed["bit_exact"] is True
    assert final_sha256(old, INTERRUPTED) == final_sha256(old, WHOLE)


@postgres_later
def test_a_model_of_0_2_makes_the_same_images_and_can_be_measured(old: Any) -> None:
    old("db", "upgrade")
    old("cancel", "5", "6", "7", "8", "9", code=0)
    old("submit", "generate", "--from", "done", "--count", "8", "--seed", "5")
    others = old.folder / "others"
    others.mkdir()
    for i in range(60):
        Image.new("RGB", (16, 16), (4 * i, 255 - 4 * i, 90)).save(others / f"{i}.png")
    measured = ("--data", str(others), "--count", "50", "--feature-network", "random")
    old("submit", "evaluate", "done", *measured)
    old.start_worker()
    old("wait", "10", "11", "--timeout", "300")
    assert old.json("status", "11")["state"] == "succeeded", old.log()
    was, now = (image_sha256s(old, job) for job in (IMAGES, 10))
    assert len(was) == len(now) == 8
    require_same_build(1, old)
    assert was == now
