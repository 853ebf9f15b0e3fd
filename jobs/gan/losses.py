"""
What the two networks minimise: scores of shape (B,) in, one number out.

`bce` reads probabilities (a sigmoid is the network's last layer), the others logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, relu, softplus

ScoresToLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """The three terms of a GAN's game; D minimises d_real + d_fake, G minimises g."""

    d_real: ScoresToLoss
    d_fake: ScoresToLoss
    g: ScoresToLoss


def _bce(target: float) -> ScoresToLoss:
    def loss(probabilities_B: Tensor) -> Tensor:
        # binary_cross_entropy aborts on NaN, on a GPU with the whole CUDA context. The
        # mean score, which is logged beside the loss, still holds the NaN that stops the run.
        probabilities_B = torch.nan_to_num(probabilities_B, nan=0.5)
        return binary_cross_entropy(probabilities_B, torch.full_like(probabilities_B, target))

    return loss


LOSSES: dict[str, Loss] = {
    # Goodfellow et al. 2014, arXiv:1406.2661, with the non-saturating generator: the tutorial's.
    "bce": Loss(_bce(1.0), _bce(0.0), _bce(1.0)),
    # The same on logits, which cannot saturate in float32.
    "nonsaturating": Loss(
        lambda logits_B: softplus(-logits_B).mean(),
        lambda logits_B: softplus(logits_B).mean(),
        lambda logits_B: softplus(-logits_B).mean(),
    ),
    # Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018.
    "hinge": Loss(
        lambda logits_B: relu(1 - logits_B).mean(),
        lambda logits_B: relu(1 + logits_B).mean(),
        lambda logits_B: -logits_B.mean(),
    ),
}
