"""
A way through latent space: the frames between the latents of given pictures.

Latents are Gaussian, so in many dimensions all of them lie near a sphere. The straight line
between two of them cuts through its inside, where the generator was never trained, and its
middle looks like an average; the great circle stays where the pictures are.

Shapes in names: K points, F frames, Z latent numbers.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

NEARLY_PARALLEL = 1e-6
"""Below this sine the great circle is not defined in floats; the straight line is as good."""


class Rows(Protocol):
    """Latents by number; jobs.rng.Latents, or something around it."""

    def rows(
        self, sample_indices: Iterable[int], *, mean: float = 0.0, std: float = 1.0, retry: int = 0
    ) -> Tensor:
        """float32 (len(sample_indices), nz)."""


def slerp(one_Z: Tensor, other_Z: Tensor, share: float) -> Tensor:
    """
    The point between two that has gone `share` of the angle from the first to the second.

    Args:
        one_Z, other_Z: float64 vectors, drawn from a standard normal distribution.
        share: 0 gives the first, 1 the second, bit for bit.

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
    Latents by frame number: frame f depends on (seed, points, frames, f) alone.

    Args:
        latents: of pictures.
        points: numbers of the pictures that the way goes through; K ≥ 2.
        frames: F ≥ K. Frame 0 is the first point, frame F − 1 the last.
    """

    def __init__(self, latents: Rows, points: Sequence[int], frames: int) -> None:
        self.points_KZ = latents.rows(points).double()
        self.frames = frames

    def place(self, frame: int) -> tuple[int, float]:
        """
        Returns:
            Between which points a frame lies (their index from 0), and what share of the way it
            has gone. What comes after the last frame stays where that is: a micro-batch is whole.
        """
        legs = len(self.points_KZ) - 1
        leg, rest = divmod(min(frame, self.frames - 1) * legs, self.frames - 1)
        return (legs - 1, 1.0) if leg == legs else (leg, rest / (self.frames - 1))

    def rows(
        self, sample_indices: Iterable[int], *, mean: float = 0.0, std: float = 1.0, retry: int = 0
    ) -> Tensor:
        """float32 (N, nz); `mean` and `std` are put on afterwards, as of any other latent."""
        way = [
            slerp(self.points_KZ[leg], self.points_KZ[leg + 1], share)
            for leg, share in map(self.place, sample_indices)
        ]
        return torch.stack(way).float().mul_(std).add_(mean)
