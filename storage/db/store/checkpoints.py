"""Checkpoints become real, and are let go, under the fence of the attempt that owns the job."""

from collections.abc import Sequence

from sqlalchemy import Connection, func, insert, select, update

from storage.db.rows import Checkpoint, Lease
from storage.db.store.base import Store
from storage.db.store.pins import unneeded
from storage.db.store.transitions import lease_lost, owned_by, record_event
from storage.db.tables import checkpoint, job, utcnow


class Checkpoints(Store):
    """Register and forget."""

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
        Make a durable checkpoint folder real. A later step than any before forgives all crashes.

        Args:
            metric: lower is better; None where it was not measured.

        Returns:
            The checkpoint's id.

        Raises:
            LeaseLostError: the job belongs to another attempt; the folder stays unreferenced.
        """

        def work(conn: Connection) -> int:
            # The owner's row is locked until commit: no other attempt can begin meanwhile.
            mine = owned_by(lease, "checkpoint_fence")
            if conn.execute(select(job.c.id).where(mine).with_for_update()).first() is None:
                raise lease_lost(lease)
            known = conn.execute(
                select(checkpoint.c.id).where(checkpoint.c.job_id == lease.job_id, checkpoint.c.path == path)
            ).scalar_one_or_none()
            if known is not None:
                return int(known)
            # A run that goes back and forth over the same steps makes no progress.
            newest = select(func.max(checkpoint.c.step)).where(checkpoint.c.job_id == lease.job_id)
            best = conn.execute(newest).scalar_one()
            forgiven = {"crash_count": 0} if best is None or step > best else {}
            conn.execute(update(job).where(job.c.id == lease.job_id).values(waits=0, **forgiven))
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
        Take rows out of the table before their folders are deleted; those that a job needs stay.

        Returns:
            The checkpoints whose folders may now go.

        Raises:
            LeaseLostError: the job belongs to another attempt.
        """

        def work(conn: Connection) -> list[Checkpoint]:
            if conn.execute(select(job.c.id).where(owned_by(lease)).with_for_update()).first() is None:
                raise lease_lost(lease)
            going = unneeded(conn, lease.job_id, ids)
            conn.execute(checkpoint.delete().where(checkpoint.c.id.in_([one.id for one in going])))
            return going

        return self.database.write(work)
