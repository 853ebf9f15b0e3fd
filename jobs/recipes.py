"""
Named presets for training. A recipe is a set of defaults; every part of it stays an option.

`origin` is the tutorial that ganq grew from, bit for bit in its semantics.
`plus` costs the generator the same and shows faces where the origin shows noise.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What a recipe is called, what it is for, and the options it sets."""

    name: str
    summary: str
    defaults: dict[str, Any] = field(default_factory=dict)


ORIGIN = Recipe(
    "origin",
    "the tutorial's DCGAN, exactly: BCE, BatchNorm, G on every 5th batch",
    {
        "batch": 256,
        "epochs": 400,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "beta1": 0.5,
        "beta2": 0.999,
        "d_every": 1,
        "g_every": 5,
        "loss": "bce",
        "norm_d": "batch",
        "noise": "stale",
        "ema_half_life_kimg": 0.0,
        "augment": (),
    },
)

PLUS = Recipe(
    "plus",
    "spectral norm, hinge loss, 1:1 steps, EMA and DiffAugment: faces from few pictures",
    {
        "batch": 64,
        "epochs": 400,
        "lr_g": 2e-4,
        "lr_d": 2e-4,
        "beta1": 0.0,
        "beta2": 0.999,
        "d_every": 1,
        "g_every": 1,
        "loss": "hinge",
        "norm_d": "spectral",
        "noise": "fresh",
        "ema_half_life_kimg": 20.0,
        "augment": ("translation", "color"),
    },
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (ORIGIN, PLUS)}
DEFAULT_RECIPE = PLUS.name
