"""
The grid of epochs: one image with a row per retained checkpoint, of the same latents.

It shows the course of a training without a metric.

Shapes in names: R rows, B images in a micro-batch, N images in a row, H, W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jobs import grids
from jobs.device import choose
from jobs.generation import model_cache, selection, video

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jobs.context import ImageSink, Sample, Snapshot
    from jobs.specs import GenerateSpec

COLUMNS = 8
"""Images in a row."""
MARGIN = 56
"""Pixels at the left, for the epoch."""
FRAMES_PER_S = 2
TARGET_VIDEO_S = 20
"""Seconds that a film of many frames takes, up to the frame rate of a video."""


def write(
    spec: "GenerateSpec",
    sample_indices: Sequence[int],
    snapshots: "Iterable[Snapshot]",
    sink: "ImageSink",
    *,
    samples: "Sequence[Sample]" = (),
    raise_if_stopped: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """
    Generate images from several checkpoints; add a grid and a film to the sink.

    The film has a frame for each sample grid of the training. If there are fewer than checkpoints, it shows
    the images of the checkpoints instead.

    Args:
        sample_indices: of the images; the first COLUMNS are shown.
        snapshots: oldest first; one at a time is in memory.
        samples: sample grids of the training, oldest first.
        raise_if_stopped: raises StopRequested if the job was asked to stop; called before each checkpoint.

    Returns:
        {'epochs': of the rows, from the top; 'frames': of the film; 'note': why there is no MP4}.
    """
    shown = list(sample_indices[:COLUMNS])
    rows: list[NDArray[np.uint8]] = []
    epochs: list[int] = []
    for snapshot in snapshots:
        raise_if_stopped()
        rows.append(images(spec, shown, snapshot))
        epochs.append(snapshot.epoch)
    sink.add_grid("epochs", labelled(np.stack(rows), [f"{epoch:,}" for epoch in epochs]))
    columns = -(-len(shown) // 2) if len(shown) > 3 else len(shown)
    frames = _frames(samples, raise_if_stopped) if len(samples) >= len(rows) else []
    if len(frames) < len(rows):
        frames = [grids.tile(row_NHW3, columns) for row_NHW3 in rows]
    if len(frames) < 2:
        return {"epochs": epochs}
    fps = min(max(FRAMES_PER_S, round(len(frames) / TARGET_VIDEO_S)), video.FPS)
    film = [*frames, frames[-1]]
    sink.add_file("epochs.gif", video.gif(film, fps=fps))
    facts = {"epochs": epochs, "frames": len(frames)}
    if not video.can_mp4():
        return {**facts, "note": video.NO_MP4}
    sink.add_file("epochs.mp4", video.mp4(film, fps=fps))
    return facts


def _frames(samples: "Sequence[Sample]", raise_if_stopped: Callable[[], None]) -> "list[NDArray[np.uint8]]":
    """Return the sample grids that can be read, all of the size of the newest one."""
    frames: list[NDArray[np.uint8]] = []
    for sample in samples:
        raise_if_stopped()
        with suppress(OSError, ValueError):  # deleted meanwhile, or damaged
            frames.append(sample.draw())
    return [frame for frame in frames if frame.shape == frames[-1].shape]


@torch.inference_mode()
def images(spec: "GenerateSpec", sample_indices: Sequence[int], snapshot: "Snapshot") -> "NDArray[np.uint8]":
    """Generate images, uint8 (N, H, W, 3), each in its own micro-batch as always."""
    device = choose(spec.device)
    model = model_cache.load(snapshot, device)
    latents = selection.latents_of(spec, model.arch.nz)
    B = spec.micro_batch
    made: dict[int, NDArray[np.uint8]] = {}
    for block in sorted({i // B for i in sample_indices}):
        latents_BZ = latents.rows(range(block * B, (block + 1) * B), mean=spec.noise_mean, std=spec.noise_std)
        labels = model.labels(range(block * B, (block + 1) * B), spec.class_name, device)
        pixels_BHW3 = grids.to_uint8(model.generator(latents_BZ.to(device)[:, :, None, None], *labels))
        made |= {i: pixels_BHW3[i % B] for i in sample_indices if i // B == block}
    return np.stack([made[i] for i in sample_indices])


def labelled(rows_RNHW3: "NDArray[np.uint8]", labels: Sequence[str]) -> "NDArray[np.uint8]":
    """Return rows of images below each other, each with its label at the left; uint8 (H, W, 3)."""
    from PIL import Image, ImageDraw

    R, N, high, wide, _ = rows_RNHW3.shape
    pad = grids.PADDING
    page = Image.new("RGB", (MARGIN + N * (wide + pad) + pad, R * (high + pad) + pad))
    pen = ImageDraw.Draw(page)
    for row, (images_NHW3, label) in enumerate(zip(rows_RNHW3, labels, strict=True)):
        top = row * (high + pad) + pad
        pen.text((MARGIN - 6, top + high // 2), label, fill="white", anchor="rm")
        for place, image_HW3 in enumerate(images_NHW3):
            page.paste(Image.fromarray(image_HW3), (MARGIN + place * (wide + pad) + pad, top))
    return np.asarray(page)
