"""
Named presets for training: a recipe is a set of defaults for the options.

Each file of this folder defines one as RECIPE; a new file needs no registration.
"""

import pkgutil
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A set of defaults for the options of a training."""

    name: str
    summary: str
    defaults: dict[str, Any] = field(default_factory=dict)
    by_size: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Defaults at one size, over the others."""

    def defaults_at(self, size: Any) -> dict[str, Any]:
        """Return the defaults at a size, which may be anything: it has not been validated."""
        return {**self.defaults, **(self.by_size.get(size, {}) if isinstance(size, int) else {})}


def _all() -> dict[str, Recipe]:
    """Return the recipes by name, sorted by name."""
    modules = [import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]
    recipes: list[Recipe] = [module.RECIPE for module in modules]
    return {recipe.name: recipe for recipe in sorted(recipes, key=lambda one: one.name)}


RECIPES: dict[str, Recipe] = _all()
DEFAULT_RECIPE = "rpgan"
