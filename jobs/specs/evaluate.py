"""The spec of an evaluation."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jobs.errors import SpecError
from jobs.specs.base import (
    READER,
    CheckpointSelector,
    Fit,
    Seed,
    Sha256,
    Spec,
    UnpackedGb,
    WhiteLevel,
    check_feature_network,
)

MIN_IMAGES = 50
"""Of a set that is measured; with fewer images a metric is mostly noise."""


class EvaluateSpec(Spec):
    """A comparison of generated images with real images."""

    kind: ClassVar[str] = "evaluate"
    of_new: ClassVar[dict[str, Any]] = {"reader": READER, "keep_duplicates": False}

    source: int | None = None
    """Id of the training or import job whose model is sampled, or of a generation with its images."""
    path: str | None = None
    """Or the absolute path of a folder, zip or tar of generated images."""
    checkpoint: CheckpointSelector = "best"
    """'best', 'last', or the number of complete epochs."""
    data: str
    """Absolute path of the real images."""
    size: Annotated[int, Field(ge=16, le=1024)]
    """Side of the compared images, to which others are resized as for a training."""
    count: Annotated[int, Field(ge=MIN_IMAGES, le=100_000)] = 2000
    """Maximum number of generated images."""
    search: Annotated[int, Field(ge=MIN_IMAGES, le=1_000_000)] = 10_000
    """Maximum number of real images."""
    seed: Seed = 0
    micro_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    feature_network: str = "effnet-lite0"
    """'effnet-lite0', 'effnet-lite2', 'random', or the absolute path of a weight file."""
    feature_sha256: Sha256 | None = None
    """SHA-256 of that file; not used for a name."""
    max_skip: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of files that may be unreadable before a data set is refused."""
    reader: Annotated[int, Field(ge=1, le=READER)] = 1
    """Version of the rules by which data sets are read; 1 is that of ganq 0.1 and 0.2."""
    keep_duplicates: bool = True
    """Use real images with equal bytes more than once."""
    white_level: WhiteLevel = 0.0
    """Value that becomes white in images of 16 bits or floats; 0: the largest of 16 bits."""
    fit: Fit = "crop"
    """How an image becomes a square: its centre, with black bars, or distorted."""
    max_unpacked_gb: UnpackedGb = 100.0
    """Maximum unpacked size of an archive."""
    loader_workers: Annotated[int, Field(ge=0, le=256)] = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.source is None) == (self.path is None):
            raise SpecError("an evaluation is of a job or of a path", hint="ganq submit evaluate JOB|PATH")
        check_feature_network(self.feature_network, self.feature_sha256)
        return self
