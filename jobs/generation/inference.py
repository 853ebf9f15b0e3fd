"""
Optimise a generator for inference: fold BatchNorm into the convolutions, replace slow layers on a CPU.

In eval mode BatchNorm is a scale and a shift per channel, which a convolution can include. The last layer has
three output channels, too few for the CPU's transposed convolutions; as a plain convolution that computes
nine pixels of each position at once it takes less than half of the time. With the first layer as a matrix
product the forward pass takes up to half of the time. Folding is done in float64, always in the same way,
so equal weights give equal images.
"""

import copy
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from jobs.networks.classes import ClassLatents
from jobs.networks.dcgan import AnyGenerator, make_grey, makes_grey
from jobs.networks.heads import LowPass
from jobs.networks.resnet import ResNetGenerator
from jobs.networks.skips import SkipGenerator


def for_inference(net: AnyGenerator, device: torch.device) -> nn.Module:
    """
    Return an optimised copy of a generator.

    Args:
        net: on the CPU, in eval mode; it is not changed.

    Returns:
        A network without BatchNorm, channels last, on the device: latents (B, Z, 1, 1) to images
        (B, 3, H, W), equal up to the last bits of the floats.
    """
    # A residual one has no BatchNorm, and no layer that is slow on a CPU.
    if isinstance(net, ResNetGenerator | SkipGenerator):
        same = copy.deepcopy(net).eval().requires_grad_(False)
        return cast(nn.Module, same.to(device=device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    source = list(net.Gene)
    on_cpu = device.type == "cpu"
    # The filter needs the pixels in their places; without it Tanh comes first, which is faster on contiguous
    # memory.
    last = source[-2:] if isinstance(source[-2], LowPass) else []
    source = source[: len(source) - len(last)]
    shuffles_last = any(isinstance(layer, nn.PixelShuffle) for layer in source[-2:])
    layers: list[nn.Module] = []
    interleave: list[nn.Module] = []
    for layer, after in zip(source, [*source[1:], None], strict=True):
        if isinstance(layer, nn.ConvTranspose2d):
            folded = _folded(layer, after if isinstance(after, nn.BatchNorm2d) else None)
            if on_cpu and folded.out_channels == 3:
                layers.append(phase_convolution(folded))
                stride, first = folded.stride[0], int(folded.padding[0])
                interleave.append(PixelInterleave(stride, first=first, less=stride))
            else:
                layers.append(LatentLayer(folded) if on_cpu and folded.stride[0] == 1 else folded)
        elif on_cpu and shuffles_last and isinstance(after, nn.PixelShuffle):
            assert isinstance(layer, nn.Conv2d)
            layers.append(_reordered_filters(layer, after.upscale_factor))
            interleave.append(PixelInterleave(after.upscale_factor))
        elif not isinstance(layer, nn.BatchNorm2d) and not (
            interleave and isinstance(layer, nn.PixelShuffle)
        ):
            layers.append(copy.deepcopy(layer))
    fast: nn.Module = nn.Sequential(*layers, *interleave, *copy.deepcopy(last))
    if net.GeneClasses is not None:
        fast = Conditioned(copy.deepcopy(net.GeneClasses), fast)
    if makes_grey(net):
        make_grey(fast)
    fast = fast.eval().requires_grad_(False)
    return cast(nn.Module, fast.to(device=device, memory_format=torch.channels_last))  # type: ignore[call-overload]


class Conditioned(nn.Module):
    """An optimised generator with class labels, which only change its latents."""

    def __init__(self, classes: ClassLatents, net: nn.Module) -> None:
        super().__init__()
        self.classes = classes
        self.net = net

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.net(self.classes(latents_BZ11, labels_B)))


def _folded(layer: nn.ConvTranspose2d, norm: nn.BatchNorm2d | None) -> nn.ConvTranspose2d:
    """
    Return the layer with BatchNorm folded in: weight w·γ/√(σ² + ε), bias β − μ·γ/√(σ² + ε).

    Source: Jacob et al. 2018, arXiv:1712.05877, equation 14.
    """
    stride, padding = cast(tuple[int, int], layer.stride), cast(tuple[int, int], layer.padding)
    kernel = cast(tuple[int, int], layer.kernel_size)
    out = nn.ConvTranspose2d(
        layer.in_channels, layer.out_channels, kernel, stride, padding, bias=norm is not None, device="meta"
    ).to_empty(device="cpu")
    with torch.no_grad():
        if norm is None:
            out.weight.copy_(layer.weight)
            return out
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale_C = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        out.weight.copy_(layer.weight.double() * scale_C.view(1, -1, 1, 1))
        assert out.bias is not None
        out.bias.copy_(norm.bias.double() - norm.running_mean.double() * scale_C)
    return out


class LatentLayer(nn.Module):
    """A transposed convolution of a 1×1 input as a matrix product, in an eighth of the time."""

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        into, self.out, self.high, self.wide = layer.weight.shape
        assert layer.bias is not None
        places = self.high * self.wide
        weight = layer.weight.detach().permute(2, 3, 1, 0).reshape(places * self.out, into)
        self.weight = nn.Parameter(weight.contiguous())
        self.bias = nn.Parameter(layer.bias.detach().repeat(places))

    def forward(self, latents_BZ11: Tensor) -> Tensor:
        pixels_BP = nn.functional.linear(latents_BZ11.flatten(1), self.weight, self.bias)
        return pixels_BP.view(-1, self.high, self.wide, self.out).permute(0, 3, 1, 2)


def phase_convolution(layer: nn.ConvTranspose2d) -> nn.Conv2d:
    """
    Return a transposed convolution as a 2×2 convolution that computes s×s pixels of each position.

    With kernel k ≤ 2s, pixel s·q + r − p of the output uses taps r and r + s of the kernel, on inputs q and
    q − 1 (in each direction): s·s filters of 2×2 per channel, whose outputs PixelInterleave arranges.

    Source: Shi et al. 2016, arXiv:1609.07009 (sub-pixel convolution).
    """
    kernel, s = layer.kernel_size[0], layer.stride[0]
    into, out = layer.weight.shape[:2]
    assert kernel <= 2 * s
    phases = nn.Conv2d(into, s * s * out, 2, padding=1, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        padded = nn.functional.pad(layer.weight, (0, 2 * s - kernel, 0, 2 * s - kernel))
        # Tap (t, u) of phase (r, c) is kernel place (r + s·(1 − t), c + s·(1 − u)).
        taps = padded.view(into, out, 2, s, 2, s).flip(2, 4)
        phases.weight.copy_(taps.permute(3, 5, 1, 0, 2, 4).reshape(s * s * out, into, 2, 2))
    return phases


def _reordered_filters(layer: nn.Conv2d, side: int) -> nn.Conv2d:
    """Return the convolution before a PixelShuffle, its filters in the order row, column, channel."""
    ordered = copy.deepcopy(layer)
    with torch.no_grad():
        for values in ordered.parameters():
            by_channel = values.view(-1, side * side, *values.shape[1:])
            values.copy_(by_channel.transpose(0, 1).reshape(values.shape))
    return ordered


class PixelInterleave(nn.Module):
    """
    Arrange the s×s pixels of each position: (B, s·s·3, H, W) to (B, 3, s·H − less, s·W − less).

    Like nn.PixelShuffle, but with NumPy, whose copy takes a quarter of the time; for the CPU only.

    Args:
        first: first row and column of the output to keep.
        less: rows and columns to drop.
    """

    def __init__(self, stride: int, *, first: int = 0, less: int = 0) -> None:
        super().__init__()
        self.stride, self.first, self.less = stride, first, less

    def forward(self, phases_BCHW: Tensor) -> Tensor:
        B, C, H, W = phases_BCHW.shape
        s = self.stride
        places = phases_BCHW.permute(0, 2, 3, 1).numpy().reshape(B, H, W, s, s, C // (s * s))
        interleaved = np.ascontiguousarray(places.transpose(0, 1, 3, 2, 4, 5)).reshape(B, s * H, s * W, -1)
        rows, columns = (slice(self.first, self.first + s * side - self.less) for side in (H, W))
        return torch.from_numpy(interleaved[:, rows, columns]).permute(0, 3, 1, 2)
