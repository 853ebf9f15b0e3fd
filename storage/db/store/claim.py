"""Claim a job, also in the transaction that finishes the last one."""

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from sqlalchemy import Connection, Executable, Update, bindparam, func, insert, null, select, text, update
from sqlalchemy.exc import IntegrityError

from jobs.errors import GanqError, LeaseLostError
from jobs.states import JobState
from storage.db.backoff import Backoffs
from storage.db.engine import SCHEMA_REVISION, check_schema
from storage.db.rows import Job, Lease, WorkerIdentity
from storage.db.store.finish import FinishMixin, bit_exact, publish
from storage.db.store.malformed import close_attempts
from storage.db.store.scheduling import (
    BEST,
    Candidate,
    Capabilities,
    candidates,
    mark_served,
    oldest,
    peek,
    release_due_jobs,
)
from storage.db.store.transitions import fence_values, record_event
from storage.db.tables import RUNNING, attempt, job, utcnow

log = logging.getLogger("ganq.claiming")

FUSED_PATIENCE_S = 5.0
"""Seconds for which a finish is tried together with the next claim, before it is tried alone."""

CLAIM_COLUMNS = {
    "state": JobState.RUNNING,
    "attempt": job.c.attempt + 1,
    "lease_token": bindparam("token"),
    "worker": bindparam("who"),
    "hb_seq": job.c.hb_seq + 1,
    "error_code": null(),
    "error_message": null(),
    "error_hint": null(),
    "started_at": func.coalesce(job.c.started_at, utcnow()),
}
IDENTITY_COLUMNS = ("host", "device", "boot_id", "pid", "start_ticks")
OPEN_ATTEMPT = insert(attempt).values(started_at=utcnow())
_CALLER = (
    ":queues, :kinds, :newest_spec, :revision, :token, :who,"
    " :by_host, :by_device, :by_boot_id, :by_pid, :by_start_ticks"
)
_COLUMNS = ", ".join(f'"{column.name}"' for column in job.c)
# Functions of the database (migration 0011): one round trip for a plain claim, and for an end with one. A row
# of NULLs says that it is not plain, and that nothing was done.
PLAIN_CLAIM = text(f"SELECT {_COLUMNS} FROM ganq_claim({_CALLER})").columns(*job.c)
PLAIN_TURN = (
    text(
        f"SELECT {_COLUMNS} FROM ganq_succeed_and_claim("
        f":owned_id, :owned_attempt, :owned_token, :result, :bit_exact, :more_s, {_CALLER})"
    )
    .bindparams(bindparam("result", type_=job.c.result.type))
    .columns(*job.c)
)


def _claim_statement(*which: Any) -> Update:
    return update(job).where(*which).values(CLAIM_COLUMNS).returning(job)


# The compare-and-set of a claim, by dialect and kind of candidate.
CLAIMS = {
    key: _claim_statement(job.c.id == best, job.c.state == JobState.QUEUED) for key, best in BEST.items()
}


class ClaimMixin(FinishMixin):
    """Claim jobs."""

    def claim(self, who: WorkerIdentity, *, kinds: Sequence[str], spec_version: int) -> Lease | None:
        """
        Claim the best job that this worker can run; storage/db/store/scheduling.py defines the order.

        The attempt number is part of the fencing token: it only increases.
        """
        claim = Claim(who, kinds, spec_version)
        claim.backoffs = self.database.backoffs
        try:
            return self._claim(claim)
        except IntegrityError:  # the job was queued by hand, and its attempt is still open
            best = self.database.read(lambda conn: best_job(conn, claim.capabilities))
            if best is not None:
                log.warning("job %s was queued by hand: its open attempt is closed", best)
                self.database.write(lambda conn: close_attempts(conn, best))
            return self._claim(claim)

    def _claim(self, claim: "Claim") -> Lease | None:
        if not self.database.is_sqlite:
            with suppress(_NotPlainError):
                return self.database.write(claim.take_plain, autocommit=True)
        return self.database.write(claim.take)

    def succeed_and_claim(
        self, lease: Lease, result: dict[str, Any], claim: "Claim", *, claim_next: bool = True
    ) -> Lease | None:
        """
        Run succeed(), then claim() in the same transaction: one commit instead of two.

        It claims only in the simple case. If there are quotas, delayed jobs, jobs that yielded or another
        schema, or if the claim fails, the job is finished all the same.

        Args:
            claim: the same object each time that this is tried for a job. If the answer to a COMMIT was
                lost, only this object recognises the job that it has claimed.
            claim_next: False: claim no further job.

        Returns:
            The next lease; None: call claim().

        Raises:
            LeaseLostError: as succeed() does.
        """

        def call(conn: Connection) -> Lease | None:
            own = claim.find_own_commit(conn)
            return own or claim.call(conn, PLAIN_TURN, {**fence_values(lease), **ending, "result": result})

        def work(conn: Connection, take: Callable[[Connection], Lease | None]) -> Lease | None:
            publish(conn, lease, result)
            with suppress(_NotPlainError):
                return take(conn)
            return None

        ending = {"bit_exact": bit_exact(result), "more_s": lease.ran_s}
        finish_only = partial(work, take=claim.find_own_commit)
        if not claim_next:
            return self.database.write(finish_only)
        try:
            if not self.database.is_sqlite:
                with suppress(_NotPlainError):
                    return self.database.write(call, patience_s=FUSED_PATIENCE_S, autocommit=True)
            return self.database.write(partial(work, take=claim.take_plain), patience_s=FUSED_PATIENCE_S)
        except LeaseLostError:
            raise
        except Exception as exc:  # even a bug in the claim must not lose a finished job
            taken = self.database.write(finish_only)
            bug = None if isinstance(exc, GanqError) else exc
            log.warning("job %s was finished without a claim: %s", lease.job_id, exc, exc_info=bug)
            return taken


class Claim:
    """One claim. Its token identifies a job that it has claimed if the answer to the COMMIT was lost."""

    def __init__(self, who: WorkerIdentity, kinds: Sequence[str], spec_version: int) -> None:
        self.capabilities = Capabilities(who.queues, kinds, spec_version)
        self.backoffs: Backoffs | None = None
        self.token = secrets.token_hex(16)
        self.attempt_values = {"token": self.token, "who": who.name}
        self.attempt_values |= {f"by_{name}": getattr(who, name) for name in IDENTITY_COLUMNS}
        self.tries = 0

    def take(self, conn: Connection) -> Lease | None:
        """Claim the best job."""
        seen = peek(conn, self.capabilities)
        check_schema(conn, seen.revision)
        if (own := self.find_own_commit(conn)) is not None:
            return own
        if seen.delayed and self.backoffs is not None and release_due_jobs(conn, self.backoffs):
            seen = peek(conn, self.capabilities)
        return self._claim_first(conn, candidates(conn, self.capabilities, seen))

    def take_plain(self, conn: Connection) -> Lease | None:
        """
        Claim the best job if there are no quotas, delayed jobs or jobs that yielded.

        Raises:
            _NotPlainError: there are, or the schema is another; nothing was done.
        """
        if (own := self.find_own_commit(conn)) is not None:
            return own
        if conn.dialect.name == "postgresql":
            return self.call(conn, PLAIN_CLAIM, {})
        seen = peek(conn, self.capabilities)
        if seen.quotas or seen.delayed or seen.yielded or seen.revision != SCHEMA_REVISION:
            raise _NotPlainError
        return self._claim_first(conn, candidates(conn, self.capabilities, seen))

    def call(self, conn: Connection, function: Executable, more: dict[str, Any]) -> Lease | None:
        """
        Claim the best job by PLAIN_CLAIM or PLAIN_TURN.

        Raises:
            _NotPlainError: it did nothing.
        """
        which = self.capabilities.parameters(queues=list(self.capabilities.queues), revision=SCHEMA_REVISION)
        row = conn.execute(function, {**which, **self.attempt_values, **more}).first()
        if row is not None and row.id is None:
            self.tries -= 1  # this one has committed nothing
            raise _NotPlainError
        return None if row is None else self._lease(row)

    def find_own_commit(self, conn: Connection) -> Lease | None:
        """Return the job that an earlier try has claimed, if its COMMIT succeeded and the answer was lost."""
        self.tries += 1
        if self.tries == 1:
            return None
        own = conn.execute(select(job).where(text(f"job.{RUNNING}"), job.c.lease_token == self.token)).first()
        return None if own is None else self._lease(own)

    def _claim_first(self, conn: Connection, some: Iterable[Candidate]) -> Lease | None:
        for candidate in some:
            row = _claim_row(conn, candidate, self.attempt_values)
            if row is not None:
                if candidate.rotates:
                    mark_served(conn, candidate.user)
                return self._lease(row)
        return None

    def _lease(self, row: Any) -> Lease:
        return Lease(Job.from_row(row), row.attempt, self.token, queues=tuple(self.capabilities.queues))


class _NotPlainError(Exception):
    """A claim, or the end before it, needs more than the plain path does."""


def _claim_row(conn: Connection, candidate: Candidate, values: dict[str, Any]) -> Any:
    """Claim a candidate and insert its attempt and event; return None if another worker claims it."""
    claim = CLAIMS[conn.dialect.name, candidate.how]
    claim_values = {name: values[name] for name in ("token", "who")}
    row = conn.execute(claim, candidate.parameters | claim_values).first()
    if row is not None:
        identity = {name: values[f"by_{name}"] for name in IDENTITY_COLUMNS}
        identity |= {"lease_token": values["token"], "worker": values["who"]}
        conn.execute(OPEN_ATTEMPT, {**identity, "job_id": row.id, "number": row.attempt})
        record_event(conn, row.id, "claimed", attempt=row.attempt, worker=values["who"])
    return row


def best_job(conn: Connection, capabilities: Capabilities) -> int | None:
    """Return the id of the job that a claim would take now."""
    for candidate in candidates(conn, capabilities, peek(conn, capabilities)):
        found: int | None = candidate.parameters.get("this") or oldest(conn, candidate)
        if found is not None:
            return found
    return None
