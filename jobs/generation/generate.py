"""
Pictures from a checkpoint; picture i depends on (checkpoint, seed, i) alone.

Picture i is always computed in the whole micro-batch number i // B, at place i mod B,
whatever was asked for around it: the last bit of a convolution may depend on the
shape of the batch and on the place in it.

Shapes in names: B pictures in a micro-batch, Z latent numbers, H, W pixels.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs import device as devices
from jobs import grids
from jobs.context import GeneratedImage, ImageSink, JobContext, Made, Part
from jobs.errors import CheckpointCorruptError, StopRequested
from jobs.failpoints import failpoint
from jobs.generation import merge_shards, model_cache, previews, selection
from jobs.generation.background_writer import BackgroundWriter
from jobs.generation.device_to_host import CopyInFlight, DeviceToHostCopier
from jobs.generation.latent_path import Path, Rows
from jobs.generation.micro_batch_pool import MicroBatchPool
from jobs.networks.classes import label_of
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


AHEAD = 2
"""Micro-batches that may wait to be encoded and written: a disk has slow moments, and so has a forward."""


MicroBatch = Callable[[], "tuple[NDArray[np.uint8], list[float]]"]
"""Waits for the pixels (B, H, W, 3) and the scores of a micro-batch that was set about."""


@dataclass(frozen=True)
class Batch:
    """Some pictures in the order in which they are published, each with its line in the manifest."""

    pixels: "NDArray[np.uint8] | list[NDArray[np.uint8]]"
    records: list[dict[str, Any]]


@dataclass(frozen=True, order=True)
class Drawn:
    """An image with its score. The order is by score; ties go to the lower sample index."""

    score: float
    minus_sample_index: int
    pixels_HW3: "NDArray[np.uint8]" = field(compare=False)
    record: dict[str, Any] = field(compare=False)


def run(spec: GenerateSpec, ctx: JobContext) -> dict[str, Any]:
    """
    Draw, score where that is asked for, keep, write, publish.

    Returns:
        Facts for the job's result: pictures, grids, speed, and what publish() adds.

    Raises:
        SpecError: --keep with a model that has no discriminator.
        StopRequested: somebody wants the job to stop; nothing was published.
    """
    with devices.memory_errors("a smaller --micro-batch; note that it is part of what makes a picture"):
        if parts := ctx.parts():
            made = [
                _draw_again(spec, ctx, place, part) if part.made is None else part.made
                for place, part in enumerate(parts)
            ]
            return merge_shards.run(spec, ctx, made)
        return Generation(spec, ctx).run()


def _draw_again(spec: GenerateSpec, ctx: JobContext, place: int, part: Part) -> Iterable[Made]:
    """Draw a shard whose folder is gone: it is a function of the checkpoint, the seed and its place."""
    first, last = part.draws
    ctx.log(f"what job {part.job_id} has made is gone: its pictures {first} to {last} are drawn again")
    ctx.event("shard_regenerated", shard=part.job_id, first=first, last=last)
    generation = Generation(spec.part(part.draws), ctx)
    sink = generation.sink(part=place)
    generation.run(sink)
    return sink.made()


class Generation:
    """What the parts of one generation job share."""

    def __init__(self, spec: GenerateSpec, ctx: JobContext) -> None:
        self.spec = spec
        self.ctx = ctx
        self.device = devices.choose(spec.device)
        devices.set_exactness(self.device, deterministic=spec.deterministic)
        self.due = spec.pictures
        ctx.report(0, self.due, "pictures", phase="loading the model")
        known = model_cache.recall(ctx.model_sha256(), self.device)
        self.model = known or model_cache.load(ctx.model(), self.device)
        failpoint("generate.loaded")
        label_of(spec.class_name, self.model.classes)  # refused before anything is drawn
        chooses = spec.keep is not None or spec.reject is not None
        self.scorer = self.model.scorer() if chooses else None
        self.latents = selection.latents_of(spec, self.model.arch.nz)
        self.rejection: selection.Rejection | None = None
        self.runway = DeviceToHostCopier(self.device)
        self.done = 0
        self.started = time.monotonic()

    def sink(self, part: int | None = None) -> ImageSink:
        """Where the pictures go that run() makes; see JobContext.pictures()."""
        spec = self.spec
        coming = self.due if spec.keep is None else min(spec.keep, self.due)
        return self.ctx.pictures(format=spec.format, quality=spec.quality, total=coming, part=part)

    def run(self, sink: ImageSink | None = None) -> dict[str, Any]:
        spec = self.spec
        if spec.reject is not None:
            self._set_threshold(spec.reject)
        sink = sink or self.sink()
        writer = _Writer(sink, spec)
        chosen = self._drawn() if spec.keep is None else self._best(spec.keep)
        with BackgroundWriter(writer.write, ahead=AHEAD) as conveyor:
            for batch in chosen:
                conveyor.put(batch)
        writer.pages.finish()
        self.ctx.report(self.done, self.due, "pictures", phase="publishing")
        more = previews.finish(spec, self.ctx, sink, writer.shown)
        published = sink.publish()
        seconds = time.monotonic() - self.started
        return {
            "image_count": writer.written,
            "drawn": self.done,
            "grids": writer.pages.made,
            "seed": spec.seed,
            "images_per_s": round(self.done / max(seconds, 1e-9), 2),
            "seconds": round(seconds, 3),
            "build": devices.build_fingerprint(self.device, deterministic=spec.deterministic),
            **more,
            **published,
        }

    def pixels(self) -> "Iterator[NDArray[np.uint8] | list[NDArray[np.uint8]]]":
        """All pictures that were asked for, uint8 (H, W, 3) each, for who only looks at them."""
        for batch in self._drawn():
            yield batch.pixels

    def _best(self, keep: int) -> Iterator[Batch]:
        """The `keep` best of all draws, best first; memory for `keep` pictures, however many are drawn."""
        heap: list[Drawn] = []
        for batch in self._drawn():
            for pixels_HW3, record in zip(batch.pixels, batch.records, strict=True):
                worth = record["score"], -record["draw"]
                if len(heap) < keep:
                    heapq.heappush(heap, Drawn(*worth, pixels_HW3.copy(), record))
                elif worth > (heap[0].score, heap[0].minus_sample_index):
                    heapq.heapreplace(heap, Drawn(*worth, pixels_HW3.copy(), record))
        heap.sort(reverse=True)
        # Micro-batches again, so that few are encoded at a time.
        for start in range(0, len(heap), self.spec.micro_batch):
            part = heap[start : start + self.spec.micro_batch]
            yield Batch([drawn.pixels_HW3 for drawn in part], [drawn.record for drawn in part])

    def _drawn(self) -> Iterator[Batch]:
        """
        All pictures that were asked for, by micro-batch.

        On a CPU there are several at once, on a GPU one is computed while one is copied; with a
        rejection each try must be seen before the next.
        """
        blocks = 1 if self.rejection else _number_of_blocks(self.spec.ranges, self.spec.micro_batch)
        under_way: deque[tuple[MicroBatch, list[range]]] = deque()
        with MicroBatchPool(self.device, blocks) as lanes:
            ahead = 0 if self.rejection else max(self.runway.ahead, lanes.ahead)
            for block, wanted in _by_block(self.spec.ranges, self.spec.micro_batch):
                under_way.append((self._begin(block, lanes), wanted))
                failpoint("generate.drawn")
                if len(under_way) > ahead:
                    yield from self._landed(*under_way.popleft())
            while under_way:
                yield from self._landed(*under_way.popleft())

    def _begin(self, block: int, lanes: MicroBatchPool) -> MicroBatch:
        """Set about a micro-batch; what this returns waits until it is there."""
        if self.rejection is not None:
            drawn = self.rejection.micro_batch(block)
            return lambda: drawn
        landing = lanes.begin(self._forward, *self._inputs(block))
        return lambda: _finish(landing())

    def _landed(self, micro_batch: MicroBatch, wanted: list[range]) -> Iterator[Batch]:
        """Of one micro-batch what was asked for."""
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
            self.ctx.report(self.done, self.due, "pictures", rate=rate)

    def _record(self, sample_index: int, score: float | None) -> dict[str, Any]:
        """A picture's line in the manifest."""
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
        """Whose turn decides the class: a picture's own, but a way stays in the class that it begins in."""
        return [self.spec.interpolate[0]] * len(sample_indices) if self.spec.interpolate else sample_indices

    def _set_threshold(self, share: float) -> None:
        """The score under which the worst of this model's pictures lie."""
        self.ctx.report(0, self.due, "pictures", phase="setting the threshold")
        calibration = selection.calibration_latents(self.spec, self.model.arch.nz)
        self.rejection = selection.Rejection(
            share,
            draw=lambda block, retry: _finish(self._forward(*self._inputs(block, retry=retry))),
            calibrate=lambda block: _finish(self._forward(*self._inputs(block, latents=calibration)))[1],
            micro_batch=self.spec.micro_batch,
        )

    def _inputs(
        self, block: int, *, retry: int = 0, latents: Rows | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """
        What goes into one whole micro-batch.

        Args:
            retry: which of each picture's own tries.
            latents: other ones than the spec's.

        Returns:
            Latents (B, Z), and the classes if the model knows any.

        Raises:
            StopRequested: somebody wants the job to stop.
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
        Compute one whole micro-batch; on a GPU this returns before it is there.

        Lanes run it side by side, so it changes nothing that they share.
        """
        images_B3HW = self.model.generator(latents_BZ.to(self.device)[:, :, None, None], *labels)
        scores_B = self.scorer(images_B3HW, *labels) if self.scorer else images_B3HW.new_zeros(0)
        return self.runway.send(images_B3HW, scores_B)


def _finish(landing: CopyInFlight) -> "tuple[NDArray[np.uint8], list[float]]":
    """
    Wait for a micro-batch.

    Returns:
        uint8 (B, H, W, 3), and B scores if they were asked for.

    Raises:
        CheckpointCorruptError: a picture is not finite: broken weights.
    """
    pixels_BHW3, scores, finite = landing.wait()
    if not finite:
        raise CheckpointCorruptError(
            "this model makes pictures that are no finite numbers",
            hint="another checkpoint of the job may be whole: ganq checkpoints JOB",
        )
    return pixels_BHW3, scores


def _number_of_blocks(ranges: tuple[tuple[int, int], ...], size: int) -> int:
    """How many micro-batches inclusive ranges touch; one that two of them share counts twice."""
    return sum(last // size - first // size + 1 for first, last in ranges)


def _by_block(ranges: tuple[tuple[int, int], ...], size: int) -> Iterator[tuple[int, list[range]]]:
    """Each micro-batch with what of it is wanted: inclusive ranges, cut at the micro-batches' borders."""
    pieces = (
        range(max(first, block * size), min(last, (block + 1) * size - 1) + 1)
        for first, last in ranges
        for block in range(first // size, last // size + 1)
    )
    for block, wanted in groupby(pieces, key=lambda piece: piece[0] // size):
        yield block, list(wanted)


class _Writer:
    """Feeds pictures to the sink and to the grid pages, in order."""

    def __init__(self, sink: ImageSink, spec: GenerateSpec) -> None:
        self.sink = sink
        self.by_rank = spec.keep is not None
        self.written = 0
        self.shown = previews.Shown(spec)
        self.pages = grids.GridPages(sink, size=spec.grid, most=spec.grid_pages)

    def write(self, batch: Batch) -> None:
        self.sink.add(
            GeneratedImage(picture_HW3, record, output_index=None if self.by_rank else record["draw"])
            for picture_HW3, record in zip(batch.pixels, batch.records, strict=True)
        )
        self.written += len(batch.records)
        for picture_HW3, record in zip(batch.pixels, batch.records, strict=True):
            if not self.pages.full:
                self.pages.add(self.sink.shown(picture_HW3))
            self.shown.add(record["draw"], picture_HW3)
