"""
A million images by 64 workers, each killed at least once, beside those of one undisturbed worker.

    python -m benchmarks.killed_workers [--images N] [--workers N] [--shard-size N] [--database postgres]
    python -m benchmarks.killed_workers --networks --images 100000 --workers 8

The workers, the table, the shards and the publication are real; images of 16×16 are drawn by numpy
(benchmarks/small_images), because 64 processes with torch do not fit into 24 GB. With --networks a DCGAN of
16×16 draws them, and a lost attempt counts as if it had drawn its whole shard. A worker is killed with
SIGKILL, with all of its processes, while it has a shard, and is started again. The command fails if a
file differs from the undisturbed worker's by a byte, if a worker was not killed, or if more than a tenth
of the images were drawn twice.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks import stack
from benchmarks.report import circumstances
from storage.datasets.synthetic import make_faces
from storage.db.queries import Queries
from storage.db.schema import open_database
from storage.results.formats import IMAGES
from storage.settings import Settings
from storage.volume.layout import Volume
from tests.machine import Ganq
from tests.services import Postgres, Redis, postgres_binaries, redis_binary

TRAIN = (
    "--size=16",
    "--ngf=4",
    "--ndf=4",
    "--nz=8",
    "--batch=8",
    "--epochs=1",
    "--metric=none",
    "--name=tiny",
)
KILLS_UNTIL = 0.8
"""Share of the shards by which the last worker is killed: each kill meets a worker that works."""
LAST_S = 3600.0
LOOK_S = 10.0
START_S = 600.0
MOST_TWICE = 0.1


class Fleet(Ganq):
    """Workers of one installation, their kills, and their memory."""

    def __init__(self, env: dict[str, str], work: Path) -> None:
        super().__init__(env, work)
        self.env = env
        self.of_name: dict[str, subprocess.Popen[bytes]] = {}
        self.largest_mb: list[tuple[float, float]] = []
        """Seconds since the submit, and the largest proportional set size (PSS) of a runner then."""
        self("db", "upgrade")
        self.queries = Queries(open_database(Settings.load(env)))

    def start(self, name: str) -> None:
        self.of_name[name] = self.start_worker(name)

    def kill(self, name: str) -> None:
        """Kill all processes of a worker at once."""
        worker = psutil.Process(self.of_name[name].pid)
        family = [worker, *worker.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):  # the worker's own helpers come and go
                process.kill()
        self.of_name[name].wait()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while sum(one.state == "idle" for one in self.queries.workers()) < len(self.of_name):
            if time.monotonic() > deadline:
                raise RuntimeError(f"workers do not start: see {self.folder}")
            time.sleep(1)

    def stop(self) -> None:
        super().stop()
        self.of_name.clear()

    def look_at_memory(self, at_s: float) -> None:
        largest = 0.0
        for worker in self.of_name.values():
            try:
                for process in psutil.Process(worker.pid).children(recursive=True):
                    if "worker.runner.main" in process.cmdline():
                        largest = max(largest, process.memory_full_info().pss / 2**20)
            except psutil.NoSuchProcess:
                continue
        self.largest_mb.append((round(at_s, 1), round(largest, 1)))


def generate(fleet: Fleet, options: argparse.Namespace, name: str, kills: int) -> dict[str, Any]:
    """
    Submit one generation and wait for it; kill `kills` workers, in a random order, each while it has a shard.

    Raises:
        RuntimeError: the job failed, or does not end.
    """
    drawn = Path(fleet.env["DRAWN"])
    drawn.write_bytes(b"")
    size = ("--count", f"{options.images}", "--shard-size", f"{options.shard_size}")
    began = looked = time.monotonic()
    submit = ("submit", "generate", "--from", "tiny", *size, "--seed", "5", "--name", name)
    job_id: int = fleet.json(*submit)["id"]
    rng = random.Random(options.seed)
    killed: set[str] = set()
    while not (job := fleet.queries.get(job_id)).state.terminal:
        shards = fleet.queries.shard_summaries([job_id])[job_id]
        due = min(kills, 1 + int(kills * shards.ended / (shards.number * KILLS_UNTIL)))
        running = {who: one.id for who, one in fleet.queries.running().items() if one.part_of == job_id}
        if len(killed) < due and (left := sorted(running.keys() - killed)):
            victim = rng.choice(left)
            fleet.kill(victim)
            shard = fleet.queries.get(running[victim])
            if shard.state == "running" and shard.worker == victim:  # else it had just ended: not counted
                killed.add(victim)
            fleet.start(victim)
            continue
        now = time.monotonic()
        if now - looked > LOOK_S:
            looked = now
            fleet.look_at_memory(now - began)
            print(
                f"{now - began:6.0f} s  {shards.ended} of {shards.number} shards, {len(killed)} killed",
                flush=True,
            )
        if now - began > LAST_S:
            raise RuntimeError(f"job {job_id} does not end: {job}")
        time.sleep(0.2)
    if job.state != "succeeded":
        raise RuntimeError(f"job {job_id} has {job.state}: {job.error_message}")
    attempts = [shard.attempt for shard in fleet.queries.shards(job_id)]
    images_drawn = drawn.stat().st_size
    if options.networks:  # nobody counts them: each attempt that did not succeed may have drawn a whole shard
        images_drawn = options.images + (sum(attempts) - len(attempts)) * options.shard_size
    return {
        "job": job_id,
        "attempt": job.attempt,
        "seconds": round(time.monotonic() - began, 1),
        "shards": len(attempts),
        "shards_of_several_attempts": sum(number > 1 for number in attempts),
        "workers_killed": len(killed),
        "images_drawn": images_drawn,
        "images_published": job.result["image_count"] if job.result else 0,
    }


def digest(folder: Path) -> tuple[int, str]:
    """
    Return the number of image files and archives of a result, and one SHA-256 over their names and bytes.

    Raises:
        RuntimeError: there are none.
    """
    files = sorted([*folder.glob("*.tar"), *(folder / IMAGES).rglob("*.png")])
    if not files:
        raise RuntimeError(f"{folder} has no images")
    sums = [f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return len(files), hashlib.sha256("\n".join(sums).encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.killed_workers", description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--shard-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1, help="of the order of the kills")
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="postgres")
    parser.add_argument("--networks", action="store_true", help="a DCGAN of 16×16 draws the images")
    parser.add_argument("--work", type=Path, help="folder of the runs; kept")
    parser.add_argument("--out", type=Path, help="write the figures to this file, too")
    options = parser.parse_args()
    with ExitStack() as stage:
        work = options.work or Path(stage.enter_context(tempfile.TemporaryDirectory(prefix="ganq-killed-")))
        work.mkdir(parents=True, exist_ok=True)
        redis_program, binaries = redis_binary(), postgres_binaries()
        if redis_program is None or binaries is None:
            raise RuntimeError("this needs redis-server and Postgres (the dev packages carry both)")
        env = {
            "GANQ_HOME": f"{work / 'home'}",
            "GANQ_REDIS_URL": stage.enter_context(Redis(redis_program)).url,
        }
        if options.database == "postgres":
            settings = {"max_connections": f"{4 * options.workers + 50}", "autovacuum": "on"}
            postgres = stage.enter_context(Postgres(binaries, settings=settings))
            env["GANQ_DATABASE_URL"] = postgres.url(postgres.create())
        fleet = Fleet(stack.clean_environment(**env, OMP_NUM_THREADS="1", DRAWN=f"{work / 'drawn'}"), work)
        stage.callback(fleet.stop)
        figures = measure(fleet, options)
    print(text := json.dumps(figures, indent=1))
    if options.out:
        options.out.write_text(text + "\n")
    same = figures["calm"]["files"] == figures["killed"]["files"]
    return 0 if same and figures["drawn_twice"] <= MOST_TWICE and not figures["workers_not_killed"] else 1


def measure(fleet: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model, generate with one worker, then with all and their kills; compare."""
    make_faces(fleet.folder / "faces", style="adventurer", count=64, size=16)
    fleet.start("trainer")
    fleet("submit", "train", "--data", "faces", *TRAIN, "--wait")
    fleet.stop()
    if not options.networks:
        fleet.env["PYTHONPATH"] = f"{Path(__file__).parent / 'small_images'}"
    fleet.start("calm")
    calm = generate(fleet, options, "calm", kills=0)
    fleet.stop()
    for number in range(options.workers):
        fleet.start(f"w{number:02d}")
    fleet.wait_until_ready()
    killed = generate(fleet, options, "killed", kills=options.workers)
    fleet.stop()
    volume = Volume(Settings.load(fleet.env).volume)
    for run in (calm, killed):
        count, sha256 = digest(volume.attempt(run["job"], run["attempt"]))
        run["files"] = {"number": count, "sha256": sha256}
    return {
        **circumstances(),
        **{name: value for name, value in vars(options).items() if name not in ("work", "out")},
        "calm": calm,
        "killed": killed,
        "drawn_twice": round(killed["images_drawn"] / options.images - 1, 4),
        "workers_not_killed": options.workers - killed["workers_killed"],
        "largest_runner_mb": fleet.largest_mb,
    }


if __name__ == "__main__":
    sys.exit(main())
