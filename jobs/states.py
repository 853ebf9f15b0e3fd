"""The states of a job and the steps between them, in one place."""

from enum import StrEnum

from jobs.errors import InvalidTransitionError


class JobState(StrEnum):
    """Where a job stands. Wishes (cancel, hold) are columns beside it, not states."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.FAILED}),
    JobState.RUNNING: frozenset({JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}

TERMINAL = frozenset(state for state, then in TRANSITIONS.items() if not then)


def check_transition(old: JobState, new: JobState) -> None:
    """
    Refuse a step that the table above does not hold.

    Raises:
        InvalidTransitionError: if `new` cannot follow `old`.
    """
    if new not in TRANSITIONS[old]:
        raise InvalidTransitionError(f"a job cannot go from {old} to {new}", old=old, new=new)


class Outcome(StrEnum):
    """How an attempt ended. One job has as many attempts as it needed."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REQUEUED = "requeued"  # its worker drained or preempted it
    RETRIED = "retried"  # an error that another try may mend
    CRASHED = "crashed"  # the runner died under a living supervisor
    LOST = "lost"  # the worker fell silent, and the reaper took the job back


class StopReason(StrEnum):
    """Why a running job is asked to stop."""

    CANCEL = "cancel"
    DRAIN = "drain"
    PREEMPT = "preempt"
    TIME_LIMIT = "time_limit"
    LOST = "lost"


KEEPS_WORK = frozenset({StopReason.DRAIN, StopReason.PREEMPT, StopReason.TIME_LIMIT})
"""Stops after which the work may go on: what was done since the last checkpoint is saved first."""
