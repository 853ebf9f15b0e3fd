"""
Generate images from a checkpoint; image i depends only on (checkpoint, seed, i).

Image i is always computed in micro-batch i // B at position i mod B, whichever images were requested: the
last bit of a convolution may depend on the shape of the batch and on the position in it.

Shapes in names: B images in a micro-batch, Z latent dimensions, H, W pixels.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs import device as devices
from jobs import grids
from jobs.context import GeneratedImage, ImageSink, JobContext, Shard
from jobs.errors import CheckpointCorruptError, StopRequested
from jobs.failpoints import failpoint
from jobs.generation import merge_shards, model_cache, previews, selection, shard_builds
from jobs.generation.latent_path import Path, Rows
from jobs.generation.pipeline import BackgroundWriter, CopyInFlight, DeviceToHostCopier, MicroBatchPool
from jobs.networks.classes import label_of
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


AHEAD = 2
"""Batches that may wait to be encoded and written, to bridge slow moments of disk and computation."""


MicroBatch = Callable[[], "tuple[NDArray[np.uint8], list[float]]"]
"""Waits for a micro-batch that was started; returns its pixels uint8 (B, H, W, 3) and its scores."""


@dataclass(frozen=True)
class Batch:
    """Images in the order of publication, each with its line of the manifest."""

    pixels: "NDArray[np.uint8] | list[NDArray[np.uint8]]"
    records: list[dict[str, Any]]


@dataclass(frozen=True, order=True)
class ScoredImage:
    """An image with its score. The order is by score; ties go to the lower sample index."""

    score: float
    negative_sample_index: int
    pixels_HW3: "NDArray[np.uint8]" = field(compare=False)
    record: dict[str, Any] = field(compare=False)


def run(spec: GenerateSpec, ctx: JobContext) -> dict[str, Any]:
    """
    Generate images, score and select them if requested, write them, publish them.

    Returns:
        The job's result: image_count, grids, speed, and what publish() adds.

    Raises:
        SpecError: --keep with a model that has no discriminator.
        StopRequested: the job was asked to stop; nothing was published.
    """
    with devices.memory_errors("a smaller --micro-batch; note that the images depend on it"):
        if shards := ctx.shards():
            return _merge(spec, ctx, shards)
        return Generation(spec, ctx).run()


def _merge(spec: GenerateSpec, ctx: JobContext, shards: list[Shard]) -> dict[str, Any]:
    """Merge the shards; name their builds where these differ."""
    linked = spec.names.linked
    for place, shard in enumerate(shards):
        if shard.images is None or (linked and shard.files is None):
            shards[place] = _generate_again(spec, ctx, place, shard)
    builds = [shard.build for shard in shards]
    found = shard_builds.distinct(builds)
    if len(found) > 1:
        differ = shard_builds.difference(found)
        ctx.log(f"shards come from different builds, so images may differ in their last bits: {differ}")
        ctx.event("not_bit_exact", changed=differ)
    numbers = shard_builds.numbers(builds, found)
    if linked:
        return merge_shards.link(spec, ctx, shards, numbers) | shard_builds.facts(builds)
    images = [
        shard_builds.marked(shard.images or (), number) for shard, number in zip(shards, numbers, strict=True)
    ]
    return merge_shards.run(spec, ctx, images) | shard_builds.facts(builds)


def _generate_again(spec: GenerateSpec, ctx: JobContext, place: int, shard: Shard) -> Shard:
    """Generate a shard again whose folder is gone: it depends only on checkpoint, seed and sample indices."""
    first, last = shard.draws
    ctx.log(f"the result of job {shard.job_id} was deleted: images {first} to {last} are generated again")
    ctx.event("shard_regenerated", shard=shard.job_id, first=first, last=last)
    generation = Generation(spec.shard(shard.draws), ctx)
    sink = generation.sink(shard=place)
    result = generation.run(sink)
    return replace(
        shard,
        images=sink.stored(),
        build=result["build"],
        files=sink.shard_files(),
        all_equal="warning" in result,
    )


class Generation:
    """One generation job."""

    def __init__(self, spec: GenerateSpec, ctx: JobContext) -> None:
        self.spec = spec
        self.ctx = ctx
        self.device = devices.choose(spec.device)
        devices.set_exactness(self.device, deterministic=spec.deterministic)
        self.due = spec.image_count
        ctx.report(0, self.due, "images", phase="loading the model")
        known = model_cache.cached(ctx.model_sha256(), self.device)
        self.model = known or model_cache.load(ctx.model(), self.device)
        failpoint("generate.loaded")
        label_of(spec.class_name, self.model.classes)  # refused before anything is generated
        chooses = spec.keep is not None or spec.reject is not None
        self.scorer = self.model.scorer() if chooses else None
        self.latents = selection.latents_of(spec, self.model.arch.nz)
        self.rejection: selection.Rejection | None = None
        self.copier = DeviceToHostCopier(self.device)
        self.done = 0
        self.started = time.monotonic()

    def sink(self, shard: int | None = None) -> ImageSink:
        """Return where run() writes its images; see JobContext.image_sink()."""
        spec = self.spec
        coming = self.due if spec.keep is None else min(spec.keep, self.due)
        return self.ctx.image_sink(
            format=spec.format, quality=spec.quality, total=coming, names=spec.names, shard=shard
        )

    def run(self, sink: ImageSink | None = None) -> dict[str, Any]:
        spec = self.spec
        if spec.reject is not None:
            self._calibrate(spec.reject)
        sink = sink or self.sink()
        writer = _ResultWriter(sink, spec, self._passport() if spec.passport else None)
        chosen = self._batches() if spec.keep is None else self._best(spec.keep)
        with BackgroundWriter(writer.write, ahead=AHEAD) as background:
            for batch in chosen:
                background.put(batch)
        writer.pages.finish()
        self.ctx.report(self.done, self.due, "images", phase="publishing")
        more = previews.finish(spec, self.ctx, sink, writer.shown)
        published = sink.publish()
        warning = f"collapsed: all {writer.written} images are equal" if writer.all_equal else None
        if warning is not None:
            self.ctx.log(warning)
            self.ctx.event("collapsed", reason="all images are equal")
        seconds = time.monotonic() - self.started
        return {
            "image_count": writer.written,
            "drawn": self.done,
            "grids": writer.pages.made,
            "seed": spec.seed,
            "images_per_s": round(self.done / max(seconds, 1e-9), 2),
            "seconds": round(seconds, 3),
            "build": devices.build_fingerprint(self.device, deterministic=spec.deterministic),
            **({"warning": warning} if warning else {}),
            **more,
            **published,
        }

    def _passport(self) -> dict[str, Any]:
        """Return what the passports of all images have in common."""
        build = devices.build_fingerprint(self.device, deterministic=self.spec.deterministic)
        return {"checkpoint": self.ctx.model_sha256(), "spec": self.spec.choice(), "build": build}

    def pixels(self) -> "Iterator[NDArray[np.uint8] | list[NDArray[np.uint8]]]":
        """Yield the requested images, uint8 (H, W, 3) each, without writing them."""
        if self.spec.reject is not None:
            self._calibrate(self.spec.reject)
        for batch in self._batches():
            yield batch.pixels

    def _best(self, keep: int) -> Iterator[Batch]:
        """Yield the `keep` images with the highest scores, best first. Holds `keep` images in memory."""
        heap: list[ScoredImage] = []
        for batch in self._batches():
            for pixels_HW3, record in zip(batch.pixels, batch.records, strict=True):
                rank_key = record["score"], -record["draw"]
                if len(heap) < keep:
                    heapq.heappush(heap, ScoredImage(*rank_key, pixels_HW3.copy(), record))
                elif rank_key > (heap[0].score, heap[0].negative_sample_index):
                    heapq.heapreplace(heap, ScoredImage(*rank_key, pixels_HW3.copy(), record))
        heap.sort(reverse=True)
        # In small batches, so that few images are encoded at a time.
        for start in range(0, len(heap), self.spec.micro_batch):
            part = heap[start : start + self.spec.micro_batch]
            yield Batch([drawn.pixels_HW3 for drawn in part], [drawn.record for drawn in part])

    def _batches(self) -> Iterator[Batch]:
        """
        Yield the requested images, micro-batch by micro-batch.

        On a CPU several are computed at once, on a GPU one is computed while one is copied. With --reject one
        at a time: each retry depends on the scores of the one before.
        """
        blocks = 1 if self.rejection else _number_of_blocks(self.spec.ranges, self.spec.micro_batch)
        in_flight: deque[tuple[MicroBatch, list[range]]] = deque()
        with MicroBatchPool(self.device, blocks) as pool:
            ahead = 0 if self.rejection else max(self.copier.ahead, pool.ahead)
            for block, wanted in _by_block(self.spec.ranges, self.spec.micro_batch):
                in_flight.append((self._submit(block, pool), wanted))
                failpoint("generate.drawn")
                if len(in_flight) > ahead:
                    yield from self._completed(*in_flight.popleft())
            while in_flight:
                yield from self._completed(*in_flight.popleft())

    def _submit(self, block: int, pool: MicroBatchPool) -> MicroBatch:
        """Start a micro-batch; return a function that waits for it."""
        if self.rejection is not None:
            drawn = self.rejection.micro_batch(block)
            return lambda: drawn
        copy = pool.submit(self._forward, *self._inputs(block))
        return lambda: _wait(copy())

    def _completed(self, micro_batch: MicroBatch, wanted: list[range]) -> Iterator[Batch]:
        """Yield the requested images of one micro-batch."""
        pixels_BHW3, scores = micro_batch()
        for sample_indices in wanted:
            first = sample_indices[0] % self.spec.micro_batch
            places = range(first, first + len(sample_indices))
            records = [
                self._record(sample_index, scores[place] if scores else None)
                for sample_index, place in zip(sample_indices, places, strict=True)
            ]
            yield Batch(pixels_BHW3[first : first + len(sample_indices)], records)
            self.done += len(sample_indices)
            rate = self.done / max(time.monotonic() - self.started, 1e-9)
            self.ctx.report(self.done, self.due, "images", rate=rate)

    def _record(self, sample_index: int, score: float | None) -> dict[str, Any]:
        """Return an image's line of the manifest."""
        record: dict[str, Any] = {"seed": self.spec.seed, "draw": sample_index, "score": score}
        if classes := self.model.classes:
            (class_index,) = self._class_indices([sample_index])
            record["class"] = self.spec.class_name or classes[class_index % len(classes)]
        if isinstance(self.latents, Path):
            leg, share = self.latents.place(sample_index)
            ends = {"from": self.spec.interpolate[leg], "to": self.spec.interpolate[leg + 1]}
            return {**record, **ends, "share": share}
        if self.rejection is not None:
            return {**record, **self.rejection.record(sample_index % self.spec.micro_batch)}
        return record

    def _class_indices(self, sample_indices: Sequence[int]) -> Sequence[int]:
        """Return the indices that select the classes; all frames of a latent path have one class."""
        return [self.spec.interpolate[0]] * len(sample_indices) if self.spec.interpolate else sample_indices

    def _calibrate(self, share: float) -> None:
        """Determine the score below which images of this model are rejected."""
        self.ctx.report(0, self.due, "images", phase="calibrating the threshold")
        calibration = selection.calibration_latents(self.spec, self.model.arch.nz)
        self.rejection = selection.Rejection(
            share,
            draw=lambda block, retry: _wait(self._forward(*self._inputs(block, retry=retry))),
            calibrate=lambda block: _wait(self._forward(*self._inputs(block, latents=calibration)))[1],
            micro_batch=self.spec.micro_batch,
        )

    def _inputs(
        self, block: int, *, retry: int = 0, latents: Rows | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Return the inputs of one micro-batch.

        Args:
            retry: number of each image's retry; 0: the first try.
            latents: instead of the spec's.

        Returns:
            Latents (B, Z), and the class labels if the model is conditional.

        Raises:
            StopRequested: the job was asked to stop.
        """
        reason = self.ctx.stop_reason()
        if reason is not None:
            raise StopRequested(reason)
        B = self.spec.micro_batch
        numbers = range(block * B, (block + 1) * B)
        mean, std = self.spec.noise_mean, self.spec.noise_std
        latents_BZ = (latents or self.latents).rows(numbers, mean=mean, std=std, retry=retry)
        return latents_BZ, self.model.labels(self._class_indices(numbers), self.spec.class_name, self.device)

    @torch.inference_mode()
    def _forward(self, latents_BZ: Tensor, labels: list[Tensor]) -> CopyInFlight:
        """
        Compute one micro-batch; on a GPU this returns before it is complete.

        Several threads run it at once, so it changes no shared state.
        """
        images_B3HW = self.model.generator(latents_BZ.to(self.device)[:, :, None, None], *labels)
        scores_B = self.scorer(images_B3HW, *labels) if self.scorer else images_B3HW.new_zeros(0)
        return self.copier.start(images_B3HW, scores_B)


def _wait(copy: CopyInFlight) -> "tuple[NDArray[np.uint8], list[float]]":
    """
    Wait for a micro-batch.

    Returns:
        Pixels uint8 (B, H, W, 3), and B scores if requested.

    Raises:
        CheckpointCorruptError: a value is not finite: the weights are damaged.
    """
    pixels_BHW3, scores, finite = copy.wait()
    if not finite:
        raise CheckpointCorruptError(
            "this model generates values that are not finite",
            hint="another checkpoint of the job may be intact: ganq checkpoints JOB",
        )
    return pixels_BHW3, scores


def _number_of_blocks(ranges: tuple[tuple[int, int], ...], size: int) -> int:
    """Return how many micro-batches inclusive ranges touch; one that two ranges share counts twice."""
    return sum(last // size - first // size + 1 for first, last in ranges)


def _by_block(ranges: tuple[tuple[int, int], ...], size: int) -> Iterator[tuple[int, list[range]]]:
    """Yield each micro-batch with the requested parts of it: the ranges, cut at micro-batch boundaries."""
    pieces = (
        range(max(first, block * size), min(last, (block + 1) * size - 1) + 1)
        for first, last in ranges
        for block in range(first // size, last // size + 1)
    )
    for block, wanted in groupby(pieces, key=lambda piece: piece[0] // size):
        yield block, list(wanted)


class _ResultWriter:
    """Writes images to the sink and to the grid pages, in order."""

    def __init__(self, sink: ImageSink, spec: GenerateSpec, passport: dict[str, Any] | None) -> None:
        self.sink = sink
        self.passport = passport
        self.by_rank = spec.keep is not None
        self.written = 0
        self._first_HW3: NDArray[np.uint8] | None = None
        self._differ = False
        self.shown = previews.Previews(spec)
        self.pages = grids.GridPages(sink, size=spec.grid, most=spec.grid_pages)

    @property
    def all_equal(self) -> bool:
        """Return whether several images were written and all are equal."""
        return self.written > 1 and not self._differ

    def write(self, batch: Batch) -> None:
        self.sink.add(
            GeneratedImage(
                image_HW3,
                record,
                output_index=None if self.by_rank else record["draw"],
                passport=None if self.passport is None else {**self.passport, "index": record["draw"]},
            )
            for image_HW3, record in zip(batch.pixels, batch.records, strict=True)
        )
        self.written += len(batch.records)
        for image_HW3 in () if self._differ else batch.pixels:
            self._first_HW3 = image_HW3.copy() if self._first_HW3 is None else self._first_HW3
            self._differ = self._differ or bool((image_HW3 != self._first_HW3).any())
        for image_HW3, record in zip(batch.pixels, batch.records, strict=True):
            if not self.pages.full:
                self.pages.add(self.sink.shown(image_HW3))
            self.shown.add(record["draw"], image_HW3)
