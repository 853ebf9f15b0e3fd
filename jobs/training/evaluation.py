"""
Measures a run while it trains: which checkpoint is the best, when to stop, and whether G has collapsed.

Every decision follows from the spec, the number of pictures and the evaluations that stand in
the checkpoints, never from a clock: a run that was killed and goes on decides the same.

Shapes in names: N real pictures, M made ones, B in a batch, D features.
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
"""Of a run's work that evaluations may take."""
FEWEST, MOST = 64, 500
"""Pictures of one evaluation, unless the spec says how many."""
LITE_GFLOP = 0.26
"""Of EfficientNet-Lite0 for one picture at 128 pixels."""
SLOWER = 4.0
"""How much slower a feature network's operations are than training's: its layers are narrow."""
WORSE = 3.0
"""A collapse is this many times as far from the real pictures as the best checkpoint was."""
BATCH = 64


@dataclass(frozen=True)
class Plan:
    """When a run is measured, and on how many pictures."""

    every: int
    """Epochs; 0: never."""
    pictures: int
    """Real ones, and as many made ones."""


@dataclass(frozen=True)
class Evaluation:
    """One line of a run's record; stands in its checkpoints."""

    step: int
    epoch: int
    key: str
    value: float
    spread: float | None
    diversity: float | None

    @property
    def can_be_best(self) -> bool:
        """
        Whether its value means that its pictures are good.

        A network looks at texture: grey noise, 64 times the same, may be nearer to faces than bad faces
        are. So who repeats itself is not compared.
        """
        return self.diversity is None or self.diversity >= COLLAPSED


def plan(spec: TrainSpec, pictures: int, train_flops: float, make_flops: float) -> Plan:
    """
    Evaluations that fit in SHARE of the run's work, on epochs that are saved.

    Args:
        pictures: of the data set.
        train_flops: of training on one picture.
        make_flops: of G, for one picture.
    """
    if spec.metric == "none":
        return Plan(0, 0)
    per_epoch = pictures // spec.batch * spec.batch
    cost = (SLOWER * LITE_GFLOP * 1e9 + make_flops) / max(train_flops, 1.0)
    budget = SHARE * spec.epochs * per_epoch / cost  # pictures
    # The real ones are measured once; five evaluations are the least that shows a course.
    count = spec.eval_samples or min(MOST, max(FEWEST, int(budget / 6)))
    count = min(count, pictures)
    if spec.eval_every:
        return Plan(spec.eval_every, count)
    times = int(budget / max(count, 1)) - 1
    if times < 1:
        return Plan(0, count)
    saves = -(-spec.epochs // (times * spec.save_every))
    return Plan(max(1, saves) * spec.save_every, count)


def flops(state: TrainState, spec: TrainSpec) -> tuple[float, float]:
    """(of training on one picture, of G alone): counted on copies of the networks."""
    G, D = (_flops(net, shape, spec.conditional) for net, shape in _shapes(state, spec))
    # A backward pass costs two forward ones; D sees reals and fakes.
    return (G + 6 * D) / spec.d_every + (3 * G + 3 * D) / spec.g_every, G


def _shapes(state: TrainState, spec: TrainSpec) -> list[tuple[nn.Module, tuple[int, ...]]]:
    return [
        (state.generator, (1, spec.nz, 1, 1)),
        (state.discriminator, (1, 3, spec.size, spec.size)),
    ]


@torch.no_grad()
def _flops(net: nn.Module, shape: tuple[int, ...], conditional: bool) -> float:
    mine = copy.deepcopy(net).float().cpu().eval()
    labels = (torch.zeros(1, dtype=torch.int64),) if conditional else ()
    with FlopCounterMode(display=False) as counter:
        mine(torch.zeros(shape), *labels)
    return float(counter.get_total_flops())


class Evaluations:
    """
    One run's record, and what follows from it.

    Args:
        state: fresh; asked for the form of its networks alone.
    """

    def __init__(
        self, spec: TrainSpec, ctx: JobContext, images: Images, state: TrainState, device: torch.device
    ) -> None:
        self.spec, self.ctx, self.images, self.device = spec, ctx, images, device
        self.plan = plan(spec, len(images), *flops(state, spec)) if spec.metric != "none" else Plan(0, 0)
        self.record: list[Evaluation] = []
        self.baseline: Measure | None = None
        self._features: features.FeatureNetwork | None = None
        self._real: ImageSet | None = None
        self._missing: str | None = None
        """Why there is no metric, if there is none."""
        if self.plan.every == 0 and spec.metric != "none":
            self._miss(
                f"the run is so short that one evaluation would be more than {SHARE:.0%} of it "
                "(--eval-every 1 measures all the same)"
            )

    @property
    def _metric(self) -> Metric:
        assert self.spec.metric != "none"
        return self.spec.metric

    def due(self, epoch: int, *, final: bool) -> bool:
        """Whether the run is measured where this many epochs are complete."""
        return self.plan.every > 0 and (final or epoch % self.plan.every == 0)

    def measure(self, step: int, epoch: int, sampler: nn.Module) -> Evaluation | None:
        """
        Measure the generator that is saved at this step; once, also if the run was stopped since.

        Args:
            sampler: is copied, and stays as it is: its bits are the run's.

        Returns:
            None where the metric says nothing about these pictures; the log says why.
        """
        known = [one for one in self.record if one.step == step]
        if known:
            return known[-1]
        try:
            real = self._reals()
            network = self._network()
            made = ImageSet.of(self._made(sampler), network)
            found = compare(self._metric, real, made)
            varied = self._diversity(real, made)
        except NotMeasurableError as exc:
            self._miss(exc.message)
            return None
        one = Evaluation(step, epoch, found.key, found.value, found.spread, varied)
        self.record.append(one)
        self._tell(one, found)
        return one

    def _diversity(self, real: ImageSet, made: ImageSet) -> float | None:
        """
        By the network's features, or by thumbnails where the metric has none.

        Returns:
            None where thumbnails tell nothing: such a metric does not depend on it.
        """
        if self._features is not None:
            return diversity(real.features_ND, made.features_ND)
        with suppress(NotMeasurableError):
            return diversity(thumbnails(real.images_N3HW), thumbnails(made.images_N3HW))
        return None

    def _miss(self, reason: str) -> None:
        self._missing = reason
        self.ctx.log(f"no metric: {reason}")

    def _tell(self, one: Evaluation, found: Measure) -> None:
        baseline = self.baseline.value if self.baseline else None
        self.ctx.metrics({**asdict(one), "metric": found.value, "baseline": baseline, "note": found.note})
        spread = "" if one.spread is None else f" ± {one.spread:.2g}"
        varied = "" if one.diversity is None else f"; diversity {one.diversity:.2f}"
        told = "" if baseline is None else f" (real-vs-real baseline {baseline:.4g})"
        self.ctx.log(f"epoch {one.epoch}: {one.key} {one.value:.4g}{spread}{varied}{told}")

    # --- what follows ---------------------------------------------------------------------

    @property
    def best(self) -> Evaluation | None:
        """The first of those with the lowest value; None while the generator only repeats itself."""
        able = [one for one in self.record if one.can_be_best]
        return min(able, key=lambda one: (one.value, one.step), default=None)

    def is_over(self) -> bool:
        """Whether patience() evaluations have passed without a new best."""
        if self.spec.patience == 0 or not self.record:
            return False
        best = self.best or min(self.record, key=lambda one: (one.value, one.step))
        return sum(one.step > best.step for one in self.record) >= self.patience()

    def patience(self) -> int:
        """Twice the spec's for a generator that has only repeated itself so far: it may be young."""
        return self.spec.patience * (1 if self.best else 2)

    def has_collapsed(self) -> bool:
        """
        Whether G repeats itself now, and once did not.

        Both signs are asked for: a young generator has no variety yet, and a value may jump.
        """
        best = self.best
        if best is None or self.record[-1].can_be_best:
            return False
        far = WORSE * max(best.value, self.baseline.value if self.baseline else 0.0, best.spread or 0.0)
        return self.record[-1].value > far

    def facts(self) -> dict[str, Any]:
        """For the job's result."""
        if not self.record:
            return {"no_metric": self._missing} if self._missing else {}
        measured: dict[str, Any] = {"key": self.record[-1].key, "last": self.record[-1].value}
        if (best := self.best) is not None:
            measured |= {"best": best.value, "best_epoch": best.epoch}
        if self.baseline is not None:
            measured |= {"baseline": self.baseline.value}
        return {"metric": {**measured, "evaluations": len(self.record), "image_count": self.plan.pictures}}

    # --- in a checkpoint --------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        baseline = asdict(self.baseline) if self.baseline else None
        return {"evaluations": [asdict(one) for one in self.record], "baseline": baseline}

    def restore(self, meta: dict[str, Any]) -> None:
        """
        Go on with the record of a checkpoint; what another metric said is let go.

        A run that goes on from another job's begins a new record: the old best is that job's, and
        its patience must not end what somebody wishes to go on.
        """
        mine = meta.get("spec", {}).get("continue_from") == self.spec.continue_from
        self.record = (
            [Evaluation(**renamed_result(one)) for one in meta.get("evaluations", ())] if mine else []
        )
        if self.record:
            wanted = self._key()
            self.record = [one for one in self.record if one.key == wanted]

    # --- pictures ---------------------------------------------------------------------------

    def _network(self) -> features.FeatureNetwork | None:
        """What the metric looks with; loaded once; None: it looks at pixels."""
        if self._features is None and self.spec.metric in ("kid", "fid"):
            name, sha256 = self.spec.feature_network, self.spec.feature_sha256
            self._features = features.chosen(name, sha256, self.ctx.weights, self.device)
        return self._features

    def _key(self) -> str:
        """The name under which values can be compared, e.g. 'kid/effnet-lite0'."""
        network = self._network()
        return f"{self.spec.metric}/{network.name}" if network else self.spec.metric

    def _reals(self) -> ImageSet:
        if self._real is None:
            self.ctx.report(0, 1, "pictures", phase="measuring the real pictures")
            network = self._network()
            chosen_N = self._chosen()
            images_N3HW = torch.from_numpy(np.ascontiguousarray(self.images.images_N3HW[chosen_N]))
            real = ImageSet.of(images_N3HW, network)
            try:
                self.baseline = real_baseline(self._metric, real)
            except GanqError as exc:
                self.ctx.log(f"no real-vs-real baseline: {exc.message}")
            self._real = real
        return self._real

    def _chosen(self) -> Any:
        """The same pictures each time, whatever the run's own seed: runs on one data set can be compared."""
        order_N = torch.randperm(len(self.images), generator=rng.generator(0, "evaluate-real"))
        return order_N[: self.plan.pictures].sort().values.numpy()

    def _labels(self, start: int) -> Tensor:
        """The classes of the real pictures that are measured, so that both sets have as many of each."""
        assert self.images.labels_N is not None
        labels_N = torch.from_numpy(self.images.labels_N[self._chosen()])
        return labels_N[torch.arange(start, start + BATCH) % len(labels_N)].to(self.device)

    @torch.no_grad()
    def _made(self, sampler: nn.Module) -> Tensor:
        """uint8 (M, 3, H, W), from the same latents each time."""
        net = copy.deepcopy(sampler).eval()
        made = []
        for start in range(0, self.plan.pictures, BATCH):
            count = min(BATCH, self.plan.pictures - start)
            latents_BZ11 = rng.noise(0, "evaluate-made", start, shape=(BATCH, self.spec.nz, 1, 1))
            labels = (self._labels(start),) if self.spec.conditional else ()
            images_B3HW = net(latents_BZ11.to(self.device), *labels)[:count]
            made.append(torch.from_numpy(grids.to_uint8(images_B3HW)).permute(0, 3, 1, 2))
        return torch.cat(made).contiguous()
