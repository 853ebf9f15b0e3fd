"""What a generation is asked for, and the parts that many workers share."""

from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from jobs.errors import SpecError
from jobs.specs.base import MAX_COUNT, CheckpointWord, Count, SampleIndex, Seed, Spec

MAX_SHARDS = 1000
MAX_FRAMES = 3600
"""Of one film: it is put together in memory. Two and a half minutes."""
FRAMES_A_LEG = 60

LOSSY = ("jpeg", "webp")
"""Formats that may lose something, and so have a quality."""


class GenerateSpec(Spec):
    """One set of pictures from one checkpoint. Picture i depends on (checkpoint, seed, i) alone."""

    kind: ClassVar[str] = "generate"

    source: int
    """Id of the training or import job that the generator comes from."""
    checkpoint: CheckpointWord = "best"
    """'best', 'last', or the number of complete epochs."""
    count: Count | None = None
    seeds: tuple[tuple[int, int], ...] = ()
    """Picture numbers as inclusive ranges (first, last); instead of `count`."""
    seed: Seed = 0
    keep: Count | None = None
    of: Count | None = None
    """Draw `of` pictures, publish the `keep` that the discriminator scores highest, best first."""
    interpolate: tuple[SampleIndex, ...] = ()
    """Numbers of pictures; the frames of a way through them are drawn, instead of `count` pictures."""
    frames: Annotated[int, Field(ge=2, le=MAX_FRAMES)] | None = None
    """Of the whole way, its ends included; None: 60 for each leg."""
    grid_epochs: bool = False
    """Add a grid of the first pictures with a row for each checkpoint that was kept."""
    reject: Annotated[float, Field(gt=0, le=0.95)] | None = None
    """Share of all draws, those with the lowest scores: place i is drawn again until it is none of them."""
    truncation: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Each latent number lies within ± this, before noise_mean and noise_std are put on."""
    class_name: Annotated[str, Field(min_length=1, max_length=255)] | None = None
    """Of a class-conditional model: the class to draw. None: the classes in turn, by picture number."""
    noise_mean: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 0.0
    noise_std: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    format: Literal["png", "webp", "jpeg", "tar", "npz"] = "png"
    """Files of one encoding, tar archives of PNGs, or one npz of arrays; see storage/results/formats.py."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """Of jpeg (95 if None); a webp is lossless if None. Other formats lose nothing and have none."""
    grid: Annotated[int, Field(ge=0, le=4096)] = 64
    """Pictures on one grid page; 0 makes no grids."""
    grid_pages: Annotated[int, Field(ge=0, le=10_000)] = 16
    """Grid pages at most; later pictures have files but no page."""
    micro_batch: Annotated[int, Field(ge=1, le=4096)] = 64
    """Fixed size of every forward pass: picture i sits at slot i mod micro_batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    out: str | None = None
    """Absolute path of a folder that gets a copy of the result."""
    shard_size: Count = 8192
    """Pictures that one worker draws at a time; a larger job is split, and many workers share it."""
    max_workers: Annotated[int, Field(ge=0, le=MAX_SHARDS)] = 0
    """Workers that may be at this job at once; 0: all that are free."""
    draws: tuple[int, int] | None = None
    """Of a part of a larger job: the places (first, last) in the order of draws that it computes."""

    @model_validator(mode="after")
    def _one_way_to_count(self) -> Self:
        ranked = self.keep is not None or self.of is not None
        if sum((self.count is not None, bool(self.seeds), ranked, bool(self.interpolate))) != 1:
            raise SpecError(
                "say how many pictures in exactly one way",
                hint="--count N, or --seeds A-B, or --keep K --of N, or --interpolate A,B --frames N",
            )
        if self.quality is not None and self.format not in LOSSY:
            raise SpecError(
                f"--quality belongs to --format {' and '.join(LOSSY)}; {self.format} loses nothing",
                hint="leave --quality out, or add --format jpeg",
            )
        if (self.keep is None) != (self.of is None):
            raise SpecError("--keep and --of go together", hint="e.g. --keep 64 --of 512")
        if self.keep is not None and self.of is not None and self.keep > self.of:
            raise SpecError(
                f"--keep {self.keep} is more than --of {self.of}",
                hint="--of is how many are drawn, --keep how many of them stay",
            )
        for first, last in self.seeds:
            if not 0 <= first <= last < MAX_COUNT:
                raise SpecError(
                    f"--seeds {first}-{last} is no range of picture numbers",
                    hint="e.g. --seeds 0-63 or --seeds 0,4,10-20",
                )
        if self.total > MAX_COUNT:
            raise SpecError(
                f"--seeds names {self.total} pictures, and one job makes at most {MAX_COUNT}",
                hint="submit several jobs",
            )
        self._check_way()
        if self.reject is not None and (ranked or self.interpolate):
            other = "--keep" if ranked else "--interpolate"
            raise SpecError(
                f"--reject and {other} do not go together",
                hint="both choose by the discriminator's score: use one of them"
                if ranked
                else "the frames between two pictures are what they are",
            )
        ends = sorted(self.seeds)
        for (_, last), (first, _) in pairwise(ends):
            if first <= last:
                raise SpecError(f"--seeds names picture {first} twice", hint="name each picture once")
        return self

    def _check_way(self) -> None:
        """
        Raises:
            SpecError: --interpolate and --frames that give no way.
        """
        points = self.interpolate
        if not points:
            if self.frames is not None:
                raise SpecError(
                    "--frames says how many pictures lie on a way, and there is none",
                    hint="e.g. --interpolate 3,17 --frames 120",
                )
            return
        if len(points) < 2 or any(one == other for one, other in pairwise(points)):
            raise SpecError(
                f"--interpolate {','.join(map(str, points))} is no way from one picture to another",
                hint="name two pictures or more by their numbers, e.g. --interpolate 3,17 or 3,17,42,3",
            )
        if not len(points) <= self.total <= MAX_FRAMES:
            raise SpecError(
                f"{self.total} frames are too {'few' if self.total < len(points) else 'many'} "
                f"for {len(points)} pictures",
                hint=f"--frames is at least one for each picture, and at most {MAX_FRAMES:,}",
            )

    @property
    def total(self) -> int:
        """Pictures that are published."""
        if self.interpolate:
            return self.frames or FRAMES_A_LEG * (len(self.interpolate) - 1)
        if self.keep is not None:
            return self.keep
        if self.count is not None:
            return self.count
        return sum(last - first + 1 for first, last in self.seeds)

    @property
    def drawn(self) -> int:
        """Pictures that are computed, by all parts together."""
        return self.of if self.of is not None else self.total

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The picture numbers that are computed here, as inclusive ranges in order."""
        whole = self.seeds or ((0, self.drawn - 1),)
        if self.draws is None:
            return whole
        mine, place = [], 0
        for first, last in whole:
            begin = max(first, first + self.draws[0] - place)
            end = min(last, first + self.draws[1] - place)
            if begin <= end:
                mine.append((begin, end))
            place += last - first + 1
        return tuple(mine)

    @property
    def pictures(self) -> int:
        """Pictures that are computed here."""
        return sum(last - first + 1 for first, last in self.ranges)

    def split(self) -> "list[GenerateSpec]":
        """
        The parts of a large job, each a range of draws; none if one worker should do all of it.

        Borders are borders of micro-batches, so that no picture is computed twice.
        """
        size = max(self.shard_size, -(-self.drawn // MAX_SHARDS))
        size = -(-size // self.micro_batch) * self.micro_batch
        if self.draws is not None or self.drawn <= size or self.interpolate:
            return []
        return [self.part((first, min(first + size, self.drawn) - 1)) for first in range(0, self.drawn, size)]

    def part(self, draws: tuple[int, int]) -> "GenerateSpec":
        """The part that computes these places (first, last) in the order of draws."""
        return self.model_copy(update={"grid": 0, "out": None, "grid_epochs": False, "draws": draws})
