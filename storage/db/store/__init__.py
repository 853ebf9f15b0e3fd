"""
The only code that changes a job's state.

Each method is one transaction: a compare-and-set on (id, state, attempt, token), the attempt's row, and an
event. For a worker that has lost its lease it changes no row and raises LeaseLostError. Each method may be
called again after a COMMIT whose answer was lost: it recognises what it has already done.

submit         insert jobs with their shards
claim          claim a job, also in the transaction that finishes the last one
lease          heartbeat, preemption, pinned inputs, events
checkpoints    register, remove
finish         succeed, cancel, requeue, fail, crash
control        cancel, hold, release
sweeps         submit many, cancel many
reap           requeue lost jobs, notify again
malformed      fail rows that ganq did not write

job_store      the class of them all
transitions    the compare-and-set itself
scheduling     the order of claims
waiting        times, ends of other jobs and places in a sweep that a job waits for
inheritance    priorities raised by dependants
pins           checkpoints that other jobs need
shards         parents and shards
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.db.store.job_store import Claim as Claim
    from storage.db.store.job_store import HeartbeatRow as HeartbeatRow
    from storage.db.store.job_store import JobStore as JobStore
    from storage.db.store.job_store import StopRequests as StopRequests


def __getattr__(name: str) -> Any:
    """Import JobStore on first use: commands that only read would wait 30 ms for it."""
    if name in ("Claim", "HeartbeatRow", "JobStore", "StopRequests"):
        return getattr(import_module("storage.db.store.job_store"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
