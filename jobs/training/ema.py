"""
Exponential moving average of the generator's weights: the generator that is saved, shown and sampled.

Source: Karras et al. 2021 (stylegan3, training_loop.py): a half-life in images, limited at first to a share
of the images so far, so that the initial weights lose their influence.
"""

import copy

import torch

from jobs.networks.dcgan import AnyGenerator

RAMP_UP = 0.05
"""The half-life is at most this share of the images seen so far."""


def ema_decay(images: int, images_seen: int, half_life: float) -> float:
    """
    Return the weight of the old average in an update.

    Args:
        images: images that G generated since the last update.
        images_seen: images that G generated since the run began, these included.
        half_life: in images.
    """
    return float(0.5 ** (images / max(min(half_life, images_seen * RAMP_UP), 1e-8)))


class Ema:
    """
    A copy of a network in eval mode that follows its weights.

    Args:
        net: its tensors must stay the same objects; loading weights writes into them.
        half_life: in images.
    """

    def __init__(self, net: AnyGenerator, half_life: float) -> None:
        self.half_life = half_life
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        # Collected once: a state_dict() takes as long as the whole update.
        self._floats = [(average, value) for average, value in pairs if average.is_floating_point()]
        self._counters = [(average, value) for average, value in pairs if not average.is_floating_point()]

    @torch.no_grad()
    def update(self, *, images: int, images_seen: int) -> None:
        """
        Move the average towards the network, including BatchNorm's running statistics.

        The statistics of single steps belong to weights that the average does not have.

        Args:
            images, images_seen: see ema_decay().
        """
        weight = 1 - ema_decay(images, images_seen, self.half_life)
        torch._foreach_lerp_([a for a, _ in self._floats], [b for _, b in self._floats], weight)
        if self._counters:
            torch._foreach_copy_([a for a, _ in self._counters], [b for _, b in self._counters])
