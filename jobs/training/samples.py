"""
Sample grids: images of the same latents at every checkpoint.

They are generated from the checkpoint's copies, on the thread that writes them, so that training does not
wait. The tutorial's grids are generated before: their forward pass updates G's running statistics, which are
saved with the weights.

Shapes in names: B images in a batch, Z latent dimensions, H, W pixels.
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

FIRST_GRID = 500
"""Images seen at the first early grid; each later one comes after twice as many."""
GRID_IMAGES = 64
"""Images on a sample grid."""


class Samples:
    """
    The sample grids of one run.

    Args:
        fixed_latents_BZ11: drawn once before training, on the device.
        labels_B: class labels of a conditional run, one class per row of the grid.
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
        """The step of the last tutorial_pass(); -1: none since the run started or resumed."""
        self.labels_B = labels_B
        self.like_tutorial = (
            spec.recipe == "dcgan" and state.ema is None and labels_B is None and not spec.progressive
        )
        # A copy for generating grids; each grid loads its own weights.
        self._net = copy.deepcopy(state.sampler).train(self.like_tutorial)

    def tutorial_pass(self, epoch: int) -> Tensor | None:
        """
        Generate the grid as the tutorial does, every save_every epochs, before it saves G.

        G runs in train mode on all fixed latents at once, which updates its running statistics: once per
        step, also if the run is stopped and resumed right after.

        Returns:
            Images (GRID_IMAGES, 3, H, W); None where the tutorial generates no grid.
        """
        if not self.like_tutorial or epoch % self.spec.save_every != 0 or self.step == self.state.step:
            return None
        self.step = self.state.step
        with torch.no_grad():
            images_B3HW: Tensor = self.state.generator(self.fixed_latents_BZ11)
        return images_B3HW[:GRID_IMAGES].clone()

    def early_due(self, step: int, per_epoch: int) -> bool:
        """
        Return whether a grid is due after a batch, before the run's first checkpoint with a grid.

        The tutorial has none.
        """
        if self.spec.recipe == "dcgan" or step >= self.spec.save_every * per_epoch:
            return False
        before, seen = ((step - 1) * self.spec.batch // FIRST_GRID, step * self.spec.batch // FIRST_GRID)
        return before.bit_length() < seen.bit_length()

    def early_grid(self) -> "NDArray[np.uint8]":
        """Generate a grid now. Draws no random number and changes nothing that is trained."""
        return self._draw({f"G.{key}": value for key, value in self.state.sampler.state_dict().items()})

    def sample(self, epoch: int, images_B3HW: Tensor | None, generator: Mapping[str, Tensor]) -> Sample:
        """
        Return the grid of an epoch, to be generated when it is written.

        Args:
            images_B3HW: the result of tutorial_pass().
            generator: copies of the weights, keys 'G.…'.
        """
        if images_B3HW is not None:
            draw = partial(self._grid, images_B3HW)
        else:
            draw = partial(self._draw, generator)
        return Sample(f"epoch-{epoch:04d}", draw)

    @torch.no_grad()
    def _draw(self, generator: Mapping[str, Tensor]) -> "NDArray[np.uint8]":
        weights = {key[2:]: value for key, value in generator.items() if key.startswith("G.")}
        self._net.load_state_dict(weights)
        # BatchNorm in train mode depends on the whole batch, so all latents are needed.
        if self.labels_B is not None:
            return self._grid(self._net(self.fixed_latents_BZ11, self.labels_B))
        count = self.spec.batch if self.like_tutorial else GRID_IMAGES
        return self._grid(self._net(self.fixed_latents_BZ11[:count])[:GRID_IMAGES])

    def _grid(self, images_B3HW: Tensor) -> "NDArray[np.uint8]":
        to_bytes = grids.stretched if self.like_tutorial else grids.to_uint8
        return grids.tile(to_bytes(images_B3HW))
