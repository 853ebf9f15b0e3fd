"""Claiming a job, also in the transaction that ends the last one."""

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, Update, bindparam, func, insert, null, select, text, update
from sqlalchemy.exc import IntegrityError

from jobs.errors import GanqError, LeaseLostError
from jobs.failpoints import guard
from jobs.states import JobState
from storage.db.backoff import Backoffs
from storage.db.engine import SCHEMA_REVISION, check_schema
from storage.db.rows import Job, Lease, WorkerIdentity
from storage.db.store.finish import Endings, publish
from storage.db.store.malformed import close_attempts
from storage.db.store.scheduling import (
    BEST,
    Candidate,
    Look,
    Wanted,
    candidates,
    look,
    oldest,
    release_due_jobs,
    serve,
)
from storage.db.store.transitions import event_of_row, record_event
from storage.db.tables import CLOCKS, RUNNING, attempt, job, utcnow

log = logging.getLogger("ganq.claiming")

PASSING_S = 5.0
"""How long an end is tried together with the claim behind it, before it is tried alone."""

TAKEN = {
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
OPENED_BY = ("host", "device", "boot_id", "pid", "start_ticks")
OPEN = insert(attempt).values(started_at=utcnow())
SAME_SCHEMA = text("(SELECT version_num FROM alembic_version) = :revision")


def _take(*which: Any) -> Update:
    return update(job).where(*which).values(TAKEN).returning(job)


def _recorded(take: Update) -> Select[Any]:
    """Take a job, open its attempt and tell of it: one statement, so that Postgres does all or nothing."""
    taken = take.cte("taken")
    whose = select(taken.c.id, taken.c.attempt, utcnow(), bindparam("token"), bindparam("who"))
    opened = insert(attempt).from_select(
        ["job_id", "number", "started_at", "lease_token", "worker", *OPENED_BY],
        whose.add_columns(*(bindparam(f"by_{name}", type_=attempt.c[name].type) for name in OPENED_BY)),
    )
    told = event_of_row(taken, "claimed", attempt=taken.c.attempt, worker=bindparam("who"))
    return select(taken).add_cte(opened.cte("opened"), told.cte("told"))


# The compare-and-set of a claim, by dialect and kind of candidate; on Postgres with its records.
TAKE: dict[tuple[str, str], Any] = {
    key: _take(job.c.id == best, job.c.state == JobState.QUEUED, SAME_SCHEMA) for key, best in BEST.items()
}
for _dialect in CLOCKS:
    TAKE[_dialect, "blindly"] = _take(job.c.id == bindparam("this"))  # what a test does without the guard
TAKE |= {key: _recorded(take) for key, take in TAKE.items() if key[0] == "postgresql"}


class Claiming(Endings):
    """Take a lease."""

    def claim(self, who: WorkerIdentity, *, kinds: Sequence[str], spec_version: int) -> Lease | None:
        """
        Take the best job that this worker can run; storage/db/store/scheduling.py says which that is.

        The attempt number is the fencing token: it only ever goes up.
        """
        claim = Claim(who, kinds, spec_version)
        claim.backoffs = self.database.backoffs
        if not guard("claim_cas"):
            claim.blind = self.database.read(lambda conn: _first(conn, claim.wanted))
        try:
            return self._take(claim)
        except IntegrityError:  # somebody has queued a job by hand whose attempt is still open
            best = self.database.read(lambda conn: _first(conn, claim.wanted)[0].bound["this"])
            log.warning("job %s has been queued by hand: its open attempt is closed", best)
            self.database.write(lambda conn: close_attempts(conn, best))
            return self._take(claim)

    def _take(self, claim: "Claim") -> Lease | None:
        try:
            alone = not self.database.is_sqlite
            return self.database.write(partial(claim.take, alone=alone), at_once=True)
        except _OneAtATimeError:
            return self.database.write(claim.take)

    def succeed_and_claim(
        self, lease: Lease, result: dict[str, Any], claim: "Claim", *, go_on: bool = True
    ) -> Lease | None:
        """
        succeed(), then claim() in the same transaction: one wait for the disk instead of two.

        Only for the plain claim. Where there is anything to consider (limits, jobs that have yielded
        or whose time has come, another schema), or the claim breaks, the job ends all the same.

        Args:
            claim: the same one each time that this is tried for an end. A commit whose answer was lost
                has perhaps taken a job, and only this claim knows it again.
            go_on: False: take no job that is not taken yet.

        Returns:
            The next lease; None: ask claim().

        Raises:
            LeaseLostError: as succeed() does.
        """

        def work(conn: Connection, take: Callable[[Connection], Lease | None]) -> Lease | None:
            publish(conn, lease, result)
            return take(conn)

        alone = partial(work, take=claim.taken_before)
        if not go_on:
            return self.database.write(alone)
        try:
            return self.database.write(partial(work, take=claim.take_plainly), patience_s=PASSING_S)
        except LeaseLostError:
            raise
        except Exception as exc:  # a defect, even: what has been made must not be lost by what comes next
            taken = self.database.write(alone)
            defect = None if isinstance(exc, GanqError) else exc
            log.warning("job %s has ended without a claim: %s", lease.job_id, exc, exc_info=defect)
            return taken


class Claim:
    """One claim: who makes it, and the token by which it knows its own commit whose answer was lost."""

    def __init__(self, who: WorkerIdentity, kinds: Sequence[str], spec_version: int) -> None:
        self.wanted = Wanted(who.queues, kinds, spec_version)
        self.blind: list[Candidate] | None = None
        self.backoffs: Backoffs | None = None
        self.token = secrets.token_hex(16)
        self.opened = {"token": self.token, "who": who.name}
        self.opened |= {f"by_{name}": getattr(who, name) for name in OPENED_BY}
        self.again = False

    def take(self, conn: Connection, *, alone: bool = False) -> Lease | None:
        """
        Args:
            alone: each statement commits by itself.
        """
        seen = look(conn, self.wanted)
        check_schema(conn, seen.revision)
        if (mine := self.taken_before(conn)) is not None:
            return mine
        if alone and seen.quotas:
            raise _OneAtATimeError
        if seen.ripening and self.backoffs is not None and release_due_jobs(conn, self.backoffs):
            seen = look(conn, self.wanted)
        return self._first_of(conn, self.blind or candidates(conn, self.wanted, seen), seen)

    def take_plainly(self, conn: Connection) -> Lease | None:
        """take(), but nothing where the claim is not plain."""
        if (mine := self.taken_before(conn)) is not None:
            return mine
        seen = look(conn, self.wanted)
        rare = seen.quotas or seen.ripening or seen.yielded or not guard("claim_cas")
        if rare or seen.revision != SCHEMA_REVISION:
            return None
        return self._first_of(conn, candidates(conn, self.wanted, seen), seen)

    def taken_before(self, conn: Connection) -> Lease | None:
        """What an earlier try has taken, if its commit was made and its answer lost."""
        if not self.again:
            self.again = True
            return None
        mine = conn.execute(
            select(job).where(text(f"job.{RUNNING}"), job.c.lease_token == self.token)
        ).first()
        return None if mine is None else Lease(Job.from_row(mine), mine.attempt, self.token)

    def _first_of(self, conn: Connection, some: Iterable[Candidate], seen: Look) -> Lease | None:
        for one in some:
            taken = _record(conn, one, {**self.opened, "revision": seen.revision})
            if taken is not None:
                if one.in_turn:
                    serve(conn, one.user)
                return Lease(Job.from_row(taken), taken.attempt, self.token)
        return None


class _OneAtATimeError(Exception):
    """There are limits, and claims under limits pass one at a time, each in a transaction."""


def _record(conn: Connection, one: Candidate, opened: dict[str, Any]) -> Any:
    """Take the candidate, open its attempt and tell of it; None: somebody else has it, or will."""
    take = TAKE[conn.dialect.name, one.how]
    if conn.dialect.name == "postgresql":
        return conn.execute(take, one.bound | opened).first()
    taken = conn.execute(
        take, one.bound | {name: opened[name] for name in ("token", "who", "revision")}
    ).first()
    if taken is not None:
        whose = {name: opened[f"by_{name}"] for name in OPENED_BY}
        whose |= {"lease_token": opened["token"], "worker": opened["who"]}
        conn.execute(OPEN, {**whose, "job_id": taken.id, "number": taken.attempt})
        record_event(conn, taken.id, "claimed", attempt=taken.attempt, worker=opened["who"])
    return taken


def _first(conn: Connection, wanted: Wanted) -> list[Candidate]:
    """The best job as it is now, to be taken whatever becomes of it: what a test does without the guard."""
    for one in candidates(conn, wanted, look(conn, wanted)):
        this = one.bound.get("this") or oldest(conn, one)
        if this is not None:
            return [Candidate("blindly", {"this": this}, one.user, one.in_turn)]
    return [Candidate("blindly", {"this": -1}, "", False)]
