"""
Write everything that a worker makes durable, in the same order, without torch: for strace.

    PYTHONPATH=tests python tests/chaos/writer.py HOME checkpoints|images|all

The database is HOME/ganq.db, the volume HOME/volume. Commits are reported on stderr, so that a trace shows
their place among the system calls.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from results import verify_manifest

from jobs.context import GeneratedImage
from jobs.kinds import SPEC_VERSION
from storage.db.engine import Database
from storage.db.queries import Queries
from storage.db.rows import Lease, WorkerIdentity
from storage.db.store import JobStore
from storage.results.writer import ImageFiles
from storage.settings import Settings
from storage.volume.checkpoints import FACTS, GENERATOR, STATE
from storage.volume.durable import make_folder, read_verified, sync_parents, write_folder, write_json
from storage.volume.layout import Volume

WHO = WorkerIdentity("w", "host", "cpu", "boot", os.getpid(), 1, ("default",), "0")
PICTURES, STEPS = 5, 3


def settings_of(home: Path) -> Settings:
    return Settings.load({"GANQ_HOME": str(home), "GANQ_USER": "tester"})


def mark(word: str) -> None:
    os.write(2, f"MARK {word}\n".encode())


def take(store: JobStore, kind: str, key: str) -> Lease:
    spec = {"source": 1, "count": PICTURES}
    store.submit(kind=kind, spec=spec, spec_version=SPEC_VERSION, submit_key=key, user="tester")
    lease = store.claim(WHO, kinds=(kind,), spec_version=SPEC_VERSION)
    assert lease is not None
    return lease


def blob(letter: str, size: int = 30_000) -> bytes:
    return letter.encode() * size


def write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def train(store: JobStore, volume: Volume, key: str) -> None:
    """
    Write checkpoints and register each once it is durable; delete the previous one when it is not needed.
    """
    lease = take(store, "train", key)
    attempt = volume.attempt(lease.job_id, lease.attempt)
    make_folder(attempt, named=False)
    write_json(volume.job(lease.job_id) / "spec.json", {"job": lease.job_id}, named=False)
    sync_parents(attempt, volume.jobs)
    ids: list[int] = []
    for step in range(1, STEPS + 1):
        letter = "abc"[step % 3]
        target = volume.checkpoints(lease.job_id, lease.attempt) / f"epoch-{step:04d}"
        mark("checkpoint")
        digest, size = write_folder(
            target,
            {
                STATE: write(blob(letter)),
                GENERATOR: write(blob(letter, 5_000)),
                FACTS: write(b"{}"),
            },
        )
        mark("written")
        path = volume.relative(target)
        ids.append(
            store.register_checkpoint(
                lease, kind="epoch", epoch=step, step=step, path=path, manifest_sha256=digest, size=size
            )
        )
        mark("registered")
        for gone in store.forget_checkpoints(lease, ids[:-2]):
            shutil.rmtree(volume.absolute(gone.path))
    store.succeed(lease, {})


def generate(store: JobStore, volume: Volume, key: str) -> None:
    lease = take(store, "generate", key)
    sink = ImageFiles(volume.attempt(lease.job_id, lease.attempt), total=PICTURES)
    pixels = np.random.default_rng(0).integers(0, 255, (PICTURES, 16, 16, 3), dtype=np.uint8)
    mark("pictures")
    sink.add(GeneratedImage(pixels[index], {"seed": 0, "draw": index}) for index in range(PICTURES))
    sink.add_grid("grid-0000", pixels[0])
    facts = sink.publish()
    mark("published")
    store.succeed(lease, facts)
    mark("succeeded")


def check(home: Path) -> tuple[int, int]:
    """
    Check that everything the table refers to exists and is intact.

    Returns:
        (registered checkpoints, published results).
    """
    settings = settings_of(home)
    database = Database(settings)
    volume = Volume(settings.volume)
    queries = Queries(database)
    try:
        with database.engine.connect() as conn:
            assert conn.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        from storage.db.queries import Filter

        checkpoints = results = 0
        for job in queries.page(Filter(), limit=1000):
            for one in queries.checkpoints(job.id):
                for name in (STATE, GENERATOR):
                    if name == GENERATOR or one.kind != "import":
                        read_verified(volume.absolute(one.path), name, one.manifest_sha256)
                checkpoints += 1
            if job.kind == "generate" and job.state == "succeeded":
                assert job.result is not None
                folder = volume.attempt(job.id, job.attempt)
                verify_manifest(folder, manifest_sha256=job.result["manifest_sha256"])
                results += 1
        return checkpoints, results
    finally:
        database.dispose()


def main() -> None:
    home, what = Path(sys.argv[1]), sys.argv[2]
    settings = settings_of(home)
    database = Database(settings)
    store, volume = JobStore(database), Volume(settings.volume)
    volume.ensure()
    mark("begun")
    if what in ("checkpoints", "all"):
        train(store, volume, f"train-{os.getpid()}")
    if what in ("pictures", "all"):
        generate(store, volume, f"generate-{os.getpid()}")
    mark("ended")
    database.dispose()


if __name__ == "__main__":
    main()
