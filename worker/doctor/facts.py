"""Facts that one check finds and a later one needs."""

from dataclasses import dataclass, field

from storage.db.engine import Database
from storage.db.rows import Job, WorkerRow


@dataclass
class Facts:
    """Facts from the job table; empty if it is unavailable."""

    database: Database | None = None
    workers: list[WorkerRow] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    attempt_started: dict[int, float] = field(default_factory=dict)
    """Job → seconds since its running attempt started."""
    checkpoint_bytes: list[int] = field(default_factory=list)
    """Size of the last checkpoint of each running training; of the largest recent one if none runs."""

    def close(self) -> None:
        """Close the job table."""
        if self.database is not None:
            self.database.dispose()
