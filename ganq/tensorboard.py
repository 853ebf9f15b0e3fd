"""Export the curves and samples of trainings to TensorBoard, from ganq's own record."""

import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from jobs.errors import ConfigError, GanqError, SpecError
from storage.results.attempts import Metrics, sample_files
from storage.volume.durable import make_folder, raise_storage_error

if TYPE_CHECKING:
    from storage.db.rows import Job
    from storage.volume.layout import Volume

FOLLOW_S = 1.0
TAGS = {
    "loss_g": "Loss/G/loss",
    "loss_d": "Loss/D/loss",
    "d_real": "Loss/scores/real",
    "d_fake": "Loss/scores/fake",
    "d_sign": "Loss/signs/real",
    "r1": "Loss/r1_penalty",
    "r2": "Loss/r2_penalty",
    "augment_p": "Progress/augment",
    "epoch": "Progress/epoch",
}
"""Names of metrics.jsonl as tags of StyleGAN3's training loop; others are below `ganq/`."""
NO_CURVES = ("step", "images", "images_per_s")
SAMPLES = "Samples/fakes"


@dataclass(frozen=True)
class Point:
    """One value of a curve, or one image."""

    tag: str
    images: int
    at: float
    value: float | Path


def follow(session: Session, jobs: "Sequence[Job]", folder: Path, *, until_end: bool) -> Iterator[int]:
    """
    Write the runs below `folder`, one folder for each job; yield how many values each pass has added.

    A step is the number of images that were seen. No tag gets a step twice: what earlier exports have
    written into the folder is left out, and so is what a resumed attempt computes again.

    Args:
        until_end: continue until all jobs have ended.

    Raises:
        SpecError: a job is no training.
        ConfigError: TensorBoard is not installed, or what is in the folder cannot be read.
        StorageError: the folder cannot be written.
    """
    for job in jobs:
        if job.kind != "train":
            raise SpecError(
                f"job {job.id} is of kind {job.kind} and has no curves", hint="give jobs of kind train"
            )
    try:
        runs = [
            Run(session.volume_of(job), job.id, folder / f"{job.name or job.kind}-{job.id}") for job in jobs
        ]
    except ImportError as exc:
        raise ConfigError(
            f"TensorBoard cannot be imported: {exc}", hint="pip install 'ganq[tensorboard]'"
        ) from exc
    try:
        while True:
            rows = session.queries.get_many([job.id for job in jobs])
            yield sum(
                run.add(row) for run, row in zip(sorted(runs, key=lambda run: run.job_id), rows, strict=True)
            )
            if not until_end or all(row.state.terminal for row in rows):
                return
            time.sleep(FOLLOW_S)
    finally:
        for run in runs:
            run.close()


@dataclass
class Run:
    """The event file of one training."""

    volume: "Volume"
    job_id: int
    folder: Path
    metrics: Metrics = field(default_factory=Metrics)
    written: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        self._writer: Any = None
        try:
            for path in sorted(self.folder.glob("events.out.tfevents.*")):
                for event in LegacyEventFileLoader(str(path)).Load():
                    self.written |= {(value.tag, event.step) for value in event.summary.value}
        except GanqError:
            raise
        except Exception as exc:  # TensorBoard raises its own and protobuf's errors
            raise ConfigError(
                f"{self.folder} holds event files that cannot be read: {exc}", hint="choose another folder"
            ) from exc

    def add(self, job: "Job") -> int:
        """Write what is new; return the number of values."""
        new = [
            one for one in points(self.volume, job, self.metrics) if (one.tag, one.images) not in self.written
        ]
        try:
            for point in new:
                self._write(point)
            if self._writer is not None:
                self._writer.flush()
        except OSError as exc:
            raise_storage_error(exc, self.folder)
        self.written |= {(one.tag, one.images) for one in new}
        return len(new)

    def _write(self, point: Point) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            make_folder(self.folder)
            self._writer = EventFileWriter(str(self.folder))
        if isinstance(point.value, Path):
            png = point.value.read_bytes()
            width, height = struct.unpack(">II", png[16:24])
            image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
            value = Summary.Value(tag=point.tag, image=image)
        else:
            value = Summary.Value(tag=point.tag, simple_value=point.value)
        self._writer.add_event(Event(wall_time=point.at, step=point.images, summary=Summary(value=[value])))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def points(volume: "Volume", job: "Job", metrics: Metrics) -> Iterator[Point]:
    """Yield all values of a training that are on the volume, by curve and step."""
    training, measured = metrics.read(volume, job.id, job.attempt)
    at = job.started_at or job.created_at
    times: dict[int, tuple[int, float]] = {}  # of a step
    ends: dict[int, tuple[int, float]] = {}  # of an epoch: its first line is that of its end
    before = 0
    for line in training:
        images, rate = line.get("images"), _number(line.get("images_per_s"))
        if not isinstance(images, int):
            continue
        at += max(images - before, 0) / rate if rate else 0.0
        before = images
        times[line["step"]] = images, at
        if isinstance(line.get("epoch"), int):
            ends.setdefault(line["epoch"], (images, at))
        for name, value in line.items():
            if name not in NO_CURVES and (number := _number(value)) is not None:
                yield Point(TAGS.get(name, f"ganq/{name}"), images, at, number)
        if rate:
            yield Point("Timing/sec_per_kimg", images, at, 1000 / rate)
    for line in measured:
        found = times.get(line["step"]) or ends.get(line.get("epoch", -1))
        if found is None:
            continue
        for name in ("metric", "diversity"):
            if (number := _number(line.get(name))) is not None:
                tag = str(line.get("key", name)).replace("/", "_") if name == "metric" else name
                yield Point(f"Metrics/{tag}", *found, number)
    for epoch, path in sample_files(volume, job.id):
        if epoch in ends:
            yield Point(SAMPLES, *ends[epoch], path)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
