"""
How good the pictures of a model are, beside those it was trained on, and whether they are copies of them.

Every number stands beside its floor: what the same metric says of one half of the real pictures
against the other. Nothing here draws on chance but the pictures themselves, so one spec gives one report.

Shapes in names: N real pictures, M made ones, D features, H, W pixels.
"""

import hashlib
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from jobs import device as devices
from jobs.context import JobContext
from jobs.errors import DatasetError, NotMeasurableError, SpecError, StopRequested
from jobs.generation.epoch_grid import labelled
from jobs.generation.generate import Generation
from jobs.metrics import features as networks
from jobs.metrics.copying import Copying, copying, thumbnails
from jobs.metrics.diversity import COLLAPSED, diversity
from jobs.metrics.prdc import precision_recall
from jobs.metrics.registry import METRICS, ImageSet, check_real, compare, real_baseline
from jobs.specs import FEWEST_PICTURES, EvaluateSpec, GenerateSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jobs.context import Images

T = TypeVar("T")

REPORT, NEIGHBOURS = "evaluation.json", "neighbours.png"
STEP = 256
"""Pictures between two looks at whether the job should stop."""
PAIRS_IN_A_ROW, ROWS = 4, 4
"""Of neighbours.png: rows of the most suspicious pairs, and as many of the first ones."""


def run(spec: EvaluateSpec, ctx: JobContext) -> dict[str, Any]:
    """
    Get the pictures, look at them with a feature network, compare, judge, publish a report.

    Returns:
        The report, and 'files': what was written, with sha-256.

    Raises:
        DatasetError, NotMeasurableError: pictures about which no number has a meaning.
        SpecError: the made pictures are not of the size that was said.
        StopRequested: somebody wants the job to stop; nothing was published.
    """
    with devices.memory_errors("a smaller --count"):
        return _Evaluation(spec, ctx).run()


class _Evaluation:
    """One evaluation, in the order of its methods."""

    def __init__(self, spec: EvaluateSpec, ctx: JobContext) -> None:
        self.spec = spec
        self.ctx = ctx
        self.device = devices.choose(spec.device)
        self.notes: list[str] = []
        self.started = time.monotonic()

    def run(self) -> dict[str, Any]:
        spec, ctx = self.spec, self.ctx
        network = self._network()
        generated_M3HW = self._made()
        images = ctx.images(spec.data, spec.size)
        real_N3HW = self._real(images)
        due = len(generated_M3HW) + len(real_N3HW)
        made = self._looked_at(network, generated_M3HW, 0, due)
        real = self._looked_at(network, real_N3HW, len(generated_M3HW), due)
        ctx.report(due, due, "pictures", phase="comparing")
        facts = self._measured(real, made)
        copied, distinct_M = self._copied(real, made, facts)
        report = {
            "image_count": len(made),
            "size": spec.size,
            "feature_network": network.name,
            "data": {
                "path": spec.data,
                "fingerprint": images.fingerprint,
                "image_count": len(images),
                "compared": len(real),
            },
            **facts,
            "notes": self.notes,
            "seconds": round(time.monotonic() - self.started, 1),
            "build": devices.build_fingerprint(self.device, deterministic=spec.deterministic),
        }
        self._ask()
        files: dict[str, bytes | NDArray[np.uint8]] = {}
        if copied is not None:
            files[NEIGHBOURS] = _pairs(made.images_N3HW[distinct_M], real.images_N3HW, copied)
        files[REPORT] = json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n"
        return {**report, "files": ctx.save_files(files)}

    # --- the pictures ---------------------------------------------------------------------------

    def _network(self) -> networks.FeatureNetwork:
        spec = self.spec
        self.ctx.report(0, spec.count, "pictures", phase="loading the feature network")
        return networks.chosen(spec.feature_network, spec.feature_sha256, self.ctx.weights, self.device)

    def _made(self) -> Tensor:
        """uint8 (M, 3, H, W): drawn from the model, or published before, or a person's own."""
        spec, ctx = self.spec, self.ctx
        if spec.path is not None:
            found = ctx.images(spec.path, spec.size, pin="path_fingerprint").images_N3HW
            generated_M3HW = torch.from_numpy(np.ascontiguousarray(found[_spread(len(found), spec.count)]))
        elif (published := ctx.generated_images(spec.count)) is not None:
            generated_M3HW = _channels_first(list(published))
        else:
            generated_M3HW = self._drawn()
        if generated_M3HW.shape[2:] != (spec.size, spec.size):
            high, wide = generated_M3HW.shape[2:]
            raise SpecError(
                f"the pictures are {wide}×{high}, and the evaluation was to be of {spec.size}×{spec.size}",
                hint=f"--size {high}",
            )
        if len(generated_M3HW) < FEWEST_PICTURES:
            raise NotMeasurableError(
                f"{len(generated_M3HW)} pictures are too few to be measured",
                hint=f"{FEWEST_PICTURES} are the least, 2,000 make good numbers",
            )
        return generated_M3HW

    def _drawn(self) -> Tensor:
        spec = self.spec
        draws = GenerateSpec(
            source=spec.source or 0,
            count=spec.count,
            seed=spec.seed,
            micro_batch=spec.micro_batch,
            device=spec.device,
            deterministic=spec.deterministic,
        )
        return _channels_first([one for part in Generation(draws, self.ctx).pixels() for one in part])

    def _real(self, images: "Images") -> Tensor:
        """uint8 (N, 3, H, W), each picture once: twins would excuse copies."""
        found = images.images_N3HW
        chosen = _spread(len(found), spec_most := self.spec.search)
        if len(found) > spec_most:
            self.notes.append(f"{spec_most:,} of the {len(found):,} training pictures were compared")
        seen: set[bytes] = set()
        distinct = []
        for place in chosen:
            digest = hashlib.blake2b(found[place].tobytes(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                distinct.append(place)
        if twins := len(chosen) - len(distinct):
            self.notes.append(f"{twins:,} training pictures are exact twins of others and count once")
        if len(distinct) < FEWEST_PICTURES:
            what = f"{len(found)} pictures" if not twins else f"{len(distinct)} different pictures"
            raise DatasetError(
                f"{self.spec.data} holds {what}: too few to measure others against",
                hint=f"{FEWEST_PICTURES} different ones are the least; ganq dataset check looks for more",
            )
        return torch.from_numpy(np.stack([found[place] for place in distinct]))

    def _looked_at(
        self, network: networks.FeatureNetwork, images_N3HW: Tensor, before: int, due: int
    ) -> ImageSet:
        """The pictures with their features; the slow part, so it says how far it is."""
        parts = []
        for start in range(0, len(images_N3HW), STEP):
            self._ask()
            parts.append(network(images_N3HW[start : start + STEP]))
            done = before + min(start + STEP, len(images_N3HW))
            rate = done / max(time.monotonic() - self.started, 1e-9)
            self.ctx.report(done, due, "pictures", rate=rate)
        return ImageSet(images_N3HW, torch.cat(parts), network.name)

    def _ask(self) -> None:
        if (reason := self.ctx.stop_reason()) is not None:
            raise StopRequested(reason)

    # --- the numbers ----------------------------------------------------------------------------

    def _measured(self, real: ImageSet, made: ImageSet) -> dict[str, Any]:
        check_real(real)
        metrics: dict[str, Any] = {}
        for metric in METRICS:
            self._ask()
            measured = self._said(compare, metric, real, made)
            if measured is None:
                continue
            baseline = self._said(real_baseline, metric, real)
            metrics[measured.key] = {
                "value": measured.value,
                "spread": measured.spread,
                "baseline": None if baseline is None else baseline.value,
                "note": measured.note,
            }
        self._ask()
        count = min(len(real), len(made))
        pr = precision_recall(real.features_ND[:count], made.features_ND[:count])
        half = count // 2
        pr_baseline = precision_recall(real.features_ND[0 : 2 * half : 2], real.features_ND[1 : 2 * half : 2])
        facts: dict[str, Any] = {
            "metrics": metrics,
            "precision": {"value": pr.precision, "baseline": pr_baseline.precision},
            "recall": {"value": pr.recall, "baseline": pr_baseline.recall},
        }
        among = self._said(diversity, real.features_ND, made.features_ND)
        if among is not None:
            facts["diversity"] = among
            if among < COLLAPSED:
                self.notes.append(
                    f"the model repeats itself: its pictures differ {among:.0%} as much as real ones do"
                )
        return facts

    def _copied(
        self, real: ImageSet, made: ImageSet, facts: dict[str, Any]
    ) -> tuple[Copying | None, list[int]]:
        """
        What the test for copies says, by thumbnails and by features: the worse of the two.

        Args:
            facts: get what both say.

        Returns:
            It, and which made pictures were asked about: each once.
        """
        rows = made.images_N3HW.flatten(1).numpy()
        first: dict[bytes, int] = {}
        for place, row in enumerate(rows):
            first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), place)
        distinct = sorted(first.values())
        if twins := len(rows) - len(distinct):
            self.notes.append(f"{twins:,} of the made pictures are exact twins of others")
        by = {
            "thumbnails": (thumbnails(real.images_N3HW), thumbnails(made.images_N3HW[distinct])),
            str(made.network): (real.features_ND, made.features_ND[distinct]),
        }
        told = {name: said for name, pair in by.items() if (said := self._said(copying, *pair)) is not None}
        if not told:
            return None, distinct
        worst = max(told, key=lambda name: (told[name].verdict == "copies", told[name].share))
        found = told[worst]
        facts["copying"] = {
            "verdict": found.verdict,
            "share": found.share,
            "by": worst,
            "summary": found.summary(),
            "all": {
                name: {"verdict": one.verdict, "share": one.share, "threshold": one.threshold}
                for name, one in told.items()
            },
        }
        return found, distinct

    def _said(self, measure: Callable[..., T], *given: Any) -> T | None:
        """A number, or a note that says why there is none."""
        try:
            return measure(*given)
        except NotMeasurableError as exc:
            self.notes.append(exc.message)
            return None


def _spread(count: int, most: int) -> list[int]:
    """At most so many places, evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return [place * count // most for place in range(most)]


def _channels_first(pictures: "list[NDArray[np.uint8]]") -> Tensor:
    if len({one.shape for one in pictures}) > 1:
        raise DatasetError("the pictures are not all of one size", hint="evaluate sets of one size")
    if not pictures:
        raise NotMeasurableError("there are no pictures to be measured", hint="name a job that has some")
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))


def _pairs(generated_M3HW: Tensor, real_N3HW: Tensor, found: Copying) -> "NDArray[np.uint8]":
    """Made picture | nearest training picture: the most suspicious pairs, then the first ones."""
    shown = PAIRS_IN_A_ROW * ROWS
    order = found.ratio_M.argsort()[:shown].tolist()
    chosen = [*order, *range(min(shown, len(generated_M3HW)))]
    pictures = [
        picture_3HW.permute(1, 2, 0).numpy()
        for place in chosen
        for picture_3HW in (generated_M3HW[place], real_N3HW[found.neighbour_M[place]])
    ]
    wide = 2 * PAIRS_IN_A_ROW
    pictures += [np.zeros_like(pictures[0])] * (-len(pictures) % wide)
    rows_RNHW3 = np.stack(pictures).reshape(-1, wide, *pictures[0].shape)
    closest = -(-len(order) // PAIRS_IN_A_ROW)
    labels = ["nearest" if row < closest else "any" for row in range(len(rows_RNHW3))]
    return labelled(rows_RNHW3, labels)
