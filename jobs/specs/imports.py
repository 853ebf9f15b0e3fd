"""The spec of imported weights."""

from typing import ClassVar, Literal

from jobs.specs.base import Spec


class ImportSpec(Spec):
    """Weights of other programs, usable by `generate --from NAME`."""

    kind: ClassVar[str] = "import"

    netg: str
    netd: str | None = None
    size: int
    nz: int
    ngf: int
    ndf: int
    arch: Literal["dcgan", "balanced", "resnet"] = "dcgan"
    norm_d: Literal["batch", "spectral", "none"] | None = None
    """None: without a discriminator. Rows of earlier versions have neither of the two fields."""
    antialias: bool = False
    """A low-pass filter follows G's last convolution."""
