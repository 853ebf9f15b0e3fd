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

transitions    the compare-and-set itself
scheduling     the order of claims
inheritance    priorities that dependants lend
pins           checkpoints that other jobs need
shards         parents and shards
"""

from storage.db.store.checkpoints import CheckpointMixin
from storage.db.store.claim import Claim as Claim
from storage.db.store.claim import ClaimMixin
from storage.db.store.control import ControlMixin
from storage.db.store.lease import LeaseMixin
from storage.db.store.lease import StopRequests as StopRequests
from storage.db.store.malformed import MalformedMixin
from storage.db.store.reap import HeartbeatRow as HeartbeatRow
from storage.db.store.reap import ReapMixin
from storage.db.store.submit import SubmitMixin
from storage.db.store.sweeps import SweepMixin


class JobStore(
    SubmitMixin, ClaimMixin, LeaseMixin, CheckpointMixin, ControlMixin, SweepMixin, ReapMixin, MalformedMixin
):
    """All state transitions, on SQLite and Postgres."""
