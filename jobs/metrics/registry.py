"""
The metrics by name, with one result type.

To add a metric: add its name to METRICS and Metric, and its computation to compare().

Shapes in names: N images, D features.
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
PAPER_NETWORK = "inception-fid"


@dataclass(frozen=True)
class ImageSet:
    """Images with their features."""

    images_N3HW: Tensor
    """uint8, on the CPU."""
    features_ND: Tensor
    """float32; D is 0 without a feature network."""
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
    """The value of a metric, lower is better."""

    key: str
    """E.g. 'kid/effnet-lite0': two values can be compared if their keys are equal."""
    value: float
    spread: float | None = None
    """Standard error from the choice of images, if the metric estimates it."""
    note: str | None = None
    """A limitation of the value, in words."""
    by_side: dict[str, float] | None = None
    """The value at each scale, by side in pixels, if the metric has scales."""


def key_of(metric: Metric, network: str | None) -> str:
    """Return the key of a metric: `fid@…` for the FID paper's network, else with the network's name."""
    if metric not in ON_FEATURES:
        return metric
    if metric == "fid" and network is not None and network.startswith(PAPER_NETWORK):
        return f"fid@{network.partition('@')[2]}"
    return f"{metric}/{network}"


def compare(metric: Metric, real: ImageSet, generated: ImageSet) -> Measure:
    """
    Return the distance of generated images from real ones.

    Raises:
        NotMeasurableError: the metric is not defined for these sets.
    """
    check_real(real)
    key = key_of(metric, generated.network)
    if metric == "swd":
        distance = swd(real.images_N3HW, generated.images_N3HW)
        by_side = {str(side): value for side, value in distance.levels.items()}
        return Measure(key, distance.value, by_side=by_side)
    if metric == "kid":
        estimate = kid(real.features_ND, generated.features_ND)
        return Measure(key, estimate.value, estimate.spread)
    count, dims = min(len(real), len(generated)), generated.features_ND.shape[1]
    note = None
    if is_biased(count, dims):
        note = f"too high, and comparable only with other values of {count} images: {dims} features need more"
    return Measure(key, fid(real.features_ND, generated.features_ND), note=note)


def real_baseline(metric: Metric, real: ImageSet) -> Measure:
    """
    Return the real-vs-real baseline: one half of the real images against the other.

    Raises:
        NotMeasurableError: as compare().
    """
    return compare(metric, real.part(0, len(real), 2), real.part(1, len(real), 2))


def check_real(real: ImageSet) -> None:
    """
    Check that the real images can be compared with.

    Raises:
        NotMeasurableError: there are none, or all are equal.
    """
    if len(real) == 0:
        raise NotMeasurableError("there are no real images to compare with", hint="use more")
    if bool((real.images_N3HW == real.images_N3HW[:1]).all()):
        raise NotMeasurableError(
            f"all {len(real)} real images are equal, so no metric is defined",
            hint="ganq dataset check shows what is in the data set",
        )
