"""
The metrics by name, with one answer for all: a key, a value, its spread, and what limits it.

Shapes in names: N pictures, D features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jobs.errors import NotMeasurableError
from jobs.metrics.features import FeatureNetwork
from jobs.metrics.fid import fid, is_biased
from jobs.metrics.kid import kid
from jobs.metrics.swd import swd

Metric = Literal["kid", "fid", "swd"]
METRICS: tuple[Metric, ...] = ("kid", "fid", "swd")
ON_FEATURES = ("kid", "fid")
PAPERS_NETWORK = "inception-fid"


@dataclass(frozen=True)
class ImageSet:
    """Pictures with what a feature network says of them."""

    images_N3HW: Tensor
    """uint8, on the CPU."""
    features_ND: Tensor
    """float32; D is 0 where no network was asked."""
    network: str | None = None

    @classmethod
    def of(cls, images_N3HW: Tensor, network: FeatureNetwork | None) -> "ImageSet":
        if network is None:
            return cls(images_N3HW, torch.empty(len(images_N3HW), 0))
        return cls(images_N3HW, network(images_N3HW), network.name)

    def __len__(self) -> int:
        return len(self.images_N3HW)

    def part(self, start: int, end: int, step: int = 1) -> "ImageSet":
        chosen = slice(start, end, step)
        return ImageSet(self.images_N3HW[chosen], self.features_ND[chosen], self.network)


@dataclass(frozen=True)
class Measure:
    """One number, lower is better, and all that belongs beside it."""

    key: str
    """E.g. 'kid/effnet-lite0': two values can be compared if their keys are equal."""
    value: float
    spread: float | None = None
    """Standard error from the choice of pictures, where the metric knows it."""
    note: str | None = None
    """What limits the value, for a person."""


def key_of(metric: Metric, network: str | None) -> str:
    """'fid' alone is the paper's network's; every other network stands in the key."""
    if metric not in ON_FEATURES:
        return metric
    if metric == "fid" and network is not None and network.startswith(PAPERS_NETWORK):
        return f"fid@{network.partition('@')[2]}"
    return f"{metric}/{network}"


def compare(metric: Metric, real: ImageSet, made: ImageSet) -> Measure:
    """
    How far made pictures are from real ones.

    Raises:
        NotMeasurableError: the metric says nothing about these sets.
    """
    check_real(real)
    key = key_of(metric, made.network)
    if metric == "swd":
        return Measure(key, swd(real.images_N3HW, made.images_N3HW).value)
    if metric == "kid":
        estimate = kid(real.features_ND, made.features_ND)
        return Measure(key, estimate.value, estimate.spread)
    count, dims = min(len(real), len(made)), made.features_ND.shape[1]
    note = None
    if is_biased(count, dims):
        note = (
            f"too high, and comparable only with other values of {count} pictures: {dims} features need more"
        )
    return Measure(key, fid(real.features_ND, made.features_ND), note=note)


def real_baseline(metric: Metric, real: ImageSet) -> Measure:
    """
    What the metric says of one half of the real pictures against the other: as good as it gets.

    Raises:
        NotMeasurableError: as compare().
    """
    return compare(metric, real.part(0, len(real), 2), real.part(1, len(real), 2))


def check_real(real: ImageSet) -> None:
    """
    Raises:
        NotMeasurableError: nothing can be near or far from these pictures.
    """
    if len(real) == 0:
        raise NotMeasurableError("there are no real pictures to compare with", hint="use more")
    if bool((real.images_N3HW == real.images_N3HW[:1]).all()):
        raise NotMeasurableError(
            f"all {len(real)} real pictures are the same, so nothing can be said of others",
            hint="ganq dataset check shows what is in the data set",
        )
