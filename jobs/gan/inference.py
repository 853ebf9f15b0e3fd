"""
The same generator with less to do: BatchNorm folded into the convolutions, the widest layer rearranged.

In eval mode BatchNorm is a scale and a shift for each channel, which a convolution
can carry. The layer next to the pixels has three output channels, too few for
the CPU's kernels of transposed convolutions; as a plain convolution that makes
nine pixels of each position at once it takes less than half of the time. With the first layer
as a matrix product, that is up to half off the forward pass. The folding is done in float64, always
in the same way, so equal weights give equal pictures.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from jobs.gan.classes import ClassLatents
from jobs.gan.networks import AnyGenerator
from jobs.gan.residual import ResidualGenerator


def for_inference(net: AnyGenerator, device: torch.device) -> nn.Module:
    """
    Args:
        net: on the CPU, in eval mode; stays as it is.

    Returns:
        A network without BatchNorm, channels last, on the device: latents (B, Z, 1, 1)
        to pictures (B, 3, H, W), equal but for the last bits of the floats.
    """
    if isinstance(net, ResidualGenerator):  # nothing to fold, and no layer at which a CPU is weak
        same = copy.deepcopy(net).eval().requires_grad_(False)
        return cast(nn.Module, same.to(device=device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    source = list(net.Gene)
    layers: list[nn.Module] = []  # 'even' ends in a plain convolution and a shuffle, which stay
    for layer, after in zip(source, [*source[1:], None], strict=True):
        if isinstance(layer, nn.ConvTranspose2d):
            norm = after if isinstance(after, nn.BatchNorm2d) else None
            folded = _folded(layer, norm)
            layers.append(_for_cpu(folded) if device.type == "cpu" else folded)
        elif not isinstance(layer, nn.BatchNorm2d):
            layers.append(copy.deepcopy(layer))
    quick: nn.Module = nn.Sequential(*layers)
    if net.GeneClasses is not None:
        quick = Conditioned(copy.deepcopy(net.GeneClasses), quick)
    quick = quick.eval().requires_grad_(False)
    return cast(nn.Module, quick.to(device=device, memory_format=torch.channels_last))  # type: ignore[call-overload]


class Conditioned(nn.Module):
    """A folded generator that takes classes: they only change its latents."""

    def __init__(self, classes: ClassLatents, net: nn.Module) -> None:
        super().__init__()
        self.classes = classes
        self.net = net

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.net(self.classes(latents_BZ11, labels_B)))


def _folded(layer: nn.ConvTranspose2d, norm: nn.BatchNorm2d | None) -> nn.ConvTranspose2d:
    """
    Weight w·γ/√(σ² + ε) and bias β − μ·γ/√(σ² + ε), for a layer without a bias.

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


def _for_cpu(layer: nn.ConvTranspose2d) -> nn.Module:
    """The two layers at which the CPU's kernels are weak; a GPU's know no such weakness."""
    if layer.stride[0] == 1:
        return LatentLayer(layer)
    return PhaseConvolution(layer) if layer.out_channels == 3 else layer


class LatentLayer(nn.Module):
    """A transposed convolution of a 1×1 picture is a matrix product: an eighth of the time."""

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


class PhaseConvolution(nn.Module):
    """
    A transposed convolution as a 2×2 convolution that makes s×s pixels of each position.

    With kernel k ≤ 2s, pixel s·q + r − p of the output takes taps r and r + s of the kernel,
    from inputs q and q − 1 (in each direction): s·s filters of 2×2, whose answers are woven
    into the picture.

    Source: Shi et al. 2016, arXiv:1609.07009 (sub-pixel convolution).
    """

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        kernel, self.stride, self.crop = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        s, (into, out) = self.stride, layer.weight.shape[:2]
        assert kernel <= 2 * s
        padded = nn.functional.pad(layer.weight.detach(), (0, 2 * s - kernel, 0, 2 * s - kernel))
        # Tap (t, u) of phase (r, c) is kernel place (r + s·(1 − t), c + s·(1 − u)).
        taps = padded.view(into, out, 2, s, 2, s).flip(2, 4)
        weight = taps.permute(3, 5, 1, 0, 2, 4).reshape(s * s * out, into, 2, 2)
        self.weight = nn.Parameter(weight.contiguous())
        self.out = out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, _, H, W = x_BCHW.shape
        s = self.stride
        phases = nn.functional.conv2d(x_BCHW, self.weight, padding=1).permute(0, 2, 3, 1)
        woven = phases.reshape(B, H + 1, W + 1, s, s, self.out).permute(0, 1, 3, 2, 4, 5)
        pixels_BHWC = woven.reshape(B, s * (H + 1), s * (W + 1), self.out)
        kept = slice(self.crop, self.crop + s * H), slice(self.crop, self.crop + s * W)
        return pixels_BHWC[:, kept[0], kept[1]].permute(0, 3, 1, 2)
