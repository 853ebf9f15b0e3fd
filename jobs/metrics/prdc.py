"""
Precision and recall: how many made pictures are real enough, and how much of what is real is made.

Shapes in names: N real pictures, M made ones, D features.
"""

from typing import NamedTuple

from torch import Tensor

from jobs.errors import NotMeasurableError
from jobs.metrics.neighbours import BLOCK, nearest

NEIGHBOURS = 3
"""As in the paper: a ball reaches to the third neighbour."""


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1, higher is better."""

    precision: float
    """Of the made pictures, that lie where real ones do."""
    recall: float
    """Of the real pictures, that lie where made ones do."""


def precision_recall(real_ND: Tensor, generated_MD: Tensor, k: int = NEIGHBOURS) -> PrecisionRecall:
    """
    Args:
        real_ND, made_MD: finite; as many of each as can be, since both shares depend on the number.
        k: a picture's ball reaches to its k-th neighbour among its own kind.

    Raises:
        NotMeasurableError: a set has no more than k pictures.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2.
    """
    if min(len(real_ND), len(generated_MD)) <= k:
        raise NotMeasurableError(f"precision and recall need more than {k} pictures", hint="use more")
    return PrecisionRecall(_covered(generated_MD, real_ND, k), _covered(real_ND, generated_MD, k))


def _covered(asked_MD: Tensor, by_ND: Tensor, k: int) -> float:
    """Share of `asked_MD` that lies in the ball of at least one of `by_ND`."""
    radius_N = nearest(by_ND, by_ND, k, themselves=True)[0][:, -1]
    by_ND = by_ND.double()
    squares_N = by_ND.square().sum(1)
    inside = 0
    for start in range(0, len(asked_MD), BLOCK):
        part_BD = asked_MD[start : start + BLOCK].double()
        apart_BN = part_BD.square().sum(1, keepdim=True) + squares_N - 2 * part_BD @ by_ND.T
        inside += int((apart_BN <= radius_N.square()).any(1).sum())
    return inside / len(asked_MD)
