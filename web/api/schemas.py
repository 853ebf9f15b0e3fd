"""JSON Schemas of what the REST API takes and answers."""

from typing import Any

from ganq.submission.accept import MAX_NOTE
from ganq.submission.options import SOURCES, known_names, spec_class
from ganq.submission.requests import JOB_OPTIONS
from ganq.submission.schema import REFERENCE, SHAPES, option_shape
from jobs.states import JobState
from storage.db.tokens import Role

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
TIME: Schema = {"type": "number", "description": "seconds since 1970, UTC"}
NOTICES: Schema = {
    "type": "array",
    "items": TEXT,
    "description": "what may delay the job, e.g. that no worker is running",
}


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _list(of: Schema | str) -> Schema:
    return {"type": "array", "items": {"$ref": f"#/components/schemas/{of}"} if isinstance(of, str) else of}


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """Return the schema of an answer, which may get further keys in later versions."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def _closed(properties: dict[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    """Return the schema of a request, in which unknown keys are refused."""
    found = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**found, "required": list(required)} if required else found


JOB: dict[str, Schema] = {
    "id": WHOLE,
    "name": _or_null(TEXT),
    "kind": TEXT,
    "state": {"type": "string", "enum": [str(one) for one in JobState]},
    "status": {"type": "string", "description": "the state with its reason, e.g. 'waiting on 12'"},
    "user": TEXT,
    "queue": TEXT,
    "priority": WHOLE,
    "effective_priority": {"type": "integer", "description": "with what jobs that wait for it lend it"},
    "preemptible": FLAG,
    "preemptions": WHOLE,
    "attempt": WHOLE,
    "worker": _or_null(TEXT),
    "held": FLAG,
    "kept": FLAG,
    "waiting_on": _list(WHOLE),
    "preempted_at": _or_null(TIME),
    "preempted_by": _or_null(WHOLE),
    "not_before": _or_null(TIME),
    "time_limit_s": _or_null(NUMBER),
    "ran_s": NUMBER,
    "cancel_requested_at": _or_null(TIME),
    "shard_of": _or_null(WHOLE),
    "sweep": _or_null(TEXT),
    "shards": _or_null(OBJECT),
    "progress": _or_null(OBJECT),
    "fraction": _or_null(NUMBER),
    "eta_seconds": _or_null(NUMBER),
    "result": _or_null(OBJECT),
    "error": _or_null(OBJECT),
    "malformed": _or_null(TEXT),
    "bit_exact": _or_null(FLAG),
    "retry_of": _or_null(WHOLE),
    "created_at": TIME,
    "started_at": _or_null(TIME),
    "finished_at": _or_null(TIME),
    "spec": OBJECT,
    "spec_version": WHOLE,
    "inputs": _or_null(OBJECT),
    "crash_count": WHOLE,
    "begin_at": _or_null(TIME),
    "max_running": {**_or_null(WHOLE), "description": "jobs of its sweep that may run at once"},
    "throttled": FLAG,
    "position": {"type": "number", "description": "order among jobs of equal priority"},
    "note": _or_null(TEXT),
    "labels": {"type": "object", "additionalProperties": TEXT},
}
JOB_FIELDS = list(JOB)
CHECKPOINT: dict[str, Schema] = {
    **dict.fromkeys(("id", "job_id", "attempt", "epoch", "step", "bytes"), WHOLE),
    "kind": TEXT,
    "metric": _or_null(NUMBER),
    "sha256": {**SHA256, "description": "of its MANIFEST.json, which has those of the files"},
    "path": {"type": "string", "description": "relative to the volume"},
    "created_at": TIME,
}
WEBHOOK: dict[str, Schema] = {
    "id": WHOLE,
    **dict.fromkeys(("channel", "url", "state", "created_by"), TEXT),
    **dict.fromkeys(("events", "users", "kinds", "labels"), _list(TEXT)),
    "jobs": _list(WHOLE),
    "created_at": TIME,
    **dict.fromkeys(("delivered_at", "failing_since", "disabled_at"), _or_null(TIME)),
    "disabled_reason": _or_null(TEXT),
    "deliveries": {**OBJECT, "description": "number by state: pending, delivered, failed"},
}
DELIVERY: dict[str, Schema] = {
    **dict.fromkeys(("webhook", "event", "job", "attempts"), WHOLE),
    **dict.fromkeys(("type", "state"), TEXT),
    "at": TIME,
    **dict.fromkeys(("next_at", "tried_at"), _or_null(TIME)),
    "status": {**_or_null(WHOLE), "description": "of HTTP"},
    "error": _or_null(TEXT),
}
FILE = _object({"name": TEXT, "bytes": WHOLE, "sha256": SHA256})
NAME = SHAPES["name"]
PRIORITY = SHAPES["priority"]
NOTE: Schema = {"type": "string", "maxLength": MAX_NOTE, "description": "'' removes it"}
LABELS: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["string", "null"]},
    "description": "added to those of the job; null or '' removes one",
}
SUBMITTED: dict[str, Schema] = {
    "known": {"type": "boolean", "description": "accepted earlier, with the same key"},
    "notices": NOTICES,
}


def schemas() -> dict[str, Schema]:
    """Return all schemas by name."""
    job = {"$ref": "#/components/schemas/Job"}
    kinds = {kind: _options(kind) for kind in SOURCES}
    return {
        "Problem": _object(
            {
                "type": TEXT,
                "title": TEXT,
                "status": WHOLE,
                "detail": TEXT,
                "code": TEXT,
                "hint": _or_null(TEXT),
            },
            {"known": OBJECT, "given": OBJECT, "job_id": WHOLE},
        ),
        "Any": OBJECT,
        "Empty": _closed({}),
        "About": _object(
            {
                "ganq": TEXT,
                "api": WHOLE,
                "installation": TEXT,
                "user": TEXT,
                "role": {"type": "string", "enum": [str(role) for role in Role]},
                "changes": FLAG,
                "now": TIME,
            }
        ),
        "Job": _object(JOB),
        "SomeJob": {**_object(JOB), "required": [], "description": "a job, with `fields` only these"},
        "Jobs": _object(
            {"jobs": _list("SomeJob"), "next": {**_or_null(TEXT), "description": "the next page"}}
        ),
        "Counts": _object({str(state): WHOLE for state in JobState}),
        "Submission": {
            "oneOf": [
                _closed({"kind": {"const": kind}, **options}, ("kind",)) for kind, options in kinds.items()
            ]
        },
        "SweepSubmission": {
            "oneOf": [
                _closed(
                    {
                        "kind": {"const": kind},
                        "over": {
                            **_closed({name: {"type": "array", "minItems": 1} for name in options}),
                            "minProperties": 1,
                        },
                        **options,
                    },
                    ("kind", "over"),
                )
                for kind, options in kinds.items()
            ]
        },
        "Submitted": _object({"job": job, **SUBMITTED}),
        "SubmittedSweep": _object({"sweep": TEXT, "name": TEXT, "jobs": _list(WHOLE), **SUBMITTED}),
        "JobFile": _closed(
            {
                "job": {**_list(OBJECT), "minItems": 1},
                "defaults": OBJECT,
                "comment": {},
                "places": _list({"type": "string", "maxLength": 299}),
            },
            ("job",),
        ),
        "SubmittedFile": _object(
            {
                "jobs": {
                    **_list(_list(WHOLE)),
                    "description": "ids of each entry, in the order of submission",
                },
                "notices": NOTICES,
            }
        ),
        "Change": {
            **_closed({"name": NAME, "priority": PRIORITY, "note": NOTE, "labels": LABELS}),
            "minProperties": 1,
        },
        "Move": _closed({"before": REFERENCE}, ("before",)),
        "Changed": _object({"job": job}, {"notices": NOTICES}),
        "Pause": _closed({"reason": {"type": "string", "maxLength": 1000, "description": "for the history"}}),
        "Keep": _closed({"undo": FLAG}),
        "Retry": _closed({"with_waiting": {**FLAG, "description": "also the jobs that ended with it"}}),
        "Retried": _object({"job": job, "jobs": _list(WHOLE), "notices": NOTICES}),
        "DatasetListing": _closed(
            {
                "files": _list(
                    _closed(
                        {
                            "path": {"type": "string", "minLength": 1, "maxLength": 999},
                            "bytes": {"type": "integer", "minimum": 0},
                            "sha256": SHA256,
                        },
                        ("path", "bytes", "sha256"),
                    )
                )
                | {"minItems": 1},
                "file": {"type": "boolean", "description": "the data set is one archive"},
            },
            ("files",),
        ),
        "Dataset": _object(
            {
                "dataset": TEXT,
                "data": {"type": "string", "description": "for `data` of a submission"},
                "complete": FLAG,
                "missing": _list(SHA256),
                "missing_count": WHOLE,
            }
        ),
        "Blob": _object({"sha256": SHA256, "complete": FLAG, "offset": WHOLE}),
        "Stored": _object({"stored": WHOLE}),
        "Attempts": _object({"attempts": _list(OBJECT)}),
        "Relations": _object(
            {
                "after": _list(_object({"id": WHOLE, "state": TEXT})),
                "after_end": _list(_object({"id": WHOLE, "condition": TEXT, "state": TEXT})),
                "priority_lent_by": _list(WHOLE),
                "ahead_in_queue": _or_null(WHOLE),
                "limit_reached": _or_null(OBJECT),
                "ended_with_it": _list(WHOLE),
            }
        ),
        "Event": _object(
            {
                "id": WHOLE,
                "job_id": WHOLE,
                "at": TIME,
                "type": TEXT,
                "attempt": _or_null(WHOLE),
                "worker": _or_null(TEXT),
                "detail": {**_or_null(OBJECT), "description": "`by` and `via`: who asked, and how"},
            }
        ),
        "Events": _object({"events": _list("Event"), "next_after": _or_null(WHOLE)}),
        "Image": _object(
            {
                "index": WHOLE,
                "seed": WHOLE,
                "sample_index": WHOLE,
                "score": _or_null(NUMBER),
                "class": _or_null(TEXT),
                "shape": {
                    "type": ["array", "null"],
                    "items": WHOLE,
                    "description": "of the raw pixels of an npz",
                },
                "bytes": WHOLE,
                "sha256": SHA256,
            }
        ),
        "Images": _object({"images": _list("Image"), "count": WHOLE, "next_after": _or_null(WHOLE)}),
        "AllUsage": _object({"usage": _list("Usage")}),
        "Usage": _object(
            {"name": TEXT, "jobs": WHOLE, "attempts": WHOLE, "worker_s": NUMBER, "gpu_s": NUMBER}
        ),
        "Samples": _object({"samples": _list("Sample")}),
        "Sample": _object({"epoch": WHOLE, "attempt": WHOLE, "at": TIME}),
        "Checkpoint": _object(CHECKPOINT),
        "Checkpoints": _object({"checkpoints": _list("Checkpoint")}),
        "CheckpointWithFiles": _object({**CHECKPOINT, "files": _list(FILE)}),
        "Worker": _object(
            {
                "name": TEXT,
                "host": TEXT,
                "device": TEXT,
                "queues": TEXT,
                "state": TEXT,
                "status": TEXT,
                "job_id": _or_null(WHOLE),
                "version": TEXT,
                "started_at": TIME,
                "seen_at": TIME,
                "silent_s": NUMBER,
            }
        ),
        "NewWebhook": _closed(
            {
                "url": {"type": "string", "description": "https://HOST/PATH or apprise+SERVICE://…"},
                "events": {**_list(TEXT), "description": "by default succeeded, failed and cancelled"},
                **dict.fromkeys(("users", "kinds", "labels"), _list(TEXT)),
                "jobs": _list(REFERENCE),
            },
            ("url",),
        ),
        "Webhook": _object(WEBHOOK),
        "AddedWebhook": _object({**WEBHOOK, "secret": {**_or_null(TEXT), "description": "not shown again"}}),
        "Webhooks": _object({"webhooks": _list("Webhook")}),
        "Deliveries": _object({"deliveries": _list(_object(DELIVERY))}),
        "Workers": _object({"workers": _list("Worker"), "now": TIME}),
        "Queues": _object(
            {
                "queues": _list(
                    _object(
                        {
                            "queue": TEXT,
                            **dict.fromkeys(("queued", "held", "claimable", "running", "workers"), WHOLE),
                            "oldest_s": NUMBER,
                            "limit": _or_null(WHOLE),
                        }
                    )
                )
            }
        ),
    }


def _options(kind: str) -> dict[str, Schema]:
    """Return the options of a kind by the names of `import ganq`."""
    fields = spec_class(kind).model_json_schema()["properties"]
    names = [name for name in (*known_names(kind), *JOB_OPTIONS) if name != "out"]
    return {
        name: option_shape(name, fields)
        for name in names
        if not (kind == "evaluate" and name in ("source", "path"))
    }
