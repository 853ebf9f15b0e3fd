"""
Encode frames as a GIF, and as an MP4 if PyAV is installed.

PyAV is an optional dependency (the extra 'video') and is imported when it is used.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FPS = 25
"""Frames per second. A GIF counts in hundredths of a second, and players ignore delays below three."""
QUALITY = 16
"""Constant rate factor of H.264; 18 is visually lossless."""
NO_MP4 = "no MP4: PyAV is not installed; install it with pip install 'ganq[video]'"


def gif(frames: "Sequence[NDArray[np.uint8]]", *, fps: float = FPS) -> bytes:
    """
    Encode uint8 (H, W, 3) frames as an endless GIF, each frame with its own palette of 256 colours.

    Args:
        fps: frames per second, 100 at most.
    """
    from PIL import Image

    first, *others = (Image.fromarray(np.ascontiguousarray(frame)).quantize(256) for frame in frames)
    buffer = io.BytesIO()
    # Without disposal=1 and optimize=False Pillow crops frames to what changed and leaves stray pixels.
    first.save(
        buffer,
        "GIF",
        save_all=True,
        append_images=others,
        duration=round(100 / fps) * 10,
        loop=0,
        optimize=False,
        disposal=1,
    )
    return buffer.getvalue()


def can_mp4() -> bool:
    """Return whether PyAV is installed."""
    return find_spec("av") is not None


def mp4(frames: "Sequence[NDArray[np.uint8]]", *, fps: int = FPS) -> bytes:
    """
    Encode uint8 (H, W, 3) frames as H.264. An odd side loses its last line: the format needs even sides.

    Raises:
        ImportError: PyAV is not installed; see can_mp4().
    """
    import av

    buffer = io.BytesIO()
    high, wide = frames[0].shape[:2]
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options={"crf": str(QUALITY)})
        stream.width, stream.height, stream.pix_fmt = wide // 2 * 2, high // 2 * 2, "yuv420p"
        for frame in frames:
            even = np.ascontiguousarray(frame[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
