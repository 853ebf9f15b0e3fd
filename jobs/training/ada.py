"""
Adaptive augmentation: D sees pictures changed no more often than it needs, lest it learn them by heart.

While D can tell training pictures from fakes too surely, the chance p that a picture is
changed grows; when it cannot, p shrinks. Everything stays on the device: a step waits for nothing.

Source: Karras et al. 2020, arXiv:2006.06676, section 3 (the heuristic r_t).
"""

from collections.abc import Collection

import torch
from torch import Tensor

EVERY = 4
"""Steps of D between two changes of p."""
FULL_UNTIL, NONE_FROM = 20_000, 100_000
"""Pictures in a data set up to which 'auto' changes all, and from which it changes none."""
AUTO = ("translation", "color")
"""What 'auto' alone does to pictures."""
MOST_COLOUR = 0.3
"""Colours that are changed more often leak into samples: docs/quality.md."""


def plan(policies: tuple[str, ...], most: float, pictures: int) -> tuple[tuple[str, ...], float]:
    """
    What an --augment comes to.

    Args:
        policies: of the spec; with 'auto' the chance goes by the size of the data set.
        most: the chance of a change, at most.
        pictures: in the data set.

    Returns:
        The policies, none if nothing is ever changed, and the chance of each, at most.
    """
    if "auto" in policies:
        policies = tuple(one for one in policies if one != "auto") or AUTO
        most = most * min(1.0, max(0.0, (NONE_FROM - pictures) / (NONE_FROM - FULL_UNTIL)))
    return (policies, most) if most > 0 else ((), 0.0)


class Ada:
    """
    The chance p, and what steers it.

    Args:
        target: mean sign of D's verdict on training pictures that is aimed at.
        speed: pictures in which p can go from 0 to 1.
    """

    def __init__(self, target: float, speed: float, device: torch.device) -> None:
        self.target = target
        self.speed = speed
        # p, the sum of mean signs since its last change, and of how many.
        self.numbers_3 = torch.zeros(3, device=device)

    @property
    def p(self) -> Tensor:
        """As it is now: a view, which see() changes."""
        return self.numbers_3[0]

    def chances(self, policies: Collection[str]) -> dict[str, Tensor]:
        """p of each policy."""
        return {one: self.p.clamp(max=MOST_COLOUR) if one == "color" else self.p for one in policies}

    @torch.no_grad()
    def see(self, sign: Tensor, verdicts: int, *, d_steps: int, most: float) -> None:
        """
        Take D's verdicts of one step.

        Args:
            sign: the mean of their signs, positive where D takes a training picture for real.
            verdicts: how many.
            d_steps: that D has made before this one.
            most: what p may be at most.
        """
        p, total, count = self.numbers_3
        total, count = total + sign, count + 1
        if d_steps % EVERY == EVERY - 1:
            step = EVERY * verdicts / self.speed
            p = (p + step * (total / count - self.target).sign()).clamp(0, most)
            total, count = torch.zeros_like(p), torch.zeros_like(p)
        self.numbers_3.copy_(torch.stack([p, total, count]))
