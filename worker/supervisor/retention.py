"""Retention: delete older checkpoints, and the shards of a split generation that has succeeded."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jobs.failpoints import failpoint
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Lease
from storage.db.store import JobStore
from storage.volume.layout import Volume
from worker.supervisor.assignment import in_creation_order

KEEP_PREVIOUS_S = 600.0
"""How long the folder of the previous checkpoint outlives its row: longer than a standby lags behind, and
longer than the interval of resume checkpoints. See docs/operations.md, Asynchronous replication."""


class Retention:
    """
    Deletes the checkpoints that a job's spec no longer keeps: first their rows, then their folders.

    The newest of these folders stays for KEEP_PREVIOUS_S: a standby that takes over without the last commits
    still has its row, and not the row of the checkpoint that replaced it.

    Args:
        delete: deletes folders of a job, given by their paths relative to the volume, without waiting.
    """

    def __init__(
        self, store: JobStore, queries: Queries, delete: Callable[[int, Sequence[str]], None]
    ) -> None:
        self.store = store
        self.queries = queries
        self.delete = delete
        self._deferred: dict[int, tuple[float, str]] = {}
        """Job → when the folder that outlives its row is deleted, and its path. When the worker exits,
        `ganq gc` deletes it."""

    def prune(self, lease: Lease) -> list[str]:
        """
        Delete the rows of checkpoints that are no longer kept, then their folders.

        Returns:
            Paths of the deleted checkpoints, relative to the volume. If this process dies here, `ganq gc`
            deletes the folders.

        Raises:
            LeaseLostError: the job belongs to another attempt; nothing was deleted.
        """
        spec = lease.job.spec
        expired = prunable(
            self.queries.checkpoints(lease.job_id),
            keep_last=spec.get("keep_last", 2),
            keep_every=spec.get("keep_every", 0),
            keep_best=spec.get("keep_best", 1),
        )
        if not expired:
            return []
        deleted = in_creation_order(self.store.forget_checkpoints(lease, [one.id for one in expired]))
        if not deleted:
            return []
        failpoint("supervisor.pruned")
        _, previous = self._deferred.get(lease.job_id, (0.0, None))
        folders = [] if previous is None else [previous]
        self.delete(lease.job_id, [*folders, *(one.path for one in deleted[:-1])])
        self._deferred[lease.job_id] = time.monotonic() + KEEP_PREVIOUS_S, deleted[-1].path
        return [one.path for one in deleted]

    def delete_due(self) -> None:
        """Delete the deferred folders that are due."""
        now = time.monotonic()
        for job_id, (due, path) in list(self._deferred.items()):
            if now >= due:
                del self._deferred[job_id]
                self.delete(job_id, [path])


def shard_folders(shards: Iterable[dict[str, Any]], volume: Volume) -> list[str]:
    """
    Return the folders of a job's shards, relative to the volume.

    They may be deleted only after the job's success has been committed: until then another attempt may need
    them.
    """
    return [volume.relative(volume.job(shard["job_id"])) for shard in shards]


def prunable(
    checkpoints: list[Checkpoint], *, keep_last: int, keep_every: int, keep_best: int = 1
) -> list[Checkpoint]:
    """
    Return the checkpoints that are no longer kept: resume checkpoints but the newest, and old epochs.

    Args:
        checkpoints: all of one job.
        keep_last: number of epoch checkpoints to keep, beside the final one.
        keep_every: keep epochs divisible by this; 0: keep none for that reason.
        keep_best: number of measured epochs with the lowest metric to keep.
    """
    checkpoints = in_creation_order(checkpoints)
    epochs = [one for one in checkpoints if one.kind == "epoch"]
    ranked = sorted(
        (one for one in epochs if one.metric is not None), key=lambda one: (one.metric or 0.0, one.epoch)
    )
    kept = {one.id for one in (*checkpoints[-1:], *epochs[-keep_last:], *ranked[:keep_best])}
    return [
        one
        for one in checkpoints
        if one.id not in kept
        and one.kind not in ("final", "import")
        and not (one.kind == "epoch" and keep_every > 0 and one.epoch % keep_every == 0)
    ]
