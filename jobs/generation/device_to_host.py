"""
Pictures on their way from the device to the CPU.

On a GPU the copy of one micro-batch goes on a stream of its own, into pinned memory, while
the next is computed; on the CPU there is nothing to wait for.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs import grids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class CopyInFlight:
    """One micro-batch that was sent off."""

    bytes_BHW3: Tensor
    scores_B: Tensor
    finite: Tensor
    there: "torch.cuda.Event | None"

    def wait(self) -> "tuple[NDArray[np.uint8], list[float], bool]":
        """
        Returns:
            uint8 (B, H, W, 3), the scores, and whether all of both were finite numbers.
        """
        if self.there is not None:
            self.there.synchronize()
        return self.bytes_BHW3.numpy(), self.scores_B.tolist(), bool(self.finite)


class DeviceToHostCopier:
    """Sends micro-batches off."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def ahead(self) -> int:
        """How many may be on their way at once: one is computed while one is copied."""
        return 0 if self.copies is None else 1

    def send(self, images_B3HW: Tensor, scores_B: Tensor) -> CopyInFlight:
        """
        Args:
            pictures_B3HW: float, in [-1, 1].
            scores_B: float; empty if none were asked for.
        """
        bytes_BHW3 = grids.as_bytes(images_B3HW)
        finite = torch.isfinite(images_B3HW.sum() + scores_B.sum())
        if self.copies is None:
            return CopyInFlight(bytes_BHW3, scores_B.float(), finite, None)
        self.copies.wait_stream(torch.cuda.current_stream(images_B3HW.device))
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.copies):
            landed = [_copied(one, self.copies) for one in (bytes_BHW3, scores_B.float(), finite)]
            there.record(self.copies)
        return CopyInFlight(landed[0], landed[1], landed[2], there)


def _copied(tensor: Tensor, stream: "torch.cuda.Stream") -> Tensor:
    """A copy in pinned memory, under way."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    # Its memory must not be given to the next forward before the copy has read it.
    tensor.record_stream(stream)
    return host
