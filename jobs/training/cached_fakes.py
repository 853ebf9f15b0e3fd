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

from jobs.device import send


class CachedFakes:
    """
    The fakes that D sees until G steps again. Needs G in train mode.

    Args:
        net: whose statistics move.
        run: a pass of it; net itself by default.
    """

    def __init__(self, net: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self._run = run or net
        self._norms = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
        self._device = next(net.parameters()).device
        self._g_steps = -1
        self._pictures_B3HW = torch.empty(0)
        self._batch_statistics: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def get(self, g_steps: int, latents: Callable[[], Tensor]) -> Tensor:
        """
        Args:
            g_steps: how often G has stepped: the pictures are made anew when it has.
            latents: draws the noise of this g_steps, (B, Z, 1, 1), on any device.

        Returns:
            (B, 3, H, W), without a graph.
        """
        if g_steps != self._g_steps:
            self._render(send(latents(), self._device))
            self._g_steps = g_steps
        for norm, (mean_C, var_C) in zip(self._norms, self._batch_statistics, strict=True):
            _move(norm.running_mean, mean_C, norm.momentum or 0.0, wide=False)
            _move(norm.running_var, var_C, norm.momentum or 0.0, wide=True)
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
        return self._pictures_B3HW

    def _render(self, latents_BZ11: Tensor) -> None:
        """One pass with a momentum of 1, which leaves the batch's own statistics; all is put back after."""
        buffers = [buffer for norm in self._norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        momenta = [norm.momentum for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 1.0
        try:
            self._pictures_B3HW = self._run(latents_BZ11)
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.momentum = momentum
        self._batch_statistics = [(_copy(norm.running_mean), _copy(norm.running_var)) for norm in self._norms]
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _move(running_C: Tensor | None, seen_C: Tensor, momentum: float, *, wide: bool) -> None:
    """
    As BatchNorm's own kernel on a CPU does it, bit for bit.

    Args:
        wide: its variance is a number of 64 bits until the sum is rounded.
    """
    assert running_C is not None
    running_C.mul_(1 - momentum)
    if wide:
        running_C.copy_(running_C.double().add_(seen_C.double(), alpha=_in_32_bits(momentum)))
    else:
        running_C.add_(seen_C * momentum)


def _in_32_bits(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def _copy(statistic_C: Tensor | None) -> Tensor:
    assert statistic_C is not None
    return statistic_C.clone()
