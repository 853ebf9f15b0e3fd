"""Facts that one check of the doctor learns and a later one needs."""

from dataclasses import dataclass, field

from storage.db.engine import Database
from storage.db.rows import Job, WorkerRow


@dataclass
class Facts:
    """What one check has learned and a later one needs; empty while the job table is away."""

    database: Database | None = None
    workers: list[WorkerRow] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    attempt_started: dict[int, float] = field(default_factory=dict)
    """Job → seconds since its running attempt began."""
    checkpoint_bytes: list[int] = field(default_factory=list)
    """Of the last checkpoint of each running training; of the newest ones if none runs."""

    def close(self) -> None:
        """Whoever looks at the job table through these is done."""
        if self.database is not None:
            self.database.dispose()
