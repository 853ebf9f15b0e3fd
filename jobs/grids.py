"""Image grids with the layout of torchvision's make_grid, without its two seconds of import."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from jobs.context import ImageSink

COLUMNS = 8
PADDING = 2


def as_bytes(images_B3HW: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """
    Map [low, high] to 0…255, clamped and rounded as torchvision's save_image rounds.

    Returns:
        uint8 (B, H, W, 3), on the images' device.
    """
    # save_image clamps to [low, high] first; the clamp at the end gives the same bytes.
    scaled = images_B3HW.detach().float().sub(low).div_(max(high - low, 1e-5))
    bytes_B3HW = scaled.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return bytes_B3HW.permute(0, 2, 3, 1).contiguous()


def to_uint8(images_B3HW: Tensor, low: float = -1.0, high: float = 1.0) -> "NDArray[np.uint8]":
    """Return as_bytes() on the CPU."""
    return as_bytes(images_B3HW, low, high).cpu().numpy()


def stretched(images_B3HW: Tensor) -> "NDArray[np.uint8]":
    """Return to_uint8(), scaled from the minimum to the maximum of all images, as in the tutorial's grids."""
    return to_uint8(images_B3HW, float(images_B3HW.min()), float(images_B3HW.max()))


def tile(
    images_BHW3: "NDArray[np.uint8]", columns: int = COLUMNS, padding: int = PADDING
) -> "NDArray[np.uint8]":
    """
    Arrange images in rows of `columns`, with black lines of `padding` pixels around each.

    Returns:
        uint8 (H, W, 3). A single image is returned as it is, as in make_grid.
    """
    import numpy as np

    count, high, wide, _ = images_BHW3.shape
    if count == 1:
        only: NDArray[np.uint8] = images_BHW3[0]
        return only
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = np.zeros((rows * (high + padding) + padding, columns * (wide + padding) + padding, 3), np.uint8)
    for place, image in enumerate(images_BHW3):
        row, column = divmod(place, columns)
        top, left = row * (high + padding) + padding, column * (wide + padding) + padding
        grid[top : top + high, left : left + wide] = image
    return grid


class GridPages:
    """
    Grid pages, each written when it is full.

    Args:
        sink: where a page goes.
        size: images on a page; 0: no pages.
        most: maximum number of pages; later images are on no page.
    """

    def __init__(self, sink: "ImageSink", *, size: int, most: int) -> None:
        self.sink = sink
        self.size = size
        self.most = most
        self.made = 0
        self._page: list[NDArray[np.uint8]] = []

    @property
    def full(self) -> bool:
        """Return whether no further image will be on a page."""
        return self.size == 0 or self.made == self.most

    def add(self, picture_HW3: "NDArray[np.uint8]") -> None:
        if self.full:
            return
        self._page.append(picture_HW3)
        if len(self._page) == self.size:
            self.finish()

    def finish(self) -> None:
        """Write the current page, full or not."""
        if not self._page:
            return
        import numpy as np

        self.sink.add_grid(f"grid-{self.made:04d}", tile(np.stack(self._page)))
        self.made += 1
        self._page.clear()
