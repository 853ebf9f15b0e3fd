"""
Pictures from a checkpoint; picture i depends on (checkpoint, seed, i) alone.

Picture i is always computed in the whole micro-batch number i // B, at place i mod B,
whatever was asked for around it: the last bit of a convolution may depend on the
shape of the batch and on the place in it.

Shapes in names: B pictures in a micro-batch, Z latent numbers, H, W pixels.
"""

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from jobs import gather
from jobs.context import JobContext, Picture, PictureSink
from jobs.errors import CheckpointCorruptError, StopRequested
from jobs.failpoints import failpoint
from jobs.gan import device as devices
from jobs.gan import grids, models, seeds
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, order=True)
class Drawn:
    """One picture with its score. The order is that of worth: of equal scores the earlier draw is better."""

    score: float
    minus_draw: int
    pixels_HW3: "NDArray[np.uint8]" = field(compare=False)


def run(spec: GenerateSpec, ctx: JobContext) -> dict[str, Any]:
    """
    Draw, score where that is asked for, keep, write, publish.

    Returns:
        Facts for the job's result: pictures, grids, speed, and what publish() adds.

    Raises:
        SpecError: --keep with a model that has no discriminator.
        StopRequested: somebody wants the job to stop; nothing was published.
    """
    parts = ctx.parts()
    if parts:
        return gather.run(spec, ctx, parts)
    with devices.memory_errors("a smaller --micro-batch; note that it is part of what makes a picture"):
        return Generation(spec, ctx).run()


class Generation:
    """What the parts of one generation job share."""

    def __init__(self, spec: GenerateSpec, ctx: JobContext) -> None:
        self.spec = spec
        self.ctx = ctx
        self.device = devices.choose(spec.device)
        devices.set_exactness(self.device, deterministic=spec.deterministic)
        self.due = spec.pictures
        ctx.report(0, self.due, "pictures", phase="loading the model")
        snapshot = ctx.model()
        self.model = models.load(snapshot, self.device)
        failpoint("generate.loaded")
        self.scorer = self.model.scorer() if spec.keep is not None else None
        self.latents = seeds.Latents(spec.seed, self.model.arch.nz)
        self.done = 0
        self.started = time.monotonic()

    def run(self) -> dict[str, Any]:
        spec = self.spec
        coming = self.due if spec.keep is None else min(spec.keep, self.due)
        sink = self.ctx.pictures(format=spec.format, total=coming)
        writer = _Writer(sink, spec)
        if spec.keep is None:
            for draws, pixels_NHW3, _ in self._drawn():
                writer.write(draws, pixels_NHW3, [None] * len(draws))
        else:
            best = self._best(spec.keep)
            # Micro-batches again, so that no more than one is encoded at a time.
            for start in range(0, len(best), spec.micro_batch):
                part = best[start : start + spec.micro_batch]
                draws = [-drawn.minus_draw for drawn in part]
                writer.write(draws, [drawn.pixels_HW3 for drawn in part], [drawn.score for drawn in part])
        writer.pages.finish()
        self.ctx.report(self.done, self.due, "pictures", phase="publishing")
        published = sink.publish()
        seconds = time.monotonic() - self.started
        return {
            "pictures": writer.written,
            "drawn": self.done,
            "grids": writer.pages.made,
            "seed": spec.seed,
            "images_per_s": round(self.done / max(seconds, 1e-9), 2),
            "seconds": round(seconds, 3),
            "build": devices.build_fingerprint(self.device, deterministic=spec.deterministic),
            **published,
        }

    def _best(self, keep: int) -> list[Drawn]:
        """The `keep` best of all draws, best first; memory for `keep` pictures, however many are drawn."""
        heap: list[Drawn] = []
        for draws, pixels_NHW3, scores in self._drawn():
            for draw, pixels_HW3, score in zip(draws, pixels_NHW3, scores, strict=True):
                if len(heap) < keep:
                    heapq.heappush(heap, Drawn(score, -draw, pixels_HW3.copy()))
                elif (score, -draw) > (heap[0].score, heap[0].minus_draw):
                    heapq.heapreplace(heap, Drawn(score, -draw, pixels_HW3.copy()))
        return sorted(heap, reverse=True)

    def _drawn(self) -> "Iterator[tuple[list[int], NDArray[np.uint8], list[float]]]":
        """Draw numbers, pixels (N, H, W, 3) and scores (none if not asked for), by micro-batch."""
        block = -1
        pixels_BHW3: NDArray[np.uint8] | None = None
        scores: list[float] = []
        for draws in _by_block(self.spec.ranges, self.spec.micro_batch):
            wanted = draws[0] // self.spec.micro_batch
            if wanted != block or pixels_BHW3 is None:
                reason = self.ctx.stop_reason()
                if reason is not None:
                    raise StopRequested(reason)
                block = wanted
                pixels_BHW3, scores = self._micro_batch(block)
                failpoint("generate.drawn")
            places = slice(draws[0] % self.spec.micro_batch, draws[-1] % self.spec.micro_batch + 1)
            yield list(draws), pixels_BHW3[places], scores[places]
            self.done += len(draws)
            rate = self.done / max(time.monotonic() - self.started, 1e-9)
            self.ctx.report(self.done, self.due, "pictures", rate=rate)

    @torch.inference_mode()
    def _micro_batch(self, block: int) -> "tuple[NDArray[np.uint8], list[float]]":
        """
        Returns:
            uint8 (B, H, W, 3), and B scores if they were asked for.

        Raises:
            CheckpointCorruptError: a picture is not finite: broken weights.
        """
        B = self.spec.micro_batch
        numbers = range(block * B, (block + 1) * B)
        latents_BZ = self.latents.rows(numbers, mean=self.spec.noise_mean, std=self.spec.noise_std)
        pictures_B3HW = self.model.generator(latents_BZ.to(self.device)[:, :, None, None])
        scores_B = self.scorer(pictures_B3HW) if self.scorer else pictures_B3HW.new_zeros(0)
        if not bool(torch.isfinite(pictures_B3HW.sum() + scores_B.sum())):
            raise CheckpointCorruptError(
                "this model makes pictures that are no finite numbers",
                hint="another checkpoint of the job may be whole: ganq checkpoints JOB",
            )
        return grids.to_uint8(pictures_B3HW), scores_B.float().tolist()


def _by_block(ranges: tuple[tuple[int, int], ...], size: int) -> Iterator[range]:
    """Cut inclusive ranges at the borders of micro-batches."""
    for first, last in ranges:
        for block in range(first // size, last // size + 1):
            yield range(max(first, block * size), min(last, (block + 1) * size - 1) + 1)


class _Writer:
    """Feeds pictures to the sink and to the grid pages, in order."""

    def __init__(self, sink: PictureSink, spec: GenerateSpec) -> None:
        self.sink = sink
        self.spec = spec
        self.written = 0
        self.pages = grids.GridPages(sink, size=spec.grid, most=spec.grid_pages)

    def write(
        self,
        draws: list[int],
        pixels: "NDArray[np.uint8] | list[NDArray[np.uint8]]",
        scores: "list[float] | list[None]",
    ) -> None:
        seed, by_rank = self.spec.seed, self.spec.keep is not None
        self.sink.add(
            Picture(
                self.written + place,
                picture_HW3,
                {"seed": seed, "draw": draw, "score": score},
                number=None if by_rank else draw,
            )
            for place, (draw, picture_HW3, score) in enumerate(zip(draws, pixels, scores, strict=True))
        )
        self.written += len(draws)
        for picture_HW3 in pixels:
            self.pages.add(picture_HW3)
