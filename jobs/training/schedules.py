"""
What changes over a run: the networks that step, and schedules of learning rates, penalties and beta2.

Pure functions of the step, so a resumed run needs no stored state.

Source: Huang et al. 2025 (R3GAN), arXiv:2501.05441, appendix on training: large steps and strong penalties
early, small ones late.
"""

import math
from dataclasses import dataclass

from jobs.specs import TrainSpec


@dataclass(frozen=True)
class Phase:
    """Which networks step on a batch. Batches of equal phase do the same work on other numbers."""

    d: bool
    g: bool
    penalty: bool
    """Gradient penalties are due."""


@dataclass(frozen=True)
class ScheduleValues:
    """The values of one step."""

    lr_g: float
    lr_d: float
    r1_gamma: float
    r2_gamma: float
    beta2: float


def phase_at(spec: TrainSpec, batch_index: int, d_steps: int, values: ScheduleValues) -> Phase:
    """
    Return which networks step on a batch.

    Args:
        batch_index: index of the batch in its epoch, from 0.
        d_steps: steps of D before this batch.
    """
    d, g = batch_index % spec.d_every == 0, batch_index % spec.g_every == 0
    penalised = values.r1_gamma > 0 or values.r2_gamma > 0
    return Phase(d, g, penalty=d and penalised and d_steps % spec.penalty_every == 0)


def side_at(spec: TrainSpec, step: int) -> int:
    """
    Return the side of the images that a batch is trained on, in pixels.

    Args:
        step: batches before this one.
    """
    seen = step * spec.batch
    return spec.size >> sum(seen < begins for begins in spec.progressive)


def side_began(spec: TrainSpec, step: int) -> int:
    """Return the first step that is trained on images of the same side as this one."""
    begun = [begins for begins in spec.progressive if step * spec.batch >= begins]
    return -(-begun[-1] // spec.batch) if begun else 0


def steps_before(step: int, per_epoch: int, every: int) -> int:
    """
    Return how often a network has stepped before a batch.

    Args:
        step: batches before this one.
        per_epoch: batches in an epoch.
        every: the network steps where the index in the epoch is divisible by this.
    """
    epochs, rest = divmod(step, per_epoch)
    return epochs * -(-per_epoch // every) + -(-rest // every)


def half_cosine(first: float, last: float, done: float) -> float:
    """
    Interpolate from `first` at done = 0 to `last` at done = 1 on half a cosine.

    Returns:
        Exactly `first` where both are equal.
    """
    return first + (last - first) * (1 - math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2


def schedule_values(spec: TrainSpec, done: float, *, lr_scale: float = 1.0) -> ScheduleValues:
    """
    Return the values of one step.

    Args:
        done: completed share of the run's steps, 0 to 1.
        lr_scale: factor of both learning rates after a rollback.
    """
    rate = lr_scale * half_cosine(1.0, spec.lr_end, done)
    gamma = half_cosine(1.0, spec.gamma_end, done)
    return ScheduleValues(
        lr_g=rate * spec.lr_g,
        lr_d=rate * spec.lr_d,
        r1_gamma=gamma * spec.r1_gamma,
        r2_gamma=gamma * spec.r2_gamma,
        beta2=half_cosine(spec.beta2, spec.beta2_end or spec.beta2, done),
    )
