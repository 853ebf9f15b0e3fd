"""What an import has brought."""

from typing import ClassVar, Literal

from jobs.specs.base import Spec


class ImportSpec(Spec):
    """Weights from outside, made usable by `generate --from NAME`."""

    kind: ClassVar[str] = "import"

    netg: str
    netd: str | None = None
    size: int
    nz: int
    ngf: int
    ndf: int
    arch: Literal["dcgan", "balanced", "resnet"] = "dcgan"
    norm_d: Literal["batch", "spectral", "none"] | None = None
    """None: it came without a discriminator. Rows of earlier versions say neither of the two."""
