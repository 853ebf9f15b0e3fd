"""
What a person asks for, resolved and frozen: TrainSpec, GenerateSpec, ImportSpec.

A spec is validated once, when it is submitted; it then travels as JSON in the
job table and in spec.json. Everything that changes the result stands in it.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from jobs.errors import SpecError
from jobs.kinds import SPEC_VERSION as SPEC_VERSION
from jobs.recipes import RECIPES

MAX_COUNT = 100_000_000
MAX_PARTS = 1000
MAX_SEED = 2**63 - 1

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

MAX_FRAMES = 3600
"""Of one film: it is put together in memory. Two and a half minutes."""
FRAMES_A_LEG = 60
FEWEST_PICTURES = 50
"""Of a set that is measured; with fewer a metric says more of chance than of pictures."""
FEATURE_NETWORKS = ("effnet-lite0", "random")

LOSSY = ("jpeg", "webp")
"""Formats that may lose something, and so have a quality."""

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
PictureNumber = Annotated[int, Field(ge=0, lt=MAX_COUNT)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Gamma = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Augment = Literal["translation", "color", "cutout", "auto"]


def check_name(name: str) -> str:
    """
    A name that is safe in a path, a shell and a table.

    Raises:
        SpecError: if it is not; a name of digits only would hide an id.
    """
    if not NAME_PATTERN.fullmatch(name) or name.isdigit():
        raise SpecError(
            f"{name[:70]!r} cannot be a name",
            hint="use letters, digits, '.', '_' and '-', at most 64, not digits alone",
        )
    return name


def check_checkpoint(which: str) -> str:
    """
    Raises:
        SpecError: it is neither a word for a checkpoint nor a number of epochs.
    """
    if which not in ("best", "last") and not re.fullmatch(r"[0-9]{1,9}", which):
        raise SpecError(
            f"--checkpoint {which[:40]!r} names no checkpoint",
            hint="use best, last, or a number of epochs (ganq checkpoints JOB lists them)",
        )
    return which


def size_plan(size: int) -> tuple[int, bool]:
    """
    How a picture size is reached from the 4×4 of the first layer.

    Returns:
        (doublings k, triple): 3·4·2^k ends in the origin's (5, 3, 1) layer, triple is True;
        4·2^(k+1) ends in a (4, 2, 1) layer, triple is False.

    Raises:
        SpecError: if the size is neither; the hint names the nearest that are.
    """
    for k in range(1, 8):
        if size == 12 * 2**k:
            return k, True
        if size == 8 * 2**k:
            return k, False
    possible = sorted([12 * 2**k for k in range(1, 6)] + [8 * 2**k for k in range(1, 6)])
    near = sorted(sorted(possible, key=lambda other: abs(other - size))[:2])
    raise SpecError(
        f"pictures of {size}×{size} cannot be made: the layers double 4×4, or triple it once",
        hint=f"--size {near[0]} or --size {near[1]} work (all: {', '.join(map(str, possible))})",
    )


class Spec(BaseModel):
    """Base of all specs: frozen, strict about unknown fields, JSON both ways."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]

    @classmethod
    def create(cls, **given: Any) -> Self:
        """
        Validate options as a person gave them; None means 'not given'.

        Raises:
            SpecError: in one line, which option, what was wrong.
        """
        try:
            return cls.model_validate({k: v for k, v in given.items() if v is not None})
        except ValidationError as exc:
            raise _in_one_line(exc) from exc

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """
        Read a spec back from the job table.

        Raises:
            SpecError: if it was written by a version that knows other fields.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as exc:
            raise _in_one_line(exc) from exc

    def split(self) -> "Sequence[GenerateSpec]":
        """The parts that many workers share, if this is such a job."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; from_json() gives an equal spec back."""
        return self.model_dump(mode="json")


def _in_one_line(exc: ValidationError) -> SpecError:
    first = exc.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SpecError):
        return cause
    option = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "spec"
    what = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (given: {str(given)[:60]})" if not isinstance(given, dict) else ""
    line = f"{option}: {what[0].lower()}{what[1:]}{shown}"
    return SpecError("".join(letter if letter.isprintable() else "?" for letter in line))


class TrainSpec(Spec):
    """One training run. Field defaults are the tutorial's; `recipe` overrides them first."""

    kind: ClassVar[str] = "train"

    data: str
    """Absolute path of a folder, zip or tar of pictures."""
    recipe: str = "origin"
    size: int = 96
    """Side of the square pictures, in pixels; see size_plan()."""
    batch: Annotated[int, Field(ge=2, le=8192)] = 256
    epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 400
    lr_g: Rate = 2e-4
    lr_d: Rate = 2e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    nz: Annotated[int, Field(ge=1, le=4096)] = 100
    ngf: Annotated[int, Field(ge=1, le=1024)] = 64
    ndf: Annotated[int, Field(ge=1, le=1024)] = 64
    d_every: Annotated[int, Field(ge=1, le=10_000)] = 1
    """The discriminator steps when the batch index within the epoch is divisible by this."""
    g_every: Annotated[int, Field(ge=1, le=10_000)] = 5
    save_every: Annotated[int, Field(ge=1, le=1_000_000)] = 5
    """Epochs between sample grids with kept checkpoints."""
    seed: Seed = 0
    loader_workers: Annotated[int, Field(ge=0, le=256)] = 4
    """Processes that decode pictures, once; training itself reads the cache."""
    init_netg: str | None = None
    init_netd: str | None = None
    """Starting weights for each network: absolute path of a .pth or .safetensors file."""
    init_from: int | None = None
    """Id of the job from whose best checkpoint both networks start."""
    freeze_d: Annotated[int, Field(ge=0, le=64)] = 0
    """Layers of D, from the pixels on, that keep their starting weights."""
    freeze_g: Annotated[int, Field(ge=0, le=64)] = 0
    """Layers of G, from the latents on, that keep their starting weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    arch: Literal["dcgan", "residual"] = "dcgan"
    """'dcgan' is the tutorial's pair; 'residual' a pair without normalisation, after R3GAN."""
    loss: Literal["bce", "hinge", "nonsaturating", "relativistic"] = "bce"
    norm_d: Literal["batch", "spectral", "none"] = "batch"
    """'batch' ends in a sigmoid as the origin does; 'spectral' and 'none' give logits."""
    r1_gamma: Gamma = 0.0
    """Weight of the penalty on D's slope at real pictures, halved as in the papers; 0 is off."""
    r2_gamma: Gamma = 0.0
    """The same at fakes."""
    penalty_every: Annotated[int, Field(ge=1, le=1000)] = 1
    """The penalties come on every N-th step of D, N times as strong."""
    lr_end: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """Share of both learning rates that is left at the end of the run, on a cosine."""
    gamma_end: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """Share of both penalties that is left at the end of the run, on a cosine."""
    beta2_end: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """beta2 at the end of the run, on a cosine; 0: it stays as it is."""
    noise: Literal["stale", "fresh"] = "stale"
    """'stale': D sees the same fakes until G steps again, as in the origin. 'fresh': new at each D step."""
    ema_half_life_kimg: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Half-life of the generator's moving average, in thousands of pictures; 0 is off."""
    augment: tuple[Augment, ...] = ()
    """DiffAugment policies that D sees, on real and fake alike; 'auto' alone: by the size of the data set."""
    augment_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """Chance of each policy for each picture; with ada_target at most."""
    ada_target: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Mean sign of D's verdict on training pictures that steers the chance; 0: the chance stays."""
    ada_kimg: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 100.0
    """Thousands of pictures in which the chance can go from 0 to 1."""
    mirror: bool = False
    """Show half of the pictures mirrored; only where left and right may be swapped."""
    conditional: bool = False
    """Train on the classes of the folder tree: G is asked for one, D is told which it sees."""
    max_skip: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of files that may be unreadable before the data set is refused."""
    checkpoint_seconds: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 300.0
    """Seconds between resume checkpoints, apart from save_every."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    keep_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Keep each checkpoint whose epoch is divisible by this; 0: only the last ones and the final."""
    keep_best: Annotated[int, Field(ge=0, le=1000)] = 1
    """Keep so many of the checkpoints that were measured, those with the lowest metric."""
    metric: Literal["kid", "fid", "swd", "none"] = "kid"
    """What checkpoints are measured by, lower is better."""
    feature_network: Literal["effnet-lite0", "random"] = "effnet-lite0"
    """What 'kid' and 'fid' look at pictures with; stands in the metric's key."""
    eval_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Epochs between evaluations; 0: as many as take a twentieth of the run, none if it is too short."""
    eval_samples: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Pictures of an evaluation, real and made; 0: 64 to 500, by the length of the run."""
    patience: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Stop after so many evaluations without a new best; 0, or no metric: never."""
    deterministic: bool = True
    """On a GPU: deterministic kernels, so that a resumed run ends with the same bits."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers of the plain passes; 'auto': bf16 on a GPU that has it, but for the origin, else fp32."""
    continue_from: int | None = None
    """Id of the job whose last checkpoint this run goes on from."""

    @classmethod
    def create(cls, **given: Any) -> Self:
        name = given.get("recipe") or "origin"
        if name not in RECIPES:
            raise SpecError(
                f"there is no recipe {str(name)[:40]!r}",
                hint=f"--recipe is one of: {', '.join(RECIPES)}",
            )
        chosen = {k: v for k, v in given.items() if v is not None}
        return super().create(**{**RECIPES[name].defaults, **chosen})

    @field_validator("size")
    @classmethod
    def _reachable(cls, size: int) -> int:
        size_plan(size)
        return size

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.loss == "bce" and self.norm_d != "batch":
            raise SpecError(
                f"--loss bce reads a sigmoid, and --norm-d {self.norm_d} gives logits",
                hint="use --loss nonsaturating (the same loss on logits) or --norm-d batch",
            )
        if self.loss != "bce" and self.norm_d == "batch":
            raise SpecError(
                f"--loss {self.loss} reads logits, and --norm-d batch ends in a sigmoid",
                hint="use --norm-d spectral or --loss bce",
            )
        if self.conditional and self.noise == "stale":
            raise SpecError(
                "--conditional shows D a fake of each real picture's class, and --noise stale shows old ones",
                hint="use --noise fresh",
            )
        if self.init_from is not None and (self.init_netg or self.init_netd):
            raise SpecError(
                "--init-from brings both networks, and --init-netg or --init-netd names another start",
                hint="use one of the two ways",
            )
        starts_g = self.init_from is not None or self.init_netg or self.continue_from is not None
        starts_d = self.init_from is not None or self.init_netd or self.continue_from is not None
        if (self.freeze_g and not starts_g) or (self.freeze_d and not starts_d):
            option = "--freeze-g" if self.freeze_g and not starts_g else "--freeze-d"
            raise SpecError(
                f"{option} would keep layers as they are drawn at random",
                hint="start from a trained network: --init-from JOB",
            )
        if "auto" in self.augment and len(self.augment) > 1:
            raise SpecError(
                "--augment auto chooses by itself, and goes with nothing else",
                hint="use auto, or name the policies",
            )
        if self.ada_target > 0 and not self.augment:
            raise SpecError(
                "--ada-target steers how often pictures are changed, and --augment none changes none",
                hint="use --augment auto, or name policies",
            )
        if self.arch == "residual" and self.norm_d != "none":
            raise SpecError(
                f"--arch residual needs no normalisation, and --norm-d {self.norm_d} would add one",
                hint="use --norm-d none (the blocks start as nothing instead) or --arch dcgan",
            )
        if self.eval_samples == 1:
            raise SpecError("--eval-samples 1: a metric compares sets", hint="--eval-samples 64 or more")
        if self.norm_d == "batch" and self.r1_gamma + self.r2_gamma > 0:
            raise SpecError(
                "--r1-gamma and --r2-gamma ask for D's slope at each picture, "
                "and with --norm-d batch a picture's score depends on its neighbours",
                hint="use --norm-d spectral or none",
            )
        return self

    @property
    def metric_key(self) -> str:
        """The name under which values can be compared, e.g. 'kid/effnet-lite0'."""
        on_features = self.metric in ("kid", "fid")
        return f"{self.metric}/{self.feature_network}" if on_features else self.metric


class GenerateSpec(Spec):
    """One set of pictures from one checkpoint. Picture i depends on (checkpoint, seed, i) alone."""

    kind: ClassVar[str] = "generate"

    source: int
    """Id of the training or import job that the generator comes from."""
    checkpoint: str = "best"
    """'best', 'last', or the number of complete epochs."""
    count: Count | None = None
    seeds: tuple[tuple[int, int], ...] = ()
    """Picture numbers as inclusive ranges (first, last); instead of `count`."""
    seed: Seed = 0
    keep: Count | None = None
    of: Count | None = None
    """Draw `of` pictures, publish the `keep` that the discriminator scores highest, best first."""
    interpolate: tuple[PictureNumber, ...] = ()
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
    """Files of one encoding, tar archives of PNGs, or one npz of arrays; see storage/containers.py."""
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
    max_workers: Annotated[int, Field(ge=0, le=MAX_PARTS)] = 0
    """Workers that may be at this job at once; 0: all that are free."""
    draws: tuple[int, int] | None = None
    """Of a part of a larger job: the places (first, last) in the order of draws that it computes."""

    @field_validator("checkpoint")
    @classmethod
    def _checkpoint_word(cls, value: str) -> str:
        return check_checkpoint(value)

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
        size = max(self.shard_size, -(-self.drawn // MAX_PARTS))
        size = -(-size // self.micro_batch) * self.micro_batch
        if self.draws is not None or self.drawn <= size or self.interpolate:
            return []
        alone = {"grid": 0, "out": None, "grid_epochs": False}
        return [
            self.model_copy(update={**alone, "draws": (first, min(first + size, self.drawn) - 1)})
            for first in range(0, self.drawn, size)
        ]


class EvaluateSpec(Spec):
    """One comparison of made pictures with those that a model was trained on."""

    kind: ClassVar[str] = "evaluate"

    source: int | None = None
    """Id of the training or import job to draw from, or of the generation whose pictures are looked at."""
    path: str | None = None
    """Or the absolute path of a folder, zip or tar of made pictures."""
    checkpoint: str = "best"
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
    feature_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Of that file; a name needs none."""
    max_skip: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of files that may be unreadable before a set of pictures is refused."""
    loader_workers: Annotated[int, Field(ge=0, le=256)] = 4
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True

    @field_validator("checkpoint")
    @classmethod
    def _checkpoint_word(cls, value: str) -> str:
        return check_checkpoint(value)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.source is None) == (self.path is None):
            raise SpecError("an evaluation is of a job or of a path", hint="ganq submit evaluate JOB|PATH")
        named = self.feature_network in FEATURE_NETWORKS
        if named and self.feature_sha256 is not None:
            raise SpecError(
                f"--feature-sha256 is of a file, and {self.feature_network} is none", hint="leave it away"
            )
        if not named and self.feature_sha256 is None:
            raise SpecError(
                f"--feature-network {self.feature_network[:200]} is none that ganq brings along",
                hint=f"{' or '.join(FEATURE_NETWORKS)}; a weight file needs its --feature-sha256 beside it "
                "(sha256sum FILE prints it)",
            )
        return self


class ImportSpec(Spec):
    """Weights from outside, made usable by `generate --from NAME`."""

    kind: ClassVar[str] = "import"

    netg: str
    netd: str | None = None
    size: int
    nz: int
    ngf: int
    ndf: int
