"""
Fréchet distance between two sets of features, approximated by normal distributions.

Source: Heusel et al. 2017, arXiv:1706.08500 (FID), equation 6. The key is `fid` only for the Inception
network of that paper; for any other network it includes the network's name.

Shapes in names: N real images, M generated images, D features.
"""

import torch
from torch import Tensor

from jobs.errors import NotMeasurableError


def fid(real_ND: Tensor, generated_MD: Tensor) -> float:
    """
    Return |μ₁ − μ₂|² + Tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½), computed in float64.

    Args:
        real_ND, generated_MD: finite, at least two rows each. See is_biased().

    Raises:
        NotMeasurableError: a set has fewer than two images.
    """
    if min(len(real_ND), len(generated_MD)) < 2:
        raise NotMeasurableError("FID needs two images in each set", hint="use more")
    real_ND, generated_MD = real_ND.double(), generated_MD.double()
    mean_term = (real_ND.mean(0) - generated_MD.mean(0)).square().sum()
    # Σ = AᵀA for the centred features, each divided by √(N − 1).
    a_ND = (real_ND - real_ND.mean(0)) / (len(real_ND) - 1) ** 0.5
    b_MD = (generated_MD - generated_MD.mean(0)) / (len(generated_MD) - 1) ** 0.5
    spread = a_ND.square().sum() + b_MD.square().sum()
    return max(0.0, float(mean_term + spread - 2 * _trace_of_root(a_ND, b_MD)))


def _trace_of_root(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """
    Return Tr((AᵀA BᵀB)^½) without the square root of a product of singular matrices, which may be complex.

    The eigenvalues of AᵀA BᵀB are the squared singular values of ABᵀ. With fewer images than features ABᵀ
    is the smaller matrix; else they are those of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and has the same
    eigenvalues.
    """
    if min(len(a_ND), len(b_MD)) < a_ND.shape[1]:
        singular_N: Tensor = torch.linalg.svdvals(a_ND @ b_MD.T)
        return singular_N.sum()
    values_D: Tensor
    values_D, vectors_DD = torch.linalg.eigh(a_ND.T @ a_ND)
    root_DD = vectors_DD * values_D.clamp_min(0).sqrt() @ vectors_DD.T
    both_DD = root_DD @ (b_MD.T @ b_MD) @ root_DD
    values_D = torch.linalg.eigvalsh((both_DD + both_DD.T) / 2)
    return values_D.clamp_min(0).sqrt().sum()


def is_biased(image_count: int, features: int) -> bool:
    """
    Return whether the bias is too large for a comparison with sets of other sizes.

    With no more images than features the covariance is singular; the bias decreases as 1/N
    (Bińkowski et al. 2018, arXiv:1801.01401, appendix D).
    """
    return image_count <= features
