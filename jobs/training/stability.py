"""
Signs that a run has diverged or collapsed although every number is finite.

They are reported and change nothing in the run: a NaN alone ends it.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from jobs import grids

LARGEST_LOSS = 1e4
"""Losses of GANs that learn stay below 1,000; a sigmoid or a penalty has no useful gradient up there."""
LOSSES = ("loss_d", "loss_g")
PROBED = 16


def diverged_loss(means: Mapping[str, float]) -> str | None:
    """Return which loss is far too large, if one is."""
    losses = {name: abs(means[name]) for name in LOSSES if name in means}
    name = max(losses, key=lambda one: losses[one], default=None)
    if name is None or losses[name] <= LARGEST_LOSS:
        return None
    return f"{name} is about 10^{int(math.log10(losses[name]))}"


@torch.no_grad()
def all_equal(sampler: nn.Module, latents_BZ11: Tensor, *, conditional: bool) -> bool:
    """
    Return whether a generator makes the same image, to the last of 256 levels, of different latents.

    Args:
        sampler: is copied, and its state does not change.
    """
    net = copy.deepcopy(sampler).eval()
    latents_BZ11 = latents_BZ11[:PROBED]
    labels = (torch.zeros(len(latents_BZ11), dtype=torch.int64, device=latents_BZ11.device),)
    images = grids.to_uint8(net(latents_BZ11, *(labels if conditional else ())))
    return len(images) > 1 and bool((images == images[:1]).all())
