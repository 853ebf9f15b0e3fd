"""The spec of a generation, and its division into shards."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jobs.context import ImageNames
from jobs.errors import SpecError
from jobs.specs.base import MAX_COUNT, CheckpointSelector, Count, SampleIndex, Seed, Spec

MAX_SHARDS = 9900
"""A folder that holds one archive or more of each shard has at most 10,000 entries."""
MAX_FRAMES = 3600
"""Of one video, which is built in memory: two and a half minutes."""
FRAMES_PER_SEGMENT = 60
TAR_ABOVE = 100_000
"""Images; more become tar archives, unless a format is given: a million files are slow to publish."""
MAX_FLAT = 10_000
"""Images; the files of more lie in several folders. See docs/decisions/0026-large-results.md."""
IMAGES_PER_TAR = 10_240
DIGITS = 6

SELECTION_OPTIONS = (
    *("seed", "micro_batch", "class_name", "noise_mean", "noise_std", "truncation", "reject"),
    *("interpolate", "frames", "deterministic"),
)
"""Fields that choose, beside checkpoint and sample index, what an image shows."""

LOSSY = ("jpeg", "webp")
"""Formats that can be lossy, and so have a quality."""


class GenerateSpec(Spec):
    """A set of images of one checkpoint. Image i depends only on (checkpoint, seed, i)."""

    kind: ClassVar[str] = "generate"
    of_new: ClassVar[dict[str, Any]] = {"passport": True, "layout": 2}

    source: int
    """Id of the training or import job of the generator."""
    checkpoint: CheckpointSelector = "best"
    """'best', 'last', or the number of complete epochs."""
    count: Count | None = None
    seeds: tuple[tuple[int, int], ...] = ()
    """Sample indices as inclusive ranges (first, last); instead of `count`."""
    seed: Seed = 0
    keep: Count | None = None
    of: Count | None = None
    """Generate `of` images and publish the `keep` images with the highest scores of D, best first."""
    interpolate: tuple[SampleIndex, ...] = ()
    """Sample indices; the frames of a latent path through them are generated, instead of `count` images."""
    frames: Annotated[int, Field(ge=2, le=MAX_FRAMES)] | None = None
    """Of the whole path, including its ends; None: 60 for each segment."""
    grid_epochs: bool = False
    """Add a grid of the first images with a row for each retained checkpoint."""
    reject: Annotated[float, Field(gt=0, le=0.95)] | None = None
    """Fraction of samples with the lowest scores that are rejected and drawn again."""
    truncation: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Bound of each latent value, before noise_mean and noise_std are applied."""
    class_name: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """Class to generate with a conditional model. None: the classes in turn, by sample index."""
    noise_mean: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 0.0
    noise_std: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    format: Literal["png", "webp", "jpeg", "tar", "npz"] = "png"
    """
    Files of one encoding, tar archives of PNGs, or one npz of arrays; see storage/results/formats.py.

    create() chooses tar for more than TAR_ABOVE images.
    """
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of jpeg (95 if None) and webp (lossless if None). Other formats are lossless and have none."""
    passport: bool = False
    """Write into each PNG from what it was made: storage/results/passport.py."""
    grid: Annotated[int, Field(ge=0, le=4096)] = 64
    """Images per grid page; 0: no grids."""
    grid_pages: Annotated[int, Field(ge=0, le=10_000)] = 16
    """Maximum number of grid pages; later images are on none."""
    micro_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    """Fixed batch size of every forward pass: image i has position i mod micro_batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    out: str | None = None
    """Absolute path of a folder for a copy of the result."""
    shard_size: Count = 8192
    """Images of one shard; a larger job is split into shards for several workers."""
    max_workers: Annotated[int, Field(ge=0, le=MAX_SHARDS)] = 0
    """Maximum number of workers of this job at a time; 0: no limit."""
    draws: tuple[int, int] | None = None
    """Of a shard: its range (first, last) in the order of sample indices."""
    layout: Literal[1, 2] = 1
    """
    Version of `names`, of new jobs always the newest.

    A job keeps that of its submission, so that workers of two versions write the same files.
    """

    @model_validator(mode="after")
    def _one_way_to_count(self) -> Self:
        ranked = self.keep is not None or self.of is not None
        if sum((self.count is not None, bool(self.seeds), ranked, bool(self.interpolate))) != 1:
            raise SpecError(
                "give the number of images in exactly one way",
                hint="--count N, or --seeds A-B, or --keep K --of N, or --interpolate A,B --frames N",
            )
        if self.quality is not None and self.format not in LOSSY:
            raise SpecError(
                f"--quality belongs to --format {' and '.join(LOSSY)}; {self.format} is lossless",
                hint="leave --quality out, or add --format jpeg",
            )
        if (self.keep is None) != (self.of is None):
            raise SpecError("--keep and --of must be given together", hint="e.g. --keep 64 --of 512")
        if self.keep is not None and self.of is not None and self.keep > self.of:
            raise SpecError(
                f"--keep {self.keep} is more than --of {self.of}",
                hint="--of is the number of generated images, --keep how many of them are kept",
            )
        for first, last in self.seeds:
            if not 0 <= first <= last < MAX_COUNT:
                raise SpecError(
                    f"--seeds {first}-{last} is not a range of image numbers",
                    hint="e.g. --seeds 0-63 or --seeds 0,4,10-20",
                )
        if self.total > MAX_COUNT:
            raise SpecError(
                f"--seeds names {self.total} images, and one job makes at most {MAX_COUNT}",
                hint="submit several jobs",
            )
        self._check_path()
        if self.reject is not None and (ranked or self.interpolate):
            other = "--keep" if ranked else "--interpolate"
            raise SpecError(
                f"--reject and {other} cannot be combined",
                hint="both choose by the discriminator's score: use one of them"
                if ranked
                else "--interpolate determines every frame",
            )
        ends = sorted(self.seeds)
        for (_, last), (first, _) in pairwise(ends):
            if first <= last:
                raise SpecError(f"--seeds names image {first} twice", hint="name each image once")
        return self

    def _check_path(self) -> None:
        """
        Check --interpolate and --frames.

        Raises:
            SpecError: they do not define a latent path.
        """
        points = self.interpolate
        if not points:
            if self.frames is not None:
                raise SpecError(
                    "--frames requires --interpolate",
                    hint="e.g. --interpolate 3,17 --frames 120",
                )
            return
        if len(points) < 2 or any(one == other for one, other in pairwise(points)):
            raise SpecError(
                f"--interpolate {','.join(map(str, points))} is not a path between images",
                hint="give the numbers of two or more images, e.g. --interpolate 3,17 or 3,17,42,3",
            )
        if not len(points) <= self.total <= MAX_FRAMES:
            raise SpecError(
                f"{self.total} frames are too {'few' if self.total < len(points) else 'many'} "
                f"for {len(points)} images",
                hint=f"--frames is at least one for each image, and at most {MAX_FRAMES:,}",
            )

    @property
    def total(self) -> int:
        """Return the number of published images."""
        if self.interpolate:
            return self.frames or FRAMES_PER_SEGMENT * (len(self.interpolate) - 1)
        if self.keep is not None:
            return self.keep
        if self.count is not None:
            return self.count
        return sum(last - first + 1 for first, last in self.seeds)

    @property
    def drawn(self) -> int:
        """Return the number of generated images, of all shards together."""
        return self.of if self.of is not None else self.total

    @property
    def _sample_ranges(self) -> tuple[tuple[int, int], ...]:
        """Return the sample indices of the whole job."""
        return self.seeds or ((0, self.drawn - 1),)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Return the sample indices of this spec, as inclusive ranges in order."""
        if self.draws is None:
            return self._sample_ranges
        mine, place = [], 0
        for first, last in self._sample_ranges:
            begin = max(first, first + self.draws[0] - place)
            end = min(last, first + self.draws[1] - place)
            if begin <= end:
                mine.append((begin, end))
            place += last - first + 1
        return tuple(mine)

    @classmethod
    def create(cls, **given: Any) -> Self:
        """Validate as for any spec; choose tar archives for more than TAR_ABOVE images without a format."""
        spec = super().create(**given)
        if given.get("format") is None and spec.total > TAR_ABOVE:
            spec = spec.model_copy(update={"format": "tar"})
        return spec

    @property
    def image_count(self) -> int:
        """Return the number of images that this spec generates."""
        return sum(last - first + 1 for first, last in self.ranges)

    def choice(self) -> dict[str, Any]:
        """Return the options that choose what an image shows: seed, micro-batch, and what is not default."""
        fields = type(self).model_fields
        return {
            name: value
            for name, value in self.model_dump(mode="json", include=set(SELECTION_OPTIONS)).items()
            if name in ("seed", "micro_batch") or getattr(self, name) != fields[name].default
        }

    @classmethod
    def of_image(cls, choice: Mapping[str, Any], index: int, **more: Any) -> "GenerateSpec":
        """
        Return the spec of one image, from the choice() of the job that made it.

        Raises:
            SpecError: the choice is none.
        """
        if unknown := set(choice) - set(SELECTION_OPTIONS):
            raise SpecError(f"there is no option {min(unknown)[:40]!r} of a generation")
        if choice.get("interpolate"):  # the index counts the frames
            return cls.create(source=0, **choice, **more).shard((index, index))
        return cls.create(source=0, seeds=((index, index),), **choice, **more)

    @property
    def names(self) -> ImageNames:
        """Return how images are named and divided into files; the images of all shards are named together."""
        if self.layout == 1 or self.total <= MAX_FLAT:
            return ImageNames()
        last = self.total - 1 if self.keep is not None else max(last for _, last in self._sample_ranges)
        digits = max(DIGITS, len(str(last)))
        if self.format != "tar" or self.keep is not None:  # an image has its rank only in the whole
            return ImageNames(digits, folders=True, per_tar=IMAGES_PER_TAR)
        step = min(self._step, self.drawn)
        tars = max(1, step // IMAGES_PER_TAR)  # of each shard
        first = 0 if self.draws is None else self.draws[0] // step * tars
        return ImageNames(
            digits,
            per_tar=-(-step // tars),
            first_tar=first,
            linked=self.drawn > step or self.draws is not None,
        )

    @property
    def _step(self) -> int:
        """
        Return the number of images of a shard.

        Shards begin at micro-batch boundaries, so that no image is computed twice.
        """
        size = max(self.shard_size, -(-self.drawn // MAX_SHARDS))
        return -(-size // self.micro_batch) * self.micro_batch

    def split(self) -> "list[GenerateSpec]":
        """Return the specs of the shards of a large job; [] if it is not split."""
        size = self._step
        if self.draws is not None or self.drawn <= size or self.interpolate:
            return []
        return [
            self.shard((first, min(first + size, self.drawn) - 1)) for first in range(0, self.drawn, size)
        ]

    def shard(self, draws: tuple[int, int]) -> "GenerateSpec":
        """Return the spec of a shard with this range (first, last) in the order of sample indices."""
        return self.model_copy(update={"grid": 0, "out": None, "grid_epochs": False, "draws": draws})
