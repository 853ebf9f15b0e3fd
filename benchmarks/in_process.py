"""
ganq's own training and generation called directly, in a warm process without a queue.

The context below writes what a job writes (decoded images, checkpoints, files, all durable), so
that the difference to a queued job is the queue.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.context import PLAIN_NAMES, CheckpointKind, ImageNames, Images, ImageSink, Sample, Snapshot
from storage.datasets.cache import open_images
from storage.results.codecs import write_png
from storage.results.writer import ImageFiles
from storage.volume.checkpoints import read_checkpoint, write_checkpoint
from storage.volume.layout import Volume
from tests.unit.jobs.local_context import LocalContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Pointer:
    """A checkpoint for read_checkpoint()."""

    path: str
    manifest_sha256: str
    job_id: int = 1
    epoch: int = 0
    step: int = 0


@dataclass
class VolumeContext(LocalContext):
    """A job in a folder, with the files of a queued job on disk."""

    checkpoint: Pointer | None = None
    source_volume: Path | None = None

    def __post_init__(self) -> None:
        self.volume = Volume(self.folder)
        self.volume.ensure()
        self.attempt_folder = self.volume.attempt(1, 1)

    def images(self, data: str, size: int, *, pin: str = "fingerprint") -> Images:
        return open_images(self.volume, data, size)

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
        target = self.volume.checkpoints(1, 1) / f"{kind}-{step:09d}"
        shutil.rmtree(target, ignore_errors=True)
        write_checkpoint(target, state=state, generator=generator, meta=meta)

    def save_sample(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        folder = self.attempt_folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{name}.png", pixels_HW3)

    def model(self) -> Snapshot:
        assert self.checkpoint is not None
        assert self.source_volume is not None
        return read_checkpoint(Volume(self.source_volume), self.checkpoint, "generator")

    def model_sha256(self) -> str:
        assert self.checkpoint is not None
        return self.checkpoint.manifest_sha256

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
        return ImageFiles(self.attempt_folder, format=format, quality=quality, total=total, names=names)


def loop_seconds(records: list[dict[str, Any]]) -> float:
    """Return the seconds in the loop over batches, without set-up and saving, from the metrics of a run."""
    seconds, before = 0.0, 0
    for record in records:
        if "images" not in record:  # an evaluation's line
            continue
        seconds += (record["images"] - before) / record["images_per_s"]
        before = record["images"]
    return seconds


def train(folder: str, spec: dict[str, Any]) -> dict[str, float]:
    """Train a model; return images, loop_s, whole_s: as in benchmarks.plain_dcgan.train()."""
    import jobs.training.train
    from jobs.specs import TrainSpec

    began = time.perf_counter()
    ctx = VolumeContext(Path(folder))
    result = jobs.training.train.run(TrainSpec.from_json(spec), ctx)
    whole_s = time.perf_counter() - began
    return {"images": result["images"], "loop_s": loop_seconds(ctx.records), "whole_s": whole_s}


def generate(
    folder: str, spec: dict[str, Any], source: dict[str, Any], source_volume: str
) -> dict[str, float]:
    """Generate images; return images, whole_s."""
    import jobs.generation.generate
    from jobs.specs import GenerateSpec

    began = time.perf_counter()
    ctx = VolumeContext(Path(folder), checkpoint=Pointer(**source), source_volume=Path(source_volume))
    result = jobs.generation.generate.run(GenerateSpec.from_json(spec), ctx)
    return {"images": result["image_count"], "whole_s": time.perf_counter() - began}


def export(source: dict[str, Any], source_volume: str, netg: str) -> dict[str, float]:
    """Write the generator in the tutorial's format, for the plain script."""
    import torch

    snapshot = read_checkpoint(Volume(Path(source_volume)), Pointer(**source), "generator")
    torch.save(
        {key.removeprefix("G."): value for key, value in snapshot.tensors.items() if key.startswith("G.")},
        netg,
    )
    return {}


def forward(
    count: int, source: dict[str, Any], source_volume: str, micro_batch: int = 64
) -> dict[str, float]:
    """Run only ganq's forward passes, in as many threads as a generation."""
    import torch

    from jobs.generation import model_cache
    from jobs.generation.pipeline import MicroBatchPool

    snapshot = read_checkpoint(Volume(Path(source_volume)), Pointer(**source), "generator")
    cpu = torch.device("cpu")
    model = model_cache.load(snapshot, cpu)
    latents = torch.randn(micro_batch, model.arch.nz, 1, 1)

    @torch.inference_mode()
    def draw() -> None:
        model.generator(latents)

    began = time.perf_counter()
    pieces = -(-count // micro_batch)
    with MicroBatchPool(cpu, pieces) as pool:
        for wait in [pool.submit(draw) for _ in range(pieces)]:
            wait()
    return {"images": count, "whole_s": time.perf_counter() - began}


def serve() -> None:
    """Run the commands on stdin, one JSON line each."""
    import torch  # noqa: F401 - imported before the first command

    work: dict[str, Callable[..., dict[str, float]]] = {
        "train": train,
        "generate": generate,
        "export": export,
        "forward": forward,
    }
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(work[order.pop("do")](**order)), flush=True)


if __name__ == "__main__":
    serve()
