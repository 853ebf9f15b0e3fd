"""Rows from the JSON of the REST API; unknown keys are ignored."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from jobs.states import JobState
from storage.db.rows import Checkpoint, Event, Job, WorkerRow, state_of

OMITTED_FIELDS: dict[str, Any] = {"hb_seq": 0, "yielded_at": None}


def job_row(data: Mapping[str, Any]) -> Job:
    """Return a job as displayed: a split job whose shards run is running."""
    error = data.get("error") or {}
    state = state_of(str(data["state"]))
    waits = bool(data.get("waiting_on") or data.get("begin_at") or data.get("throttled"))
    waits = waits or (state is JobState.QUEUED and bool(data.get("shards")))
    values = {
        **OMITTED_FIELDS,
        **data,
        "state": state,
        "priority": data["effective_priority"],
        "blockers": int(waits),
        "error_code": error.get("code"),
        "error_message": error.get("message"),
        "error_hint": error.get("hint"),
        "part_of": data.get("shard_of"),
        "yields": data.get("preemptions", 0),
        "yielded_at": data.get("preempted_at"),
    }
    return Job(
        **{one.name: values[one.name] for one in fields(Job) if one.name in values or one.default is MISSING}
    )


def event_row(data: Mapping[str, Any]) -> Event:
    return Event(**{one.name: data.get(one.name) for one in fields(Event)})  # type: ignore[arg-type]


def checkpoint_row(data: Mapping[str, Any]) -> Checkpoint:
    values = {**data, "manifest_sha256": data["sha256"]}
    return Checkpoint(**{one.name: values[one.name] for one in fields(Checkpoint)})


def worker_row(data: Mapping[str, Any]) -> WorkerRow:
    return WorkerRow(**{one.name: data.get(one.name) for one in fields(WorkerRow)})  # type: ignore[arg-type]
