"""
The moving average of the generator's weights: what is kept, shown and sampled.

G circles around its goal; the mean of its way is nearer than any point of it.

Source: Karras et al. 2021 (stylegan3, training_loop.py): a half-life counted in
pictures, which grows with the run at first, so that the average forgets its start.
"""

import copy

import torch

from jobs.networks.dcgan import AnyGenerator

RAMP_UP = 0.05
"""The half-life is at most this share of the pictures seen so far."""


def ema_decay(pictures: int, seen: int, half_life: float) -> float:
    """
    Share of the old average that stays.

    Args:
        pictures: that G made since the last update.
        seen: that G made since the run began, these included.
        half_life: in pictures.
    """
    return float(0.5 ** (pictures / max(min(half_life, seen * RAMP_UP), 1e-8)))


class Ema:
    """
    A copy of a network, in eval mode, that follows it slowly.

    Args:
        net: whose tensors stay the same ones: loading weights writes into them.
    """

    def __init__(self, net: AnyGenerator, half_life: float) -> None:
        self.half_life = half_life
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        # Asked for once: a state_dict() takes as long as all that update() does with it.
        self._floats = [(a, b) for a, b in pairs if a.is_floating_point()]
        self._counters = [(a, b) for a, b in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self, *, pictures: int, seen: int) -> None:
        """
        Move towards the network, BatchNorm's running statistics included: the statistics of
        single steps belong to weights that the average has not.
        """
        towards = 1 - ema_decay(pictures, seen, self.half_life)
        torch._foreach_lerp_([a for a, _ in self._floats], [b for _, b in self._floats], towards)
        if self._counters:
            torch._foreach_copy_([a for a, _ in self._counters], [b for _, b in self._counters])
