"""JSON Schema of job files, for editors."""

from collections.abc import Mapping
from typing import Any

from ganq.submission.options import SOURCES, known_names, spec_class
from ganq.submission.requests import JOB_OPTIONS
from jobs.specs import option_of

REFERENCE = {"type": ["string", "integer"], "description": "id or name of a job"}
SHAPES: dict[str, Any] = {
    "continue": REFERENCE,
    "init-from": REFERENCE,
    "from": REFERENCE,
    "subject": {"type": ["string", "integer"], "description": "a job, or the path of images"},
    "now": {"type": "boolean"},
    "seeds": {"type": ["string", "array"], "description": "'0,4-6', or [0, [4, 6]]"},
    "augment": {"type": ["string", "array"], "description": "'translation,color', a list, or 'none'"},
    "progressive": {"type": ["string", "array"], "description": "'20k,60k', [20000, 60000], or 'none'"},
    "interpolate": {"type": ["string", "array"], "description": "image indices: '3,17', or [3, 17]"},
    "stop-after": {"type": ["string", "integer"], "description": "'10m', '200k-images', or epochs"},
    "checkpoint": {"type": ["string", "integer"], "description": "best, last, or an epoch"},
    "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
    "priority": {"type": "integer", "minimum": -1000, "maximum": 1000},
    "no-preempt": {"type": "boolean"},
    "queue": {"type": "string"},
    "after": {"type": ["string", "integer", "array"], "description": "jobs that must succeed first"},
    "user": {"type": "string"},
    "hold": {"type": "boolean"},
    "time-limit": {"type": ["string", "number"], "description": "'2h30m', or seconds"},
    "submit-key": {"type": "string"},
    "note": {"type": "string"},
    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
    "begin": {"type": "string", "description": "'22:00', '2026-12-01T06:30', 'now+2h'"},
    "after-any": {"type": ["string", "integer", "array"], "description": "jobs that must have ended"},
    "after-fail": {"type": ["string", "integer", "array"], "description": "jobs that must have failed"},
    "max-running": {"type": "integer", "minimum": 1, "description": "jobs of the sweep that run at once"},
}
NAMES = {"continue_from": "continue", "source": "from"}


def job_file_schema() -> dict[str, Any]:
    """Return the schema of a job file."""
    kinds = {kind: _options(kind) for kind in SOURCES}
    everything = {name: shape for shapes in kinds.values() for name, shape in shapes.items()}
    tables = {kind: _table(shapes) for kind, shapes in kinds.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ganq job file",
        "type": "object",
        "additionalProperties": False,
        "required": ["job"],
        "properties": {
            "comment": True,
            "defaults": _table({**dict.fromkeys(everything, True), **tables}),
            "job": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["kind"],
                    "properties": {"kind": {"enum": list(kinds)}},
                    "oneOf": [
                        _table(
                            {
                                "kind": {"const": kind},
                                "sweep": _table({name: {"type": "array", "minItems": 1} for name in shapes}),
                                **shapes,
                            }
                        )
                        for kind, shapes in kinds.items()
                    ],
                },
            },
        },
    }


def _table(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _options(kind: str) -> dict[str, Any]:
    """Return the schema of each option of a kind, by its name in a job file."""
    fields = spec_class(kind).model_json_schema()["properties"]
    found: dict[str, Any] = {}
    for name in (*known_names(kind), *JOB_OPTIONS):
        if kind == "evaluate" and name in ("source", "path"):
            continue  # `subject` is either
        found[option_name(name)] = option_shape(name, fields)
    return found


def option_name(name: str) -> str:
    """Return the name of an option in a job file."""
    return NAMES.get(name) or option_of(name)[2:]


def option_shape(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the schema of an option.

    Args:
        fields: schemas of the fields of its spec.
    """
    shape: dict[str, Any] = SHAPES.get(option_name(name)) or fields[name]
    return shape
