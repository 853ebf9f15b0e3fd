"""
Whether made pictures are copies of training pictures, judged by how near real ones are to each other.

A distance alone says nothing: in a crowd of look-alikes any good picture has a near neighbour.
So each distance is divided by how near that neighbour's own nearest is. For an independent
picture the ratio is distributed as for a real picture that is compared with all the others; a copy's
ratio is near zero, and so is that of a copy with small changes.

Shapes in names: N real pictures, M made ones, D features.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from jobs.errors import NotMeasurableError
from jobs.metrics.neighbours import nearest

Verdict = Literal["copies", "none", "unsure"]

RARE = 0.01
"""Share of the real pictures whose ratio lies below the line."""
TOO_MANY = 0.03
"""Share of made pictures below the line from which on they count as copies, if chance cannot explain them."""
SIGMAS = 3.0
"""As unlikely as one in 740 before it is called copying."""
FEWEST = 200
"""Pictures of each kind, below which the line and the shares are guesses."""
TINY = 1e-9
STEP = 256
THUMBNAIL = 16
"""Side of the pictures that are compared pixel by pixel."""


@dataclass(frozen=True)
class Copying:
    """What the test found."""

    verdict: Verdict
    share: float
    """Of the made pictures, that lie below the line."""
    threshold: float
    """The ratio below which one real picture in a hundred lies."""
    ratio_M: Tensor
    """Of each made picture; 1 is as near as its neighbour's own neighbour."""
    neighbour_M: Tensor
    """Row of the real picture that is nearest to each made one."""

    def summary(self) -> str:
        """One sentence for a person."""
        about = f"{self.share:.1%} of the pictures are suspiciously near to a training picture"
        chance = f"{RARE:.0%} would be by chance"
        if self.verdict == "unsure":
            return f"too few pictures to tell copies from chance ({about}, {chance})"
        if self.verdict == "copies":
            return f"the model copies training pictures: {about}, {chance}"
        return f"no sign of copying: {about}, {chance}"


def thumbnails(images_N3HW: Tensor) -> Tensor:
    """
    Pixels of small pictures, float32 (N, 768): to them a copy with noise or blur is a copy.

    A feature network sees noise as another texture. Of copied drawn faces with noise of 12 grey
    levels EfficientNet-Lite0 finds none and thumbnails 99 %; of faces that were moved by 2 pixels
    of 64 it finds 77 %, of mirrored ones 54 %, thumbnails none. So both are asked.
    """
    small = [
        nn.functional.interpolate(images_N3HW[start : start + STEP].float(), THUMBNAIL, mode="area")
        for start in range(0, len(images_N3HW), STEP)
    ]
    return torch.cat(small).flatten(1)


def copying(real_ND: Tensor, generated_MD: Tensor) -> Copying:
    """
    Args:
        real_ND: of the pictures that the model was trained on, each once: twins excuse copies.
        made_MD: of distinct made pictures.

    Raises:
        NotMeasurableError: fewer than three real pictures, or none made.

    Source: Alaa et al. 2022, arXiv:2102.08921, section 3.3 (authenticity: the distance to the nearest
    training picture beside that picture's own nearest). Its line, a ratio of 1, is crossed by about
    half of all independent pictures; here the real pictures, each held out in turn, say where it lies.
    """
    if len(real_ND) < 3 or len(generated_MD) < 1:
        raise NotMeasurableError("three real pictures and one made are the least", hint="use more")
    near_N2, row_N2 = nearest(real_ND, real_ND, 2, themselves=True)
    # Real picture n held out: its neighbour's nearest is then another one, or the second if that was n.
    to_N, whose_N = near_N2[:, 0], row_N2[:, 0]
    is_me_N = row_N2[whose_N, 0] == torch.arange(len(real_ND))
    its_own_N = torch.where(is_me_N, near_N2[whose_N, 1], near_N2[whose_N, 0])
    real_ratio_N = _ratio(to_N, its_own_N)
    to_M1, row_M1 = nearest(generated_MD, real_ND, 1)
    ratio_M = _ratio(to_M1[:, 0], near_N2[row_M1[:, 0], 0])
    threshold = float(real_ratio_N.quantile(RARE))
    share = float((ratio_M < threshold).double().mean())
    enough = min(len(real_ND), len(generated_MD)) >= FEWEST
    many = share >= TOO_MANY and _sigmas(share, len(generated_MD), RARE, len(real_ND)) >= SIGMAS
    verdict: Verdict = "copies" if many else "none" if enough else "unsure"
    return Copying(verdict, share, threshold, ratio_M, row_M1[:, 0])


def _ratio(distance: Tensor, own: Tensor) -> Tensor:
    return distance / own.clamp_min(TINY)


def _sigmas(one: float, count: int, other: float, others: int) -> float:
    """How many standard errors lie between two shares."""
    both = (one * count + other * others) / (count + others)
    error = math.sqrt(both * (1 - both) * (1 / count + 1 / others))
    return (one - other) / error if error else 0.0
