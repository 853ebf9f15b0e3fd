"""
The grids that show how far a run is: the same latents at every age.

They are drawn from the checkpoint's own copies, on the thread that writes them, so that
training does not wait. The tutorial's own grids cannot wait that long: the pass that
makes them moves G's running statistics, which belong to the weights that are saved next.

Shapes in names: B pictures in a batch, Z latent numbers, H, W pixels.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jobs import grids
from jobs.context import Sample
from jobs.specs import TrainSpec
from jobs.training.state import TrainState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHOWN = 64
"""Pictures on a sample grid."""


class Samples:
    """
    One run's grids.

    Args:
        fixed_latents_BZ11: drawn once before training, on the device.
        labels_B: of a conditional run, the class of each of them, a class a row; then all are shown.
    """

    def __init__(
        self,
        spec: TrainSpec,
        state: TrainState,
        fixed_latents_BZ11: Tensor,
        labels_B: Tensor | None = None,
    ) -> None:
        self.spec = spec
        self.state = state
        self.fixed_latents_BZ11 = fixed_latents_BZ11
        self.step = -1
        """Where the tutorial's own pass was last made; -1: not since the run began or went on."""
        self.labels_B = labels_B
        self.as_tutorial = spec.recipe == "dcgan" and state.ema is None and labels_B is None
        # Of this copy only the form is used: each grid brings its own weights.
        self._net = copy.deepcopy(state.sampler).train(self.as_tutorial)

    def pass_of_the_tutorial(self, epoch: int) -> Tensor | None:
        """
        What the tutorial does to G before it saves it, where it does: every save_every epochs.

        It shows G in train mode, all fixed latents at once, and so moves its running
        statistics: once, also if the run was stopped right after.

        Returns:
            The pictures, (SHOWN, 3, H, W), of such an epoch.
        """
        if not self.as_tutorial or epoch % self.spec.save_every != 0 or self.step == self.state.step:
            return None
        self.step = self.state.step
        with torch.no_grad():
            images_B3HW: Tensor = self.state.generator(self.fixed_latents_BZ11)
        return images_B3HW[:SHOWN].clone()

    def sample(self, epoch: int, tutorials: Tensor | None, generator: Mapping[str, Tensor]) -> Sample:
        """
        Args:
            tutorials: what pass_of_the_tutorial() gave.
            generator: the weights to show, keys 'G.…': copies.
        """
        draw = partial(self._tiled, tutorials) if tutorials is not None else partial(self._draw, generator)
        return Sample(f"epoch-{epoch:04d}", draw)

    @torch.no_grad()
    def _draw(self, generator: Mapping[str, Tensor]) -> "NDArray[np.uint8]":
        weights = {key[2:]: value for key, value in generator.items() if key.startswith("G.")}
        self._net.load_state_dict(weights)
        # BatchNorm in train mode sees the whole batch, so all of it is needed.
        if self.labels_B is not None:
            return self._tiled(self._net(self.fixed_latents_BZ11, self.labels_B))
        shown = self.spec.batch if self.as_tutorial else SHOWN
        return self._tiled(self._net(self.fixed_latents_BZ11[:shown])[:SHOWN])

    def _tiled(self, images_B3HW: Tensor) -> "NDArray[np.uint8]":
        to_bytes = grids.stretched if self.as_tutorial else grids.to_uint8
        return grids.tile(to_bytes(images_B3HW))
