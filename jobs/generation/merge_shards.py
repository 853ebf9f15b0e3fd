"""
The last step of a generation that was split: publish as one what its parts have made.

No picture is made anew. Files are linked where the volume can do that, and what lies in an
archive is copied, so the result has the bytes that one worker alone would have made.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jobs.context import JobContext, Made
from jobs.errors import StopRequested
from jobs.failpoints import failpoint
from jobs.generation import previews
from jobs.grids import GridPages
from jobs.specs import GenerateSpec


@dataclass(frozen=True)
class Placed:
    """An image of a shard with its output index, which names its file in the merged result."""

    output_index: int
    made: Made


def run(spec: GenerateSpec, ctx: JobContext, parts: list[Iterable[Made]]) -> dict[str, Any]:
    """
    Args:
        parts: what each part has made, in the order of draws.

    Returns:
        Facts for the job's result, as of a generation that was not split.

    Raises:
        StopRequested: somebody wants the job to stop; nothing was published.
        StorageError: a part's result is not what was registered.
    """
    started = time.monotonic()
    sink = ctx.pictures(format=spec.format, quality=spec.quality, total=spec.total)
    pages = GridPages(sink, size=spec.grid, most=spec.grid_pages)
    in_order = _all(parts) if spec.keep is None else _best(parts, spec.keep)
    shown = previews.Shown(spec)
    gathered = 0
    for placed in in_order:
        reason = ctx.stop_reason()
        if reason is not None:
            raise StopRequested(reason)
        sink.adopt(placed.made, output_index=placed.output_index)
        failpoint("gather.adopted")
        if not pages.full:
            pages.add(sink.pixels(placed.made))
        shown.add(placed.made.record["draw"])
        gathered += 1
        ctx.report(gathered, spec.total, "pictures", phase="gathering")
    pages.finish()
    more = previews.finish(spec, ctx, sink, shown)
    published = sink.publish()
    return {
        "image_count": gathered,
        "drawn": spec.drawn,
        "grids": pages.made,
        "seed": spec.seed,
        "shards": len(parts),
        "seconds": round(time.monotonic() - started, 3),
        **more,
        **published,
    }


def _all(parts: list[Iterable[Made]]) -> Iterator[Placed]:
    """Yield all images; the output index is the sample index."""
    for part in parts:
        for made in part:
            yield Placed(made.record["draw"], made)


def _best(parts: list[Iterable[Made]], keep: int) -> Iterator[Placed]:
    """Yield the best images, best first; the output index is the rank. Ties go to the lower sample index."""
    import heapq

    # Each part comes best first, so that no more than one line of each is in memory.
    merged = heapq.merge(*parts, key=lambda made: (-made.record["score"], made.record["draw"]))
    for rank, made in enumerate(islice(merged, keep)):
        yield Placed(rank, made)
