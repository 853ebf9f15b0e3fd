"""
The last layers of a generator: from features to an image with twice or three times their side.

Shapes in names: B images, C channels, H, W pixels.

Source: sub-pixel convolution: Shi et al. 2016, arXiv:1609.07009; its initialisation: Aitken et al. 2017
(ICNR), arXiv:1707.02937.
"""

from collections.abc import Callable
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from jobs.networks.layout import edge_layer

FULL_RESOLUTION_CHANNELS = 16

Head = Callable[[int, int], list[nn.Module]]
"""From channels and the size of the image to layers."""


class LastLayers(TypedDict, total=False):
    """Options of every generator's last layers; each is off unless it is given."""

    full_res_conv: bool
    antialias: bool


def last_layers(
    usual: Head, channels: int, size: int, *, full_res_conv: bool = False, antialias: bool = False
) -> list[nn.Module]:
    """
    Return the last layers of a generator, without its Tanh.

    Args:
        usual: those without full_res_conv.
    """
    head = full_resolution_head if full_res_conv else usual
    return [*head(channels, size), *([LowPass(size)] if antialias else [])]


class LowPass(nn.Module):
    """
    Average each channel over three pixels in both directions; those beyond the edge are those of the edge.

    The layers before it compute each of the 3×3 (or 2×2) pixels of a position with weights of its own, and
    their differences show as a pattern of dots (Odena et al. 2016, doi:10.23915/distill.00003). The weights
    [1, 1, 1] / 3 have a zero at a period of three pixels, [1, 2, 1] / 4 at one of two, so this pattern cannot
    pass. The filter comes before the Tanh, which restores the contrast of an outline.

    Source: Karras et al. 2019 (StyleGAN), arXiv:1812.04948, section 2, filters after upsampling by two.

    Args:
        size: of the image.
    """

    kernel: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        _, side, _ = edge_layer(size)
        taps = torch.tensor([1.0, 1.0, 1.0]) / 3 if side == 3 else torch.tensor([1.0, 2.0, 1.0]) / 4
        # In the state dict, so that another program cannot take the weights and omit the filter.
        self.register_buffer("kernel", torch.outer(taps, taps).expand(3, 1, 3, 3).contiguous())

    def forward(self, images_B3HW: Tensor) -> Tensor:
        # nn.functional.pad does the same, but deterministically on a GPU only in a slow way.
        for side in (2, 3):
            first, last = images_B3HW.narrow(side, 0, 1), images_B3HW.narrow(side, -1, 1)
            images_B3HW = torch.cat([first, images_B3HW, last], dim=side)
        return nn.functional.conv2d(images_B3HW, self.kernel, groups=3)


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
