"""
Evaluate a run during training: choose the best checkpoint, stop early, detect a collapse of the generator.

Every decision is derived from the spec, the number of images and the evaluations stored in the checkpoints,
never from a clock: a run that was killed and resumed decides the same.

Shapes in names: N real images, M generated images, B in a batch, D features.
"""

import copy
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jobs import grids, rng
from jobs.context import Images, JobContext
from jobs.errors import GanqError, NotMeasurableError
from jobs.metrics import features
from jobs.metrics.copying import thumbnails
from jobs.metrics.diversity import COLLAPSED, diversity
from jobs.metrics.registry import ImageSet, Measure, Metric, compare, real_baseline
from jobs.renamed import renamed_result
from jobs.specs import TrainSpec
from jobs.training.state import TrainState

SHARE = 0.05
"""Share of a run's computation that evaluations may take."""
MIN_SAMPLES, MAX_SAMPLES = 64, 500
"""Images of one evaluation, unless the spec gives a number."""
LITE_GFLOP = 0.26
"""Of EfficientNet-Lite0 for one image of 128×128."""
SLOWDOWN = 4.0
"""Time of an operation of the feature network relative to training: its layers are narrow."""
COLLAPSE_FACTOR = 3.0
"""A collapse has a metric this many times as large as the best checkpoint's."""
BATCH = 64


@dataclass(frozen=True)
class Plan:
    """When a run is evaluated, and on how many images."""

    every: int
    """Epochs between evaluations; 0: never."""
    samples: int
    """Real images, and as many generated ones."""


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation; stored in the checkpoints."""

    step: int
    epoch: int
    key: str
    value: float
    spread: float | None
    diversity: float | None

    @property
    def can_be_best(self) -> bool:
        """
        Return whether the checkpoint can be the best one.

        A feature network responds to texture: 64 equal images of grey noise may have a lower metric than bad
        faces. A collapsed generator is therefore not compared.
        """
        return self.diversity is None or self.diversity >= COLLAPSED


def plan(spec: TrainSpec, image_count: int, train_flops: float, generate_flops: float) -> Plan:
    """
    Plan evaluations that take at most SHARE of the run's computation, at epochs that are saved.

    A run so short that a single evaluation takes more is evaluated at its end.

    Args:
        image_count: images in the data set.
        train_flops: of training on one image.
        generate_flops: of G's forward pass for one image.
    """
    if spec.metric == "none":
        return Plan(0, 0)
    per_epoch = image_count // spec.batch * spec.batch
    cost = (SLOWDOWN * LITE_GFLOP * 1e9 + generate_flops) / max(train_flops, 1.0)
    trained = spec.epochs * per_epoch
    if spec.progressive:  # an image of half the side takes a quarter of the operations
        half, full = spec.progressive
        trained -= int(15 / 16 * half + 3 / 4 * (full - half))
    budget = SHARE * trained / cost  # images
    # Features of the real images are computed once; fewer than five evaluations show no trend.
    count = spec.eval_samples or min(MAX_SAMPLES, max(MIN_SAMPLES, int(budget / 6)))
    count = min(count, image_count)
    if spec.eval_every:
        return Plan(spec.eval_every, count)
    times = int(budget / max(count, 1)) - 1
    if times < 1:  # at the end only
        return Plan(spec.epochs, count if spec.eval_samples else min(count, MIN_SAMPLES))
    saves = -(-spec.epochs // (times * spec.save_every))
    return Plan(max(1, saves) * spec.save_every, count)


def flops(state: TrainState, spec: TrainSpec) -> tuple[float, float]:
    """Return FLOPs of training on one image and of G's forward pass, counted on copies of the networks."""
    nets: tuple[nn.Module, nn.Module] = state.generator, state.discriminator
    if spec.progressive:  # the networks at the end of the run, not those of this step
        full = state.arch.at(spec.size)
        nets = full.build_generator(), full.build_discriminator()
    shapes = (1, spec.nz, 1, 1), (1, 3, spec.size, spec.size)
    G, D = (_flops(net, shape, spec.conditional) for net, shape in zip(nets, shapes, strict=True))
    # A backward pass costs two forward passes; D sees real images and fakes.
    return (G + 6 * D) / spec.d_every + (3 * G + 3 * D) / spec.g_every, G


@torch.no_grad()
def _flops(net: nn.Module, shape: tuple[int, ...], conditional: bool) -> float:
    copied = copy.deepcopy(net).float().cpu().eval()
    labels = (torch.zeros(1, dtype=torch.int64),) if conditional else ()
    with FlopCounterMode(display=False) as counter:
        copied(torch.zeros(shape), *labels)
    return float(counter.get_total_flops())


class Evaluations:
    """
    The evaluations of one run, and the decisions derived from them.

    Args:
        state: only the architecture of its networks is used.
    """

    def __init__(
        self, spec: TrainSpec, ctx: JobContext, images: Images, state: TrainState, device: torch.device
    ) -> None:
        self.spec, self.ctx, self.images, self.device = spec, ctx, images, device
        self.plan = plan(spec, len(images), *flops(state, spec)) if spec.metric != "none" else Plan(0, 0)
        self.history: list[Evaluation] = []
        self.baseline: Measure | None = None
        self._features: features.FeatureNetwork | None = None
        self._real: ImageSet | None = None
        self._missing: str | None = None
        """Why there is no metric."""

    @property
    def _metric(self) -> Metric:
        assert self.spec.metric != "none"
        return self.spec.metric

    def due(self, epoch: int, *, final: bool) -> bool:
        """Return whether an evaluation is due after this many epochs."""
        return self.plan.every > 0 and (final or epoch % self.plan.every == 0)

    def measure(self, step: int, epoch: int, sampler: nn.Module) -> Evaluation | None:
        """
        Evaluate the generator that is saved at this step; only once, also if the run was stopped since.

        Args:
            sampler: the generator; it is copied and not changed.

        Returns:
            None if the metric is not defined for these images; the log says why.
        """
        earlier = [one for one in self.history if one.step == step]
        if earlier:
            return earlier[-1]
        try:
            real = self._real_set()
            network = self._network()
            generated = ImageSet.of(self._generate(sampler), network)
            measure = compare(self._metric, real, generated)
            relative_diversity = self._diversity(real, generated)
        except NotMeasurableError as exc:
            self._skip(exc.message)
            return None
        evaluation = Evaluation(step, epoch, measure.key, measure.value, measure.spread, relative_diversity)
        self.history.append(evaluation)
        self._log(evaluation, measure)
        return evaluation

    def _diversity(self, real: ImageSet, generated: ImageSet) -> float | None:
        """
        Compute the diversity of the features, or of thumbnails if the metric uses no network.

        Returns:
            None if it is not defined for the thumbnails.
        """
        if self._features is not None:
            return diversity(real.features_ND, generated.features_ND)
        with suppress(NotMeasurableError):
            return diversity(thumbnails(real.images_N3HW), thumbnails(generated.images_N3HW))
        return None

    def _skip(self, reason: str) -> None:
        self._missing = reason
        self.ctx.log(f"no metric: {reason}")

    def _log(self, evaluation: Evaluation, measure: Measure) -> None:
        baseline = self.baseline.value if self.baseline else None
        self.ctx.metrics(
            {**asdict(evaluation), "metric": measure.value, "baseline": baseline, "note": measure.note}
        )
        parts = [f"epoch {evaluation.epoch}: {evaluation.key} {evaluation.value:.4g}"]
        if evaluation.spread is not None:
            parts.append(f" ± {evaluation.spread:.2g}")
        if evaluation.diversity is not None:
            parts.append(f", diversity {evaluation.diversity:.2f}")
        if baseline is not None:
            parts.append(f" (real-vs-real baseline {baseline:.4g})")
        self.ctx.log("".join(parts))

    # --- decisions ------------------------------------------------------------------------

    @property
    def best(self) -> Evaluation | None:
        """The first evaluation with the lowest value; None while all of them are of a collapsed generator."""
        candidates = [one for one in self.history if one.can_be_best]
        return min(candidates, key=lambda one: (one.value, one.step), default=None)

    def patience_exceeded(self) -> bool:
        """Return whether patience() evaluations have passed without a new best."""
        if self.spec.patience == 0 or not self.history:
            return False
        best = self.best or min(self.history, key=lambda one: (one.value, one.step))
        return sum(one.step > best.step for one in self.history) >= self.patience()

    def patience(self) -> int:
        """Return the spec's patience, doubled before there is a best: early in training diversity is low."""
        return self.spec.patience * (1 if self.best else 2)

    def has_collapsed(self) -> bool:
        """
        Return whether G has collapsed: low diversity now, not before, and a much larger metric.

        Both are required: early in training diversity is low, and single values fluctuate.
        """
        best = self.best
        if best is None or self.history[-1].can_be_best:
            return False
        limit = COLLAPSE_FACTOR * max(
            best.value, self.baseline.value if self.baseline else 0.0, best.spread or 0.0
        )
        return self.history[-1].value > limit

    def facts(self) -> dict[str, Any]:
        """Return the entries of the job's result."""
        if not self.history:
            return {"no_metric": self._missing} if self._missing else {}
        metric: dict[str, Any] = {"key": self.history[-1].key, "last": self.history[-1].value}
        if (best := self.best) is not None:
            metric |= {"best": best.value, "best_epoch": best.epoch}
        if self.baseline is not None:
            metric |= {"baseline": self.baseline.value}
        return {"metric": {**metric, "evaluations": len(self.history), "image_count": self.plan.samples}}

    # --- in a checkpoint --------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        baseline = asdict(self.baseline) if self.baseline else None
        return {"evaluations": [asdict(one) for one in self.history], "baseline": baseline}

    def restore(self, meta: dict[str, Any]) -> None:
        """
        Restore the evaluations of a checkpoint, except those of another metric.

        A run that continues another job starts without evaluations: the best checkpoint belongs to the other
        job, whose patience must not stop this run.
        """
        same_run = meta.get("spec", {}).get("continue_from") == self.spec.continue_from
        self.history = (
            [Evaluation(**renamed_result(one)) for one in meta.get("evaluations", ())] if same_run else []
        )
        if self.history:
            key = self._key()
            self.history = [one for one in self.history if one.key == key]

    # --- images -----------------------------------------------------------------------------

    def _network(self) -> features.FeatureNetwork | None:
        """Return the metric's feature network, loaded once; None if the metric uses pixels."""
        if self._features is None and self.spec.metric in ("kid", "fid"):
            name, sha256 = self.spec.feature_network, self.spec.feature_sha256
            self._features = features.chosen(name, sha256, self.ctx.weights, self.device)
        return self._features

    def _key(self) -> str:
        """Return the key under which values can be compared, e.g. 'kid/effnet-lite0'."""
        network = self._network()
        return f"{self.spec.metric}/{network.name}" if network else self.spec.metric

    def _real_set(self) -> ImageSet:
        if self._real is None:
            self.ctx.report(0, 1, "images", phase="measuring the real images")
            network = self._network()
            chosen_N = self._real_indices()
            images_N3HW = torch.from_numpy(np.ascontiguousarray(self.images.images_N3HW[chosen_N]))
            real = ImageSet.of(images_N3HW, network)
            try:
                self.baseline = real_baseline(self._metric, real)
            except GanqError as exc:
                self.ctx.log(f"no real-vs-real baseline: {exc.message}")
            self._real = real
        return self._real

    def _real_indices(self) -> Any:
        """Return the indices of the real images: independent of the run's seed, so runs are comparable."""
        order_N = torch.randperm(len(self.images), generator=rng.generator(0, "evaluate-real"))
        return order_N[: self.plan.samples].sort().values.numpy()

    def _labels(self, start: int) -> Tensor:
        """Return the class labels of the real images, so that both sets have the same classes."""
        assert self.images.labels_N is not None
        labels_N = torch.from_numpy(self.images.labels_N[self._real_indices()])
        return labels_N[torch.arange(start, start + BATCH) % len(labels_N)].to(self.device)

    @torch.no_grad()
    def _generate(self, sampler: nn.Module) -> Tensor:
        """Return images uint8 (M, 3, H, W), from the same latents each time."""
        net = copy.deepcopy(sampler).eval()
        images = []
        for start in range(0, self.plan.samples, BATCH):
            count = min(BATCH, self.plan.samples - start)
            latents_BZ11 = rng.noise(0, "evaluate-made", start, shape=(BATCH, self.spec.nz, 1, 1))
            labels = (self._labels(start),) if self.spec.conditional else ()
            images_B3HW = net(latents_BZ11.to(self.device), *labels)[:count]
            images.append(torch.from_numpy(grids.to_uint8(images_B3HW)).permute(0, 3, 1, 2))
        return torch.cat(images).contiguous()
