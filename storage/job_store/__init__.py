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

storage/transitions.py holds the compare-and-set itself.
"""

from storage.job_store.checkpoints import Checkpoints
from storage.job_store.claiming import Claim as Claim
from storage.job_store.claiming import Claiming
from storage.job_store.leases import Leases
from storage.job_store.leases import Wishes as Wishes
from storage.job_store.malformed import Malformed
from storage.job_store.recovering import Beat as Beat
from storage.job_store.recovering import Recovering
from storage.job_store.submitting import Submitting
from storage.job_store.sweeping import Sweeping
from storage.job_store.wishing import Wishing


class JobStore(Submitting, Claiming, Leases, Checkpoints, Wishing, Sweeping, Recovering, Malformed):
    """All changes of state, on SQLite and Postgres alike."""
