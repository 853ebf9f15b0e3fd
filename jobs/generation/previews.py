"""What a generation shows beside its pictures and grids: a film of a way, a grid of epochs."""

from typing import TYPE_CHECKING, Any

from jobs.context import ImageSink, JobContext
from jobs.errors import StopRequested
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILM = "interpolation"


class Shown:
    """The pictures that will be shown, gathered in order: all frames of a film, or the first numbers."""

    def __init__(self, spec: GenerateSpec) -> None:
        from jobs.generation.epoch_grid import COLUMNS

        self.is_film = bool(spec.interpolate)
        self.first = COLUMNS if spec.grid_epochs else 0
        self.frames: list[NDArray[np.uint8]] = []
        self.sample_indices: list[int] = []

    def add(self, sample_index: int, picture_HW3: "NDArray[np.uint8] | None" = None) -> None:
        if len(self.sample_indices) < self.first:
            self.sample_indices.append(sample_index)
        if self.is_film and picture_HW3 is not None:
            # A copy: it may be a view of its whole micro-batch, or of memory that is used again.
            self.frames.append(picture_HW3.copy())


def finish(spec: GenerateSpec, ctx: JobContext, sink: ImageSink, shown: Shown) -> dict[str, Any]:
    """
    Make what the spec asks for beside the pictures, and hand it to the sink.

    Returns:
        Facts for the job's result: the epochs of the grid, or why there is no MP4.

    Raises:
        StopRequested: somebody wants the job to stop; nothing was published.
    """
    facts: dict[str, Any] = {}
    if shown.is_film:
        facts |= _film(sink, shown)
    if spec.grid_epochs:
        from jobs.generation import epoch_grid

        def ask() -> None:
            if (reason := ctx.stop_reason()) is not None:
                raise StopRequested(reason)

        facts |= epoch_grid.write(spec, shown.sample_indices, ctx.models(), sink, ask=ask)
        ctx.log(f"rows of grids/epoch_grid.png, from the top: epochs {', '.join(map(str, facts['epochs']))}")
    if "note" in facts:
        ctx.log(facts["note"])
    return facts


def _film(sink: ImageSink, shown: Shown) -> dict[str, Any]:
    from jobs.generation import video

    sink.add_file(f"{FILM}.gif", video.gif(shown.frames))
    if not video.can_mp4():
        return {"note": video.NO_MP4}
    sink.add_file(f"{FILM}.mp4", video.mp4(shown.frames))
    return {}
