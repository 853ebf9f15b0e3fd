"""
The tutorial's way from latents to features: transposed convolutions that double the side.

Source: Radford et al. 2015, arXiv:1511.06434.
"""

from collections.abc import Sequence

from torch import nn


def doublings(into: int, channels: Sequence[int]) -> list[nn.Module]:
    """
    Args:
        into: numbers of a latent vector.
        channels: of each layer: the first makes 4×4 pixels, each further one twice the side.

    Returns:
        Layers for an nn.Sequential, no bias in any: BatchNorm would take it away again.
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
