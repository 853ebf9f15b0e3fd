"""
The tutorial's stale fakes: between two steps of G, D sees the same pictures again.

The tutorial runs G anew for each batch, though neither its weights nor the noise
have changed. The pictures are the same, so they are kept; what remains of the
repeated passes is that each moved BatchNorm's running statistics, and that is
replayed. It takes a fifth off a step of D.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jobs.gan.networks import Generator


class StaleFakes:
    """
    The fakes that D sees until G steps again. Needs G in train mode.

    Args:
        net: whose statistics move.
        run: a pass of it; net itself by default.
    """

    def __init__(self, net: Generator, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self._run = run or net
        self._norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        self._g_steps = -1
        self._pictures_B3HW = torch.empty(0)
        self._moves: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def get(self, g_steps: int, latents_BZ11: Tensor) -> Tensor:
        """
        Args:
            g_steps: how often G has stepped: the pictures are made anew when it has.
            latents_BZ11: the noise of this g_steps.

        Returns:
            (B, 3, H, W), without a graph.
        """
        if g_steps != self._g_steps:
            self._render(latents_BZ11)
            self._g_steps = g_steps
        for norm, (mean_C, var_C) in zip(self._norms, self._moves, strict=True):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert norm.num_batches_tracked is not None
            keep = 1 - (norm.momentum or 0.0)
            norm.running_mean.mul_(keep).add_(mean_C)
            norm.running_var.mul_(keep).add_(var_C)
            norm.num_batches_tracked.add_(1)
        return self._pictures_B3HW

    def _render(self, latents_BZ11: Tensor) -> None:
        """One pass from statistics of zero: what it leaves there is what each pass adds."""
        buffers = [buffer for norm in self._norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            buffer.zero_()
        self._pictures_B3HW = self._run(latents_BZ11)
        self._moves = [(_copy(norm.running_mean), _copy(norm.running_var)) for norm in self._norms]
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _copy(statistic_C: Tensor | None) -> Tensor:
    assert statistic_C is not None
    return statistic_C.clone()
