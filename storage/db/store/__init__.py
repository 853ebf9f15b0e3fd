"""
The only code that changes a job's state.

Every step is one transaction: a compare-and-set on (id, state, attempt, token),
the attempt's row, and an event beside it. A worker whose lease has passed on
changes zero rows and learns it by LeaseLostError. Each function may run again
after a commit whose answer was lost: it recognises what it has already done.

submitting    accept
claiming      claim, also where the last job ends
leases        beat, yield, pin
checkpoints   register, forget
endings       succeed, fail, release, crash
wishing       cancel, hold
sweeping      accept an array, cancel many
recovering    take back, ring again
malformed     end what no ganq wrote

storage/db/store/transitions.py holds the compare-and-set itself.
"""

from storage.db.store.checkpoints import Checkpoints
from storage.db.store.claim import Claim as Claim
from storage.db.store.claim import Claiming
from storage.db.store.control import Control
from storage.db.store.lease import Leases
from storage.db.store.lease import StopRequests as StopRequests
from storage.db.store.malformed import Malformed
from storage.db.store.reap import HeartbeatRow as HeartbeatRow
from storage.db.store.reap import Recovering
from storage.db.store.submit import Submitting
from storage.db.store.sweeps import Sweeping


class JobStore(Submitting, Claiming, Leases, Checkpoints, Control, Sweeping, Recovering, Malformed):
    """All changes of state, on SQLite and Postgres alike."""
