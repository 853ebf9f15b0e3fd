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
    patch_size: int = 0
    full_res_conv: bool = False
    antialias: bool = False
    skips: bool = False
    grey: bool = False
    conditional: bool = False
    """These six as in a training. Rows of ganq 0.2 have none of them."""
