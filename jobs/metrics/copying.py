"""
Detect whether generated images are copies of training images.

A distance alone does not show it: in a dense region every good image has a near neighbour. Each distance is
therefore divided by the distance from that neighbour to its own nearest neighbour. For an independent image
the ratio has the same distribution as for a real image that is held out; for a copy, also with small changes,
it is near zero.

Shapes in names: N real images, M generated images, D features.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jobs.errors import NotMeasurableError
from jobs.metrics.neighbours import nearest

Verdict = Literal["copies", "none", "unsure"]

EXPECTED_SHARE = 0.01
"""Share of real images whose ratio is below the threshold, by construction."""
COPYING_SHARE = 0.03
"""Share of generated images below the threshold that is called copying, if it is significant."""
SIGMAS = 3.0
"""Standard errors that are significant: a probability of one in 740."""
MIN_IMAGES = 200
"""Images per set; with fewer, threshold and shares are not reliable."""
EPSILON = 1e-9
BATCH = 256
THUMBNAIL = 16
"""Side of the images that are compared pixel by pixel."""


@dataclass(frozen=True)
class Copying:
    """Result of the test."""

    verdict: Verdict
    share: float
    """Share of generated images below the threshold."""
    threshold: float
    """The ratio that one real image in a hundred falls below."""
    ratio_M: Tensor
    """Ratio of each generated image; 1: as near as its neighbour's own neighbour."""
    neighbour_M: Tensor
    """Index of the nearest real image of each generated image."""

    def summary(self) -> str:
        """Return the result in one sentence."""
        about = f"{self.share:.1%} of the images are suspiciously close to a training image"
        chance = f"{EXPECTED_SHARE:.0%} are expected by chance"
        if self.verdict == "unsure":
            return f"too few images to distinguish copies from chance ({about}, {chance})"
        if self.verdict == "copies":
            return f"the model copies training images: {about}, {chance}"
        return f"no sign of copying: {about}, {chance}"


def thumbnails(images_N3HW: Tensor) -> Tensor:
    """
    Return pixels of images scaled to 16×16, float32 (N, 768). They recognise copies with noise or blur.

    To a feature network noise is another texture. Of copied faces with noise of 12 grey levels
    EfficientNet-Lite0 recognises none, thumbnails 99 %; of faces moved by 2 pixels of 64 the network
    recognises 77 %, of mirrored ones 54 %, thumbnails none. Both are therefore used.
    """
    small = [
        nn.functional.interpolate(images_N3HW[start : start + BATCH].float(), THUMBNAIL, mode="area")
        for start in range(0, len(images_N3HW), BATCH)
    ]
    return torch.cat(small).flatten(1)


def copying(real_ND: Tensor, generated_MD: Tensor) -> Copying:
    """
    Test whether generated images are copies of training images.

    Args:
        real_ND: features of the training images, without duplicates: they would hide copies.
        generated_MD: features of distinct generated images.

    Raises:
        NotMeasurableError: fewer than three real images, or no generated one.

    Source: Alaa et al. 2022, arXiv:2102.08921, section 3.3 (authenticity). Its threshold, a ratio of 1, is
    met by about half of all independent images; here the threshold is a quantile of the ratios of held-out
    real images.
    """
    if len(real_ND) < 3 or len(generated_MD) < 1:
        raise NotMeasurableError(
            "the copy test needs three real images and one generated image", hint="use more"
        )
    near_N2, row_N2 = nearest(real_ND, real_ND, 2, themselves=True)
    # Real image n is held out: its neighbour's nearest is then another image, or the second if it was n.
    distance_N, neighbour_N = near_N2[:, 0], row_N2[:, 0]
    is_n_N = row_N2[neighbour_N, 0] == torch.arange(len(real_ND))
    neighbours_own_N = torch.where(is_n_N, near_N2[neighbour_N, 1], near_N2[neighbour_N, 0])
    real_ratio_N = _ratio(distance_N, neighbours_own_N)
    distance_M1, row_M1 = nearest(generated_MD, real_ND, 1)
    ratio_M = _ratio(distance_M1[:, 0], near_N2[row_M1[:, 0], 0])
    threshold = float(real_ratio_N.quantile(EXPECTED_SHARE))
    share = float((ratio_M < threshold).double().mean())
    enough = min(len(real_ND), len(generated_MD)) >= MIN_IMAGES
    many = (
        share >= COPYING_SHARE and _sigmas(share, len(generated_MD), EXPECTED_SHARE, len(real_ND)) >= SIGMAS
    )
    verdict: Verdict = "copies" if many else "none" if enough else "unsure"
    return Copying(verdict, share, threshold, ratio_M, row_M1[:, 0])


def _ratio(distance: Tensor, own: Tensor) -> Tensor:
    return distance / own.clamp_min(EPSILON)


def _sigmas(one: float, count: int, other: float, others: int) -> float:
    """Return the difference of two shares in standard errors."""
    both = (one * count + other * others) / (count + others)
    error = math.sqrt(both * (1 - both) * (1 / count + 1 / others))
    return (one - other) / error if error else 0.0
