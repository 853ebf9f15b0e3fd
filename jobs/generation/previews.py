"""Previews beside a generation's images and grids: the video of a latent path, the grid of epochs."""

from typing import TYPE_CHECKING, Any

from jobs.context import ImageSink, JobContext
from jobs.errors import StopRequested
from jobs.specs import GenerateSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VIDEO = "interpolation"


class Previews:
    """The images of the previews, in order: all frames of a video, or the first sample indices."""

    def __init__(self, spec: GenerateSpec) -> None:
        from jobs.generation.epoch_grid import COLUMNS

        self.is_video = bool(spec.interpolate)
        self.first = COLUMNS if spec.grid_epochs else 0
        self.frames: list[NDArray[np.uint8]] = []
        self.sample_indices: list[int] = []

    def add(self, sample_index: int, image_HW3: "NDArray[np.uint8] | None" = None) -> None:
        if len(self.sample_indices) < self.first:
            self.sample_indices.append(sample_index)
        if self.is_video and image_HW3 is not None:
            # A copy: it may be a view of a whole micro-batch, or of memory that is reused.
            self.frames.append(image_HW3.copy())


def finish(spec: GenerateSpec, ctx: JobContext, sink: ImageSink, shown: Previews) -> dict[str, Any]:
    """
    Create the previews that the spec requests, and add them to the sink.

    Returns:
        Entries of the job's result: the epochs of the grid, or why there is no MP4.

    Raises:
        StopRequested: the job was asked to stop; nothing was published.
    """
    facts: dict[str, Any] = {}
    if shown.is_video:
        facts |= _add_video(sink, shown)
    if spec.grid_epochs:
        from jobs.generation import epoch_grid

        def raise_if_stopped() -> None:
            if (reason := ctx.stop_reason()) is not None:
                raise StopRequested(reason)

        facts |= epoch_grid.write(
            spec,
            shown.sample_indices,
            ctx.models(),
            sink,
            samples=ctx.sample_grids(),
            raise_if_stopped=raise_if_stopped,
        )
        ctx.log(f"rows of grids/epoch_grid.png, from the top: epochs {', '.join(map(str, facts['epochs']))}")
    if "note" in facts:
        ctx.log(facts["note"])
    return facts


def _add_video(sink: ImageSink, shown: Previews) -> dict[str, Any]:
    from jobs.generation import video

    sink.add_file(f"{VIDEO}.gif", video.gif(shown.frames))
    if not video.can_mp4():
        return {"note": video.NO_MP4}
    sink.add_file(f"{VIDEO}.mp4", video.mp4(shown.frames))
    return {}
