"""
Names of ganq 0.2 that have a standard name now.

Rows, checkpoints, sweeps and scripts may still say the old ones. They are translated where they come in,
so that the rest of the code knows the new names alone.
"""

from collections.abc import Mapping
from typing import Any

FIELDS = {"noise": "fake_reuse"}
"""Fields of a spec: old name to new."""

VALUES: dict[str, dict[str, str]] = {
    "recipe": {"origin": "dcgan", "plus": "sngan", "pairs": "rpgan", "r3": "r3gan"},
    "arch": {"even": "balanced", "residual": "resnet"},
    "fake_reuse": {"stale": "until-g-step", "fresh": "none"},
}
"""Values of a field, by its new name: old value to new."""


def renamed_value(field: str, value: Any) -> Any:
    """Return the value under its new name."""
    return VALUES.get(field, {}).get(value, value) if isinstance(value, str) else value


def renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a spec, or the facts of networks, with every name as it is now.

    A field that stands there under both names keeps the value of the new one.
    """
    old_first = sorted(data.items(), key=lambda item: item[0] not in FIELDS)
    return {FIELDS.get(name, name): renamed_value(FIELDS.get(name, name), value) for name, value in old_first}
