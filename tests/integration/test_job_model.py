"""
Random sequences of operations on the job table, against a model of what a job is.

The model knows states, attempts and wishes, nothing of SQL. After each step the table must
agree with it, and with what holds for any history: terminal is final, the attempt number only
rises, at most one attempt is open, and each transition has its event.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tables import Claimer, Seen, beat_of, seen, set_columns

from jobs.errors import (
    DiskFullError,
    InvalidTransitionError,
    LeaseLostError,
    OutOfMemoryError,
    TrainingDivergedError,
)
from jobs.states import TERMINAL, JobState
from storage.db.queries import Filter, Queries
from storage.db.store import JobStore

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.rows import Job

ENDED = frozenset(TERMINAL)


@dataclass
class Model:
    """What we know of one job without looking."""

    state: str = "queued"
    attempt: int = 0
    held: bool = False
    cancel: bool = False
    crashes: int = 0
    fresh: int = 0
    needs: int | None = None
    events: list[str] = field(default_factory=lambda: ["submitted"])


def machine(database: "Database", take: Any, submit: Any) -> Any:
    store, queries = JobStore(database), Queries(database)

    class Jobs(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            # What earlier examples left behind is none of this one's business.
            for one in queries.stream(Filter(states=(JobState.QUEUED,))):
                store.hold(one.id, held=True)
            self.jobs: dict[int, Any] = {}
            self.leases: dict[int, list[Any]] = {}  # job id → all leases that it ever had, the newest last

        def pick(self, data: Any, states: Any) -> Any:
            return data.draw(st.sampled_from(sorted(i for i, m in self.jobs.items() if m.state in states)))

        def some(self, *states: Any) -> Any:
            return any(model.state in states for model in self.jobs.values())

        def close(self, job_id: Any, state: Any, event: Any = None) -> None:
            model = self.jobs[job_id]
            model.state = state
            model.events.append(event or state)
            if state in ENDED and state != "succeeded":
                for child, other in self.jobs.items():
                    if other.needs == job_id and other.state == "queued":
                        self.close(child, "cancelled" if state == "cancelled" else "failed")

        @rule(priority=st.integers(-3, 3), data=st.data())
        def submit(self, priority: Any, data: Any) -> None:
            live = sorted(i for i, m in self.jobs.items() if m.state not in ("failed", "cancelled"))
            needs = data.draw(st.none() | st.sampled_from(live)) if live else None
            made = submit(priority=priority, after=[] if needs is None else [needs])
            self.jobs[made.id] = Model(needs=needs)
            self.leases[made.id] = []

        @rule()
        def claim(self) -> None:
            lease = take()
            free = [
                i
                for i, m in self.jobs.items()
                if m.state == "queued"
                and not m.held
                and (m.needs is None or self.jobs[m.needs].state == "succeeded")
            ]
            if lease is None:
                assert not free
                return
            assert lease.job_id in free
            model = self.jobs[lease.job_id]
            model.state, model.attempt = "running", model.attempt + 1
            model.events.append("claimed")
            assert lease.attempt == model.attempt
            self.leases[lease.job_id].append(lease)

        @precondition(lambda self: self.some("running"))
        @rule(
            data=st.data(),
            how=st.sampled_from(
                ["succeed", "never", "later", "fresh", "crashed", "release", "cancel_done", "rescue"]
            ),
        )
        def end(self, data: Any, how: Any) -> None:
            job_id = self.pick(data, {"running"})
            model, lease = self.jobs[job_id], self.leases[job_id][-1]
            if how == "succeed":
                store.succeed(lease, {})
                self.close(job_id, "succeeded")
            elif how == "cancel_done":
                store.cancel_done(lease)
                self.close(job_id, "cancelled")
            else:
                ways: dict[str, Callable[[], Any]] = {
                    "never": lambda: store.fail(lease, TrainingDivergedError("nan")),
                    "later": lambda: store.fail(lease, DiskFullError("full")),
                    "fresh": lambda: store.fail(lease, OutOfMemoryError("oom")),
                    "crashed": lambda: store.crashed(lease, "killed"),
                    "release": lambda: store.release(lease, "drain"),
                    "rescue": lambda: store.requeue_lost(beat_of(store, job_id), "silent"),
                }
                back = ways[how]()
                model.crashes += how == "crashed"
                model.fresh += how == "fresh"
                if model.cancel:
                    expected = "cancelled"
                elif how == "never" or model.crashes == 3 or (how == "fresh" and model.fresh > 1):
                    expected = "failed"
                else:
                    expected = "queued"
                assert back == expected
                word = {"release": "requeued", "rescue": "lost", "crashed": "crashed"}.get(how, "retried")
                self.close(job_id, expected, word if expected == "queued" else None)
                if expected == "queued":
                    set_columns(database, job_id, not_before=None)

        @precondition(lambda self: self.some("running"))
        @rule(data=st.data())
        def checkpoint(self, data: Any) -> None:
            job_id = self.pick(data, {"running"})
            store.register_checkpoint(
                self.leases[job_id][-1],
                kind="resume",
                epoch=1,
                step=1,
                path=secrets.token_hex(8),
                manifest_sha256="0" * 64,
                size=1,
            )
            self.jobs[job_id].crashes = 0

        @precondition(lambda self: any(self.leases.values()))
        @rule(data=st.data())
        def stale(self, data: Any) -> None:
            job_id = data.draw(st.sampled_from(sorted(i for i, all_ in self.leases.items() if all_)))
            lease = data.draw(st.sampled_from(self.leases[job_id]))
            model = self.jobs[job_id]
            if model.state == "running" and model.attempt == lease.attempt:
                store.heartbeat(lease, None)
            else:
                with pytest.raises(LeaseLostError):
                    store.heartbeat(lease, None)

        @precondition(lambda self: self.jobs)
        @rule(data=st.data())
        def cancel(self, data: Any) -> None:
            job_id = data.draw(st.sampled_from(sorted(self.jobs)))
            model = self.jobs[job_id]
            if model.state in ENDED:
                with pytest.raises(InvalidTransitionError):
                    store.request_cancel(job_id)
                return
            store.request_cancel(job_id)
            if not model.cancel:
                model.events.append("cancel_requested")
            model.cancel = True
            if model.state == "queued":
                self.close(job_id, "cancelled")

        @precondition(lambda self: self.some("queued"))
        @rule(data=st.data(), held=st.booleans())
        def hold(self, data: Any, held: Any) -> None:
            job_id = self.pick(data, {"queued"})
            model = self.jobs[job_id]
            store.hold(job_id, held=held)
            if model.held != held:
                model.events.append("held" if held else "hold_released")
            model.held = held

        @precondition(lambda self: self.some("queued", "running"))
        @rule(data=st.data())
        def pause(self, data: Any) -> None:
            job_id = self.pick(data, {"queued", "running"})
            model = self.jobs[job_id]
            store.pause(job_id)
            if not model.held:
                model.events.append("held" if model.state == "queued" else "pause_requested")
            model.held = True

        @precondition(lambda self: self.some("running"))
        @rule(data=st.data())
        def withdraw_a_pause(self, data: Any) -> None:
            job_id = self.pick(data, {"running"})
            model = self.jobs[job_id]
            if not model.held:
                with pytest.raises(InvalidTransitionError):
                    store.hold(job_id, held=False)
                return
            assert store.stop_requests(self.leases[job_id][-1]).pause
            store.hold(job_id, held=False)
            model.events.append("hold_released")
            model.held = False

        @invariant()
        def the_table_agrees(self) -> None:
            assert seen(database, sorted(self.jobs)) == {
                job_id: Seen(
                    state=model.state,
                    attempt=model.attempt,
                    held=model.held,
                    cancel=model.cancel,
                    finished=model.state in ENDED,
                    open_attempts=int(model.state == "running"),
                    events=model.events,
                )
                for job_id, model in self.jobs.items()
            }

    return Jobs


def test_any_sequence_of_operations_keeps_to_the_model(
    database: "Database", claim: Claimer, job_factory: "Callable[..., Job]"
) -> None:
    run_state_machine_as_test(
        machine(database, claim.or_none, job_factory),
        settings=settings(
            max_examples=20,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # shrinking on a real database would outlast the test's time limit
            suppress_health_check=list(HealthCheck),
        ),
    )
