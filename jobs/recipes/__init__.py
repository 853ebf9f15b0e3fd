"""
Named presets for training. A recipe is a set of defaults; every part of it stays an option.

One file each in this folder, whose RECIPE is found by itself: to add one, add a file.
"""

import pkgutil
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What a recipe is called, what it is for, and the options it sets."""

    name: str
    summary: str
    defaults: dict[str, Any] = field(default_factory=dict)


def _all() -> dict[str, Recipe]:
    """By name, in the order of the names."""
    modules = [import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]
    recipes: list[Recipe] = [module.RECIPE for module in modules]
    return {recipe.name: recipe for recipe in sorted(recipes, key=lambda one: one.name)}


RECIPES: dict[str, Recipe] = _all()
DEFAULT_RECIPE = "rpgan"
