"""
The DCGAN pair of the tutorial, for every picture size that jobs.specs.size_plan allows.

Shapes in names: B pictures, C channels, H and W pixels, Z latent numbers.

The layers of each network sit in one Sequential, `Gene` and `Discrim`, at the
tutorial's indices, so that its weight files fit without renaming a key.

Source: Radford et al. 2015, arXiv:1511.06434, as the tutorial changed it: the
last layer of G and the first of D triple the side, which makes 96 pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from jobs.errors import SpecError
from jobs.specs import TrainSpec, size_plan

WIDEST = 8
"""Channels never exceed 8·ngf or 8·ndf, as at 96 pixels: doubling on would cost 4× the weights a layer."""


def widths(size: int) -> list[int]:
    """
    Channel factors of the hidden layers of G, from the 4×4 picture outwards.

    Returns:
        For 96: [8, 4, 2, 1]; D has the same, reversed.

    Raises:
        SpecError: if no stack of layers makes this size.
    """
    doublings, _ = size_plan(size)
    return [min(WIDEST, 2**k) for k in range(doublings, -1, -1)]


def edge_layer(size: int) -> tuple[int, int, int]:
    """(kernel, stride, padding) of the layer next to the pixels: it triples or doubles the side."""
    _, triple = size_plan(size)
    return (5, 3, 1) if triple else (4, 2, 1)


class Generator(nn.Module):
    """
    Latents (B, Z, 1, 1) to pictures (B, 3, size, size) in (-1, 1).

    No layer has a bias: BatchNorm would take it away again.
    """

    def __init__(self, *, size: int, nz: int, ngf: int) -> None:
        super().__init__()
        factors = widths(size)
        layers: list[nn.Module] = []
        channels = nz
        for place, factor in enumerate(factors):
            kernel, stride, padding = (4, 1, 0) if place == 0 else (4, 2, 1)
            layers += [
                nn.ConvTranspose2d(channels, ngf * factor, kernel, stride, padding, bias=False),
                nn.BatchNorm2d(ngf * factor),
                nn.ReLU(inplace=True),
            ]
            channels = ngf * factor
        layers += [nn.ConvTranspose2d(channels, 3, *edge_layer(size), bias=False), nn.Tanh()]
        self.Gene = nn.Sequential(*layers)

    def forward(self, latents_BZ11: Tensor) -> Tensor:
        return cast(Tensor, self.Gene(latents_BZ11))


class Discriminator(nn.Module):
    """
    Pictures (B, 3, size, size) in [-1, 1] to one score each, shape (B,).

    norm 'batch': BatchNorm after every layer but the first and the last, and a
    sigmoid at the end: scores are probabilities, as in the tutorial.
    norm 'spectral': every layer divided by its largest singular value (Miyato et al.
    2018, arXiv:1802.05957), scores are logits. Identity stands where BatchNorm
    stood, so that both kinds have the same indices; the layers then have a bias,
    which BatchNorm's shift made needless. The power iteration's vectors u and v
    are buffers: they travel with the state_dict, so a resumed run goes on exactly.
    """

    def __init__(self, *, size: int, ndf: int, norm: Literal["batch", "spectral"]) -> None:
        super().__init__()
        spectral = norm == "spectral"

        def conv(into: int, out: int, kernel: int, stride: int, padding: int, *, bias: bool) -> nn.Module:
            layer = nn.Conv2d(into, out, kernel, stride, padding, bias=bias)
            return spectral_norm(layer) if spectral else layer

        factors = widths(size)[::-1]
        layers: list[nn.Module] = []
        channels = 3
        for place, factor in enumerate(factors):
            kernel, stride, padding = edge_layer(size) if place == 0 else (4, 2, 1)
            layers.append(conv(channels, ndf * factor, kernel, stride, padding, bias=spectral))
            if place > 0:
                layers.append(nn.Identity() if spectral else nn.BatchNorm2d(ndf * factor))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = ndf * factor
        layers.append(conv(channels, 1, 4, 1, 0, bias=True))
        if not spectral:
            layers.append(nn.Sigmoid())
        self.Discrim = nn.Sequential(*layers)

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        return cast(Tensor, self.Discrim(pictures_B3HW)).flatten()


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build the pair again; stands as meta["arch"] in every checkpoint."""

    size: int
    nz: int = 100
    ngf: int = 64
    ndf: int = 64
    norm_d: Literal["batch", "spectral"] = "batch"

    def __post_init__(self) -> None:
        size_plan(self.size)
        if min(self.nz, self.ngf, self.ndf) < 1 or self.norm_d not in ("batch", "spectral"):
            raise SpecError(f"no network has these measures: {asdict(self)}")

    @classmethod
    def of_spec(cls, spec: TrainSpec) -> Self:
        return cls(size=spec.size, nz=spec.nz, ngf=spec.ngf, ndf=spec.ndf, norm_d=spec.norm_d)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """
        Raises:
            SpecError: if it was written by a version that builds other networks.
        """
        try:
            return cls(**data)
        except TypeError as exc:
            raise SpecError(
                "this checkpoint describes networks that this version of ganq cannot build",
                hint="use the version that wrote it, or a newer one",
            ) from exc

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def build_generator(self, seed: int | None = None) -> Generator:
        """
        PyTorch's default initialisation, which is the tutorial's.

        Args:
            seed: of the initial weights. None: whatever, because weights are loaded next.
        """
        with _initial_weights(seed):
            return Generator(size=self.size, nz=self.nz, ngf=self.ngf)

    def build_discriminator(self, seed: int | None = None) -> Discriminator:
        """Like build_generator()."""
        with _initial_weights(seed):
            return Discriminator(size=self.size, ndf=self.ndf, norm=self.norm_d)


@contextmanager
def _initial_weights(seed: int | None) -> Iterator[None]:
    """PyTorch initialises from its global generator: seed it here, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        yield
