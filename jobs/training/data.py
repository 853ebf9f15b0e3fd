"""
Batches out of the decoded data set: a permutation of (seed, epoch), nothing to remember.

The pictures lie as uint8 in a memory-mapped file, or on the GPU when they fit;
they become floats where they are used. No loader processes, so a resumed run has
no loader state to restore.
"""

import torch
from torch import Tensor

from jobs import device as devices
from jobs import rng
from jobs.context import Images
from jobs.errors import DatasetError

SHARE_OF_FREE = 0.5
"""Of the GPU's free memory the data set may take; the networks need the rest."""
UPLOAD_PICTURES = 4096


class Batches:
    """
    The batches of a training run, by epoch and place.

    Args:
        images: the decoded data set.
        batch: pictures in a batch; the last, incomplete batch of an epoch is dropped.
        mirror: flip each picture with probability 1/2.

    Raises:
        DatasetError: fewer pictures than one batch.
    """

    def __init__(self, images: Images, *, batch: int, seed: int, mirror: bool, device: torch.device) -> None:
        if len(images) < batch:
            raise DatasetError(
                f"{len(images)} pictures do not fill one batch of {batch}",
                hint=f"--batch {max(2, len(images))} or less, or more pictures",
                pictures=len(images),
                batch=batch,
            )
        self.images = images
        self.batch = batch
        self.seed = seed
        self.mirror = mirror
        self.device = device
        self.per_epoch = len(images) // batch
        self._epoch = -1
        self._order_N = torch.empty(0, dtype=torch.int64)
        self._on_device_N3HW = self._upload() if device.type == "cuda" else None

    def _upload(self) -> Tensor | None:
        """The whole data set on the GPU, or None when it does not fit."""
        images_N3HW = self.images.images_N3HW
        free, _ = torch.cuda.mem_get_info(self.device)
        if images_N3HW.nbytes > free * SHARE_OF_FREE:
            return None
        there_N3HW = torch.empty(images_N3HW.shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(images_N3HW), UPLOAD_PICTURES):
            part = torch.from_numpy(images_N3HW[start : start + UPLOAD_PICTURES].copy())
            there_N3HW[start : start + len(part)].copy_(part)
        return there_N3HW

    def get(self, epoch: int, place: int) -> Tensor:
        """
        Returns:
            float32 (batch, 3, H, W) in [-1, 1], channels last, on the device.
        """
        return self.pictures(devices.send_all(self.draw(epoch, place), self.device))

    def draw(self, epoch: int, place: int) -> dict[str, Tensor]:
        """Which pictures are next and which are mirrored, for pictures(); the bytes, if no GPU has them."""
        if epoch != self._epoch:
            order_N = rng.permutation(self.seed, epoch, len(self.images))
            self._order_N = order_N if self._on_device_N3HW is None else devices.send(order_N, self.device)
            self._epoch = epoch
        chosen_B = self._order_N[place * self.batch : (place + 1) * self.batch]
        if self._on_device_N3HW is not None:
            drawn = {"chosen": chosen_B}
        else:
            drawn = {"bytes": torch.from_numpy(self.images.images_N3HW[chosen_B.numpy()])}
        if self.mirror:
            draws = rng.generator(self.seed, "mirror", epoch, place)
            drawn["flip"] = torch.rand(self.batch, generator=draws).lt_(0.5).bool()
        return drawn

    def pictures(self, drawn: devices.Named) -> Tensor:
        """What get() returns, from what draw() gave, on the device."""
        if self._on_device_N3HW is not None:
            bytes_B3HW = self._on_device_N3HW[drawn["chosen"]]
        else:
            bytes_B3HW = drawn["bytes"]
        if self.mirror:
            bytes_B3HW = torch.where(drawn["flip"].view(-1, 1, 1, 1), bytes_B3HW.flip(3), bytes_B3HW)
        # ToTensor and Normalize(0.5, 0.5) in torchvision's own order of operations: the same bits.
        bytes_B3HW = bytes_B3HW.contiguous(memory_format=torch.channels_last)
        return bytes_B3HW.float().div_(255).sub_(0.5).div_(0.5)

    def labels(self, epoch: int, place: int) -> Tensor:
        """The classes of get()'s pictures: int64 (batch,), on the CPU."""
        assert self.images.labels_N is not None
        order_N = rng.permutation(self.seed, epoch, len(self.images))
        chosen_B = order_N[place * self.batch : (place + 1) * self.batch]
        return torch.from_numpy(self.images.labels_N[chosen_B.numpy()])
