"""
Batches of the decoded data set, in a permutation of (seed, epoch): there is no loader state to store.

The images are uint8 in a memory-mapped file, or on the GPU if they fit. They are converted to floats where
they are used. No loader processes are needed.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from jobs import device as devices
from jobs import rng
from jobs.context import Images
from jobs.errors import DatasetError

SHARE_OF_FREE = 0.5
"""Share of the GPU's free memory that the data set may take; the networks need the rest."""
UPLOAD_IMAGES = 4096
"""Images that are copied to the GPU at once."""


class Batches:
    """
    The batches of a training run, by epoch and index.

    Args:
        images: the decoded data set.
        batch: images in a batch; the last, incomplete batch of an epoch is dropped.
        mirror: flip each image horizontally with probability 1/2.

    Raises:
        DatasetError: fewer images than one batch.
    """

    def __init__(self, images: Images, *, batch: int, seed: int, mirror: bool, device: torch.device) -> None:
        if len(images) < batch:
            raise DatasetError(
                f"{len(images)} images do not fill one batch of {batch}",
                hint=f"--batch {max(2, len(images))} or less, or more images",
                images=len(images),
                batch=batch,
            )
        self.images = images
        self.batch = batch
        self.seed = seed
        self.mirror = mirror
        self.device = device
        self.per_epoch = len(images) // batch
        self.side = images.images_N3HW.shape[3]
        """Side to which images_of() reduces the images."""
        self._epoch = -1
        self._order_N = torch.empty(0, dtype=torch.int64)
        self._on_device_N3HW = self._upload() if device.type == "cuda" else None

    def _upload(self) -> Tensor | None:
        """Copy the whole data set to the GPU; None if it does not fit."""
        images_N3HW = self.images.images_N3HW
        free, _ = torch.cuda.mem_get_info(self.device)
        if images_N3HW.nbytes > free * SHARE_OF_FREE:
            return None
        on_device_N3HW = torch.empty(images_N3HW.shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(images_N3HW), UPLOAD_IMAGES):
            part = torch.from_numpy(images_N3HW[start : start + UPLOAD_IMAGES].copy())
            on_device_N3HW[start : start + len(part)].copy_(part)
        return on_device_N3HW

    def get(self, epoch: int, index: int) -> Tensor:
        """
        Return a batch.

        Args:
            index: of the batch in its epoch, from 0.

        Returns:
            float32 (B, 3, H, W) in [-1, 1], channels last, on the device.
        """
        return self.images_of(devices.send_all(self.draw(epoch, index), self.device))

    def draw(self, epoch: int, index: int) -> dict[str, Tensor]:
        """
        Choose the images of a batch, and which of them are flipped.

        Returns:
            The input of images_of(): indices if the GPU has the data set, else uint8 images on the CPU.
        """
        if epoch != self._epoch:
            order_N = rng.permutation(self.seed, epoch, len(self.images))
            self._order_N = order_N if self._on_device_N3HW is None else devices.send(order_N, self.device)
            self._epoch = epoch
        chosen_B = self._order_N[index * self.batch : (index + 1) * self.batch]
        if self._on_device_N3HW is not None:
            drawn = {"chosen": chosen_B}
        else:
            drawn = {"bytes": torch.from_numpy(self.images.images_N3HW[chosen_B.numpy()])}
        if self.mirror:
            draws = rng.generator(self.seed, "mirror", epoch, index)
            drawn["flip"] = torch.rand(self.batch, generator=draws).lt_(0.5).bool()
        return drawn

    def images_of(self, drawn: devices.NamedTensors) -> Tensor:
        """Return what get() returns, from the output of draw() on the device."""
        if self._on_device_N3HW is not None:
            bytes_B3HW = self._on_device_N3HW[drawn["chosen"]]
        else:
            bytes_B3HW = drawn["bytes"]
        if self.mirror:
            bytes_B3HW = torch.where(drawn["flip"].view(-1, 1, 1, 1), bytes_B3HW.flip(3), bytes_B3HW)
        # ToTensor and Normalize(0.5, 0.5) in torchvision's order of operations: the same bits.
        bytes_B3HW = bytes_B3HW.contiguous(memory_format=torch.channels_last)
        images_B3HW = bytes_B3HW.float().div_(255).sub_(0.5).div_(0.5)
        factor = images_B3HW.shape[3] // self.side
        return images_B3HW if factor == 1 else avg_pool2d(images_B3HW, factor)

    def labels(self, epoch: int, index: int) -> Tensor:
        """Return the class labels of a batch: int64 (B,), on the CPU."""
        assert self.images.labels_N is not None
        order_N = rng.permutation(self.seed, epoch, len(self.images))
        chosen_B = order_N[index * self.batch : (index + 1) * self.batch]
        return torch.from_numpy(self.images.labels_N[chosen_B.numpy()])
