"""
The tutorial's generator with balanced channel widths and a sub-pixel convolution as its last layer.

The tutorial halves the channels at each doubling of the side, so that nearly all weights are at 4×4 and 8×8
and few channels remain at high resolution. Here the wide layers have half as many channels and the narrow
layers twice as many: at 96 pixels 40 % fewer weights, and 50 % more work per image. The sub-pixel convolution
is initialised to nearest-neighbour upsampling, which avoids checkerboard artefacts.

Shapes in names: B images, C channels, Z latent dimensions, H, W pixels.

Source: jobs/networks/heads.py; the widths were chosen by measurement: docs/quality.md.
"""

from typing import Unpack, cast

from torch import Tensor, nn

from jobs.networks.classes import ClassLatents
from jobs.networks.heads import LastLayers, last_layers, subpixel_head
from jobs.networks.layout import balanced_widths
from jobs.networks.transposed_conv import doublings


class BalancedGenerator(nn.Module):
    """Map latents (B, Z, 1, 1) to images (B, 3, size, size) in (-1, 1)."""

    def __init__(self, *, size: int, nz: int, ngf: int, classes: int = 0, **last: Unpack[LastLayers]) -> None:
        super().__init__()
        self.GeneClasses = ClassLatents(classes) if classes else None
        channels = [ngf * factor for factor in balanced_widths(size, last.get("patch_size", 0))]
        layers = doublings(nz + ClassLatents.NUMBERS if classes else nz, channels)
        layers += last_layers(subpixel_head, channels[-1], size, **last)
        self.Gene = nn.Sequential(*layers, nn.Tanh())

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.GeneClasses is not None:
            latents_BZ11 = self.GeneClasses(latents_BZ11, labels_B)
        return cast(Tensor, self.Gene(latents_BZ11))
