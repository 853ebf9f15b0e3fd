"""
The last layers of a generator: from features to an image with twice or three times their side.

Shapes in names: B images, C channels, H, W pixels.

Source: sub-pixel convolution: Shi et al. 2016, arXiv:1609.07009; its initialisation: Aitken et al. 2017
(ICNR), arXiv:1707.02937.
"""

from typing import cast

import torch
from torch import Tensor, nn

from jobs.networks.layout import edge_layer

FULL_RESOLUTION_CHANNELS = 16


def transposed_head(channels: int, size: int) -> list[nn.Module]:
    """Return the tutorial's last layer for images of `size`, without its Tanh."""
    return [nn.ConvTranspose2d(channels, 3, *edge_layer(size), bias=False)]


def subpixel_head(channels: int, size: int) -> list[nn.Module]:
    """Return a sub-pixel convolution that is initialised to nearest-neighbour upsampling."""
    _, side, _ = edge_layer(size)
    pixels = nn.Conv2d(channels, 3 * side**2, 3, padding=1)
    with torch.no_grad():
        pixels.weight.copy_(pixels.weight[:3].repeat_interleave(side**2, dim=0))
        nn.init.zeros_(cast(Tensor, pixels.bias))
    return [pixels, nn.PixelShuffle(side)]


def full_resolution_head(channels: int, size: int) -> list[nn.Module]:
    """
    Return a sub-pixel convolution to 16 channels and a 3×3 convolution at the resolution of the image.

    A sub-pixel convolution alone computes the pixels of one position independently of those of the next, so
    an outline cannot continue from one position to the next. The convolution at full resolution sees both.
    """
    _, side, _ = edge_layer(size)
    mix = nn.Conv2d(channels, FULL_RESOLUTION_CHANNELS * side**2, 1)
    with torch.no_grad():
        for values in mix.parameters():
            values.copy_(values[:FULL_RESOLUTION_CHANNELS].repeat_interleave(side**2, dim=0))
    pixels = nn.Conv2d(FULL_RESOLUTION_CHANNELS, 3, 3, padding=1)
    return [mix, nn.PixelShuffle(side), nn.LeakyReLU(0.2, inplace=True), pixels]
