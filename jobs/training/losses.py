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
    """A game of three terms: D minimises d_real + d_fake, G minimises g."""

    d_real: ScoresToLoss
    d_fake: ScoresToLoss
    g: ScoresToLoss


class RelativisticLoss:
    """
    Each fake is judged beside a real picture: only the difference of their logits counts.

    What D says of a fake is then never good or bad in itself, so G cannot win by dropping
    the kinds of pictures that it makes badly.

    Source: Jolicoeur-Martineau 2018, arXiv:1807.00734; Huang et al. 2025,
    arXiv:2501.05441, equation 2, which needs R1 and R2 (section 2.2) to converge.
    """

    def d(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        return softplus(fake_B - real_B).mean()

    def g(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        return softplus(real_B - fake_B).mean()


def _bce(target: float) -> ScoresToLoss:
    def loss(probabilities_B: Tensor) -> Tensor:
        # binary_cross_entropy aborts on NaN, on a GPU with the whole CUDA context. The
        # mean score, which is logged beside the loss, still holds the NaN that stops the run.
        probabilities_B = torch.nan_to_num(probabilities_B, nan=0.5)
        return binary_cross_entropy(probabilities_B, torch.full_like(probabilities_B, target))

    return loss


LOSSES: dict[str, Loss | RelativisticLoss] = {
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
    "relativistic": RelativisticLoss(),
}


def squared_gradient_norms(images_B3HW: Tensor, scores_B: Tensor) -> Tensor:
    """
    How steep D is at each picture: ‖∂score/∂picture‖², shape (B,), differentiable once more.

    R1 holds it down at real pictures, R2 at fakes: γ/2 times its mean (Mescheder et al.
    2018, arXiv:1801.04406, equations 9 and 10).

    Args:
        pictures_B3HW: what D has seen, with requires_grad, each scored by itself (no BatchNorm).
    """
    (slopes_B3HW,) = torch.autograd.grad(scores_B.sum(), images_B3HW, create_graph=True)
    return slopes_B3HW.square().sum(dim=(1, 2, 3))
