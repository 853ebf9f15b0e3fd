"""States of a job, and the transitions between them."""

from enum import StrEnum

from jobs.errors import InvalidTransitionError


class JobState(StrEnum):
    """State of a job. Requests (cancel, hold) are columns of their own, not states."""

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


def ending_text(state: str) -> str:
    """Return how a job has ended, after 'it has': "failed", "been cancelled"."""
    return "been cancelled" if state == JobState.CANCELLED else state


def check_transition(old: JobState, new: JobState) -> None:
    """
    Refuse a transition that TRANSITIONS does not contain.

    Raises:
        InvalidTransitionError: if `new` cannot follow `old`.
    """
    if new not in TRANSITIONS[old]:
        raise InvalidTransitionError(f"a job cannot go from {old} to {new}", old=old, new=new)


class Outcome(StrEnum):
    """How an attempt ended. A job can have several attempts."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REQUEUED = "requeued"  # its worker drained or preempted it
    RETRIED = "retried"  # a transient error
    CRASHED = "crashed"  # the runner died, and the supervisor lived
    LOST = "lost"  # the worker sent no heartbeats, and the reaper requeued the job


class StopReason(StrEnum):
    """Why a running job is asked to stop."""

    CANCEL = "cancel"
    DRAIN = "drain"
    PREEMPT = "preempt"
    PAUSE = "pause"
    TIME_LIMIT = "time_limit"
    STOP_AFTER = "stop_after"  # the time of --stop-after has passed: it ends as a success
    LOST = "lost"


SAVING_STOP_REASONS = frozenset(
    {StopReason.DRAIN, StopReason.PREEMPT, StopReason.PAUSE, StopReason.TIME_LIMIT}
)
"""Reasons after which the job may continue: a checkpoint is saved first."""
