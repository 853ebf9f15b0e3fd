"""The spec of a training."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from jobs.budgets import Budget, read_budget, read_switches
from jobs.errors import SpecError
from jobs.recipes import RECIPES
from jobs.renamed import renamed
from jobs.specs.base import (
    READER,
    Fit,
    Seed,
    Sha256,
    Spec,
    UnpackedGb,
    WhiteLevel,
    check_feature_network,
    check_quarter,
    difference,
    size_plan,
)

Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Gamma = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Switch = Annotated[int, Field(ge=1, le=10**12)]
Augment = Literal["translation", "color", "cutout", "auto"]


class TrainSpec(Spec):
    """A training run. Field defaults are those of the tutorial, which a recipe overrides."""

    kind: ClassVar[str] = "train"
    of_new: ClassVar[dict[str, Any]] = {"reader": READER, "keep_duplicates": False}

    data: str
    """Absolute path of a folder, zip or tar of images."""
    recipe: str = "dcgan"
    size: int = 96
    """Side of the square images, in pixels; see size_plan()."""
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
    """Processes that decode images into the cache."""
    init_netg: str | None = None
    init_netd: str | None = None
    """Starting weights for each network: absolute path of a .pth or .safetensors file."""
    init_from: int | None = None
    """Id of the job whose best checkpoint initialises both networks."""
    freeze_d: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of frozen layers of D, from the pixels on."""
    freeze_g: Annotated[int, Field(ge=0, le=64)] = 0
    """Number of frozen layers of G, from the latents on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    arch: Literal["dcgan", "balanced", "resnet"] = "dcgan"
    """'dcgan': the tutorial's networks; 'balanced': with balanced widths of G; 'resnet': after R3GAN."""
    patch_size: Literal[0, 2, 3, 4, 6, 8] = 0
    """Side of the squares of pixels that G's last layer makes and D's first reads; 0: 3 or 2, by the size."""
    full_res_conv: bool = False
    """Last layer of G: a convolution at the resolution of the image."""
    antialias: bool = False
    """A low-pass filter after G's last convolution, against patterns of dots."""
    skips: bool = False
    """Skip connections: both networks have an image at a quarter and half of the side, too."""
    progressive: tuple[Switch, ...] = ()
    """Images seen when the side grows from a quarter to half, and to the whole; (): whole from the start."""
    loss: Literal["bce", "hinge", "nonsaturating", "relativistic"] = "bce"
    norm_d: Literal["batch", "spectral", "none"] = "batch"
    """'batch' ends in a sigmoid, as in the tutorial; 'spectral' and 'none' return logits."""
    r1_gamma: Gamma = 0.0
    """Weight of the R1 gradient penalty (real images), halved as in the papers; 0: off."""
    r2_gamma: Gamma = 0.0
    """Weight of the R2 gradient penalty (fakes); 0: off."""
    penalty_every: Annotated[int, Field(ge=1, le=1000)] = 1
    """Apply the penalties at every N-th step of D, N times as strong (lazy regularisation)."""
    lr_end: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """Final fraction of both learning rates, on a cosine schedule."""
    gamma_end: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """Final fraction of both penalties, on a cosine schedule."""
    beta2_end: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Final beta2, on a cosine schedule; 0: constant."""
    fake_reuse: Literal["until-g-step", "none"] = "until-g-step"
    """'until-g-step' (the tutorial): reuse fakes until G steps. 'none': new fakes at each step of D."""
    ema_half_life_kimg: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Half-life of the generator's moving average, in thousands of images; 0: off."""
    augment: tuple[Augment, ...] = ()
    """DiffAugment policies for real images and fakes; 'auto' chooses by the size of the data set."""
    augment_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """Probability of each policy for each image; with ada_target the maximum."""
    ada_target: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    """Target of the mean sign of D on training images, for adaptive augmentation (ADA); 0: off."""
    ada_kimg: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 100.0
    """Thousands of images in which the probability can rise from 0 to 1."""
    mirror: bool = False
    """Mirror half of the images horizontally."""
    conditional: bool = False
    """Train a class-conditional pair on the classes of the folder tree."""
    max_skip: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of files that may be unreadable before the data set is refused."""
    reader: Annotated[int, Field(ge=1, le=READER)] = 1
    """Version of the rules by which data sets are read; 1 is that of ganq 0.1 and 0.2."""
    keep_duplicates: bool = True
    """Use files with equal bytes more than once."""
    white_level: WhiteLevel = 0.0
    """Value that becomes white in images of 16 bits or floats; 0: the largest of 16 bits."""
    fit: Fit = "crop"
    """How an image becomes a square: its centre, with black bars, or distorted."""
    max_unpacked_gb: UnpackedGb = 100.0
    """Maximum unpacked size of an archive."""
    grey: bool = False
    """The generator makes grey images: equal channels."""
    checkpoint_seconds: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 300.0
    """Seconds between resume checkpoints, apart from save_every."""
    keep_last: Annotated[int, Field(ge=1, le=1000)] = 2
    keep_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Keep each checkpoint whose epoch is divisible by this; 0: only the last ones and the final one."""
    keep_best: Annotated[int, Field(ge=0, le=1000)] = 1
    """Number of evaluated checkpoints to keep, those with the lowest metric."""
    metric: Literal["kid", "fid", "swd", "none"] = "kid"
    """Metric of checkpoints, lower is better."""
    feature_network: str = "effnet-lite0"
    """A name of FEATURE_NETWORKS, or the absolute path of a weight file; its name is in the metric's key."""
    feature_sha256: Sha256 | None = None
    """SHA-256 of that file; not used for a name."""
    eval_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Epochs between evaluations; 0: they take a twentieth of the run at most, none if it is short."""
    eval_samples: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Real and generated images of an evaluation; 0: 64 to 500, by the length of the run."""
    patience: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Stop after this number of evaluations without a new best; 0, or no metric: never."""
    stop_after: str | None = None
    """End earlier than `epochs`, whose schedules apply: jobs.budgets.Budget as text."""
    deterministic: bool = True
    """On a GPU: deterministic kernels, so that a resumed run is bit-exact."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of forward passes; 'auto': bf16 on a GPU that has it, fp32 for recipe dcgan."""
    cuda_graphs: bool = True
    """On a GPU: capture the forward and backward passes of a step as CUDA graphs."""
    continue_from: int | None = None
    """Id of the job whose last checkpoint this run continues."""

    @classmethod
    def create(cls, **given: Any) -> Self:
        given = renamed(given)
        name = given.get("recipe") or "dcgan"
        if name not in RECIPES:
            raise SpecError(
                f"there is no recipe {str(name)[:40]!r}",
                hint=f"--recipe is one of: {', '.join(RECIPES)}",
            )
        chosen = {k: v for k, v in given.items() if v is not None}
        if not chosen.get("augment", True):
            chosen.setdefault("ada_target", 0.0)  # the recipe's value needs augmentation
        if chosen.get("progressive") not in (None, (), [], "none"):
            chosen.setdefault("skips", True)
        defaults = RECIPES[name].defaults_at(chosen.get("size"))
        starts = ("init_from", "init_netg", "init_netd", "continue_from")
        if any(start in chosen for start in starts):
            defaults |= NEW_NETWORK_OPTIONS  # the given networks determine them, and files tell none
        elif "ngf" in chosen:
            chosen.setdefault("ndf", chosen["ngf"])  # networks of unequal size train badly, or slowly
        return super().create(**{**defaults, **chosen})

    @model_validator(mode="before")
    @classmethod
    def _usual_patch_size(cls, given: Any) -> Any:
        """Store 0 for the patch size that the size has by itself: equal networks have equal specs."""
        if not isinstance(given, Mapping):
            return given
        size, patch_size = given.get("size", 96), given.get("patch_size")
        if isinstance(size, int) and patch_size in (2, 3):
            with suppress(SpecError):
                return {**given, "patch_size": 0 if size_plan(size)[1] == patch_size else patch_size}
        return given

    @field_validator("stop_after", mode="before")
    @classmethod
    def _budget(cls, given: Any) -> Any:
        return str(read_budget(given)) if isinstance(given, str | int) else given

    @field_validator("progressive", mode="before")
    @classmethod
    def _switches(cls, given: Any) -> Any:
        return read_switches(given) if isinstance(given, str) else given

    @property
    def budget(self) -> Budget | None:
        """Return what --stop-after gives it."""
        return None if self.stop_after is None else read_budget(self.stop_after)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        size_plan(self.size, self.patch_size)
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
        self._check_growth()
        if self.conditional and self.fake_reuse == "until-g-step":
            raise SpecError(
                "--conditional shows D a fake of each real image's class, "
                "and --fake-reuse until-g-step shows old ones",
                hint="use --fake-reuse none",
            )
        if self.init_from is not None and (self.init_netg or self.init_netd):
            raise SpecError(
                "--init-from sets both networks and cannot be combined with --init-netg or --init-netd",
                hint="use one of them",
            )
        starts_g = self.init_from is not None or self.init_netg or self.continue_from is not None
        starts_d = self.init_from is not None or self.init_netd or self.continue_from is not None
        if (self.freeze_g and not starts_g) or (self.freeze_d and not starts_d):
            option = "--freeze-g" if self.freeze_g and not starts_g else "--freeze-d"
            raise SpecError(
                f"{option} would freeze randomly initialised layers",
                hint="start from a trained network: --init-from JOB",
            )
        if self.ada_target > 0 and not self.augment:
            raise SpecError(
                "--ada-target controls how often images are augmented, and --augment none disables that",
                hint="use --augment auto, or name policies",
            )
        if self.arch == "resnet" and self.norm_d != "none":
            raise SpecError(
                f"--arch resnet needs no normalisation, and --norm-d {self.norm_d} would add one",
                hint="use --norm-d none (the blocks start as nothing instead) or --arch dcgan",
            )
        if (budget := self.budget) is not None and budget.unit == "epochs" and budget.amount > self.epochs:
            raise SpecError(
                f"--stop-after {budget} is more than --epochs {self.epochs}",
                hint=f"--epochs {int(budget.amount)} or more; the schedules follow --epochs",
            )
        if self.eval_samples == 1:
            raise SpecError("--eval-samples 1: a metric compares sets", hint="--eval-samples 64 or more")
        check_feature_network(self.feature_network, self.feature_sha256)
        if self.norm_d == "batch" and self.r1_gamma + self.r2_gamma > 0:
            raise SpecError(
                "--r1-gamma and --r2-gamma need D's gradient at each image, "
                "and with --norm-d batch an image's score depends on its neighbours",
                hint="use --norm-d spectral or none, or --r1-gamma 0 --r2-gamma 0",
            )
        return self

    def _check_growth(self) -> None:
        option = "--progressive" if self.progressive else "--skips"
        if self.skips or self.progressive:
            check_quarter(option, self.size, self.patch_size)
        if self.skips and (self.freeze_d or self.freeze_g):
            raise SpecError(
                f"--freeze-{'d' if self.freeze_d else 'g'} counts layers, and with {option} they branch",
                hint=f"omit one of them, or start from a job without {option}",
            )
        if not self.progressive:
            return
        if not self.skips:
            raise SpecError("--progressive grows networks with skip connections", hint="omit --no-skips")
        if len(self.progressive) != 2 or self.progressive[0] >= self.progressive[1]:
            raise SpecError(
                "--progressive takes the images seen when half and when full size begins",
                hint="e.g. --progressive 20k,60k",
            )
        if self.init_from is not None or self.init_netg or self.init_netd:
            raise SpecError(
                "--progressive starts with networks for small images, and trained ones are of full size",
                hint="omit --progressive: a start from trained networks does not need it",
            )
        budget = self.budget
        if budget is not None and budget.unit == "images" and budget.amount <= self.progressive[1]:
            raise self.ends_too_early(int(budget.amount), f"--stop-after {budget}")

    def ends_too_early(self, images: int, run: str) -> SpecError:
        """
        Return the error of a run that ends before its images have full size.

        Args:
            images: that the run sees.
            run: what ends it, in words.
        """
        half, full = self.progressive
        return SpecError(
            f"--progressive {half},{full}: full size begins after {full:,} images, "
            f"and {run} ends the run after {images:,}",
            hint=f"e.g. --progressive {max(1, images // 6)},{max(2, images // 2)}, or a longer run",
        )

    def check_progressive(self, image_count: int) -> None:
        """
        Check that the run does not end before its images have full size.

        Args:
            image_count: images in the data set.

        Raises:
            SpecError: it does.
        """
        if not self.progressive:
            return
        per_epoch = image_count // self.batch
        steps, run = self.epochs * per_epoch, f"--epochs {self.epochs}"
        if self.budget is not None:
            limit = self.budget.steps(per_epoch=per_epoch, batch=self.batch) or steps
            if limit < steps:
                steps, run = limit, f"--stop-after {self.budget}"
        if steps * self.batch <= self.progressive[1]:
            raise self.ends_too_early(steps * self.batch, run)


CHANGEABLE_ON_RESUME = frozenset(
    {
        "data",  # a folder can move: the fingerprint of the images is compared instead
        "epochs",
        "save_every",
        "device",
        "cuda_graphs",  # bit-exact
        "deterministic",  # with `device` in the build fingerprint, which says bit_exact or not
        "init_netg",  # these three apply only at the beginning of a run
        "init_netd",
        "init_from",
        "loader_workers",
        "max_skip",
        "max_unpacked_gb",
        "checkpoint_seconds",
        "keep_last",
        "keep_best",
        "metric",  # these six do not affect training steps
        "feature_network",
        "feature_sha256",
        "eval_every",
        "eval_samples",
        "patience",
        "stop_after",
        "keep_every",
        "continue_from",
    }
)
"""Options that may differ between a run and its continuation."""


NETWORK_OPTIONS = (
    *("size", "nz", "ngf", "ndf", "arch", "norm_d"),
    *("patch_size", "full_res_conv", "antialias", "skips"),
)
"""Options of the networks, whose weights fit no others; the number of classes comes from the data set."""
NEW_NETWORK_OPTIONS = {"patch_size": 0, "full_res_conv": False, "antialias": False, "skips": False}
NEW_FIELDS = {**NEW_NETWORK_OPTIONS, "progressive": [], "fit": "crop"}
"""Fields that a spec of an earlier version lacks, with what it did, as JSON."""


def check_same_run(saved: Mapping[str, Any], spec: TrainSpec) -> None:
    """
    Check that the options permit the continuation of a run.

    Args:
        saved: the spec of the run that is continued, as JSON.

    Raises:
        SpecError: it names each option that differs, with both values.
    """
    mine = spec.to_json()
    saved = renamed(saved)
    if saved:
        saved = {**NEW_FIELDS, **saved}
    differ = [
        difference(name, mine[name], saved[name])
        for name in mine
        if name in saved and name not in CHANGEABLE_ON_RESUME and saved[name] != mine[name]
    ]
    if differ:
        raise SpecError(
            f"a run cannot be continued with a changed {', '.join(differ)}",
            hint="omit it, or start a new run: --init-from JOB starts one from its networks",
            options=differ,
        )
