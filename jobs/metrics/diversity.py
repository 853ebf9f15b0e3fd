"""
Diversity of generated images relative to real ones; it shows a collapse of the generator.

Shapes in names: N real images, M generated images, D features.
"""

import torch
from torch import Tensor

from jobs.errors import NotMeasurableError

COLLAPSED = 0.25
"""A generator below this diversity has collapsed."""


def diversity(real_ND: Tensor, generated_MD: Tensor) -> float:
    """
    Return the distance of a generated image to its nearest neighbour, relative to the same of real images.

    Medians over min(N, M) images each, because the distance to the nearest neighbour decreases with the
    size of a set. About 1 for equally diverse images, near 0 for few images with small changes. It does not
    measure quality: noise is diverse, too.

    Raises:
        NotMeasurableError: a set has fewer than two images, or most real images have a duplicate.
    """
    count = min(len(real_ND), len(generated_MD))
    if count < 2:
        raise NotMeasurableError("diversity needs two images in each set", hint="use more")
    within_real, within_generated = (
        _median_nearest_distance(real_ND[:count]),
        _median_nearest_distance(generated_MD[:count]),
    )
    if within_real <= 0:
        raise NotMeasurableError(
            "most images of the data set look exactly like another one in it",
            hint="ganq dataset check names equal files, and images that are nearly black",
        )
    return within_generated / within_real


def _median_nearest_distance(features_ND: Tensor) -> float:
    """Return the median distance of an image to its nearest neighbour."""
    # Found with matrix products, ten times as fast; measured with differences, so that duplicates are at 0.
    distances_NN = torch.cdist(features_ND, features_ND, compute_mode="use_mm_for_euclid_dist")
    nearest_N = distances_NN.fill_diagonal_(torch.inf).argmin(1)
    return float((features_ND - features_ND[nearest_N]).norm(dim=1).median())
