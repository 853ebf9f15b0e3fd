"""What a job need not keep: older checkpoints, and the shards of a split generation once it has succeeded."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jobs.failpoints import failpoint
from storage.db.queries import Queries
from storage.db.rows import Checkpoint, Lease
from storage.db.store import JobStore
from storage.volume.layout import Volume
from worker.supervisor.assignment import as_written

KEEP_BEFORE_S = 600.0
"""How long the folder of the checkpoint before the newest outlives its row: longer than a standby lags
behind, and than two resume points lie apart. See docs/operations.md, Asynchronous replication."""


class Retention:
    """
    Forgets the checkpoints that a job's spec no longer keeps, and deletes their folders.

    The rows go at once. Of the folders, the newest stays for KEEP_BEFORE_S: a standby that takes over
    without the last commits still has its row, and not that of the checkpoint that replaced it.

    Args:
        delete: has folders of a job deleted, by their paths relative to the volume; does not wait for it.
    """

    def __init__(
        self, store: JobStore, queries: Queries, delete: Callable[[int, Sequence[str]], None]
    ) -> None:
        self.store = store
        self.queries = queries
        self.delete = delete
        self._kept: dict[int, tuple[float, str]] = {}
        """Job → when the folder that outlives its row goes, and which it is. A worker that ends leaves it
        to `ganq gc`."""

    def prune(self, lease: Lease) -> list[str]:
        """
        Returns:
            The paths of those that are forgotten, relative to the volume. A folder that stays because this
            process dies here is for `ganq gc`.

        Raises:
            LeaseLostError: the job belongs to another attempt; nothing was deleted.
        """
        spec = lease.job.spec
        going = prunable(
            self.queries.checkpoints(lease.job_id),
            keep_last=spec.get("keep_last", 2),
            keep_every=spec.get("keep_every", 0),
            keep_best=spec.get("keep_best", 1),
        )
        gone = as_written(self.store.forget_checkpoints(lease, [one.id for one in going]) if going else [])
        if not gone:
            return []
        failpoint("supervisor.forgotten")
        _, before = self._kept.get(lease.job_id, (0.0, None))
        self.delete(lease.job_id, [*([] if before is None else [before]), *(one.path for one in gone[:-1])])
        self._kept[lease.job_id] = time.monotonic() + KEEP_BEFORE_S, gone[-1].path
        return [one.path for one in gone]

    def delete_due(self) -> None:
        """Delete the folders whose time is over."""
        now = time.monotonic()
        for job_id, (due, path) in list(self._kept.items()):
            if now >= due:
                del self._kept[job_id]
                self.delete(job_id, [path])


def shard_folders(parts: Iterable[dict[str, Any]], volume: Volume) -> list[str]:
    """
    Return the folders of a split job's shards, relative to the volume, to be deleted. Only after the job's
    success has been committed: until then another attempt may need them.
    """
    return [volume.relative(volume.job(part["job_id"])) for part in parts]


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
