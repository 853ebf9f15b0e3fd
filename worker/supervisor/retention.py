"""What a job need not keep: older checkpoints, and the pictures of its parts once they are gathered."""

import shutil
from collections.abc import Iterable
from typing import Any

from jobs.failpoints import failpoint
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Lease
from storage.db.store import JobStore
from storage.volume.layout import Volume
from worker.supervisor.assignment import as_written


def prune_checkpoints(lease: Lease, store: JobStore, queries: Queries, volume: Volume) -> list[str]:
    """
    Forget the checkpoints that the job's spec no longer keeps, then delete their folders.

    Returns:
        Their paths, relative to the volume. A folder that stays because this process dies here
        is for `ganq gc`.

    Raises:
        LeaseLostError: the job belongs to another attempt; nothing was deleted.
    """
    spec = lease.job.spec
    going = prunable(
        queries.checkpoints(lease.job_id),
        keep_last=spec.get("keep_last", 2),
        keep_every=spec.get("keep_every", 0),
        keep_best=spec.get("keep_best", 1),
    )
    gone = store.forget_checkpoints(lease, [one.id for one in going]) if going else []
    for one in gone:
        failpoint("supervisor.forgotten")
        shutil.rmtree(volume.absolute(one.path), ignore_errors=True)
    return [one.path for one in gone]


def delete_shards(parts: Iterable[dict[str, Any]], volume: Volume) -> None:
    """
    Delete the folders of a split job's shards. Only after the job's success has been committed: until then
    another attempt may need them. What is left here, for whatever reason, is for `ganq gc`.
    """
    for part in parts:
        shutil.rmtree(volume.job(part["job_id"]), ignore_errors=True)


def prunable(
    checkpoints: list[Checkpoint], *, keep_last: int, keep_every: int, keep_best: int = 1
) -> list[Checkpoint]:
    """
    Checkpoints that retention lets go: resume points behind the newest, and old epochs.

    Args:
        checkpoints: oldest first.
        keep_last: epoch checkpoints that stay, beside the final one.
        keep_every: epochs divisible by this stay; 0: none for that reason.
        keep_best: so many of the measured epochs with the lowest metric stay.
    """
    checkpoints = as_written(checkpoints)
    epochs = [one for one in checkpoints if one.kind == "epoch"]
    ranked = sorted(
        (one for one in epochs if one.metric is not None), key=lambda one: (one.metric or 0.0, one.epoch)
    )
    staying = {one.id for one in (*checkpoints[-1:], *epochs[-keep_last:], *ranked[:keep_best])}
    return [
        one
        for one in checkpoints
        if one.id not in staying
        and one.kind not in ("final", "import")
        and not (one.kind == "epoch" and keep_every > 0 and one.epoch % keep_every == 0)
    ]
