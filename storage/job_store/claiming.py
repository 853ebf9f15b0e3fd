"""Claiming a job, also in the transaction that ends the last one."""

import logging
import secrets
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, Update, bindparam, func, insert, null, select, text, update

from jobs.errors import LeaseLostError
from jobs.failpoints import guard
from jobs.states import JobState
from storage.claims import BEST, Candidate, Look, Wanted, candidates, look, oldest, ripen, serve
from storage.engine import SCHEMA_REVISION, check_schema
from storage.job_store.endings import Endings, publish
from storage.jobs import Job, Lease, WorkerIdentity
from storage.models import CLOCKS, RUNNING, attempt, job, utcnow
from storage.transitions import record_event, telling

log = logging.getLogger("ganq.claiming")

PASSING_S = 5.0
"""How long an end waits together with the claim behind it, before it waits alone."""

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
    told = telling(taken, "claimed", attempt=taken.c.attempt, worker=bindparam("who"))
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
        Take the best job that this worker can run; storage/claims.py says which that is.

        The attempt number is the fencing token: it only ever goes up.
        """
        claim = _Claim(who, Wanted(who.queues, kinds, spec_version))
        if not guard("claim_cas"):
            claim.blind = self.database.read(lambda conn: _first(conn, claim.wanted))
        try:
            alone = not self.database.is_sqlite
            return self.database.write(partial(claim.take, alone=alone), at_once=True)
        except _OneAtATimeError:
            return self.database.write(claim.take)

    def succeed_and_claim(
        self,
        lease: Lease,
        result: dict[str, Any],
        who: WorkerIdentity,
        *,
        kinds: Sequence[str],
        spec_version: int,
    ) -> Lease | None:
        """
        succeed(), then claim() in the same transaction: one wait for the disk instead of two.

        Only for the plain claim. Where there is anything to consider (limits, jobs that have yielded
        or whose time has come, another schema), or the claim breaks, the job ends all the same.

        Returns:
            The next lease; None: ask claim().

        Raises:
            LeaseLostError: as succeed() does.
        """
        claim = _Claim(who, Wanted(who.queues, kinds, spec_version))

        def work(conn: Connection) -> Lease | None:
            publish(conn, lease, result)
            return claim.take_plainly(conn)

        try:
            return self.database.write(work, patience_s=PASSING_S)
        except LeaseLostError:
            raise
        except Exception as exc:  # a defect, even: what has been made must not be lost by what comes next
            log.warning("job %s ends without a claim: %s", lease.job_id, exc)
            self.succeed(lease, result)
            return None


class _Claim:
    """One claim: who makes it, and the token by which it knows its own commit whose answer was lost."""

    def __init__(self, who: WorkerIdentity, wanted: Wanted) -> None:
        self.wanted = wanted
        self.blind: list[Candidate] | None = None
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
        if (mine := self._taken_before(conn)) is not None:
            return mine
        if alone and seen.quotas:
            raise _OneAtATimeError
        if seen.ripening and ripen(conn):
            seen = look(conn, self.wanted)
        return self._first_of(conn, self.blind or candidates(conn, self.wanted, seen), seen)

    def take_plainly(self, conn: Connection) -> Lease | None:
        """take(), but nothing where the claim is not plain."""
        seen = look(conn, self.wanted)
        if (mine := self._taken_before(conn)) is not None:
            return mine
        rare = seen.quotas or seen.ripening or seen.yielded or not guard("claim_cas")
        if rare or seen.revision != SCHEMA_REVISION:
            return None
        return self._first_of(conn, candidates(conn, self.wanted, seen), seen)

    def _taken_before(self, conn: Connection) -> Lease | None:
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
