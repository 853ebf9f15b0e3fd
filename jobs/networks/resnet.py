"""
Residual generator and discriminator without normalisation, a small version of R3GAN.

The last layer of a residual block is initialised to zero, so that a deep network starts as a
shallow one and trains without BatchNorm. Upsampling repeats and smooths pixels, downsampling
averages them, which avoids the checkerboard artefacts of transposed convolutions. The layer
next to the pixels is a sub-pixel convolution that is initialised to nearest-neighbour
upsampling: a convolution at full resolution would cost more than all other layers together.

Shapes in names: B images, C channels, H and W pixels, Z latent dimensions.

Source: Huang et al. 2025 (R3GAN), arXiv:2501.05441, section 4; initialisation of the blocks:
Zhang et al. 2019 (Fixup), arXiv:1901.09321; of the last resize: Aitken et al. 2017
(ICNR), arXiv:1707.02937.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu

from jobs.networks.classes import ClassLatents, ClassScores
from jobs.networks.heads import LastLayers, last_layers
from jobs.networks.layout import edge_layer, widths

SLOPE = 0.2
GAIN = (2 / (1 + SLOPE**2)) ** 0.5
"""Keeps the variance through a LeakyReLU (He et al. 2015)."""
GROUP = 16
"""Channels per group of the 3×3 convolutions, as in R3GAN; they do a ninth of a block's work."""


class BiasedActivation(nn.Module):
    """Add a bias per channel, then apply LeakyReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return leaky_relu(x_BCHW + self.bias, SLOPE)


def convolution(into: int, out: int, kernel: int, *, gain: float, groups: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the side, with initial weights of variance gain² / fan-in."""
    layer = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    with torch.no_grad():
        layer.weight.normal_().mul_(gain / (into // groups * kernel**2) ** 0.5)
    return layer


class Block(nn.Module):
    """
    Residual block: x + W₃ φ(W₂ φ(W₁ x)), with a 3×3 kernel in the middle; W₃ is initialised to zero.

    Args:
        channels: of the input and the output.
        blocks: number of blocks of the network, by which the initial weights are scaled.
    """

    def __init__(self, channels: int, *, blocks: int) -> None:
        super().__init__()
        # Fixup: L^(-1/(2m - 2)) for m layers in a block.
        gain = GAIN * blocks ** (-1 / 4)
        groups = channels // GROUP if channels % GROUP == 0 else 1
        self.layers = nn.Sequential(
            convolution(channels, channels, 1, gain=gain),
            BiasedActivation(channels),
            convolution(channels, channels, 3, gain=gain, groups=groups),
            BiasedActivation(channels),
            convolution(channels, channels, 1, gain=0),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + cast(Tensor, self.layers(x_BCHW))


class Double(nn.Module):
    """
    Double the side: repeat pixels, then average over 3×3, which equals the kernel 1, 2, 2, 1.

    R3GAN has 1, 3, 3, 1. PyTorch's bilinear resize has no deterministic backward on a GPU.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        repeated = interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        return avg_pool2d(repeated, 3, stride=1, padding=1, count_include_pad=False)


def residual_stages(into: int, channels: Sequence[int]) -> list[list[nn.Module]]:
    """
    Return the layers of each side of the features: 4×4, then its doubles.

    Args:
        into: dimensions of a latent vector.
        channels: of each side.
    """
    stem = nn.ConvTranspose2d(into, channels[0], 4, bias=False)
    with torch.no_grad():
        stem.weight.normal_().mul_(into**-0.5)
    stages: list[list[nn.Module]] = [[stem, Block(channels[0], blocks=len(channels))]]
    for before, out in pairwise(channels):
        stages.append([convolution(before, out, 1, gain=1), Double(), Block(out, blocks=len(channels))])
    return stages


def residual_head(channels: int, patch_size: int) -> list[nn.Module]:
    """Return a sub-pixel convolution that is initialised to nearest-neighbour upsampling."""
    pixels = nn.Conv2d(channels, 3 * patch_size**2, 3, padding=1)
    with torch.no_grad():
        one_pixel = torch.randn(3, channels, 3, 3) * (9 * channels) ** -0.5
        pixels.weight.copy_(one_pixel.repeat_interleave(patch_size**2, dim=0))
        nn.init.zeros_(cast(Tensor, pixels.bias))
    return [pixels, nn.PixelShuffle(patch_size)]


class ResNetGenerator(nn.Module):
    """
    Map latents (B, Z, 1, 1) to images (B, 3, size, size), in [-1, 1] in eval mode.

    The output is linear in training, as in R3GAN: a Tanh reaches pure white and black only
    at infinity.
    """

    def __init__(self, *, size: int, nz: int, ngf: int, classes: int = 0, **last: Unpack[LastLayers]) -> None:
        super().__init__()
        self.GeneClasses = ClassLatents(classes) if classes else None
        into = nz + ClassLatents.NUMBERS if classes else nz
        channels = [ngf * factor for factor in widths(size, last.get("patch_size", 0))]
        stages = residual_stages(into, channels)
        layers = [layer for stage in stages for layer in stage]
        layers += last_layers(residual_head, channels[-1], size, **last)
        self.Gene = nn.Sequential(*layers)

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.GeneClasses is not None:
            latents_BZ11 = self.GeneClasses(latents_BZ11, labels_B)
        images_B3HW = cast(Tensor, self.Gene(latents_BZ11))
        return images_B3HW if self.training else images_B3HW.clamp(-1, 1)


class ResNetDiscriminator(nn.Module):
    """Map images (B, 3, size, size) in [-1, 1] to logits (B,): the generator, mirrored."""

    def __init__(self, *, size: int, ndf: int, classes: int = 0, patch_size: int = 0) -> None:
        super().__init__()
        factors = widths(size, patch_size)[::-1]
        _, side, _ = edge_layer(size, patch_size)
        channels = ndf * factors[0]
        layers: list[nn.Module] = [
            nn.PixelUnshuffle(side),
            convolution(3 * side**2, channels, 3, gain=1),
            Block(channels, blocks=len(factors)),
        ]
        for factor in factors[1:]:
            layers += [
                nn.AvgPool2d(2),
                convolution(channels, ndf * factor, 1, gain=1),
                Block(ndf * factor, blocks=len(factors)),
            ]
            channels = ndf * factor
        # 4×4 to one value per channel, then all to one. No bias: a relativistic loss cancels it.
        gather = nn.Conv2d(channels, channels, 4, groups=channels, bias=False)
        judge = nn.Conv2d(channels, 1, 1, bias=False)
        with torch.no_grad():
            gather.weight.normal_().mul_(1 / 4)
            judge.weight.normal_().mul_(channels**-0.5)
        self.Discrim = nn.Sequential(*layers, gather, judge)
        self.DiscrimClasses = ClassScores(classes, channels) if classes else None

    def forward(self, images_B3HW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        features_BC11 = cast(Tensor, self.Discrim[:-1](images_B3HW))
        logits_B = cast(Tensor, self.Discrim[-1](features_BC11)).flatten()
        if self.DiscrimClasses is not None:
            logits_B = logits_B + self.DiscrimClasses(features_BC11, labels_B)
        return logits_B
