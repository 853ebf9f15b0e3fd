"""
A run's state as it was at one step, kept still while training goes on.

A checkpoint is written beside the training, from copies. They lie in memory that is
used again by the next one: fresh pages for a hundred megabytes cost more than the
copying itself, and a GPU writes only into pinned memory without waiting.
"""

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class StagingBuffers:
    """One set of copies; the next take() overwrites it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._making: threading.Thread | None = None

    def prepare(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """
        Make room on another thread, once, so that the first take() is no slower than the others.

        Args:
            tensors: gives what take() will get.
        """
        if self._making is None:
            self._making = threading.Thread(target=self._make, args=(tensors(),), name="stills", daemon=True)
            self._making.start()

    def _make(self, tensors: Mapping[str, Tensor]) -> None:
        places = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        for place in places.values():
            place.zero_()  # pages are given out when they are first written
        self._kept = places

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Args:
            tensors: on any device, in any memory layout, which their copies share: a copy that
                changes the layout takes several times as long, and can be made later, by who writes.

        Returns:
            The same names, copies on the CPU, complete.
        """
        if self._making is not None:
            self._making.join()
        kept = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        # What is not asked for any more is forgotten.
        self._kept = kept
        with torch.no_grad():
            for name, tensor in tensors.items():
                kept[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return dict(kept)

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        old = self._kept.get(name)
        if old is not None and (old.shape, old.dtype, old.stride()) == (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        ):
            return old
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda
        )
