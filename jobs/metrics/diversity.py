"""
Whether pictures differ among themselves as real ones do: what a generator loses when it collapses.

Shapes in names: N real pictures, M made ones, D features.
"""

import torch
from torch import Tensor

from jobs.errors import NotMeasurableError

COLLAPSED = 0.25
"""Below this share of the real pictures' variety a generator repeats itself."""


def diversity(real_ND: Tensor, generated_MD: Tensor) -> float:
    """
    How far a made picture is from its nearest sister, compared with the same among real ones.

    Medians of min(N, M) pictures each, because a nearest neighbour is the nearer the more there
    are. About 1 for as many different pictures; near 0 for few pictures with small changes. It
    says nothing about whether they are any good: noise has variety, too.

    Raises:
        NotMeasurableError: a set has fewer than two pictures, or most real ones have a twin.
    """
    count = min(len(real_ND), len(generated_MD))
    if count < 2:
        raise NotMeasurableError("diversity needs two pictures in each set", hint="use more")
    among_real, among_made = _to_nearest(real_ND[:count]), _to_nearest(generated_MD[:count])
    if among_real <= 0:
        raise NotMeasurableError(
            "most pictures of the data set have an exact twin in it",
            hint="ganq dataset check names them; leave each picture in once",
        )
    return among_made / among_real


def _to_nearest(features_ND: Tensor) -> float:
    """Median distance of a picture to the one nearest to it."""
    # Found by products, which is ten times as fast; measured by differences: twins must be at 0 exactly.
    apart_NN = torch.cdist(features_ND, features_ND, compute_mode="use_mm_for_euclid_dist")
    nearest_N = apart_NN.fill_diagonal_(torch.inf).argmin(1)
    return float((features_ND - features_ND[nearest_N]).norm(dim=1).median())
