"""
InceptionV3 with weights from a file of the user: FID's or torchvision's.

FID's weights come from TensorFlow, whose average pooling excludes the padding, and whose last block uses a
maximum instead of the mean; other variants of the network give other values.

Source: Szegedy et al. 2015, arXiv:1512.00567; FID's form: mseitzer/pytorch-fid.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

DIMS = 2048
FID_CLASSES = 1008
"""FID's weights have eight unused classes; torchvision's have 1000."""
AVERAGES = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
LAST = "Mixed_7c"


def build(weights: Mapping[str, Tensor]) -> tuple[str, nn.Module]:
    """
    Build the network for a file's weights.

    Returns:
        'inception-fid' or 'inception-torchvision', and the network: images (B, 3, 299, 299) in [-1, 1] to
        features (B, 2048).

    Raises:
        RuntimeError: the weights do not fit the network.
    """
    from torchvision.models import Inception3

    classes = len(weights["fc.bias"]) if "fc.bias" in weights else FID_CLASSES
    # The auxiliary classifier is used in training only.
    kept = {key: value for key, value in weights.items() if not key.startswith("AuxLogits.")}
    net = Inception3(num_classes=classes, aux_logits=False, init_weights=False)
    counters = {key: value for key, value in net.state_dict().items() if key.endswith("num_batches_tracked")}
    net.load_state_dict({**counters, **kept})
    net.fc = net.dropout = nn.Identity()
    if classes != FID_CLASSES:
        return "inception-torchvision", net
    for name in AVERAGES:
        setattr(net, name, OtherPool(getattr(net, name), _average))
    setattr(net, LAST, OtherPool(getattr(net, LAST), _largest))
    return "inception-fid", cast(nn.Module, net)


def _average(x_BCHW: Tensor) -> Tensor:
    return avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def _largest(x_BCHW: Tensor) -> Tensor:
    return max_pool2d(x_BCHW, 3, stride=1, padding=1)


class OtherPool(nn.Module):
    """A torchvision block with another pooling before its last branch."""

    def __init__(self, block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x_BCHW: Tensor) -> Tensor:
        *branches, _ = self.block._forward(x_BCHW)  # type: ignore[operator]
        return torch.cat([*branches, self.block.branch_pool(self.pool(x_BCHW))], 1)  # type: ignore[operator]
