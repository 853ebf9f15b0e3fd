"""
The tutorial's stack of transposed convolutions, each of which doubles the side.

Source: Radford et al. 2015, arXiv:1511.06434.
"""

from collections.abc import Sequence

from torch import nn


def doublings(into: int, channels: Sequence[int]) -> list[nn.Module]:
    """
    Return layers for an nn.Sequential, without bias, because BatchNorm would remove it.

    Args:
        into: dimensions of a latent vector.
        channels: of each layer: the first makes 4×4 pixels, every other one doubles the side.
    """
    layers: list[nn.Module] = []
    for place, out in enumerate(channels):
        kernel, stride, padding = (4, 1, 0) if place == 0 else (4, 2, 1)
        layers += [
            nn.ConvTranspose2d(into, out, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        ]
        into = out
    return layers
