"""A home with jobs of all sorts, as workers would have left them, for the tests of the page."""

import json
import math
import os
import secrets
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import Connection, insert, update

from jobs.context import GeneratedImage
from jobs.kinds import SPEC_VERSION
from storage.db.engine import Database
from storage.db.store import JobStore
from storage.db.tables import attempt, checkpoint, job, utcnow, worker
from storage.db.tables import event as event_table
from storage.results.codecs import encode_png
from storage.results.writer import ImageFiles
from storage.settings import Settings
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

HOSTILE = "<script>alert(1)</script>\"'\u202egpj.exe 😀"
EPOCHS, SIDE = 24, 32
IMAGES = 150


class World:
    """Writes rows and files; ids are kept by name in `ids`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings)
        self.store = JobStore(self.database)
        self.volume = Volume(settings.volume)
        self.volume.ensure()
        self.ids: dict[str, int] = {}

    def submit(self, name: str, **values: Any) -> int:
        kind = values.pop("kind", "train")
        spec = values.pop("spec", {"data": "/images", "size": SIDE, "epochs": EPOCHS})
        made = self.store.submit(
            kind=kind,
            spec=spec,
            spec_version=values.pop("spec_version", SPEC_VERSION),
            submit_key=secrets.token_hex(16),
            user=values.pop("user", "ada"),
            name=values.pop("shown", name),
            **values,
        )
        self.ids[name] = made.id
        return made.id

    def set(self, job_id: int, **values: Any) -> None:
        """Change columns as a worker's transaction would, with an event."""
        self.database.write(
            lambda conn: (
                conn.execute(update(job).where(job.c.id == job_id).values(**values)),
                conn.execute(insert(event_table).values(job_id=job_id, at=utcnow(), type="changed")),
            )
        )

    def begin(self, job_id: int, *, attempts: int = 1, state: str = "running", **values: Any) -> None:
        now = time.time()
        ended = state not in ("running", "queued")
        self.set(
            job_id,
            state=state,
            attempt=attempts,
            worker="gpu-0" if state == "running" else None,
            lease_token="t" * 32 if state == "running" else None,
            started_at=now - 300,
            finished_at=now - 5 if ended else None,
            **values,
        )
        for number in range(1, attempts + 1):
            over = ended or number < attempts
            row = {
                "job_id": job_id,
                "number": number,
                "lease_token": "t" * 32,
                "worker": "gpu-0",
                "host": "node",
                "device": "NVIDIA H200",
                "started_at": now - 300,
                "ended_at": now - 5 if over else None,
                "outcome": (state if number == attempts else "requeued") if over else None,
            }
            self.database.write(partial(self._add_attempt, row))
            self.volume.attempt(job_id, number).mkdir(parents=True, exist_ok=True)

    def _add_attempt(self, row: dict[str, Any], conn: Connection) -> None:
        conn.execute(insert(attempt).values(row))

    def worker(self, name: str, *, state: str, job_id: int | None = None, silent_s: float = 0) -> None:
        self.database.write(
            lambda conn: conn.execute(
                insert(worker).values(
                    name=name,
                    host="node",
                    device="NVIDIA H200",
                    queues="default",
                    state=state,
                    job_id=job_id,
                    version="0.3.0",
                    started_at=utcnow() - 1000,
                    seen_at=utcnow() - silent_s,
                )
            )
        )

    def train_files(self, job_id: int, epochs: range, *, attempt_number: int = 1, seed: int = 0) -> None:
        """Grids that go from noise to discs, metrics, and a checkpoint row every fourth epoch."""
        folder = self.volume.attempt(job_id, attempt_number)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.jsonl", "a") as metrics:
            for epoch in epochs:
                self.add_sample(job_id, epoch, attempt_number=attempt_number, seed=seed)
                for step in range(epoch * 10 - 9, epoch * 10 + 1):
                    share = step / (EPOCHS * 10)
                    line = {
                        "step": step,
                        "epoch": epoch,
                        "images": step * 16,
                        "loss_d": 0.7 - 0.2 * share + 0.02 * math.sin(step),
                        "loss_g": 0.8 + 0.5 * share,
                        "d_real": 0.4 + share,
                        "d_fake": 0.4 - 0.2 * share,
                        "augment_p": 0.1 * share,
                        "images_per_s": 900.0,
                    }
                    metrics.write(json.dumps(line) + "\n")
                if epoch % 4 == 0:
                    value = 0.5 + abs(epoch - 16) / 10 + seed / 10
                    about = {"step": epoch * 10, "epoch": epoch, "key": "kid/effnet-lite0", "value": value}
                    metrics.write(json.dumps({**about, "metric": value, "diversity": 0.9}) + "\n")
                    self.add_checkpoint(job_id, epoch, value, attempt_number)

    def add_sample(self, job_id: int, epoch: int, *, attempt_number: int = 1, seed: int = 0) -> None:
        grid = tiled([picture(place + 100 * seed, noise=1 - epoch / EPOCHS) for place in range(64)])
        path = self.volume.attempt(job_id, attempt_number) / "samples" / f"epoch-{epoch:04d}.png"
        temp = path.with_suffix(".tmp")
        temp.write_bytes(encode_png(grid))
        temp.rename(path)

    def add_checkpoint(self, job_id: int, epoch: int, metric: float | None, attempt_number: int = 1) -> None:
        values = {"job_id": job_id, "attempt": attempt_number, "kind": "epoch", "epoch": epoch}
        values |= {"step": epoch * 10, "path": f"jobs/{job_id:06d}/a1/checkpoints/epoch-{epoch:04d}"}
        values |= {"manifest_sha256": "0" * 64, "bytes": 1000, "metric": metric}
        self.database.write(
            lambda conn: (
                conn.execute(insert(checkpoint).values(created_at=utcnow(), **values)),
                conn.execute(insert(event_table).values(job_id=job_id, at=utcnow(), type="checkpoint")),
            )
        )

    def images(self, name: str, source: int, *, count: int, format: str, scored: bool = False) -> int:
        """A generation whose images the worker's own code has written."""
        spec: dict[str, Any] = {"source": source, "checkpoint": "16", "seed": 7, "format": format}
        spec |= {"keep": count, "of": 2 * count} if scored else {"count": count}
        made = self.submit(name, kind="generate", spec=spec)
        self.begin(made, state="succeeded")
        sink = ImageFiles(self.volume.attempt(made, 1), format=format, total=count)
        sink.add(
            GeneratedImage(picture(i), {"seed": 7, "draw": i, "score": 1 - i / count if scored else None})
            for i in range(count)
        )
        sink.add_grid("grid-0000", tiled([picture(i) for i in range(64)]))
        pinned = {"checkpoint": {"job_id": source, "epoch": 16, "manifest_sha256": "a" * 64}}
        self.set(made, result=sink.publish(), inputs=pinned)
        return made

    def log(self, job_id: int, data: bytes, *, attempt_number: int = 1) -> None:
        (self.volume.attempt(job_id, attempt_number) / "log.txt").write_bytes(data)

    def close(self) -> None:
        self.database.dispose()


def tiled(pictures: "list[NDArray[np.uint8]]") -> "NDArray[np.uint8]":
    """A grid as jobs/grids.py lays it out, without importing torch."""
    grid = np.zeros((8 * (SIDE + 2) + 2, 8 * (SIDE + 2) + 2, 3), np.uint8)
    for place, one in enumerate(pictures):
        row, column = divmod(place, 8)
        top, left = 2 + row * (SIDE + 2), 2 + column * (SIDE + 2)
        grid[top : top + SIDE, left : left + SIDE] = one
    return grid


def picture(number: int, *, noise: float = 0.0) -> "NDArray[np.uint8]":
    """A coloured disc that differs from image to image."""
    rng = np.random.default_rng(number)
    ground, ink = rng.integers(0, 256, (2, 3))
    y, x = np.mgrid[0:SIDE, 0:SIDE] - SIDE // 2
    inside = (x**2 + y**2 < (6 + number % 9) ** 2)[..., None]
    clean = np.where(inside, ink, ground)
    pixels_HW3: NDArray[np.uint8] = (
        (1 - noise) * clean + noise * rng.integers(0, 256, (SIDE, SIDE, 3))
    ).astype(np.uint8)
    return pixels_HW3


def build(settings: Settings) -> World:
    """The whole of it; see the names in World.ids."""
    world = World(settings)
    done = {"done": EPOCHS * 160, "total": EPOCHS * 160, "unit": "images", "epoch": EPOCHS, "epochs": EPOCHS}
    train = world.submit("faces")
    world.begin(train, attempts=2, state="succeeded", progress=done, result={"epoch": EPOCHS})
    world.train_files(train, range(1, 17))
    world.train_files(train, range(13, EPOCHS + 1), attempt_number=2)  # it went back to epoch 12
    for number in (1, 2):
        lines = [f"09:00:{i:02d} epoch {i}/{EPOCHS}  loss_d 0.61  loss_g 0.97" for i in range(1, EPOCHS + 1)]
        world.log(train, "\n".join([*lines, ""]).encode(), attempt_number=number)
    other = world.submit("faces-2")
    half = {**done, "done": 12 * 160, "epoch": 12, "rate": 900.0}
    world.begin(other, progress=half)
    world.train_files(other, range(1, 13), seed=1)
    folder = world.images("folder", train, count=IMAGES, format="png", scored=True)
    world.images("tar", train, count=40, format="tar")
    world.images("npz", train, count=30, format="npz")
    (world.volume.attempt(folder, 1) / "images" / "000003.png").write_bytes(b"\x89PNG torn")
    (world.volume.attempt(folder, 1) / "images" / "000004.png").unlink()
    hostile = world.submit("hostile", shown=HOSTILE, user="eve")
    error = "<img src=x onerror=alert(2)>" + "x" * 10_000
    world.begin(hostile, state="failed", error_code="CRASH_LOOP", error_message=error, error_hint="</script>")
    world.log(hostile, b"\x1b[31mred\x1b[0m \xff\xfe <b>bold</b>\n" + b"y" * 10_000_000 + b"\nlast line\n")
    world.submit("held", held=True)
    world.submit("newer", kind="dream", spec={"depth": 3}, spec_version=SPEC_VERSION + 5)
    gone = world.submit("deleted")
    world.begin(gone, state="succeeded", result={"deleted_at": time.time()})
    for i in range(2):
        swept = world.submit(
            f"rates-{i}", spec={"data": "/i", "size": SIDE, "epochs": EPOCHS, "lr_g": 1e-4 * (i + 1)}
        )
        world.begin(swept, state="succeeded", progress=done)
        world.train_files(swept, range(1, 9), seed=i)
        world.set(swept, sweep="sweep-1")
    measured = world.submit("measured", kind="evaluate", spec={"source": train, "checkpoint": "16"})
    copying = {"verdict": "none", "summary": "no image is a copy", "share": 0.0}
    result = {"metrics": {"kid/effnet-lite0": {"value": 0.12, "spread": 0.01, "baseline": 0.02}}}
    world.begin(measured, state="succeeded", result={**result, "copying": copying})
    (world.volume.attempt(measured, 1) / "neighbours.png").write_bytes(encode_png(picture(1)))
    world.worker("gpu-0", state="busy", job_id=other)
    world.worker("gpu-1", state="idle", silent_s=500)
    return world


def table_bytes(home: Path) -> dict[str, bytes]:
    """The job table's files, whose bytes change with any write."""
    return {
        name: (home / name).read_bytes() for name in ("ganq.db", "ganq.db-wal") if os.path.exists(home / name)
    }
