"""The states of a job, and the errors that move it."""

from typing import Any

import pytest
from sqlalchemy import Column, String

from jobs import errors
from jobs.errors import GanqError, InvalidTransitionError, Retry, StopRequested
from jobs.states import TERMINAL, TRANSITIONS, JobState, Outcome, StopReason, check_transition

ALLOWED = {
    ("queued", "running"),
    ("queued", "cancelled"),
    ("queued", "failed"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "cancelled"),
}


@pytest.mark.parametrize("old", JobState)
@pytest.mark.parametrize("new", JobState)
def test_only_the_steps_of_the_table_are_allowed(old: Any, new: Any) -> None:
    if (old, new) in ALLOWED:
        check_transition(old, new)
        return
    with pytest.raises(InvalidTransitionError) as caught:
        check_transition(old, new)
    assert (caught.value.old, caught.value.new) == (old, new)


def test_terminal_states_lead_nowhere_and_all_others_lead_to_one() -> None:
    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} == TERMINAL
    assert {state for state in JobState if state.terminal} == TERMINAL
    for state in set(JobState) - TERMINAL:
        assert TRANSITIONS[state] & TERMINAL


def test_status_texts_fit_into_their_columns() -> None:
    from storage.db.tables import attempt, job

    def length(column: Column[Any]) -> int:
        assert isinstance(column.type, String)
        return column.type.length or 0

    assert max(map(len, JobState)) <= length(job.c.state)
    assert max(map(len, Outcome)) <= length(attempt.c.outcome)
    codes = [cls.code for cls in all_errors()]
    assert max(map(len, [*codes, "DEPENDENCY_FAILED"])) <= length(job.c.error_code)
    assert set(StopReason) == {"cancel", "drain", "pause", "preempt", "stop_after", "time_limit", "lost"}


def all_errors() -> list[type[GanqError]]:
    return [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, GanqError)]


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert errors.__doc__ is not None
    missing = [one.__name__ for one in all_errors() if one.__name__ not in errors.__doc__]
    assert missing == []


@pytest.mark.parametrize("kind", all_errors(), ids=lambda one: one.__name__)
def test_every_error_has_a_code_of_its_own_an_exit_code_and_a_policy(kind: Any) -> None:
    same = [one for one in all_errors() if one.code == kind.code]
    assert same == [kind]
    assert kind.exit_code in (1, 2, 3)
    assert kind.retry in Retry


def test_facts_of_an_error_are_attributes_and_others_are_not() -> None:
    error = GanqError("no", hint="yes", job_id=3)

    assert (error.job_id, error.hint, str(error)) == (3, "yes", "no")
    with pytest.raises(AttributeError):
        _ = error.other


def test_an_error_survives_pickling_between_processes() -> None:
    import copy
    import pickle

    error = GanqError("no", hint="yes", job_id=3)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (again.message, again.hint, again.job_id) == ("no", "yes", 3)


def test_a_stop_request_passes_through_an_except_exception() -> None:
    def work() -> None:
        try:
            raise StopRequested(StopReason.DRAIN)
        except Exception:
            pytest.fail("swallowed")

    with pytest.raises(StopRequested) as caught:
        work()
    assert caught.value.reason == "drain"
