"""What a row of the job table looks like to the rest of ganq: Job, Lease, Checkpoint and kin."""

import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row

from jobs.states import JobState


@dataclass(frozen=True)
class Job:
    """One job, as it stood when it was read. Times are seconds since 1970, UTC."""

    id: int
    name: str | None
    kind: str
    queue: str
    user: str
    priority: int
    spec: dict[str, Any]
    spec_version: int
    inputs: dict[str, Any] | None
    state: JobState
    attempt: int
    worker: str | None
    hb_seq: int
    held: bool
    blockers: int
    not_before: float | None
    cancel_requested_at: float | None
    crash_count: int
    progress: dict[str, Any] | None
    result: dict[str, Any] | None
    error_code: str | None
    error_message: str | None
    error_hint: str | None
    bit_exact: bool | None
    retry_of: int | None
    preemptible: bool
    part_of: int | None
    sweep: str | None
    yields: int
    yielded_at: float | None
    time_limit_s: float | None
    ran_s: float
    created_at: float
    started_at: float | None
    finished_at: float | None

    @classmethod
    def from_row(cls, row: Row[Any]) -> "Job":
        values = row._mapping
        return cls(
            **{
                name: values[name]
                for name in cls.__dataclass_fields__
                if name not in ("state", "held", "preemptible", "bit_exact")
            },
            state=JobState(values["state"]),
            held=bool(values["held"]),
            preemptible=bool(values["preemptible"]),
            bit_exact=None if values["bit_exact"] is None else bool(values["bit_exact"]),
        )


@dataclass(frozen=True)
class Lease:
    """The right to work on a job: every write of a worker carries (job, attempt, token)."""

    job: Job
    attempt: int
    token: str
    claimed_at: float = field(default_factory=time.monotonic, compare=False)
    """Monotonic seconds of the process that holds it."""

    @property
    def job_id(self) -> int:
        return self.job.id

    @property
    def ran_s(self) -> float:
        """Seconds since the claim."""
        return time.monotonic() - self.claimed_at


@dataclass(frozen=True)
class WorkerIdentity:
    """Who claims: enough to find out on the same machine whether it still lives."""

    name: str
    host: str
    device: str
    boot_id: str
    pid: int
    start_ticks: int
    queues: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Checkpoint:
    """One registered checkpoint."""

    id: int
    job_id: int
    attempt: int
    kind: str
    epoch: int
    step: int
    path: str
    manifest_sha256: str
    bytes: int
    metric: float | None
    created_at: float

    @classmethod
    def from_row(cls, row: Row[Any]) -> "Checkpoint":
        values = row._mapping
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Event:
    """One line of a job's history."""

    id: int
    job_id: int
    at: float
    type: str
    attempt: int | None
    worker: str | None
    detail: dict[str, Any] | None

    @classmethod
    def from_row(cls, row: Row[Any]) -> "Event":
        values = row._mapping
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class WorkerRow:
    """One worker, as it last spoke."""

    name: str
    host: str
    boot_id: str | None
    pid: int | None
    start_ticks: int | None
    device: str
    queues: str
    state: str
    job_id: int | None
    version: str
    started_at: float
    seen_at: float
    silent_s: float

    @classmethod
    def from_row(cls, row: Row[Any]) -> "WorkerRow":
        values = row._mapping
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})
