"""A JobContext over a temporary folder and plain memory: what train and generate need, without a queue."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.context import (
    PLAIN_NAMES,
    CheckpointKind,
    GeneratedImage,
    ImageNames,
    Images,
    ImageSink,
    Sample,
    Shard,
    ShardFiles,
    Snapshot,
    StoredImage,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def sha256_of(tensors: "Mapping[str, Tensor]") -> str:
    """One value for all names, shapes, types and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def noise_images(count: int, size: int, seed: int = 0) -> Images:
    """Images of smooth random blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    images_N3HW = small.repeat(size // 4, axis=2).repeat(size // 4, axis=3)
    return Images(images_N3HW, hashlib.sha256(images_N3HW.tobytes()).hexdigest())


@dataclass
class Saved:
    """What save_checkpoint was given."""

    kind: CheckpointKind
    epoch: int
    step: int
    state: "dict[str, Tensor]"
    generator: "dict[str, Tensor]"
    meta: dict[str, Any]

    def for_resume(self) -> Snapshot:
        return Snapshot(self.step, self.epoch, self.state, self.meta, sha256_of(self.state), 1)

    def for_generate(self) -> Snapshot:
        return Snapshot(self.step, self.epoch, self.generator, self.meta, sha256_of(self.generator), 1)


@dataclass
class LocalSink:
    """Holds what was added; `published` stays False until publish()."""

    stored_images: list[GeneratedImage] = field(default_factory=list)
    grids: "dict[str, NDArray[np.uint8]]" = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    published: bool = False

    def add(self, images: Iterable[GeneratedImage]) -> None:
        self.stored_images.extend(images)

    def adopt(self, image: StoredImage, *, output_index: int) -> None:
        raise AssertionError("a job without parts adopts nothing")

    def shown(self, pixels_HW3: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
        return pixels_HW3

    def pixels(self, image: StoredImage) -> "NDArray[np.uint8]":
        raise AssertionError("a job without parts adopts nothing")

    def add_grid(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        self.grids[name] = pixels_HW3

    def add_file(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def stored(self) -> Iterable[StoredImage]:
        raise AssertionError("a job without parts makes none again")

    def link(self, shard: ShardFiles, *, build: int | None = None) -> None:
        raise AssertionError("a job without shards links to none")

    def shard_files(self) -> ShardFiles:
        raise AssertionError("a job without shards has none")

    def publish(self) -> dict[str, Any]:
        self.published = True
        return {"published": len(self.stored_images)}


@dataclass
class LocalContext:
    """
    One attempt. Give `resume_from` the last checkpoint of an earlier one to go on.

    Args:
        stop_at: asked with the number of earlier questions; returns a StopReason or None.
    """

    folder: Path
    data: Images | None = None
    other_data: Images | None = None
    made: "list[NDArray[np.uint8]] | None" = None
    resume_from: Snapshot | None = None
    source: Snapshot | None = None
    kept: list[Snapshot] = field(default_factory=list)
    source_samples: list[Sample] = field(default_factory=list)
    stop_at: Callable[[int], str | None] = lambda asked: None
    start_weights: "dict[str, dict[str, Tensor]]" = field(default_factory=dict)
    job_id: int = 1
    attempt: int = 1

    saved: list[Saved] = field(default_factory=list)
    samples: "dict[str, NDArray[np.uint8]]" = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    files: "dict[str, bytes | NDArray[np.uint8]]" = field(default_factory=dict)
    sink: LocalSink = field(default_factory=LocalSink)
    asked: int = 0
    pinned_step: int | None = None

    def stop_reason(self) -> str | None:
        self.asked += 1
        return self.stop_at(self.asked - 1)

    def stop_step(self) -> int | None:
        return self.pinned_step

    def pin_stop_step(self, step: int) -> None:
        self.pinned_step = step

    def report(self, done: int, total: int, unit: str, **more: Any) -> None:
        assert 0 <= done <= total
        self.reports.append({"done": done, "total": total, "unit": unit, **more})

    def log(self, message: str) -> None:
        self.lines.append(message)

    def metrics(self, record: Mapping[str, float | int | str | None]) -> None:
        self.records.append(dict(record))

    def images(self, data: str, size: int, *, pin: str = "fingerprint") -> Images:
        found = self.data if pin == "fingerprint" else self.other_data
        assert found is not None
        return found

    def event(self, type: str, **detail: Any) -> None:
        self.events.append({"type": type, **detail})

    def resume(
        self, restore: Callable[[Snapshot], None], *, whole_epoch: bool = False, step: int | None = None
    ) -> Snapshot | None:
        own = [one.for_resume() for one in self.saved if one.kind != "resume" or not whole_epoch]
        own.sort(key=lambda one: one.step == step)
        newest = own[-1] if own else self.resume_from
        if newest is not None:
            restore(newest)
        return newest

    def save_checkpoint(
        self,
        *,
        kind: CheckpointKind,
        epoch: int,
        step: int,
        state: "Mapping[str, Tensor]",
        generator: "Mapping[str, Tensor]",
        meta: Mapping[str, Any],
        sample: Sample | None = None,
    ) -> None:
        if sample is not None:
            self.save_sample(sample.name, sample.draw())
        # Through a file, as in life: what safetensors refuses must fail here too.
        from safetensors.torch import load_file, save_file

        read = []
        for name, tensors in (("state", state), ("generator", generator)):
            path = self.folder / f"{name}-{self.attempt}-{step}-{kind}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            read.append(load_file(path))
        self.saved.append(Saved(kind, epoch, step, read[0], read[1], dict(meta)))

    def is_saving(self) -> bool:
        return False

    def wait_for_save(self) -> None:
        pass

    def save_sample(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        self.samples[name] = pixels_HW3

    def model(self) -> Snapshot:
        assert self.source is not None
        return self.source

    def model_sha256(self) -> str:
        assert self.source is not None
        return self.source.sha256

    def models(self) -> Iterator[Snapshot]:
        yield from self.kept

    def sample_grids(self) -> Sequence[Sample]:
        return self.source_samples

    def generated_images(self, most: int) -> "Iterator[NDArray[np.uint8]] | None":
        return None if self.made is None else iter(self.made[:most])

    def save_files(self, files: "Mapping[str, bytes | NDArray[np.uint8]]") -> list[dict[str, Any]]:
        self.files |= files
        return [{"name": name} for name in files]

    def weights(self, path: str, *, sha256: str | None = None) -> "dict[str, Tensor]":
        return self.start_weights[path]

    def shards(self) -> list[Shard]:
        return []

    def image_sink(
        self,
        *,
        format: str = "png",
        quality: int | None = None,
        total: int | None = None,
        names: ImageNames = PLAIN_NAMES,
        shard: int | None = None,
        of_shards: bool = False,
    ) -> ImageSink:
        return self.sink

    def scratch(self) -> Path:
        return self.folder
