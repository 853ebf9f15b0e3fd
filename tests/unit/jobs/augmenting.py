"""Augmentation in one call, as the training loop does it in two."""

from collections.abc import Collection

import torch
from torch import Tensor

from jobs.device import send_all
from jobs.training.augment import apply, draw


def augment(
    images_B3HW: Tensor, policies: Collection[str], draws: torch.Generator, p: Tensor | None = None
) -> Tensor:
    """Draw and apply policies; p is the probability of each for each image, None: 1."""
    drawn = draw(policies, images_B3HW.shape, draws, always=p is None)
    probabilities = None if p is None else dict.fromkeys(policies, p)
    return apply(images_B3HW, policies, send_all(drawn, images_B3HW.device), probabilities)
