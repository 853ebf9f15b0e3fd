"""
Two measures of detail at the scale of pixels: grain of flat areas and strength of outlines.

A feature network hardly sees either, and a person sees both at once.

Shapes in names: N images, H, W pixels.

Source: noise from the difference of two Laplacians: Immerkær 1996, doi:10.1006/cviu.1996.0060; without the
pixels at edges: Tai and Yang 2008, "A fast method for image noise estimation using Laplacian operator and
adaptive edge detection".
"""

from math import pi, sqrt

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from jobs.errors import NotMeasurableError

LUMINANCE = (0.299, 0.587, 0.114)
FLAT_SHARE = 0.5
"""Share of the pixels of an image, those with the lowest gradient, whose grain is measured."""
OUTLINE_SHARE = 0.05
"""Share of the pixels of an image, those with the highest gradient, that count as outlines."""
BATCH = 256


def grain(images_N3HW: Tensor) -> float:
    """
    Return the mean standard deviation of the noise of flat areas, in levels of 255.

    Args:
        images_N3HW: uint8.
    """
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
    total = 0.0
    for grey_N1HW in _grey(images_N3HW):
        noise_NP = conv2d(grey_N1HW, kernel[None, None]).abs().flatten(1)
        slope_NP = _gradient(grey_N1HW).flatten(1)
        flat = max(1, int(FLAT_SHARE * slope_NP.shape[1]))
        chosen_NP = slope_NP.argsort(dim=1, stable=True)[:, :flat]
        # A normal distribution of deviation σ has a mean magnitude of 6 σ √(2/π) after this kernel.
        total += float(noise_NP.gather(1, chosen_NP).mean(dim=1).sum()) * sqrt(pi / 2) / 6
    return total / len(images_N3HW)


def outline_strength(images_N3HW: Tensor) -> float:
    """
    Return the mean gradient of the strongest pixels of each image, in levels of 255 per pixel.

    Args:
        images_N3HW: uint8.
    """
    total = 0.0
    for grey_N1HW in _grey(images_N3HW):
        slope_NP = _gradient(grey_N1HW).flatten(1)
        strongest = max(1, int(OUTLINE_SHARE * slope_NP.shape[1]))
        total += float(slope_NP.topk(strongest, dim=1).values.mean(dim=1).sum())
    return total / len(images_N3HW)


def outlines(real_N3HW: Tensor, generated_M3HW: Tensor) -> float:
    """
    Return the strength of the outlines of generated images, relative to that of real ones.

    Raises:
        NotMeasurableError: the real images have no outlines.
    """
    real = outline_strength(real_N3HW)
    if real == 0:
        raise NotMeasurableError("the real images have no outlines", hint="look at them")
    return outline_strength(generated_M3HW) / real


def _grey(images_N3HW: Tensor) -> list[Tensor]:
    """Return the luminance of batches of images, float32 (N, 1, H, W)."""
    weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
    return [
        (images_N3HW[start : start + BATCH].float() * weights).sum(dim=1, keepdim=True)
        for start in range(0, len(images_N3HW), BATCH)
    ]


def _gradient(grey_N1HW: Tensor) -> Tensor:
    """Return the magnitude of Sobel's gradient, (N, 1, H − 2, W − 2)."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    slopes_N2HW = conv2d(grey_N1HW, torch.stack([across, across.T])[:, None])
    return slopes_N2HW.square().sum(dim=1, keepdim=True).sqrt()
