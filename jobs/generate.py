"""
Pictures from a checkpoint; picture i depends on (checkpoint, seed, i) alone.

Picture i is always computed in the whole micro-batch number i // B, at place i mod B,
whatever was asked for around it: the last bit of a convolution may depend on the
shape of the batch and on the place in it.

Shapes in names: B pictures in a micro-batch, Z latent numbers, H, W pixels.
"""

import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from jobs import gather, showing
from jobs.context import JobContext, Picture, PictureSink
from jobs.errors import CheckpointCorruptError, StopRequested
from jobs.failpoints import failpoint
from jobs.gan import device as devices
from jobs.gan import grids, models, selection
from jobs.gan.interpolation import Path, Rows
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
        chooses = spec.keep is not None or spec.reject is not None
        self.scorer = self.model.scorer() if chooses else None
        self.latents = selection.latents_of(spec, self.model.arch.nz)
        self.rejection: selection.Rejection | None = None
        self.done = 0
        self.started = time.monotonic()

    def run(self) -> dict[str, Any]:
        spec = self.spec
        if spec.reject is not None:
            self._set_threshold(spec.reject)
        coming = self.due if spec.keep is None else min(spec.keep, self.due)
        sink = self.ctx.pictures(format=spec.format, quality=spec.quality, total=coming)
        writer = _Writer(sink, spec, self.record)
        if spec.keep is None:
            for draws, pixels_NHW3, scores in self._drawn():
                writer.write(draws, pixels_NHW3, scores or [None] * len(draws))
        else:
            best = self._best(spec.keep)
            # Micro-batches again, so that no more than one is encoded at a time.
            for start in range(0, len(best), spec.micro_batch):
                part = best[start : start + spec.micro_batch]
                draws = [-drawn.minus_draw for drawn in part]
                writer.write(draws, [drawn.pixels_HW3 for drawn in part], [drawn.score for drawn in part])
        writer.pages.finish()
        self.ctx.report(self.done, self.due, "pictures", phase="publishing")
        more = showing.finish(spec, self.ctx, sink, writer.shown)
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
            **more,
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
                block = wanted
                pixels_BHW3, scores = (
                    self.rejection.micro_batch(block) if self.rejection else self._micro_batch(block)
                )
                failpoint("generate.drawn")
            places = slice(draws[0] % self.spec.micro_batch, draws[-1] % self.spec.micro_batch + 1)
            yield list(draws), pixels_BHW3[places], scores[places]
            self.done += len(draws)
            rate = self.done / max(time.monotonic() - self.started, 1e-9)
            self.ctx.report(self.done, self.due, "pictures", rate=rate)

    def record(self, draw: int) -> dict[str, Any]:
        """What the manifest says of a picture beside seed, number and score."""
        if isinstance(self.latents, Path):
            leg, share = self.latents.place(draw)
            return {"from": self.spec.interpolate[leg], "to": self.spec.interpolate[leg + 1], "share": share}
        return self.rejection.record(draw % self.spec.micro_batch) if self.rejection else {}

    def _set_threshold(self, share: float) -> None:
        """The score under which the worst of this model's pictures lie."""
        self.ctx.report(0, self.due, "pictures", phase="setting the threshold")
        calibration = selection.calibration_latents(self.spec, self.model.arch.nz)
        self.rejection = selection.Rejection(
            share,
            draw=lambda block, retry: self._micro_batch(block, retry=retry),
            calibrate=lambda block: self._micro_batch(block, latents=calibration)[1],
            micro_batch=self.spec.micro_batch,
        )

    @torch.inference_mode()
    def _micro_batch(
        self, block: int, *, retry: int = 0, latents: Rows | None = None
    ) -> "tuple[NDArray[np.uint8], list[float]]":
        """
        Args:
            retry: which of each picture's own tries.
            latents: other ones than the spec's.

        Returns:
            uint8 (B, H, W, 3), and B scores if they were asked for.

        Raises:
            CheckpointCorruptError: a picture is not finite: broken weights.
            StopRequested: somebody wants the job to stop.
        """
        reason = self.ctx.stop_reason()
        if reason is not None:
            raise StopRequested(reason)
        B = self.spec.micro_batch
        numbers = range(block * B, (block + 1) * B)
        mean, std = self.spec.noise_mean, self.spec.noise_std
        latents_BZ = (latents or self.latents).rows(numbers, mean=mean, std=std, retry=retry)
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

    def __init__(self, sink: PictureSink, spec: GenerateSpec, more: Callable[[int], dict[str, Any]]) -> None:
        self.sink = sink
        self.spec = spec
        self.more = more
        self.written = 0
        self.shown = showing.Shown(spec)
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
                {"seed": seed, "draw": draw, "score": score, **self.more(draw)},
                number=None if by_rank else draw,
            )
            for place, (draw, picture_HW3, score) in enumerate(zip(draws, pixels, scores, strict=True))
        )
        self.written += len(draws)
        for draw, picture_HW3 in zip(draws, pixels, strict=True):
            if not self.pages.full:
                self.pages.add(self.sink.shown(picture_HW3))
            self.shown.add(draw, picture_HW3)
