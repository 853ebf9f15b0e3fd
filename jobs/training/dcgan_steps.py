"""
What the tutorial does differently: D sees the same fakes until G steps, and latents are drawn in its order.

The tutorial runs G again for each batch although neither its weights nor its latents have changed. The images
are the same, so they are cached; what remains of the repeated passes is that each updated the running
statistics of BatchNorm, and that is repeated here. It saves a fifth of a D step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jobs.device import send
from jobs.training.schedules import Phase


class CachedFakes:
    """
    The fakes that D sees until G steps again. G must be in train mode.

    Args:
        generator: the network whose running statistics are updated.
        forward: its forward pass; the network itself by default.
    """

    def __init__(self, generator: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        self._forward = forward or generator
        self._norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
        self._device = next(generator.parameters()).device
        self._g_steps = -1
        self._images_B3HW = torch.empty(0)
        self._batch_statistics: list[tuple[Tensor, Tensor]] = []

    def draw(self, phase: Phase, g_steps: int, latents: Callable[[int], Tensor]) -> dict[str, Tensor]:
        """
        Return the inputs of one batch in the tutorial's order of draws.

        The tutorial draws latents before the loop and again at each step of G, which uses the new ones; D
        then sees their images until G steps again. Draws are numbered by G's steps: checkpoints store none.

        Args:
            g_steps: steps of G before this batch.
            latents: returns the latents (B, Z, 1, 1) of a draw, on any device.
        """
        inputs: dict[str, Tensor] = {}
        if phase.d:
            inputs["fakes"] = self.get(g_steps, lambda: latents(g_steps))
        if phase.g:
            inputs["latents"] = latents(g_steps + 1)
        return inputs

    @torch.no_grad()
    def get(self, g_steps: int, latents: Callable[[], Tensor]) -> Tensor:
        """
        Return the fakes (B, 3, H, W), detached, and update the running statistics as a forward pass would.

        Args:
            g_steps: steps of G so far; images are generated again when it changes.
            latents: returns the latents (B, Z, 1, 1) for this g_steps, on any device.
        """
        if g_steps != self._g_steps:
            self._generate(send(latents(), self._device))
            self._g_steps = g_steps
        for norm, (mean_C, var_C) in zip(self._norms, self._batch_statistics, strict=True):
            _update(norm.running_mean, mean_C, norm.momentum or 0.0, float64=False)
            _update(norm.running_var, var_C, norm.momentum or 0.0, float64=True)
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
        return self._images_B3HW

    def _generate(self, latents_BZ11: Tensor) -> None:
        """Run one pass with momentum 1, which yields the batch's own statistics, and restore the buffers."""
        buffers = [buffer for norm in self._norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in buffers]
        momenta = [norm.momentum for norm in self._norms]
        for norm in self._norms:
            norm.momentum = 1.0
        try:
            self._images_B3HW = self._forward(latents_BZ11)
        finally:
            for norm, momentum in zip(self._norms, momenta, strict=True):
                norm.momentum = momentum
        self._batch_statistics = [(_copy(norm.running_mean), _copy(norm.running_var)) for norm in self._norms]
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def _update(running_C: Tensor | None, batch_C: Tensor, momentum: float, *, float64: bool) -> None:
    """
    Update a running statistic with the bits of BatchNorm's CPU kernel.

    Args:
        float64: the sum is computed in float64 and rounded once, as the kernel does for the variance.
    """
    assert running_C is not None
    running_C.mul_(1 - momentum)
    if float64:
        running_C.copy_(running_C.double().add_(batch_C.double(), alpha=_as_float32(momentum)))
    else:
        running_C.add_(batch_C * momentum)


def _as_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()


def _copy(statistic_C: Tensor | None) -> Tensor:
    assert statistic_C is not None
    return statistic_C.clone()
