"""
A path through latent space: the frames between the latents of given images.

Gaussian latents of many dimensions lie near a sphere. The straight line between two of them leaves it, where
the generator was never trained; spherical interpolation (slerp) stays on it.

Shapes in names: K points, F frames, Z latent dimensions.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

NEARLY_PARALLEL = 1e-6
"""Below this sine slerp is not defined in floats; linear interpolation is as good."""


class Rows(Protocol):
    """Latents by sample index: jobs.rng.Latents, or a wrapper of it."""

    def rows(
        self, sample_indices: Iterable[int], *, mean: float = 0.0, std: float = 1.0, retry: int = 0
    ) -> Tensor:
        """Return latents, float32 (N, Z)."""


def slerp(one_Z: Tensor, other_Z: Tensor, share: float) -> Tensor:
    """
    Interpolate spherically between two latents.

    Args:
        one_Z, other_Z: float64 vectors, drawn from a standard normal distribution.
        share: of the angle; 0 returns the first, 1 the second, bit for bit.

    Source: White 2016, arXiv:1609.04468, section 2.1 (after Shoemake 1985).
    """
    if share in (0.0, 1.0):
        return other_Z if share else one_Z
    lengths = float(one_Z.norm() * other_Z.norm())
    cosine = min(1.0, max(-1.0, float(one_Z @ other_Z) / lengths)) if lengths else 1.0
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if sine < NEARLY_PARALLEL:
        return torch.lerp(one_Z, other_Z, share)
    return (math.sin((1 - share) * angle) * one_Z + math.sin(share * angle) * other_Z) / sine


class Path:
    """
    Latents by frame: frame f depends only on (seed, points, frames, f).

    Args:
        latents: of images.
        points: sample indices of the images that the path connects; K ≥ 2.
        frames: F ≥ K. Frame 0 is the first point, frame F − 1 the last.
    """

    def __init__(self, latents: Rows, points: Sequence[int], frames: int) -> None:
        self.points_KZ = latents.rows(points).double()
        self.frames = frames

    def place(self, frame: int) -> tuple[int, float]:
        """
        Return the position of a frame.

        Returns:
            Index of the leg, from 0, and share of the leg. Frames after the last one, which fill the last
            micro-batch, have its position.
        """
        legs = len(self.points_KZ) - 1
        leg, rest = divmod(min(frame, self.frames - 1) * legs, self.frames - 1)
        return (legs - 1, 1.0) if leg == legs else (leg, rest / (self.frames - 1))

    def rows(
        self, sample_indices: Iterable[int], *, mean: float = 0.0, std: float = 1.0, retry: int = 0
    ) -> Tensor:
        """Return latents, float32 (N, Z); `mean` and `std` are applied last, as to any latents."""
        path_FZ = [
            slerp(self.points_KZ[leg], self.points_KZ[leg + 1], share)
            for leg, share in map(self.place, sample_indices)
        ]
        return torch.stack(path_FZ).float().mul_(std).add_(mean)
