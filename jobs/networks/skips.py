"""
Generator and discriminator with skip connections at a quarter, half and the full side of the images.

The generator adds an image at each of the three sides, the smaller ones enlarged; the discriminator reads the
image at each of them. With --progressive the networks have the layers of the small sides first and get those
of the next side later. What is added then starts at zero, so that both networks compute the same function
before and after, except for a spectral-norm discriminator, whose layers cannot be zero.

Shapes in names: B images, C channels, H, W pixels, Z latent dimensions.

Source: growing: Karras et al. 2018, arXiv:1710.10196; skip connections of images: Karras et al. 2020
(StyleGAN2), arXiv:1912.04958, section 4.1.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils.parametrizations import spectral_norm

from jobs.networks.classes import ClassLatents, ClassScores
from jobs.networks.heads import Head, LastLayers, last_layers, subpixel_head, transposed_head
from jobs.networks.layout import balanced_widths, edge_layer, skip_sides, widths
from jobs.networks.resnet import Block, Double, convolution, residual_head, residual_stages
from jobs.networks.transposed_conv import doublings

HEADS: dict[str, Head] = {
    "dcgan": transposed_head,
    "balanced": subpixel_head,
    "resnet": residual_head,
}


def levels(size: int, grown: int, patch_size: int = 0) -> list[tuple[int, int]]:
    """
    Return (side of the images, index of the features' side in widths()) of each level, smallest first.

    Args:
        grown: side of the images of the largest level.

    Returns:
        For 96 and 96: [(24, 1), (48, 2), (96, 3)].
    """
    return [
        (side, len(widths(side, patch_size)) - 1) for side in skip_sides(size, patch_size) if side <= grown
    ]


class SkipGenerator(nn.Module):
    """
    Map latents (B, Z, 1, 1) to images (B, 3, side, side) in [-1, 1].

    In train mode the side is `grown`, in eval mode always `size`: smaller images are enlarged.

    Args:
        arch: whose layers and widths are used.
        grown: side of the largest level.
    """

    def __init__(
        self,
        arch: str,
        *,
        size: int,
        grown: int,
        nz: int,
        ngf: int,
        classes: int,
        **last: Unpack[LastLayers],
    ) -> None:
        super().__init__()
        self.GeneClasses = ClassLatents(classes) if classes else None
        into = nz + ClassLatents.NUMBERS if classes else nz
        patch_size = last.get("patch_size", 0)
        found = levels(size, grown, patch_size)
        channels = [
            ngf * factor for factor in (balanced_widths if arch == "balanced" else widths)(size, patch_size)
        ]
        kept = channels[: found[-1][1] + 1]
        if arch == "resnet":
            stages = residual_stages(into, channels)[: len(kept)]
        else:
            layers = doublings(into, kept)
            stages = [layers[start : start + 3] for start in range(0, len(layers), 3)]
        self.Gene = nn.Sequential(*[layer for stage in stages for layer in stage])
        ends = [sum(map(len, stages[: index + 1])) for _, index in found]
        self.parts = list(pairwise([0, *ends]))
        self.GeneSkips = nn.ModuleList(
            nn.Sequential(*last_layers(HEADS[arch], channels[index], side, **last)) for side, index in found
        )
        for skip in list(self.GeneSkips)[1:]:
            _zero(skip)
        self.enlarge = Double()
        self.enlargements = (size // grown).bit_length() - 1
        # Linear in training, as in ResNetGenerator: a Tanh reaches pure white and black only at infinity.
        self.squash = nn.Hardtanh() if arch == "resnet" else nn.Tanh()
        self.linear_in_training = arch == "resnet"

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.GeneClasses is not None:
            latents_BZ11 = self.GeneClasses(latents_BZ11, labels_B)
        features_BCHW, images_B3HW = latents_BZ11, None
        for (start, end), skip in zip(self.parts, self.GeneSkips, strict=True):
            features_BCHW = self.Gene[start:end](features_BCHW)
            added_B3HW = cast(Tensor, skip(features_BCHW)).float()  # a sum in bfloat16 would show bands
            images_B3HW = added_B3HW if images_B3HW is None else self.enlarge(images_B3HW) + added_B3HW
        assert images_B3HW is not None
        if not (self.training and self.linear_in_training):
            images_B3HW = self.squash(images_B3HW)
        for _ in range(0 if self.training else self.enlargements):
            images_B3HW = self.enlarge(images_B3HW)
        return images_B3HW


class SkipDiscriminator(nn.Module):
    """
    Map images (B, 3, H, W) in [-1, 1] to scores (B,); images larger than `grown` are reduced first.

    Args:
        arch: 'resnet', or any other for the tutorial's layers.
        norm: as in Discriminator; 'none' for resnet.
    """

    def __init__(
        self, arch: str, *, size: int, grown: int, ndf: int, norm: str, classes: int, patch_size: int = 0
    ) -> None:
        super().__init__()
        self.grown = grown
        found = levels(size, grown, patch_size)
        channels = [ndf * factor for factor in widths(size, patch_size)]
        build = _Residual(channels, patch_size) if arch == "resnet" else _Plain(channels, norm, patch_size)
        self.DiscrimEdges = nn.ModuleList(build.edge(index, side) for side, index in found)
        self.DiscrimDowns = nn.ModuleList(nn.Sequential(*build.down(index)) for _, index in found[1:])
        for down in self.DiscrimDowns if norm != "spectral" else ():
            _zero(down)
        layers, self.head = build.trunk(found[0][1])
        self.Discrim = nn.Sequential(*layers)
        self.DiscrimClasses = (
            ClassScores(classes, channels[0], spectral=norm == "spectral") if classes else None
        )

    def forward(self, images_B3HW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if images_B3HW.shape[2] > self.grown:
            images_B3HW = avg_pool2d(images_B3HW, images_B3HW.shape[2] // self.grown)
        features_BCHW = cast(Tensor, self.DiscrimEdges[-1](images_B3HW))
        for edge, down in zip(self.DiscrimEdges[-2::-1], self.DiscrimDowns[::-1], strict=True):
            images_B3HW = avg_pool2d(images_B3HW, 2)
            features_BCHW = cast(Tensor, edge(images_B3HW)) + cast(Tensor, down(features_BCHW))
        features_BCHW = self.Discrim[: self.head](features_BCHW)
        logits_B = cast(Tensor, self.Discrim[self.head](features_BCHW)).flatten()
        if self.DiscrimClasses is not None:
            logits_B = logits_B + self.DiscrimClasses(features_BCHW, labels_B)
        return cast(Tensor, self.Discrim[self.head + 1 :](logits_B))


class _Plain:
    """Layers of the tutorial's discriminator."""

    def __init__(self, channels: Sequence[int], norm: str, patch_size: int) -> None:
        self.channels, self.norm, self.patch_size = channels, norm, patch_size

    def edge(self, index: int, side: int) -> nn.Module:
        """Return the layer from images of `side` to features."""
        return self._conv(3, self.channels[index], *edge_layer(side, self.patch_size))

    def down(self, index: int) -> list[nn.Module]:
        """Return the layers from the features of a level to those of half the side."""
        norms = [nn.BatchNorm2d(self.channels[index - 1])] if self.norm == "batch" else []
        return [
            nn.LeakyReLU(0.2, inplace=True),
            self._conv(self.channels[index], self.channels[index - 1], 4, 2, 1),
            *norms,
        ]

    def trunk(self, index: int) -> tuple[list[nn.Module], int]:
        """Return the layers from the smallest level's features to scores, and the index of the last one."""
        layers = [layer for at in range(index, 0, -1) for layer in self.down(at)]
        layers.append(nn.LeakyReLU(0.2, inplace=True))
        head = [self._conv(self.channels[0], 1, 4, 1, 0, last=True)]
        return [*layers, *head, *([nn.Sigmoid()] if self.norm == "batch" else [])], len(layers)

    def _conv(
        self, into: int, out: int, kernel: int, stride: int, padding: int, *, last: bool = False
    ) -> nn.Module:
        layer = nn.Conv2d(into, out, kernel, stride, padding, bias=last or self.norm != "batch")
        return spectral_norm(layer) if self.norm == "spectral" else layer


class _Residual:
    """Layers of ResNetDiscriminator."""

    def __init__(self, channels: Sequence[int], patch_size: int) -> None:
        self.channels, self.patch_size = channels, patch_size

    def edge(self, index: int, side: int) -> nn.Module:
        _, stride, _ = edge_layer(side, self.patch_size)
        return nn.Sequential(
            nn.PixelUnshuffle(stride), convolution(3 * stride**2, self.channels[index], 3, gain=1)
        )

    def down(self, index: int) -> list[nn.Module]:
        return [
            Block(self.channels[index], blocks=len(self.channels)),
            nn.AvgPool2d(2),
            convolution(self.channels[index], self.channels[index - 1], 1, gain=1),
        ]

    def trunk(self, index: int) -> tuple[list[nn.Module], int]:
        channels = self.channels[0]
        layers = [layer for at in range(index, 0, -1) for layer in self.down(at)]
        layers.append(Block(channels, blocks=len(self.channels)))
        # As in ResNetDiscriminator: 4×4 to one value per channel, then all to one.
        gather = nn.Conv2d(channels, channels, 4, groups=channels, bias=False)
        judge = nn.Conv2d(channels, 1, 1, bias=False)
        with torch.no_grad():
            gather.weight.normal_().mul_(1 / 4)
            judge.weight.normal_().mul_(channels**-0.5)
        return [*layers, gather, judge], len(layers) + 1


def _zero(layers: nn.Module) -> None:
    """Let a sequence compute zeros: the parameters of its last layer that has some become zero."""
    last = [layer for layer in layers.modules() if list(layer.parameters(recurse=False))][-1]
    for values in last.parameters():
        nn.init.zeros_(values)
