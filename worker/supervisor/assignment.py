"""
What the supervisor hands to its runner: the spec, and what of the table the work may read.

The choice is pinned in the job's row at the first attempt, so that every attempt
reads the same checkpoint and the same pictures.
"""

from typing import Any

from jobs.errors import CheckpointNotFoundError, GanqError, NotFoundError, SpecError, one_line
from jobs.failpoints import failpoint
from jobs.kinds import kind_named
from storage.db.malformed import HINT, malformed_error
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Job, Lease
from storage.db.store import JobStore

EPOCH_ROWS = 32
"""Rows of --grid-epochs at most."""


def make_assignment(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    """
    Args:
        lease: the claim that the order is for.

    Returns:
        JSON: job_id, attempt, kind, label (for people), spec, submitted_at, inputs, parts (of a job that
        was split), checkpoints (own ones, newest first).

    Raises:
        CheckpointNotFoundError: the job wants a model that is not there.
        LeaseLostError: the job belongs to another attempt.
        SpecError: no ganq wrote such a job.
    """
    if lease.job.malformed is not None:
        raise malformed_error(lease.job)
    for field in ("source", "init_from", "continue_from"):
        if not isinstance(lease.job.spec.get(field), int | None):
            raise SpecError(f"--{field.replace('_', '-')} is {lease.job.spec[field]!r:.60}, not a job")
    try:
        return _make(lease, store, queries)
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        if isinstance(exc, GanqError):
            raise
        raise SpecError(f"its spec cannot be read: {one_line(exc)}", hint=HINT) from exc


def _make(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    job = lease.job
    kind = kind_named(job.kind)
    inputs = dict(job.inputs or {})
    if kind.needs_model and not {"checkpoint", "pictures"} & set(inputs):
        inputs |= _source(lease, store, queries)
    if job.spec.get("grid_epochs") and "checkpoints" not in inputs:
        inputs |= _choose_epochs(lease, store, queries)
    # Checkpoints are registered by attempts, so that the first one finds none.
    own = as_written(queries.checkpoints(job.id)) if lease.attempt > 1 else []
    start = job.spec.get("init_from")
    if start is not None and not own and "checkpoint" not in inputs:
        inputs |= _choose(lease, store, queries, start, "best")
    parent = job.spec.get("continue_from")
    if not own and parent is not None:
        own = as_written(queries.checkpoints(parent))
        if not own:
            raise CheckpointNotFoundError(
                f"job {parent} has no checkpoint to go on from", hint=f"ganq checkpoints {parent}"
            )
    parts = queries.parts(job.id) if kind.splits and job.part_of is None else []
    return {
        "job_id": job.id,
        "attempt": lease.attempt,
        "kind": job.kind,
        "label": job.name or job.kind,
        "spec": job.spec,
        "submitted_at": job.created_at,
        "inputs": inputs,
        "parts": [_made(one) | {"draws": one.spec["draws"]} for one in parts],
        "checkpoints": [_pointer(one) | {"kind": one.kind, "bytes": one.bytes} for one in reversed(own)],
    }


def as_written(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """In the order in which they were made: a run that went back left later steps behind that it gave up."""
    return sorted(checkpoints, key=lambda one: one.id)


def _choose(lease: Lease, store: JobStore, queries: Queries, source: int, which: str) -> dict[str, Any]:
    """Choose the checkpoint and pin it; again, if the training let it go in between."""
    while True:
        chosen = queries.choose_checkpoint(source, which)
        failpoint("orders.chosen")
        pin = {"checkpoint_id": chosen.id, "checkpoint": _pointer(chosen)}
        fixed = store.pin_inputs(lease, pin)
        if fixed is not None:
            return fixed


def _source(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    """Pin what the job reads of the job that its spec names: a checkpoint, or published pictures."""
    spec = lease.job.spec
    if spec["source"] is None:
        return {}
    source = queries.get(spec["source"])
    if kind_named(source.kind).makes_model:
        return _trained_on(lease, store, source) | _choose(
            lease, store, queries, spec["source"], spec["checkpoint"]
        )
    if (source.result or {}).get("manifest_sha256") is None or "deleted_at" in (source.result or {}):
        raise NotFoundError(
            f"job {source.id} ({source.state}) has no pictures",
            hint=f"ganq retry {source.id} makes them again",
        )
    model = queries.get(source.spec["source"])
    fixed = store.pin_inputs(lease, {"pictures": _made(source)}) or {}
    return fixed | _trained_on(lease, store, model)


def _trained_on(lease: Lease, store: JobStore, model: Job) -> dict[str, Any]:
    """Pin the pictures that a model was trained on, if they are what this job compares with."""
    spec, known = lease.job.spec, (model.inputs or {}).get("fingerprint")
    if known is None or spec.get("data") is None:
        return {}
    if (spec["data"], spec["size"]) != (model.spec.get("data"), model.spec.get("size")):
        return {}
    return store.pin_inputs(lease, {"fingerprint": known}) or {}


def _choose_epochs(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    """Pin the checkpoints that retention has kept until now, for a grid with a row for each."""
    source = lease.job.spec["source"]
    while True:
        there = as_written(queries.checkpoints(source))
        kept = spread([one for one in there if one.kind != "resume"] or there, EPOCH_ROWS)
        if not kept:
            raise CheckpointNotFoundError(
                f"job {source} has no checkpoint yet", hint=f"ganq status {source} shows how far it is"
            )
        pin = {"checkpoint_ids": [one.id for one in kept], "checkpoints": [_pointer(one) for one in kept]}
        fixed = store.pin_inputs(lease, pin)
        if fixed is not None:
            return fixed


def spread(checkpoints: list[Checkpoint], most: int) -> list[Checkpoint]:
    """At most so many, evenly from the first to the last; one for each step."""
    distinct = list({one.step: one for one in checkpoints}.values())
    if len(distinct) <= most:
        return distinct
    return [distinct[place * (len(distinct) - 1) // (most - 1)] for place in range(most)]


def _made(part: Job) -> dict[str, Any]:
    """Where a part of a split job has put its pictures."""
    digest = (part.result or {}).get("manifest_sha256")
    return {"job_id": part.id, "attempt": part.attempt, "manifest_sha256": digest}


def _pointer(one: Checkpoint) -> dict[str, Any]:
    return {
        "job_id": one.job_id,
        "path": one.path,
        "manifest_sha256": one.manifest_sha256,
        "epoch": one.epoch,
        "step": one.step,
    }
