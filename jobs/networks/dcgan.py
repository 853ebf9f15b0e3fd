"""
The tutorial's DCGAN generator and discriminator, for every image size that jobs.specs.size_plan allows.

Shapes in names: B images, C channels, H and W pixels, Z latent dimensions.

The layers of each network are in one Sequential, `Gene` or `Discrim`, at the tutorial's
indices, so that its weight files have the same keys.

Source: Radford et al. 2015, arXiv:1511.06434, as changed by the tutorial: the stride of
the last layer of G and the first layer of D is 3, which gives 96 pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, Unpack, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from jobs.errors import SpecError
from jobs.networks.balanced import BalancedGenerator
from jobs.networks.classes import ClassLatents, ClassScores
from jobs.networks.heads import LastLayers, last_layers, transposed_head
from jobs.networks.layout import edge_layer, skip_sides, widths
from jobs.networks.resnet import ResNetDiscriminator, ResNetGenerator
from jobs.networks.skips import SkipDiscriminator, SkipGenerator
from jobs.networks.transposed_conv import doublings
from jobs.renamed import renamed
from jobs.specs import TrainSpec, size_plan

NormD = Literal["batch", "spectral", "none"]
Arch = Literal["dcgan", "balanced", "resnet"]


class Generator(nn.Module):
    """
    Map latents (B, Z, 1, 1) to images (B, 3, size, size) in (-1, 1).

    No layer has a bias, because BatchNorm would remove it.
    """

    def __init__(self, *, size: int, nz: int, ngf: int, classes: int = 0, **last: Unpack[LastLayers]) -> None:
        super().__init__()
        self.GeneClasses = ClassLatents(classes) if classes else None
        channels = [ngf * factor for factor in widths(size, last.get("patch_size", 0))]
        layers = doublings(nz + ClassLatents.NUMBERS if classes else nz, channels)
        layers += last_layers(transposed_head, channels[-1], size, **last)
        self.Gene = nn.Sequential(*layers, nn.Tanh())

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.GeneClasses is not None:
            latents_BZ11 = self.GeneClasses(latents_BZ11, labels_B)
        return cast(Tensor, self.Gene(latents_BZ11))


class Discriminator(nn.Module):
    """
    Map images (B, 3, size, size) in [-1, 1] to scores (B,).

    norm 'batch': BatchNorm after every layer but the first and the last, and a
    sigmoid at the end: scores are probabilities, as in the tutorial.
    norm 'spectral': spectral normalisation of every layer (Miyato et al. 2018,
    arXiv:1802.05957); scores are logits. Identity layers replace BatchNorm, so that
    the indices are the same, and the layers have a bias. The vectors u and v of the
    power iteration are buffers of the state_dict, so that a resumed run is bit-exact.
    norm 'none': as 'spectral' without normalisation, for losses with penalties.
    """

    def __init__(self, *, size: int, ndf: int, norm: NormD, classes: int = 0, patch_size: int = 0) -> None:
        super().__init__()
        spectral, batch = norm == "spectral", norm == "batch"

        def conv(into: int, out: int, kernel: int, stride: int, padding: int, *, bias: bool) -> nn.Module:
            layer = nn.Conv2d(into, out, kernel, stride, padding, bias=bias)
            return spectral_norm(layer) if spectral else layer

        factors = widths(size, patch_size)[::-1]
        layers: list[nn.Module] = []
        channels = 3
        for place, factor in enumerate(factors):
            kernel, stride, padding = edge_layer(size, patch_size) if place == 0 else (4, 2, 1)
            layers.append(conv(channels, ndf * factor, kernel, stride, padding, bias=not batch))
            if place > 0:
                layers.append(nn.BatchNorm2d(ndf * factor) if batch else nn.Identity())
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = ndf * factor
        self.head = len(layers)
        layers.append(conv(channels, 1, 4, 1, 0, bias=True))
        if batch:
            layers.append(nn.Sigmoid())
        self.Discrim = nn.Sequential(*layers)
        self.DiscrimClasses = ClassScores(classes, channels, spectral=spectral) if classes else None

    def forward(self, images_B3HW: Tensor, labels_B: Tensor | None = None) -> Tensor:
        if self.DiscrimClasses is None:
            return cast(Tensor, self.Discrim(images_B3HW)).flatten()
        features_BCHW = self.Discrim[: self.head](images_B3HW)
        logits_B = cast(Tensor, self.Discrim[self.head](features_BCHW)).flatten()
        logits_B = logits_B + self.DiscrimClasses(features_BCHW, labels_B)
        return cast(Tensor, self.Discrim[self.head + 1 :](logits_B))


AnyGenerator = Generator | BalancedGenerator | ResNetGenerator | SkipGenerator
AnyDiscriminator = Discriminator | ResNetDiscriminator | SkipDiscriminator
GENERATORS: dict[Arch, type[Generator | BalancedGenerator | ResNetGenerator]] = {
    "dcgan": Generator,
    "balanced": BalancedGenerator,
    "resnet": ResNetGenerator,
}


GENERATOR_FIELDS = ("size", "nz", "ngf", "classes", "patch_size", "full_res_conv", "antialias")
DISCRIMINATOR_FIELDS = ("size", "ndf", "classes", "patch_size")
LATER_FIELDS = ("arch", "classes", "grey", "patch_size", "full_res_conv", "antialias", "skips", "grown")
"""Fields of an architecture that ganq 0.1 does not know."""


@dataclass(frozen=True)
class Architecture:
    """The parameters of both networks; meta["arch"] of every checkpoint."""

    size: int
    nz: int = 100
    ngf: int = 64
    ndf: int = 64
    norm_d: NormD = "batch"
    arch: Arch = "dcgan"
    classes: int = 0
    """Number of classes of a conditional pair; 0: unconditional."""
    grey: bool = False
    """G's channels are equal: each is the mean of the three."""
    patch_size: int = 0
    """As in size_plan(); 0: 3 or 2, by the size."""
    full_res_conv: bool = False
    """G ends in a convolution at the resolution of the image."""
    antialias: bool = False
    """A low-pass filter follows G's last convolution."""
    skips: bool = False
    """Both networks have an image at a quarter and half of the side, too."""
    grown: int = 0
    """Side that a network with skips is trained at, in an early phase of --progressive; 0: `size`."""

    def __post_init__(self) -> None:
        size_plan(self.size, self.patch_size)
        smaller = skip_sides(self.size, self.patch_size)[:2] if self.skips else ()
        if self.grown and self.grown not in smaller:
            raise SpecError(f"no network has these measures: {asdict(self)}")
        known = self.norm_d in get_args(NormD) and self.arch in get_args(Arch)
        fits = self.arch != "resnet" or self.norm_d == "none"
        if min(self.nz, self.ngf, self.ndf) < 1 or self.classes < 0 or not known or not fits:
            raise SpecError(f"no network has these measures: {asdict(self)}")

    @classmethod
    def of_spec(cls, spec: TrainSpec, classes: int = 0) -> Self:
        """
        Return the architecture that a spec describes.

        Args:
            classes: number of classes of the data set, if the run is conditional.
        """
        return cls(
            size=spec.size,
            nz=spec.nz,
            ngf=spec.ngf,
            ndf=spec.ndf,
            norm_d=spec.norm_d,
            arch=spec.arch,
            classes=classes,
            grey=spec.grey,
            patch_size=spec.patch_size,
            full_res_conv=spec.full_res_conv,
            antialias=spec.antialias,
            skips=spec.skips,
        )

    @property
    def side(self) -> int:
        """Side of the images that the networks are trained on."""
        return self.grown or self.size

    def at(self, side: int) -> Self:
        """Return the networks of the phase of --progressive in which images have this side."""
        return replace(self, grown=0 if side == self.size else side)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """
        Return the architecture that to_json() wrote.

        Raises:
            SpecError: it was written by a version with other networks.
        """
        try:
            return cls(**renamed(data))
        except TypeError as exc:
            raise SpecError(
                "this checkpoint describes networks that this version of ganq cannot build",
                hint="use the version that wrote it, or a newer one",
            ) from exc

    def to_json(self) -> dict[str, Any]:
        """Return JSON without fields that ganq 0.1 does not know, if they have their defaults."""
        later = {one.name: one.default for one in fields(self) if one.name in LATER_FIELDS}
        return {name: value for name, value in asdict(self).items() if later.get(name) != value}

    def build_generator(self, seed: int | None = None) -> AnyGenerator:
        """
        Build the generator.

        Args:
            seed: of the initial weights. None: any, because weights are loaded next.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in GENERATOR_FIELDS}
        net: AnyGenerator
        with _initial_weights(seed):
            if self.skips:
                net = SkipGenerator(self.arch, grown=self.side, **given)
            else:
                net = GENERATORS[self.arch](**given)
        if self.grey:
            make_grey(net)
        return net

    def build_discriminator(self, seed: int | None = None) -> AnyDiscriminator:
        """Build the discriminator; `seed` as in build_generator()."""
        given: dict[str, Any] = {name: getattr(self, name) for name in DISCRIMINATOR_FIELDS}
        with _initial_weights(seed):
            if self.skips:
                return SkipDiscriminator(self.arch, grown=self.side, norm=self.norm_d, **given)
            if self.arch == "resnet":
                return ResNetDiscriminator(**given)
            return Discriminator(norm=self.norm_d, **given)


def make_grey(net: nn.Module) -> None:
    """Average the channels of what a generator makes; its weights stay those of any other."""
    net.register_forward_hook(_to_grey)


def makes_grey(net: nn.Module) -> bool:
    """Return whether make_grey() was called for this network, or for the one that it is a copy of."""
    return _to_grey in net._forward_hooks.values()


def _to_grey(net: nn.Module, inputs: Any, images_B3HW: Tensor) -> Tensor:
    grey_B1HW = images_B3HW.mean(dim=1, keepdim=True)
    return torch.cat([grey_B1HW] * 3, dim=1)


@contextmanager
def _initial_weights(seed: int | None) -> Iterator[None]:
    """Seed PyTorch's global generator, which initialises weights, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        yield
