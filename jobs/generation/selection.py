"""
Truncation of latents and rejection of images by score.

Image i remains a function of (checkpoint, seed, i): truncation changes its own latent, its retries have
latents of their own, and the threshold of rejection belongs to the model.

Shapes in names: B images in a micro-batch, N images, Z latent dimensions, H, W pixels.
"""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jobs import rng
from jobs.generation.latent_path import Path, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from jobs.specs import GenerateSpec

CALIBRATION = 1024
"""Images whose scores determine the threshold of rejection."""
MAX_DRAWS = 64
"""Tries per image at most; then the best of them is used."""


def latents_of(spec: "GenerateSpec", nz: int) -> Rows:
    """Return the latents of a spec: plain, truncated, or a path."""
    latents = _truncated(spec, rng.Latents(spec.seed, nz))
    return Path(latents, spec.interpolate, spec.total) if spec.interpolate else latents


def calibration_latents(spec: "GenerateSpec", nz: int) -> Rows:
    """Return latents for calibration, the same for every seed and used for no image."""
    return _truncated(spec, rng.Latents(0, nz, stream="calibration"))


def _truncated(spec: "GenerateSpec", latents: Rows) -> Rows:
    return latents if spec.truncation is None else Truncated(latents, spec.truncation)


class Truncated:
    """
    Latents from a normal distribution truncated to ±limit: less diversity, fewer artefacts.

    BigGAN draws each value again until it lies within the limit; this maps each value through the inverse of
    the truncated distribution. The distribution is the same, no second draw is needed, and truncated image i
    resembles image i.

    Source: Brock et al. 2018, arXiv:1809.11096, section 3.1 (the truncation trick);
    Devroye 1986, chapter II.2 (inversion).
    """

    def __init__(self, latents: Rows, limit: float) -> None:
        self.latents = latents
        self.limit = limit

    def rows(
        self, sample_indices: Iterable[int], *, mean: float = 0.0, std: float = 1.0, retry: int = 0
    ) -> Tensor:
        """Return latents, float32 (N, Z)."""
        plain_NZ = self.latents.rows(sample_indices, retry=retry).double()
        below = math.erfc(self.limit / math.sqrt(2)) / 2  # probability below −limit
        within_NZ: Tensor = torch.special.ndtri(below + torch.special.ndtr(plain_NZ) * (1 - 2 * below))
        return within_NZ.clamp_(-self.limit, self.limit).to(torch.float32).mul_(std).add_(mean)


Scored = tuple["NDArray[np.uint8]", list[float]]
"""Pixels (B, H, W, 3) of a micro-batch, and B scores."""


class Rejection:
    """
    Generates image i again until the discriminator's score reaches the model's threshold.

    Try k of image i has the latent (seed, i, k) and is computed in a micro-batch of k-th tries, at its own
    position, so that it depends neither on its neighbours nor on the requested range. This takes about
    log(B) / log(1/share) passes per micro-batch.

    Args:
        share: of all images that is rejected: those with the lowest scores.
        draw: (block, try) → the micro-batch with its scores.
        calibrate: block → scores of calibration images.
        micro_batch: B.

    Source: Azadi et al. 2018, arXiv:1810.06758. There the probability of acceptance grows with the score;
    here it is a step function, with a share as its parameter.
    """

    def __init__(
        self,
        share: float,
        draw: Callable[[int, int], Scored],
        calibrate: Callable[[int], list[float]],
        micro_batch: int,
    ) -> None:
        self.draw = draw
        blocks = range(-(-CALIBRATION // micro_batch))
        scores = np.array([score for block in blocks for score in calibrate(block)])
        self.threshold = float(np.quantile(scores, share))
        self.tries: list[int] = []

    def micro_batch(self, block: int) -> Scored:
        """Return the accepted images of a block with their scores; set `tries` to the tries of each."""
        pixels_BHW3, scores = self.draw(block, 0)
        pixels_BHW3, scores = pixels_BHW3.copy(), list(scores)
        self.tries = [1] * len(scores)
        for retry in range(1, MAX_DRAWS):
            rejected = [place for place, score in enumerate(scores) if score < self.threshold]
            if not rejected:
                break
            others_BHW3, others = self.draw(block, retry)
            for place in rejected:
                self.tries[place] += 1
                if others[place] > scores[place]:
                    pixels_BHW3[place], scores[place] = others_BHW3[place], others[place]
        return pixels_BHW3, scores

    def record(self, place: int) -> dict[str, Any]:
        """Return the manifest entries of the image at a position of the last block."""
        return {"tries": self.tries[place]}
