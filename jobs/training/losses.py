"""
Loss functions: scores of shape (B,) to a scalar; and the gradient norms of R1 and R2.

`bce` takes probabilities (the network ends in a sigmoid), the others logits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, relu, softplus

ScoresToLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """D minimises d_real + d_fake, G minimises g."""

    d_real: ScoresToLoss
    d_fake: ScoresToLoss
    g: ScoresToLoss


class RelativisticLoss:
    """
    Softplus of the difference between the logits of a real image and a fake.

    Only the difference counts, so G cannot win by dropping the modes that it generates badly.

    Source: Jolicoeur-Martineau 2018, arXiv:1807.00734; Huang et al. 2025, arXiv:2501.05441, equation 2, which
    needs R1 and R2 (section 2.2) to converge.
    """

    def d(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        return softplus(fake_B - real_B).mean()

    def g(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        return softplus(real_B - fake_B).mean()


def _bce(target: float) -> ScoresToLoss:
    def loss(probabilities_B: Tensor) -> Tensor:
        # binary_cross_entropy aborts on NaN, on a GPU with the whole CUDA context. The mean score, which is
        # logged beside the loss, still contains the NaN that stops the run.
        probabilities_B = torch.nan_to_num(probabilities_B, nan=0.5)
        return binary_cross_entropy(probabilities_B, torch.full_like(probabilities_B, target))

    return loss


LOSSES: dict[str, Loss | RelativisticLoss] = {
    # Goodfellow et al. 2014, arXiv:1406.2661, with the non-saturating generator loss: the tutorial's.
    "bce": Loss(_bce(1.0), _bce(0.0), _bce(1.0)),
    # The same on logits, which cannot saturate in float32.
    "nonsaturating": Loss(
        lambda logits_B: softplus(-logits_B).mean(),
        lambda logits_B: softplus(logits_B).mean(),
        lambda logits_B: softplus(-logits_B).mean(),
    ),
    # Lim and Ye 2017, arXiv:1705.02894; Miyato et al. 2018, arXiv:1802.05957.
    "hinge": Loss(
        lambda logits_B: relu(1 - logits_B).mean(),
        lambda logits_B: relu(1 + logits_B).mean(),
        lambda logits_B: -logits_B.mean(),
    ),
    "relativistic": RelativisticLoss(),
}


def squared_gradient_norms(images_B3HW: Tensor, scores_B: Tensor) -> Tensor:
    """
    Return the squared norm of D's gradient at each image, ‖∂score/∂image‖².

    R1 is γ/2 times its mean over real images, R2 over fakes.

    Args:
        images_B3HW: D's input, requires_grad set; each is scored independently of the others (no BatchNorm).
        scores_B: D's output.

    Returns:
        Shape (B,), differentiable once more.

    Source: Mescheder et al. 2018, arXiv:1801.04406, equations 9 and 10.
    """
    (gradients_B3HW,) = torch.autograd.grad(scores_B.sum(), images_B3HW, create_graph=True)
    return gradients_B3HW.square().sum(dim=(1, 2, 3))
