"""JobStore, of all the transactions of this folder."""

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
