"""Register checkpoints, and remove their rows, under the fence."""

from collections.abc import Sequence

from sqlalchemy import Connection, func, insert, select, update

from storage.db.rows import Checkpoint, Lease
from storage.db.store.pins import deletable
from storage.db.store.transitions import StoreMixin, fence_of, lease_lost, record_event
from storage.db.tables import checkpoint, job, utcnow


class CheckpointMixin(StoreMixin):
    """Register and remove checkpoints."""

    def register_checkpoint(
        self,
        lease: Lease,
        *,
        kind: str,
        epoch: int,
        step: int,
        path: str,
        manifest_sha256: str,
        size: int,
        metric: float | None = None,
    ) -> int:
        """
        Register a checkpoint whose files are durable. A higher step than all before resets the crash count.

        Args:
            metric: lower is better; None if it was not measured.

        Returns:
            The checkpoint's id.

        Raises:
            LeaseLostError: the job belongs to another attempt; the folder remains unregistered.
        """

        def work(conn: Connection) -> int:
            # The job's row is locked until the commit, so that no other attempt can begin.
            mine = fence_of(lease)
            if conn.execute(select(job.c.id).where(mine).with_for_update()).first() is None:
                raise lease_lost(lease)
            known = conn.execute(
                select(checkpoint.c.id).where(checkpoint.c.job_id == lease.job_id, checkpoint.c.path == path)
            ).scalar_one_or_none()
            if known is not None:
                return int(known)
            # A run that repeats the same steps makes no progress.
            newest = select(func.max(checkpoint.c.step)).where(checkpoint.c.job_id == lease.job_id)
            best = conn.execute(newest).scalar_one()
            reset = {"crash_count": 0} if best is None or step > best else {}
            conn.execute(update(job).where(job.c.id == lease.job_id).values(waits=0, **reset))
            new_id = conn.execute(
                insert(checkpoint)
                .values(
                    job_id=lease.job_id,
                    attempt=lease.attempt,
                    kind=kind,
                    epoch=epoch,
                    step=step,
                    path=path,
                    manifest_sha256=manifest_sha256,
                    bytes=size,
                    metric=metric,
                    created_at=utcnow(),
                )
                .returning(checkpoint.c.id)
            ).scalar_one()
            if kind != "resume":
                record_event(
                    conn,
                    lease.job_id,
                    "checkpoint",
                    attempt=lease.attempt,
                    detail={"kind": kind, "epoch": epoch, "step": step},
                )
            return int(new_id)

        return self.database.write(work)

    def forget_checkpoints(self, lease: Lease, ids: Sequence[int]) -> list[Checkpoint]:
        """
        Delete the rows of checkpoints before their folders are deleted; keep those that a job needs.

        Returns:
            The checkpoints whose folders may now be deleted.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> list[Checkpoint]:
            if conn.execute(select(job.c.id).where(fence_of(lease)).with_for_update()).first() is None:
                raise lease_lost(lease)
            going = deletable(conn, lease.job_id, ids)
            conn.execute(checkpoint.delete().where(checkpoint.c.id.in_([one.id for one in going])))
            return going

        return self.database.write(work)
