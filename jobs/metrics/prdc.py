"""
Precision and recall: how many made images are real enough, and how much of what is real is made.

Shapes in names: N real images, M made ones, D features.
"""

from typing import NamedTuple

from torch import Tensor

from jobs.errors import NotMeasurableError
from jobs.metrics.neighbours import BLOCK, nearest

K_NEIGHBOURS = 3
"""As in the paper: a ball reaches to the third neighbour."""


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1, higher is better."""

    precision: float
    """Share of generated images within the manifold of real images."""
    recall: float
    """Share of real images within the manifold of generated images."""


def precision_recall(real_ND: Tensor, generated_MD: Tensor, k: int = K_NEIGHBOURS) -> PrecisionRecall:
    """
    Return improved precision and recall.

    Args:
        real_ND, generated_MD: finite; sets of equal size, since both values depend on it.
        k: the radius of an image's hypersphere is the distance to its k-th neighbour in its own set.

    Raises:
        NotMeasurableError: a set has at most k images.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2.
    """
    if min(len(real_ND), len(generated_MD)) <= k:
        raise NotMeasurableError(f"precision and recall need more than {k} images", hint="use more")
    return PrecisionRecall(_covered(generated_MD, real_ND, k), _covered(real_ND, generated_MD, k))


def _covered(queries_MD: Tensor, reference_ND: Tensor, k: int) -> float:
    """Return the share of queries within the hypersphere of at least one reference."""
    radius_N = nearest(reference_ND, reference_ND, k, themselves=True)[0][:, -1]
    reference_ND = reference_ND.double()
    squares_N = reference_ND.square().sum(1)
    inside = 0
    for start in range(0, len(queries_MD), BLOCK):
        part_BD = queries_MD[start : start + BLOCK].double()
        squared_distances_BN = (
            part_BD.square().sum(1, keepdim=True) + squares_N - 2 * part_BD @ reference_ND.T
        )
        inside += int((squared_distances_BN <= radius_N.square()).any(1).sum())
    return inside / len(queries_MD)
