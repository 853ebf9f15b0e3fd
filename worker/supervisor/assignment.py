"""
The assignment: what the supervisor sends to its runner for one job.

What the job reads is pinned in its row at the first attempt, so that every attempt reads the same
checkpoint and the same images.
"""

import os
from typing import Any

from jobs.budgets import read_budget
from jobs.errors import CheckpointNotFoundError, GanqError, NotFoundError, SpecError, one_line
from jobs.failpoints import failpoint
from jobs.kinds import kind_named
from storage.datasets.sources import Reading
from storage.db.malformed import HINT, malformed_error
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Job, Lease
from storage.db.store import JobStore
from storage.users import this_account

MAX_GRID_EPOCHS = 32
"""Rows of a grid with --grid-epochs."""


def make_assignment(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    """
    Return the assignment for a lease, and pin what the job reads.

    Returns:
        JSON: job_id, attempt, kind, label (for people), spec, submitted_at, copies_out (whether this worker
        writes to --out), inputs, ends_in_s (what --stop-after leaves), parts (shards of a job that was
        split), checkpoints (its own, newest first).

    Raises:
        CheckpointNotFoundError: the job needs a checkpoint that does not exist.
        LeaseLostError: the job belongs to another attempt.
        SpecError: ganq did not write this row.
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
        inputs |= _pin_source(lease, store, queries)
    if job.spec.get("grid_epochs") and "checkpoints" not in inputs:
        inputs |= _pin_epochs(lease, store, queries)
    # Checkpoints are registered by attempts, so the first attempt finds none.
    own = in_creation_order(queries.checkpoints(job.id)) if lease.attempt > 1 else []
    initial = job.spec.get("init_from")
    if initial is not None and not own and "checkpoint" not in inputs:
        inputs |= _pin_checkpoint(lease, store, queries, initial, "best")
    continued = job.spec.get("continue_from")
    if not own and continued is not None:
        own = in_creation_order(queries.checkpoints(continued))
        if not own:
            raise CheckpointNotFoundError(
                f"job {continued} has no checkpoint to continue from", hint=f"ganq checkpoints {continued}"
            )
    shards = queries.shards(job.id) if kind.splits and job.part_of is None else []
    return {
        "job_id": job.id,
        "attempt": lease.attempt,
        "kind": job.kind,
        "label": job.name or job.kind,
        "spec": job.spec,
        "submitted_at": job.created_at,
        "copies_out": bool(job.spec.get("out")) and _is_submitter(job, queries),
        "inputs": inputs,
        "ends_in_s": None if (left_s := time_left_s(lease)) is None else max(0.0, left_s),
        "shards": [_shard_pointer(one) for one in shards],
        "checkpoints": [
            _checkpoint_pointer(one) | {"kind": one.kind, "bytes": one.bytes} for one in reversed(own)
        ],
    }


def time_left_s(lease: Lease) -> float | None:
    """
    Return the seconds of running time, over all attempts, that --stop-after leaves; None without such a time.

    Raises:
        SpecError: ganq did not write this spec.
    """
    given = lease.job.spec.get("stop_after")
    seconds = None if given is None else read_budget(given).seconds
    return None if seconds is None else seconds - lease.job.ran_s - lease.ran_s


def _is_submitter(job: Job, queries: Queries) -> bool:
    """Return whether this worker has the account of the submitter, so that it may write to --out."""
    uid = queries.submitter_uid(job.id)
    return job.user == this_account() if uid is None else uid == os.geteuid()


def in_creation_order(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Sort by id, not by step: a run that was rolled back has abandoned checkpoints of later steps."""
    return sorted(checkpoints, key=lambda one: one.id)


def evenly_spaced(checkpoints: list[Checkpoint], limit: int) -> list[Checkpoint]:
    """Return at most `limit` checkpoints, evenly from the first to the last, with distinct steps."""
    distinct = list({one.step: one for one in checkpoints}.values())
    if len(distinct) <= limit:
        return distinct
    return [distinct[place * (len(distinct) - 1) // (limit - 1)] for place in range(limit)]


# --- pinning ------------------------------------------------------------------------------


def _pin_checkpoint(
    lease: Lease, store: JobStore, queries: Queries, source: int, which: str
) -> dict[str, Any]:
    """Choose a checkpoint and pin it; choose again if retention deleted it in between."""
    while True:
        chosen = queries.choose_checkpoint(source, which)
        failpoint("assignment.chosen")
        pin = {"checkpoint_id": chosen.id, "checkpoint": _checkpoint_pointer(chosen)}
        pinned = store.pin_inputs(lease, pin)
        if pinned is not None:
            return pinned


def _pin_source(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    """Pin what the job reads of its source job: a checkpoint, or published images."""
    spec = lease.job.spec
    if spec["source"] is None:
        return {}
    source = queries.get(spec["source"])
    if kind_named(source.kind).makes_model:
        return _pin_dataset(lease, store, source) | _pin_checkpoint(
            lease, store, queries, spec["source"], spec["checkpoint"]
        )
    if (source.result or {}).get("manifest_sha256") is None or "deleted_at" in (source.result or {}):
        raise NotFoundError(
            f"job {source.id} ({source.state}) has no images",
            hint=f"ganq retry {source.id} generates them again",
        )
    model = queries.get(source.spec["source"])
    pinned = store.pin_inputs(lease, {"pictures": _images_pointer(source)}) or {}
    return pinned | _pin_dataset(lease, store, model)


def _pin_dataset(lease: Lease, store: JobStore, model: Job) -> dict[str, Any]:
    """Pin the data set that a model was trained on, if this job reads the same data at the same size."""
    spec, fingerprint = lease.job.spec, (model.inputs or {}).get("fingerprint")
    if fingerprint is None or spec.get("data") is None:
        return {}
    if (spec["data"], spec["size"]) != (model.spec.get("data"), model.spec.get("size")):
        return {}
    if Reading.of_spec(spec) != Reading.of_spec(model.spec):
        return {}
    return store.pin_inputs(lease, {"fingerprint": fingerprint}) or {}


def _pin_epochs(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    """Pin the checkpoints that retention has kept until now, one for each row of a grid."""
    source = lease.job.spec["source"]
    while True:
        existing = in_creation_order(queries.checkpoints(source))
        chosen = evenly_spaced([one for one in existing if one.kind != "resume"] or existing, MAX_GRID_EPOCHS)
        if not chosen:
            raise CheckpointNotFoundError(
                f"job {source} has no checkpoint yet", hint=f"ganq status {source} shows its progress"
            )
        pin = {
            "checkpoint_ids": [one.id for one in chosen],
            "checkpoints": [_checkpoint_pointer(one) for one in chosen],
        }
        pinned = store.pin_inputs(lease, pin)
        if pinned is not None:
            return pinned


def _images_pointer(job: Job) -> dict[str, Any]:
    """Point to the images that a generation or a shard has published."""
    digest = (job.result or {}).get("manifest_sha256")
    return {"job_id": job.id, "attempt": job.attempt, "manifest_sha256": digest}


def _shard_pointer(shard: Job) -> dict[str, Any]:
    """Point to the images of a shard; name its files if its parent links to them."""
    result = shard.result or {}
    pointer = _images_pointer(shard) | {"draws": shard.spec["draws"], "build": result.get("build")}
    if "archives" in result:
        pointer["files"] = {
            "images": result["image_count"],
            **{name: result[name] for name in ("bytes", "manifest_bytes", "archives")},
        }
        pointer["all_equal"] = "warning" in result
    return pointer


def _checkpoint_pointer(one: Checkpoint) -> dict[str, Any]:
    return {
        "job_id": one.job_id,
        "path": one.path,
        "manifest_sha256": one.manifest_sha256,
        "epoch": one.epoch,
        "step": one.step,
    }
