"""
What the supervisor hands to its runner: the spec, and what of the table the work may read.

The choice is pinned in the job's row at the first attempt, so that every attempt
reads the same checkpoint and the same pictures.
"""

from typing import Any

from jobs.errors import CheckpointNotFoundError
from jobs.kinds import kind_named
from storage.job_store import JobStore
from storage.jobs import Checkpoint, Lease
from storage.queries import Queries


def make_order(lease: Lease, store: JobStore, queries: Queries) -> dict[str, Any]:
    """
    Args:
        lease: the claim that the order is for.

    Returns:
        JSON: job_id, attempt, kind, spec, inputs, checkpoints (own ones, newest first).

    Raises:
        CheckpointNotFoundError: the job wants a model that is not there.
        LeaseLostError: the job belongs to another attempt.
    """
    job = lease.job
    inputs = dict(job.inputs or {})
    if kind_named(job.kind).needs_model and "checkpoint" not in inputs:
        chosen = queries.choose_checkpoint(job.spec["source"], job.spec["checkpoint"])
        inputs |= {"checkpoint_id": chosen.id, "checkpoint": _pointer(chosen)}
        store.pin_inputs(lease, inputs)
    own = _as_written(queries.checkpoints(job.id))
    parent = job.spec.get("continue_from")
    if not own and parent is not None:
        own = _as_written(queries.checkpoints(parent))
        if not own:
            raise CheckpointNotFoundError(
                f"job {parent} has no checkpoint to go on from", hint=f"ganq checkpoints {parent}"
            )
    return {
        "job_id": job.id,
        "attempt": lease.attempt,
        "kind": job.kind,
        "spec": job.spec,
        "inputs": inputs,
        "checkpoints": [_pointer(one) | {"kind": one.kind, "bytes": one.bytes} for one in reversed(own)],
    }


def _as_written(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """In the order in which they were made: a run that went back left later steps behind that it gave up."""
    return sorted(checkpoints, key=lambda one: one.id)


def _pointer(one: Checkpoint) -> dict[str, Any]:
    return {
        "job_id": one.job_id,
        "path": one.path,
        "manifest_sha256": one.manifest_sha256,
        "epoch": one.epoch,
        "step": one.step,
    }


def prunable(checkpoints: list[Checkpoint], *, keep_last: int, keep_every: int) -> list[Checkpoint]:
    """
    Checkpoints that retention lets go: resume points behind the newest, and old epochs.

    Args:
        checkpoints: oldest first.
        keep_last: epoch checkpoints that stay, beside the final one.
        keep_every: epochs divisible by this stay; 0: none for that reason.
    """
    checkpoints = _as_written(checkpoints)
    newest = checkpoints[-1].id if checkpoints else None
    epochs = [one for one in checkpoints if one.kind == "epoch"]
    last = {one.id for one in epochs[-keep_last:]}
    best = {
        min(
            (one for one in epochs if one.metric is not None), key=lambda one: one.metric or 0.0, default=None
        )
    }
    going = []
    for one in checkpoints:
        if one.id == newest or one.kind in ("final", "import") or one in best:
            continue
        kept_by_epoch = one.kind == "epoch" and keep_every > 0 and one.epoch % keep_every == 0
        if one.id not in last and not kept_by_epoch:
            going.append(one)
    return going
