"""What an evaluation is asked for."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jobs.errors import SpecError
from jobs.specs.base import (
    READER,
    CheckpointWord,
    Seed,
    Sha256,
    Spec,
    UnpackedGb,
    WhiteLevel,
    check_feature_network,
)

FEWEST_PICTURES = 50
"""Of a set that is measured; with fewer a metric says more of chance than of pictures."""


class EvaluateSpec(Spec):
    """One comparison of made pictures with those that a model was trained on."""

    kind: ClassVar[str] = "evaluate"
    of_new: ClassVar[dict[str, Any]] = {"reader": READER, "keep_duplicates": False}

    source: int | None = None
    """Id of the training or import job to draw from, or of the generation whose pictures are looked at."""
    path: str | None = None
    """Or the absolute path of a folder, zip or tar of made pictures."""
    checkpoint: CheckpointWord = "best"
    """'best', 'last', or the number of complete epochs."""
    data: str
    """Absolute path of the real pictures."""
    size: Annotated[int, Field(ge=16, le=1024)]
    """Side of the pictures that are compared; others are brought to it as for a training."""
    count: Annotated[int, Field(ge=FEWEST_PICTURES, le=100_000)] = 2000
    """Made pictures that are drawn or looked at, at most."""
    search: Annotated[int, Field(ge=FEWEST_PICTURES, le=1_000_000)] = 10_000
    """Real pictures at most: each is looked at by the feature network."""
    seed: Seed = 0
    micro_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    feature_network: str = "effnet-lite0"
    """'effnet-lite0', 'random', or the absolute path of a weight file."""
    feature_sha256: Sha256 | None = None
    """Of that file; a name needs none."""
    max_skip: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of files that may be unreadable before a set of pictures is refused."""
    reader: Annotated[int, Field(ge=1, le=READER)] = 1
    """Version of the rules by which data sets are read; 1 is that of ganq 0.1 and 0.2."""
    keep_duplicates: bool = True
    """Use real images with equal bytes more than once."""
    white_level: WhiteLevel = 0.0
    """Value that becomes white in images of 16 bits or floats; 0: the largest of 16 bits."""
    max_unpacked_gb: UnpackedGb = 100.0
    """What an archive may unpack to."""
    loader_workers: Annotated[int, Field(ge=0, le=256)] = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.source is None) == (self.path is None):
            raise SpecError("an evaluation is of a job or of a path", hint="ganq submit evaluate JOB|PATH")
        check_feature_network(self.feature_network, self.feature_sha256)
        return self
