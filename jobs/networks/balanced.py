"""
The tutorial's generator with balanced channel widths and a sub-pixel convolution as its last layer.

The tutorial halves the channels at each doubling of the side, so that nearly all weights are at 4×4 and 8×8
and few channels remain at high resolution. Here the wide layers have half as many channels and the narrow
layers twice as many: at 96 pixels 40 % fewer weights, and 50 % more work per image. The sub-pixel convolution
is initialised to nearest-neighbour upsampling, which avoids checkerboard artefacts.

Shapes in names: B images, C channels, Z latent dimensions, H, W pixels.

Source: sub-pixel convolution: Shi et al. 2016, arXiv:1609.07009; its initialisation: Aitken et al. 2017
(ICNR), arXiv:1707.02937. The widths were chosen by measurement: docs/quality.md.
"""

from typing import cast

import torch
from torch import Tensor, nn

from jobs.networks.classes import ClassLatents
from jobs.networks.layout import balanced_widths, edge_layer
from jobs.networks.transposed_conv import doublings


class BalancedGenerator(nn.Module):
    """Map latents (B, Z, 1, 1) to images (B, 3, size, size) in (-1, 1)."""

    def __init__(self, *, size: int, nz: int, ngf: int, classes: int = 0) -> None:
        super().__init__()
        _, side, _ = edge_layer(size)
        self.GeneClasses = ClassLatents(classes) if classes else None
        channels = [ngf * factor for factor in balanced_widths(size)]
        layers = doublings(nz + ClassLatents.NUMBERS if classes else nz, channels)
        pixels = nn.Conv2d(channels[-1], 3 * side**2, 3, padding=1)
        with torch.no_grad():
            pixels.weight.copy_(pixels.weight[:3].repeat_interleave(side**2, dim=0))
            nn.init.zeros_(cast(Tensor, pixels.bias))
        self.Gene = nn.Sequential(*layers, pixels, nn.PixelShuffle(side), nn.Tanh())

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.GeneClasses is not None:
            latents_BZ11 = self.GeneClasses(latents_BZ11, labels_B)
        return cast(Tensor, self.Gene(latents_BZ11))
