"""
What changes over a run: learning rates, penalties and Adam's second beta, each on half a cosine.

Pure functions of how far the run is, so a resumed run needs to remember nothing.

Source: Huang et al. 2025 (R3GAN), arXiv:2501.05441, appendix on training: large steps and
strong penalties while G learns where the pictures lie, small ones while it learns to draw.
"""

import math
from dataclasses import dataclass

from jobs.specs import TrainSpec


@dataclass(frozen=True)
class ScheduleValues:
    """The values of one step."""

    lr_g: float
    lr_d: float
    r1_gamma: float
    r2_gamma: float
    beta2: float


def between(first: float, last: float, done: float) -> float:
    """
    From `first` at done = 0 to `last` at done = 1, slow at both ends.

    Returns:
        Exactly `first` where both are the same.
    """
    return first + (last - first) * (1 - math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2


def schedule_values(spec: TrainSpec, done: float, *, lr_scale: float = 1.0) -> ScheduleValues:
    """
    Args:
        done: share of the run's steps that lie behind, from 0 to 1.
        lr_scale: what the rates are multiplied with after a rollback.
    """
    rate = lr_scale * between(1.0, spec.lr_end, done)
    gamma = between(1.0, spec.gamma_end, done)
    return ScheduleValues(
        lr_g=rate * spec.lr_g,
        lr_d=rate * spec.lr_d,
        r1_gamma=gamma * spec.r1_gamma,
        r2_gamma=gamma * spec.r2_gamma,
        beta2=between(spec.beta2, spec.beta2_end or spec.beta2, done),
    )
