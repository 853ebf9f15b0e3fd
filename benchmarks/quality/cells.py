"""What the study compares: one cell is a style, a number of images, a recipe and a seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from jobs.recipes import DEFAULT_RECIPE

BASE: dict[str, Any] = {"size": 96, "ngf": 32, "ndf": 32}
"""The same for all: networks that two cores can train in minutes."""
DCGAN_BATCH = 64
"""Instead of its 256, with which it would make four times fewer steps in the same time."""


@dataclass(frozen=True)
class Cell:
    """One training of the study."""

    style: str
    images: int
    recipe: str
    seed: int
    without: str = ""
    """Of an ablation: the part that is put back to what dcgan has."""
    options: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def variant(self) -> str:
        return f"{self.recipe} without {self.without}" if self.without else self.recipe

    @property
    def key(self) -> str:
        """Return the key of this cell in names and files."""
        return "-".join(
            filter(None, (self.style, str(self.images), self.recipe, self.without, str(self.seed)))
        )

    def spec(self, data: str, epochs: int, save_every: int) -> dict[str, Any]:
        """Return options of TrainSpec."""
        chosen = {**BASE, "recipe": self.recipe, "seed": self.seed, **self.options}
        if self.recipe == "dcgan":
            chosen.setdefault("batch", DCGAN_BATCH)
        return {**chosen, "data": data, "epochs": epochs, "save_every": save_every}


PARTS: dict[str, dict[str, Any]] = {
    "balanced channels": {"arch": "dcgan"},
    "low-pass filter": {"antialias": False},
    "pairing": {"loss": "nonsaturating"},
    "penalties": {"norm_d": "spectral", "r1_gamma": 0.0, "r2_gamma": 0.0},
    "average": {"ema_half_life_kimg": 0.0},
    "augmentation": {"augment": ()},
    "adaptation": {"ada_target": 0.0},
    "batch and rate": {"batch": 64, "lr_g": 2e-4, "lr_d": 2e-4},
    "beta1": {"beta1": 0.5},
    "beta2": {"beta2": 0.999},
    "turns": {"g_every": 5},
}
"""Each part of the default recipe, as dcgan has it or as is usual: what is lost without it."""


def cells(
    styles: Sequence[str], sizes: Sequence[int], recipes: Sequence[str], seeds: Sequence[int]
) -> Iterator[Cell]:
    """Return the whole comparison, all of one seed first, so that partial results can be read."""
    for seed, images, style, recipe in product(seeds, sizes, styles, recipes):
        yield Cell(style, images, recipe, seed)


def ablation(style: str, images: int, seeds: Sequence[int]) -> Iterator[Cell]:
    """Return the default recipe, complete and without each of its parts."""
    for seed in seeds:
        yield Cell(style, images, DEFAULT_RECIPE, seed)
        for part, options in PARTS.items():
            yield Cell(style, images, DEFAULT_RECIPE, seed, part, options)
