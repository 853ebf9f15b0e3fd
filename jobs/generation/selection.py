"""
Which latents a generation draws from, and which of its draws it takes.

Whatever is chosen here, picture i stays a function of (checkpoint, seed, i): what is
truncated is the latent itself, the tries of place i are its own, and the score below which a try
is rejected is the model's.

Shapes in names: B pictures in a micro-batch, Z latent numbers, H, W pixels.
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
"""Pictures by whose scores the threshold of a rejection is set."""
TRIES = 64
"""Draws for one place at most; after them the best of them is taken."""


def latents_of(spec: "GenerateSpec", nz: int) -> Rows:
    """The latents that a spec draws from: plain, truncated, or a way through some of them."""
    latents = _within(spec, rng.Latents(spec.seed, nz))
    return Path(latents, spec.interpolate, spec.total) if spec.interpolate else latents


def calibration_latents(spec: "GenerateSpec", nz: int) -> Rows:
    """Latents of pictures that are nobody's, the same for every seed, to learn a model's scores from."""
    return _within(spec, rng.Latents(0, nz, stream="calibration"))


def _within(spec: "GenerateSpec", latents: Rows) -> Rows:
    return latents if spec.truncation is None else Truncated(latents, spec.truncation)


class Truncated:
    """
    Latents whose numbers all lie within ±limit: less variety, fewer odd pictures.

    Where BigGAN draws a number again until it lies within, this puts each through
    the inverse of the truncated distribution. The result is distributed alike, needs no second
    draw, and keeps kinship: picture i is a tamer version of picture i.

    Source: Brock et al. 2018, arXiv:1809.11096, section 3.1 (the truncation trick);
    Devroye 1986, chapter II.2 (inversion).
    """

    def __init__(self, latents: Rows, limit: float) -> None:
        self.latents = latents
        self.limit = limit

    def rows(
        self, sample_indices: Iterable[int], *, mean: float = 0.0, std: float = 1.0, retry: int = 0
    ) -> Tensor:
        """float32 (len(sample_indices), nz)."""
        plain_NZ = self.latents.rows(sample_indices, retry=retry).double()
        below = math.erfc(self.limit / math.sqrt(2)) / 2  # the share that lies under −limit
        within_NZ: Tensor = torch.special.ndtri(below + torch.special.ndtr(plain_NZ) * (1 - 2 * below))
        return within_NZ.clamp_(-self.limit, self.limit).to(torch.float32).mul_(std).add_(mean)


Drawn = tuple["NDArray[np.uint8]", list[float]]
"""Pixels (B, H, W, 3) of a micro-batch, and B scores."""


class Rejection:
    """
    Draws place i again until the discriminator's score reaches the model's own threshold.

    Try k of place i has the latent (seed, i, k), and is computed in a whole micro-batch of k-th
    tries, at its own place: so neither its neighbours nor the range that was asked for matter. It
    costs about log(B) / log(1/share) passes for each micro-batch.

    Args:
        share: of all draws, that is rejected: those with the lowest scores.
        draw: (block, try) → the micro-batch, with scores.
        calibrate: number of a block → scores of pictures that are nobody's.
        micro_batch: B.

    Source: Azadi et al. 2018, arXiv:1810.06758. There a draw is accepted with a probability that
    grows with its score; here that is a step, whose place is a share a person can read.
    """

    def __init__(
        self,
        share: float,
        draw: Callable[[int, int], Drawn],
        calibrate: Callable[[int], list[float]],
        micro_batch: int,
    ) -> None:
        self.draw = draw
        blocks = range(-(-CALIBRATION // micro_batch))
        scores = np.array([score for block in blocks for score in calibrate(block)])
        self.threshold = float(np.quantile(scores, share))
        self.tries: list[int] = []

    def micro_batch(self, block: int) -> Drawn:
        """The accepted pictures of a block, with their scores; `tries` then says how many each took."""
        pixels_BHW3, scores = self.draw(block, 0)
        pixels_BHW3, scores = pixels_BHW3.copy(), list(scores)
        self.tries = [1] * len(scores)
        for retry in range(1, TRIES):
            open_places = [place for place, score in enumerate(scores) if score < self.threshold]
            if not open_places:
                break
            others_BHW3, others = self.draw(block, retry)
            for place in open_places:
                self.tries[place] += 1
                if others[place] > scores[place]:
                    pixels_BHW3[place], scores[place] = others_BHW3[place], others[place]
        return pixels_BHW3, scores

    def record(self, place: int) -> dict[str, Any]:
        """What the manifest says of the picture at this place of the block that came last."""
        return {"tries": self.tries[place]}
