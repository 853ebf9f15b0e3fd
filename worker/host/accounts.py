"""The Unix accounts of the workers of this machine, for checks before a job runs."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.errors import DatasetError
from storage.db.queries import Queries
from storage.status.job_text import TAKES_NO_JOB, UNRESPONSIVE_S
from storage.volume.permissions import account_of, may_not_read
from worker.host.process import boot_id, has_died

READ_HINT = (
    "let that account read it (a common group, chmod g+rX), or move it to a folder of the group: "
    "docs/operations.md, Several Unix users"
)


def worker_uids(queries: Queries) -> Sequence[int]:
    """Return the accounts of all live workers; empty if those of some are not known on this machine."""
    found = set()
    here = boot_id()
    for row in queries.workers():
        if row.silent_s > UNRESPONSIVE_S or row.state in TAKES_NO_JOB:
            continue
        uid = None
        if here and row.boot_id == here and row.pid and not has_died(row.pid, row.start_ticks or 0):
            with suppress(OSError):  # also with hidepid
                uid = os.stat(f"/proc/{row.pid}").st_uid
        if uid is None:
            return ()
        found.add(uid)
    return sorted(found)


def require_readable_data(queries: Queries, spec: Mapping[str, Any]) -> None:
    """
    Check that a worker can read the data set of a job, as far as this machine can tell.

    Raises:
        DatasetError: no worker may read it.
    """
    data = spec.get("data")
    if not data or not os.path.exists(data):
        return
    uids = worker_uids(queries)
    unreadable = {uid: may_not_read(Path(data), uid=uid) for uid in uids}
    if uids and None not in unreadable.values():
        uid, path = next(iter(unreadable.items()))
        raise DatasetError(f"the workers' user {account_of(uid)} may not read {path}", hint=READ_HINT)
