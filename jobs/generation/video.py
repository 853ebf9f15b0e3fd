"""
Pictures one after the other: a GIF that every program shows, and an MP4 where there is a library for it.

PyAV, which makes the MP4, is an optional part of ganq (the extra 'video') and imported when it is used.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

FPS = 25
"""Frames a second: a GIF counts in hundredths of a second, and players pass over less than three of them."""
QUALITY = 16
"""H.264's constant rate factor: 18 already looks lossless."""
NO_MP4 = "no MP4: PyAV is not installed here; pip install 'ganq[video]' brings it"


def gif(frames: "Sequence[NDArray[np.uint8]]", *, fps: float = FPS) -> bytes:
    """
    An endless GIF of uint8 (H, W, 3) frames, each with the 256 colours that suit it best.

    Args:
        fps: frames a second, 100 at most.
    """
    from PIL import Image

    first, *others = (Image.fromarray(np.ascontiguousarray(frame)).quantize(256) for frame in frames)
    buffer = io.BytesIO()
    # Without disposal 1 and optimize=False Pillow cuts frames to what has changed, with stray pixels.
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
    """Whether PyAV is installed."""
    return find_spec("av") is not None


def mp4(frames: "Sequence[NDArray[np.uint8]]", *, fps: int = FPS) -> bytes:
    """
    An H.264 film of uint8 (H, W, 3) frames; an odd side loses its last line, which the format cannot hold.

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
