"""
The residual pair: blocks without normalisation between resizes, after R3GAN, made small.

A block adds what it has learned to what came in, and begins as nothing at all, so a deep
network starts as a shallow one and needs no BatchNorm to train. Sides are doubled by
repeating and smoothing pixels and halved by averaging them, which makes no checkerboard as
a transposed convolution does. The resize next to the pixels is a sub-pixel convolution that
starts as a repeat: a layer at full size would cost more than all others together.

Shapes in names: B pictures, C channels, H and W pixels, Z latent numbers.

Source: Huang et al. 2025 (R3GAN), arXiv:2501.05441, section 4; initialisation of the blocks:
Zhang et al. 2019 (Fixup), arXiv:1901.09321; of the last resize: Aitken et al. 2017
(ICNR), arXiv:1707.02937.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu

from jobs.networks.classes import ClassLatents, ClassScores
from jobs.networks.layout import edge_layer, widths

SLOPE = 0.2
GAIN = (2 / (1 + SLOPE**2)) ** 0.5
"""Keeps the variance through a LeakyReLU (He et al. 2015)."""
GROUP = 16
"""Channels that one 3×3 kernel sees, as in R3GAN: a ninth of a block's work instead of most of it."""


class BiasedActivation(nn.Module):
    """A bias for each channel, then LeakyReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return leaky_relu(x_BCHW + self.bias, SLOPE)


def convolution(into: int, out: int, kernel: int, *, gain: float, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the side; its weights start with variance gain² / fan-in."""
    layer = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    with torch.no_grad():
        layer.weight.normal_().mul_(gain / (into // groups * kernel**2) ** 0.5)
    return layer


class Block(nn.Module):
    """
    x + W₃ φ(W₂ φ(W₁ x)), with a 3×3 kernel in the middle; W₃ starts as zero.

    Args:
        channels: in and out.
        blocks: in the whole network: the more, the smaller the start of each.
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
    Twice the side: pixels are repeated, then averaged over 3×3, which comes to the kernel 1, 2, 2, 1.

    R3GAN's is 1, 3, 3, 1. PyTorch's bilinear resize has no deterministic backward on a GPU.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        repeated = interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        return avg_pool2d(repeated, 3, stride=1, padding=1, count_include_pad=False)


class ResNetGenerator(nn.Module):
    """
    Latents (B, Z, 1, 1) to pictures (B, 3, size, size), in [-1, 1] in eval mode.

    In training it is linear at the end, as in R3GAN: a Tanh would have to go to infinity
    for the pure white and black of a drawing.
    """

    def __init__(self, *, size: int, nz: int, ngf: int, classes: int = 0) -> None:
        super().__init__()
        factors = widths(size)
        _, side, _ = edge_layer(size)
        self.GeneClasses = ClassLatents(classes) if classes else None
        into = nz + ClassLatents.NUMBERS if classes else nz
        channels = ngf * factors[0]
        stem = nn.ConvTranspose2d(into, channels, 4, bias=False)
        with torch.no_grad():
            stem.weight.normal_().mul_(into**-0.5)
        layers: list[nn.Module] = [stem, Block(channels, blocks=len(factors))]
        for factor in factors[1:]:
            layers += [
                convolution(channels, ngf * factor, 1, gain=1),
                Double(),
                Block(ngf * factor, blocks=len(factors)),
            ]
            channels = ngf * factor
        pixels = nn.Conv2d(channels, 3 * side**2, 3, padding=1)
        with torch.no_grad():
            one_pixel = torch.randn(3, channels, 3, 3) * (9 * channels) ** -0.5
            pixels.weight.copy_(one_pixel.repeat_interleave(side**2, dim=0))
            nn.init.zeros_(cast(Tensor, pixels.bias))
        self.Gene = nn.Sequential(*layers, pixels, nn.PixelShuffle(side))

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.GeneClasses is not None:
            latents_BZ11 = self.GeneClasses(latents_BZ11, labels_B)
        images_B3HW = cast(Tensor, self.Gene(latents_BZ11))
        return images_B3HW if self.training else images_B3HW.clamp(-1, 1)


class ResNetDiscriminator(nn.Module):
    """Pictures (B, 3, size, size) in [-1, 1] to one logit each, shape (B,): the generator, mirrored."""

    def __init__(self, *, size: int, ndf: int, classes: int = 0) -> None:
        super().__init__()
        factors = widths(size)[::-1]
        _, side, _ = edge_layer(size)
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
        # Each channel's 4×4 to one number, then all to one: no bias, which a pairing loss cannot feel.
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
