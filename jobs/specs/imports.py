"""What an import has brought."""

from typing import ClassVar

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
