"""
Merge the shards of a generation: publish their images as one result.

Images are not computed or encoded again. Archives are hard-linked as they are, each with the manifest of its
shard, so that publication takes as long for a hundred million images as their number of archives needs.
Image files are hard-linked one by one. Ranked images, the arrays of an npz and archives of jobs that an older
ganq has submitted are copied.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from jobs.context import JobContext, Shard, StoredImage
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


def run(spec: GenerateSpec, ctx: JobContext, shards: Sequence[Iterable[StoredImage]]) -> dict[str, Any]:
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
    sink = ctx.image_sink(format=spec.format, quality=spec.quality, total=spec.total, names=spec.names)
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
    equal = len(digests) == 1
    return _facts(spec, len(shards), merged, started, equal=equal) | {"grids": pages.made} | more | published


def link(
    spec: GenerateSpec, ctx: JobContext, shards: Sequence[Shard], builds: Sequence[int | None]
) -> dict[str, Any]:
    """
    Publish links to the archives of shards; only the images of the grids are read.

    Args:
        shards: all of them, with their files and images.
        builds: number of the build of each; None: all have the same.

    Returns, Raises: as run().
    """
    started = time.monotonic()
    sink = ctx.image_sink(format=spec.format, names=spec.names, of_shards=True)
    pages = GridPages(sink, size=spec.grid, most=spec.grid_pages)
    shown = previews.Previews(spec)
    for image in chain.from_iterable(shard.images or () for shard in shards):
        if pages.full and len(shown.sample_indices) == shown.first:
            break
        if not pages.full:
            pages.add(sink.pixels(image))
        shown.add(image.record["draw"])
    linked, equal, digest = 0, True, b""
    for shard, build in zip(shards, builds, strict=True):
        reason = ctx.stop_reason()
        if reason is not None:
            raise StopRequested(reason)
        assert shard.files is not None
        sink.link(shard.files, build=build)
        failpoint("gather.adopted")
        equal = equal and (shard.all_equal or shard.files.images == 1)
        if equal:
            (image,) = islice(shard.images or (), 1)
            found = hashlib.sha256(sink.pixels(image).tobytes()).digest()
            digest = digest or found
            equal = digest == found
        linked += shard.files.images
        ctx.report(linked, spec.total, "images", phase="merging shards")
    pages.finish()
    more = previews.finish(spec, ctx, sink, shown)
    published = sink.publish()
    return _facts(spec, len(shards), linked, started, equal=equal) | {"grids": pages.made} | more | published


def _facts(spec: GenerateSpec, shards: int, merged: int, started: float, *, equal: bool) -> dict[str, Any]:
    """Return what the job's result says of all images; `equal`: whether they are all the same."""
    return {
        "image_count": merged,
        "drawn": spec.drawn,
        "seed": spec.seed,
        "shards": shards,
        "seconds": round(time.monotonic() - started, 3),
        **({"warning": f"collapsed: all {merged} images are equal"} if merged > 1 and equal else {}),
    }


def _all(shards: Sequence[Iterable[StoredImage]]) -> Iterator[ShardImage]:
    """Yield all images; the output index is the sample index."""
    for shard in shards:
        for image in shard:
            yield ShardImage(image.record["draw"], image)


def _best(shards: Sequence[Iterable[StoredImage]], keep: int) -> Iterator[ShardImage]:
    """Yield the best images, best first; the output index is the rank. Ties go to the lower sample index."""
    import heapq

    # Each shard is sorted, best first, so that only one line of each is in memory.
    ranked = heapq.merge(*shards, key=lambda image: (-image.record["score"], image.record["draw"]))
    for rank, image in enumerate(islice(ranked, keep)):
        yield ShardImage(rank, image)
