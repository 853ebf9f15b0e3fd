"""
The last layers of a generator: from features to an image, a patch of pixels for each position.

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
"""From channels and the patch size to layers."""


class LastLayers(TypedDict, total=False):
    """Options of every generator's last layers; each is off, or 0, unless it is given."""

    patch_size: int
    full_res_conv: bool
    antialias: bool


def last_layers(
    usual: Head,
    channels: int,
    size: int,
    *,
    patch_size: int = 0,
    full_res_conv: bool = False,
    antialias: bool = False,
) -> list[nn.Module]:
    """
    Return the last layers of a generator, without its Tanh.

    Args:
        usual: those without full_res_conv.
        patch_size: as in size_plan().
    """
    _, patch_size, _ = edge_layer(size, patch_size)
    head = full_resolution_head if full_res_conv else usual
    return [*head(channels, patch_size), *([LowPass(patch_size)] if antialias else [])]


class LowPass(nn.Module):
    """
    Average each channel over neighbouring pixels; those beyond the edge are those of the edge.

    The layers before it compute each pixel of a patch with weights of its own, and their differences show as
    a pattern of dots (Odena et al. 2016, doi:10.23915/distill.00003). A mean over one patch, [1, 1, 1] / 3,
    has a zero at the period of this pattern, so it cannot pass. An even side needs half a pixel more at both
    ends to have a centre: [1, 2, 1] / 4, [1, 2, 2, 2, 1] / 8. The filter comes before the Tanh, which
    restores the contrast of an outline.

    Source: Karras et al. 2019 (StyleGAN), arXiv:1812.04948, section 2, filters after upsampling by two.

    Args:
        patch_size: side of a patch in pixels.
    """

    kernel: Tensor

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        taps = torch.ones(patch_size)
        if patch_size % 2 == 0:
            taps = torch.cat([torch.ones(1), torch.full((patch_size - 1,), 2.0), torch.ones(1)])
        taps /= taps.sum()
        # In the state dict, so that another program cannot take the weights and omit the filter.
        self.register_buffer("kernel", torch.outer(taps, taps).repeat(3, 1, 1, 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        # nn.functional.pad does the same, but deterministically on a GPU only in a slow way.
        beyond = self.kernel.shape[-1] // 2
        for side in (2, 3):
            first, last = images_B3HW.narrow(side, 0, 1), images_B3HW.narrow(side, -1, 1)
            images_B3HW = torch.cat([first] * beyond + [images_B3HW] + [last] * beyond, dim=side)
        return nn.functional.conv2d(images_B3HW, self.kernel, groups=3)


def transposed_head(channels: int, patch_size: int) -> list[nn.Module]:
    """Return the tutorial's last layer, without its Tanh."""
    return [nn.ConvTranspose2d(channels, 3, patch_size + 2, patch_size, 1, bias=False)]


def subpixel_head(channels: int, patch_size: int) -> list[nn.Module]:
    """Return a sub-pixel convolution that is initialised to nearest-neighbour upsampling."""
    pixels = nn.Conv2d(channels, 3 * patch_size**2, 3, padding=1)
    with torch.no_grad():
        pixels.weight.copy_(pixels.weight[:3].repeat_interleave(patch_size**2, dim=0))
        nn.init.zeros_(cast(Tensor, pixels.bias))
    return [pixels, nn.PixelShuffle(patch_size)]


def full_resolution_head(channels: int, patch_size: int) -> list[nn.Module]:
    """
    Return a sub-pixel convolution to 16 channels and a 3×3 convolution at the resolution of the image.

    A sub-pixel convolution alone computes the pixels of one position independently of those of the next, so
    an outline cannot continue from one position to the next. The convolution at full resolution sees both.
    """
    mix = nn.Conv2d(channels, FULL_RESOLUTION_CHANNELS * patch_size**2, 1)
    with torch.no_grad():
        for values in mix.parameters():
            values.copy_(values[:FULL_RESOLUTION_CHANNELS].repeat_interleave(patch_size**2, dim=0))
    pixels = nn.Conv2d(FULL_RESOLUTION_CHANNELS, 3, 3, padding=1)
    return [mix, nn.PixelShuffle(patch_size), nn.LeakyReLU(0.2, inplace=True), pixels]
