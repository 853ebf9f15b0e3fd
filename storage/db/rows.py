"""Rows of the job table as dataclasses: Job, Lease, Checkpoint, Event, WorkerRow."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row

from jobs.errors import SpecError
from jobs.kinds import KINDS, SPEC_VERSION
from jobs.renamed import OUTCOMES, renamed, renamed_code, renamed_event, renamed_result
from jobs.states import JobState
from storage.db.json_object import MalformedJson

MAX_REPR = 60
OWN_PRIORITY = "own_priority"
"""A key of `inputs`."""


@dataclass(frozen=True)
class Job:
    """A job at the time it was read. Times are seconds since 1970, UTC."""

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
    note: str | None
    begin_at: float | None
    max_running: int | None
    throttled: bool
    position: float
    kept: bool = False
    """Its results are kept until this is reset."""
    malformed: str | None = None
    """Why ganq cannot have written this row; values that cannot be read are empty here."""

    @classmethod
    def from_row(cls, row: Row[Any]) -> "Job":
        values: Mapping[Any, Any] = row._mapping
        faults, repaired = _faults(values)
        if repaired:
            values = {**values, **repaired}
        return cls(
            **{name: values[name] for name in _COPIED},
            spec=spec if isinstance(spec := values["spec"], MalformedJson) else renamed(spec),
            result=renamed_result(result) if type(result := values["result"]) is dict else result,
            state=state_of(values["state"]),
            error_code=renamed_code(values["error_code"]),
            held=bool(values["held"]),
            throttled=bool(values["throttled"]),
            kept=bool(values["kept"]),
            preemptible=bool(values["preemptible"]),
            bit_exact=None if values["bit_exact"] is None else bool(values["bit_exact"]),
            malformed="; ".join(faults) or None,
        )

    @property
    def own_priority(self) -> int:
        """Return the priority of the submit; `priority` may be raised (storage/db/store/inheritance.py)."""
        own = (self.inputs or {}).get(OWN_PRIORITY)
        return own if isinstance(own, int) else self.priority

    def spec_field(self, name: str) -> Any:
        """
        Return a field that each spec of this kind has.

        Raises:
            SpecError: the spec lacks it.
        """
        if name not in self.spec:
            raise SpecError(
                f"the spec of job {self.id} has no {name}: ganq did not write it",
                hint=f"ganq status {self.id}",
            )
        return self.spec[name]


_COPIED = tuple(
    set(Job.__dataclass_fields__)
    - {"spec", "result", "state", "error_code", "held", "throttled", "kept", "preemptible"}
    - {"bit_exact", "malformed"}
)
REQUIRED_NUMBERS = (
    *("priority", "spec_version", "attempt", "hb_seq", "held", "blockers", "crash_count", "waits"),
    *("fresh_retries", "preemptible", "yields", "ran_s", "created_at", "kept"),
    *("throttled", "position"),
)
NUMBERS = (
    *REQUIRED_NUMBERS,
    *("not_before", "cancel_requested_at", "retry_of", "part_of", "preempt_for", "yielded_at", "rung_at"),
    *("time_limit_s", "bit_exact", "started_at", "finished_at", "begin_at", "max_running"),
)
"""Columns that contain a number or, if not required, NULL; SQLite accepts text, too."""
TEXTS = ("kind", "queue", "user")
OBJECTS = ("spec", "inputs", "progress", "result")
_STATES = frozenset(map(str, JobState))


def _faults(values: Mapping[Any, Any]) -> tuple[list[str], dict[str, Any]]:
    """Find values that ganq does not write: return what is wrong, and values to use instead."""
    faults: list[str] = []
    repaired: dict[str, Any] = {}
    for name in NUMBERS:
        if not isinstance(values[name], int | float | None):
            faults.append(f"{name} is {_short_repr(values[name])}, not a number")
            repaired[name] = 0 if name in REQUIRED_NUMBERS else None
    for name in TEXTS:
        if not isinstance(values[name], str):
            faults.append(f"{name} is {_short_repr(values[name])}, not text")
            repaired[name] = str(values[name])
    for name in OBJECTS:
        if isinstance(values[name], MalformedJson):
            faults.append(f"{name} is {_short_repr(values[name].text)}, not a JSON object")
    if values["spec"] is None:
        faults.append("spec is null, not a JSON object")
        repaired["spec"] = {}
    if values["state"] not in _STATES:
        faults.append(f"state is {_short_repr(values['state'])}")
    kind = KINDS.get(repaired.get("kind", values["kind"]))
    if kind is None and repaired.get("spec_version", values["spec_version"]) <= SPEC_VERSION:
        faults.append(f"there is no job kind {_short_repr(values['kind'])}")
    if kind is not None and kind.runner is None and values["state"] in ("queued", "running"):
        faults.append(f"no worker runs the kind {kind.name}")
    return faults, repaired


def _short_repr(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_REPR else f"{text[:MAX_REPR]}…"


def state_of(value: str, unknown: JobState = JobState.FAILED) -> JobState:
    """Return the state of a row; `unknown` for a word that is no state."""
    return JobState(value) if value in _STATES else unknown


@dataclass(frozen=True)
class Lease:
    """The right to execute a job: each write of a worker requires (job, attempt, token)."""

    job: Job
    attempt: int
    token: str
    claimed_at: float = field(default_factory=time.monotonic, compare=False)
    """Monotonic clock of the process that holds it."""
    queues: tuple[str, ...] | None = field(default=None, compare=False)
    """Queues of the worker that holds it; None: not known."""

    @property
    def job_id(self) -> int:
        return self.job.id

    @property
    def ran_s(self) -> float:
        """Return the seconds since the claim."""
        return time.monotonic() - self.claimed_at


@dataclass(frozen=True)
class WorkerIdentity:
    """A worker, with what another process of its machine needs to find out whether it is alive."""

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
    """One entry of a job's history."""

    id: int
    job_id: int
    at: float
    type: str
    attempt: int | None
    worker: str | None
    detail: dict[str, Any] | None

    @classmethod
    def from_row(cls, row: Row[Any]) -> "Event":
        values = {name: row._mapping[name] for name in cls.__dataclass_fields__}
        type, detail = renamed_event(values["type"], values["detail"])
        return cls(**{**values, "type": type, "detail": detail})


def attempt_from_row(row: Row[Any]) -> dict[str, Any]:
    """Return the columns of an attempt, without its token."""
    values = {name: value for name, value in row._mapping.items() if name != "lease_token"}
    values["outcome"] = OUTCOMES.get(values["outcome"], values["outcome"])
    values["error_code"] = renamed_code(values["error_code"])
    return values


CANNOT_CLAIM = {
    "volume hung": "whose volume does not answer",
    "runner stuck": "whose last runner cannot be killed, because it waits in the kernel",
}
"""States of a worker that runs but claims no job until something else recovers."""


@dataclass(frozen=True)
class WorkerRow:
    """One worker, as of its last report."""

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
    drain_requested_at: float | None

    @classmethod
    def from_row(cls, row: Row[Any]) -> "WorkerRow":
        values = row._mapping
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})
