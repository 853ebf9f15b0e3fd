"""
Names of ganq 0.2 and the standard names that replace them.

Stored rows, checkpoints, sweeps and scripts may contain the old names, and workers of 0.2 that share the job
table still write them. Names are translated when they are read; the rest of the code knows only the new ones.
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


EVENTS = {
    "asked_to_yield": "preempt_requested",
    "unheld": "hold_released",
    "released": "requeued",
    "set_aside": "quarantined",
    "save_missed": "checkpoint_save_failed",
}
"""Event types: old name to new. No new name is an old one: decision 18."""

EVENT_DETAILS: dict[str, dict[str, str]] = {
    "preempt_requested": {"to": "waiting_job"},
    "rolled_back": {"to": "to_step", "now": "action"},
}
"""Keys of an event's detail, by the new name of its type: old name to new."""

ALL_EVENT_DETAILS = {"why": "reason"}
"""The same for the events of all types."""

OUTCOMES = {"released": "requeued"}
"""Outcomes of an attempt: old name to new."""

ERROR_CODES = {"POISON": "CRASH_LOOP", "DEFECT": "INTERNAL_ERROR", "FOREIGN_FILE": "UNSAFE_WEIGHTS"}
"""Error codes: old name to new."""


def renamed_event(type: str, detail: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
    """Return the type and the detail of an event under their new names."""
    type = EVENTS.get(type, type)
    if not isinstance(detail, dict):
        return type, detail
    keys = ALL_EVENT_DETAILS | EVENT_DETAILS.get(type, {})
    detail = {keys.get(key, key): value for key, value in detail.items()}
    if "code" in detail:
        detail["code"] = renamed_code(detail["code"])
    return type, detail


def renamed_code(code: Any) -> Any:
    """Return an error code under its new name."""
    return ERROR_CODES.get(code, code) if isinstance(code, str) else code


RESULT_KEYS = {
    "variety": "diversity",
    "floor": "baseline",
    "pictures": "image_count",
    "parts": "shards",
    "words": "summary",
    "line": "threshold",
}
"""Keys of a job's result, of its metrics and of the evaluations in a checkpoint: old name to new."""


def renamed_value(field: str, value: Any) -> Any:
    """Return the value under its new name."""
    return VALUES.get(field, {}).get(value, value) if isinstance(value, str) else value


def renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return a spec, or the facts of networks, under their current names.

    A field that stands there under both names keeps the value of the new one.
    """
    old_first = sorted(data.items(), key=lambda item: item[0] not in FIELDS)
    return {FIELDS.get(name, name): renamed_value(FIELDS.get(name, name), value) for name, value in old_first}


def renamed_result(result: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """
    Return a job's result under the current keys, including those of nested objects.

    Args:
        name: the key of a nested object: `best` means the baseline in `precision` and `recall` only.
    """
    keys = {**RESULT_KEYS, "best": "baseline"} if name in ("precision", "recall") else RESULT_KEYS
    return {
        keys.get(key, key): renamed_result(value, key) if isinstance(value, dict) else value
        for key, value in result.items()
    }
