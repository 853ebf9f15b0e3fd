"""The curves and samples of trainings, from ganq's own record, for other programs."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.results.attempts import Metrics, sample_files
from storage.volume.durable import raise_storage_error

if TYPE_CHECKING:
    from storage.db.rows import Job
    from storage.volume.layout import Volume

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


@dataclass
class Run(ABC):
    """The record of one training in another program's format."""

    job_id: int
    folder: Path
    metrics: Metrics = field(default_factory=Metrics)
    written: set[tuple[str, int]] = field(default_factory=set)
    """(tag, images) of what this and earlier exports have written."""

    def add(self, job: "Job", volume: "Volume") -> int:
        """Write what is new; return the number of values."""
        new = [one for one in points(volume, job, self.metrics) if (one.tag, one.images) not in self.written]
        try:
            self.write(job, new)
        except OSError as exc:
            raise_storage_error(exc, self.folder)
        self.written |= {(one.tag, one.images) for one in new}
        return len(new)

    @abstractmethod
    def write(self, job: "Job", new: "list[Point]") -> None:
        """Write these values."""

    @abstractmethod
    def close(self) -> None:
        """Complete the files."""


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
