"""What jobs have written, made by hand: real files beside real rows, without training anything."""

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from sqlalchemy import update
from tables import set_columns

from storage.db.engine import Database
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Job, Lease
from storage.db.store import JobStore
from storage.db.tables import attempt, utcnow
from storage.volume.durable import write_folder
from storage.volume.layout import Volume

LONG_S = 90 * 86400.0


class Files:
    """One volume and its job table."""

    def __init__(self, store: JobStore, volume: Volume) -> None:
        self.store = store
        self.database: Database = store.database
        self.queries = Queries(store.database)
        self.volume = volume
        volume.ensure()

    def begin(self, job: Job, number: int) -> Path:
        """What every attempt writes at its start; returns its folder."""
        folder = self.volume.attempt(job.id, number)
        folder.mkdir(parents=True, exist_ok=True)
        spec = self.volume.job(job.id) / "spec.json"
        if not spec.exists():
            spec.write_text(json.dumps({"job": job.id, "spec": job.spec, "submitted_at": job.created_at}))
        (folder / "log.txt").write_text("began\n")
        (folder / "metrics.jsonl").write_text("{}\n")
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / "epoch-0001.png").write_bytes(b"sample")
        return folder

    def folder(self, lease: Lease) -> Path:
        return self.begin(lease.job, lease.attempt)

    def checkpoint(self, lease: Lease, epoch: int, *, kind: str = "epoch", register: bool = True) -> Path:
        """A whole checkpoint folder, with its row or without."""
        self.folder(lease)
        name = "final" if kind == "final" else f"{kind}-{epoch:04d}"
        target = self.volume.checkpoints(lease.job_id, lease.attempt) / name
        weights = secrets.token_bytes(1000)
        digest, size = write_folder(target, {"generator.safetensors": lambda path: _put(path, weights)})
        if register:
            self.store.register_checkpoint(
                lease,
                kind=kind,
                epoch=epoch,
                step=epoch * 10,
                path=self.volume.relative(target),
                manifest_sha256=digest,
                size=size,
            )
        return target

    def write_images(self, lease: Lease, count: int = 3) -> Path:
        """What a generation has renamed into place; whether it is published is the row's to say."""
        folder = self.folder(lease)
        for name in ("images", "grids"):
            (folder / name).mkdir()
            for number in range(count):
                (folder / name / f"{number:06d}.png").write_bytes(b"picture" * 10)
        (folder / "manifest.jsonl").write_text("{}\n" * count)
        return folder

    def registered(self, job_id: int) -> list[Checkpoint]:
        return self.queries.checkpoints(job_id)

    def all_there(self) -> bool:
        """Whether everything that a row points to is on the volume."""
        paths = [one.path for job_id in self._ids() for one in self.registered(job_id)]
        return all((self.volume.root / path / "MANIFEST.json").is_file() for path in paths)

    def _ids(self) -> list[int]:
        from storage.gc.scan import known_jobs

        return sorted(self.database.read(known_jobs))

    def ended_long_ago(self, job_id: int, seconds: float = LONG_S) -> None:
        """Move a job's end into the past, and its attempts' ends with it."""
        set_columns(self.database, job_id, finished_at=utcnow() - seconds)
        self.attempts_ended_long_ago(job_id, seconds)

    def attempts_ended_long_ago(self, job_id: int, seconds: float = LONG_S) -> None:
        past = update(attempt).where(attempt.c.job_id == job_id, attempt.c.ended_at.is_not(None))
        self.database.write(lambda conn: conn.execute(past.values(ended_at=utcnow() - seconds)))


def _put(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def grow_old(path: Path, seconds: float = LONG_S) -> Path:
    """Set the times of a path, and of all below it, so far back."""
    past = time.time() - seconds
    for one in [*path.rglob("*"), path] if path.is_dir() and not path.is_symlink() else [path]:
        os.utime(one, (past, past), follow_symlinks=False)
    return path


def listing(root: Path) -> dict[str, Any]:
    """Everything below a folder: equal before and after means that nothing was touched."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(root.rglob("*"))
    }
