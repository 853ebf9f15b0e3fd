"""
Kernel Inception distance between two sets of features. It is unbiased, so a few hundred images suffice.

Source: Bińkowski et al. 2018, arXiv:1801.01401 (KID): the squared maximum mean
discrepancy, unbiased estimator (Gretton et al. 2012, equation 3), with the kernel
k(x, y) = (x·y / D + 1)³.

Shapes in names: N real images, M generated images, D features, K blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.errors import NotMeasurableError

BLOCKS = 10
"""Blocks of the jackknife; fewer for small sets."""
TILE = 4096
"""Rows of a kernel matrix in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error from the choice of images."""

    value: float
    spread: float


def kid(real_ND: Tensor, generated_MD: Tensor) -> Estimate:
    """
    Return KID over all pairs of images.

    The usual mean over random subsets has the same expectation and a larger variance. The spread is a
    jackknife estimate: a tenth of each set is left out in turn.

    Args:
        real_ND, generated_MD: finite, at least two rows each.

    Returns:
        The value may be slightly below zero for equal sets, because the estimator is unbiased.

    Raises:
        NotMeasurableError: a set has fewer than two images.
    """
    if min(len(real_ND), len(generated_MD)) < 2:
        raise NotMeasurableError("KID needs two images in each set", hint="use more")
    K = min(BLOCKS, len(real_ND) // 2, len(generated_MD) // 2)
    real, generated = _blocks(real_ND, K), _blocks(generated_MD, K)
    rr_KK, gg_KK, rg_KK = _sums(real, real), _sums(generated, generated), _sums(real, generated)
    # The unbiased estimator excludes pairs of an image with itself.
    rr_KK = rr_KK - torch.diag(torch.stack([_kernel_diagonal(one).sum() for one in real]))
    gg_KK = gg_KK - torch.diag(torch.stack([_kernel_diagonal(one).sum() for one in generated]))
    n_K = torch.tensor([len(one) for one in real], dtype=torch.float64)
    m_K = torch.tensor([len(one) for one in generated], dtype=torch.float64)

    def mmd(keep_K: Tensor) -> Tensor:
        n, m = n_K[keep_K].sum(), m_K[keep_K].sum()
        rr, mm, rm = (one[keep_K][:, keep_K].sum() for one in (rr_KK, gg_KK, rg_KK))
        return rr / (n * (n - 1)) + mm / (m * (m - 1)) - 2 * rm / (n * m)

    whole = float(mmd(torch.ones(K, dtype=torch.bool)))
    if K < 2:
        return Estimate(whole, float("nan"))
    without_K = torch.stack([mmd(torch.arange(K) != k) for k in range(K)])
    spread = ((K - 1) / K * (without_K - without_K.mean()).square().sum()).sqrt()
    return Estimate(whole, float(spread))


def _blocks(features_ND: Tensor, K: int) -> list[Tensor]:
    """Return blocks of every K-th row, so that blocks of a sorted set are alike."""
    features_ND = features_ND.double()
    return [features_ND[k::K] for k in range(K)]


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _kernel_diagonal(x_ND: Tensor) -> Tensor:
    return (x_ND.square().sum(1) / x_ND.shape[1] + 1) ** 3


def _sums(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Return the sum of the kernel over each pair of blocks, float64 (K, K)."""
    return torch.stack([torch.stack([_sum(x, y) for y in ys]) for x in xs])


def _sum(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return torch.stack([_kernel(part, y_MD).sum() for part in torch.split(x_ND, TILE)]).sum()
