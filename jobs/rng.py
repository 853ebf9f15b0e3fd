"""
Random numbers, derived from (seed, stream, step).

There is no state to store: step 4,711 draws the same numbers in a resumed run as in an uninterrupted one.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def _digest(seed: int, stream: str, steps: tuple[int, ...]) -> bytes:
    return hashlib.sha256("/".join(["ganq", str(seed), stream, *map(str, steps)]).encode()).digest()


def derive(seed: int, stream: str, *steps: int) -> int:
    """
    Return 64 pseudorandom bits, the same for the same arguments on every machine.

    Args:
        seed: of the job.
        stream: purpose of the draw; streams are independent.
        steps: position in the stream: a step, an epoch, a count.
    """
    return int.from_bytes(_digest(seed, stream, steps)[:8], "little")


def generator(seed: int, stream: str, *steps: int) -> torch.Generator:
    """
    Return a CPU generator for one draw; draws on the CPU are the same for every device.

    PyTorch's CPU generator uses 32 of the 64 bits, so two steps may have equal draws (once in 2³² pairs),
    which does not affect training.
    """
    return torch.Generator().manual_seed(derive(seed, stream, *steps))


def noise(seed: int, stream: str, *steps: int, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal float32 numbers, on the CPU."""
    return torch.randn(shape, generator=generator(seed, stream, *steps))


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """Return the order of an epoch's images: int64, shape (n,)."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


class Latents:
    """
    Latent vectors by sample index: row i depends on (seed, i) alone.

    Philox is a keyed function of a counter (Salmon et al. 2011): the key comes from
    the seed, the counter is the sample index, so no two images share a latent.
    A generator seeded anew per image would hold 32 bits, and of a million images
    about a hundred would come twice. Costs 4 µs an image.
    """

    def __init__(self, seed: int, nz: int, *, stream: str = "latents") -> None:
        key = int.from_bytes(_digest(seed, stream, ())[:16], "little")
        self.nz = nz
        self._philox = np.random.Philox(key=key)
        self._normal = np.random.Generator(self._philox)
        self._start = self._philox.state

    def rows(
        self, sample_indices: Iterable[int], *, mean: float = 0.0, std: float = 1.0, retry: int = 0
    ) -> Tensor:
        """
        Draw the latents of some images.

        Args:
            sample_indices: which images, each from 0 to 2⁶³.
            mean, std: of the normal distribution.
            retry: which of an image's own tries; 0 is the image as it comes.

        Returns:
            float32, shape (len(sample_indices), nz).
        """
        indices = list(sample_indices)
        rows_NZ = np.empty((len(indices), self.nz), np.float32)
        for row_Z, sample_index in zip(rows_NZ, indices, strict=True):
            # The counter's second and third words are ours; the first counts blocks within an image.
            self._start["state"]["counter"][:] = (0, sample_index, retry, 0)
            self._philox.state = self._start
            self._normal.standard_normal(dtype=np.float32, out=row_Z)
        return torch.from_numpy(rows_NZ).mul_(std).add_(mean)


def latents(
    seed: int, sample_indices: Iterable[int], nz: int, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Return Latents(seed, nz).rows(...), for a single use."""
    return Latents(seed, nz).rows(sample_indices, mean=mean, std=std)
