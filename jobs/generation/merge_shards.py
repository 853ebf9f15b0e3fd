"""
Merge the shards of a generation: publish their images as one result.

Images are not computed or encoded again. Files are hard-linked if the volume supports it; members of archives
are copied. The result has the same bytes as that of a single worker.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jobs.context import JobContext, StoredImage
from jobs.errors import StopRequested
from jobs.failpoints import failpoint
from jobs.generation import previews
from jobs.grids import GridPages
from jobs.specs import GenerateSpec


@dataclass(frozen=True)
class ShardImage:
    """An image of a shard with its output index, which names its file in the merged result."""

    output_index: int
    image: StoredImage


def run(spec: GenerateSpec, ctx: JobContext, shards: list[Iterable[StoredImage]]) -> dict[str, Any]:
    """
    Merge shards and publish the result.

    Args:
        shards: the images of each shard, in the order of sample indices.

    Returns:
        The job's result, as of a generation that was not split.

    Raises:
        StopRequested: the job was asked to stop; nothing was published.
        StorageError: a shard's result differs from what was registered.
    """
    started = time.monotonic()
    sink = ctx.image_sink(format=spec.format, quality=spec.quality, total=spec.total)
    pages = GridPages(sink, size=spec.grid, most=spec.grid_pages)
    in_order = _all(shards) if spec.keep is None else _best(shards, spec.keep)
    shown = previews.Previews(spec)
    merged = 0
    digests: set[bytes] = set()  # no more than two: it only matters whether images differ
    for placed in in_order:
        reason = ctx.stop_reason()
        if reason is not None:
            raise StopRequested(reason)
        sink.adopt(placed.image, output_index=placed.output_index)
        failpoint("merge.adopted")
        if not pages.full:
            pages.add(sink.pixels(placed.image))
        shown.add(placed.image.record["draw"])
        merged += 1
        if len(digests) < 2:
            # Of the pixels: the files of equal images differ in their passports.
            digests.add(hashlib.sha256(sink.pixels(placed.image).tobytes()).digest())
        ctx.report(merged, spec.total, "images", phase="merging shards")
    pages.finish()
    more = previews.finish(spec, ctx, sink, shown)
    published = sink.publish()
    return {
        "image_count": merged,
        "drawn": spec.drawn,
        "grids": pages.made,
        "seed": spec.seed,
        "shards": len(shards),
        "seconds": round(time.monotonic() - started, 3),
        **({"warning": f"collapsed: all {merged} images are equal"} if merged > 1 == len(digests) else {}),
        **more,
        **published,
    }


def _all(shards: list[Iterable[StoredImage]]) -> Iterator[ShardImage]:
    """Yield all images; the output index is the sample index."""
    for shard in shards:
        for image in shard:
            yield ShardImage(image.record["draw"], image)


def _best(shards: list[Iterable[StoredImage]], keep: int) -> Iterator[ShardImage]:
    """Yield the best images, best first; the output index is the rank. Ties go to the lower sample index."""
    import heapq

    # Each shard is sorted, best first, so that only one line of each is in memory.
    ranked = heapq.merge(*shards, key=lambda image: (-image.record["score"], image.record["draw"]))
    for rank, image in enumerate(islice(ranked, keep)):
        yield ShardImage(rank, image)
