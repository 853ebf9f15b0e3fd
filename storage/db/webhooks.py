"""
Webhooks and the deliveries of events to them; worker/webhooks/ sends them.

A trigger inserts a delivery in the transaction of its event (migration 0009). The deliveries of one webhook
are sent by one process at a time, which has its lease. A delivery is pending until its outcome is recorded,
so that a process that is killed leaves it to the next one: sent at least once. A job's later event waits
for the earlier one.
"""

import base64
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sqlalchemy import Connection, and_, case, delete, exists, func, insert, literal, or_, select, update

from jobs.errors import NotFoundError, SpecError
from jobs.states import TERMINAL, Outcome
from storage.db.engine import Database
from storage.db.rows import Event, Job
from storage.db.tables import delivery, event, job, label, utcnow, webhook

EVENTS = (
    *("submitted", "imported", "claimed", "checkpoint", "checkpoint_skipped", "collapsed", "dataset"),
    *("dataset_damaged", "diverged", "checkpoint_recovered", "shard_regenerated", "quarantined"),
    *("not_bit_exact", "rolled_back", "checkpoint_save_failed", "stopped_early", "budget_reached", "kept"),
    *("not_kept", "results_deleted", "cancel_requested", "preempt_requested", "pause_requested", "held"),
    *("priority_changed", "renamed", "begin_reached", "note_changed", "labels_changed", "moved"),
    *("hold_released", *(str(one) for one in Outcome)),
)
"""The types of events, as docs/states.md lists them."""
ENDS = ("succeeded", "failed", "cancelled")
assert set(ENDS) == set(TERMINAL)

LEASE_S = 30.0
"""A webhook whose process was killed is delivered by another one after this time."""
DISABLED_AFTER_S = 5 * 86400.0
"""A webhook to which no delivery has succeeded for this time is disabled."""
KEPT_S = 7 * 86400.0
"""Time for which the outcome of a delivery is listed."""
PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"
FILTERS = ("events", "users", "kinds", "jobs", "labels")


@dataclass(frozen=True)
class Filters:
    """Which events a webhook gets; an empty filter passes all."""

    events: tuple[str, ...] = ENDS
    users: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    jobs: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    """'key=value' or 'key'; the job must have all."""

    def passes_labels(self, found: dict[str, str]) -> bool:
        """Return whether a job with these labels passes."""
        pairs = [one.partition("=") for one in self.labels]
        return all(found.get(key) == value if equals else key in found for key, equals, value in pairs)


def read_events(names: Iterable[str]) -> tuple[str, ...]:
    """
    Return types of events as a filter; 'all' passes all.

    Raises:
        SpecError: there is no such type, or none is named.
    """
    found = tuple(dict.fromkeys(one.strip() for one in names if one.strip()))
    if found == ("all",):
        return ()
    for name in found:
        if name not in EVENTS:
            near = get_close_matches(name, EVENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else "docs/states.md lists them; all means each"
            raise SpecError(f"there is no event {name[:40]!r}", hint=hint)
    if not found:
        raise SpecError("no event is named", hint="e.g. succeeded,failed; all means each")
    return found


@dataclass(frozen=True)
class Webhook:
    """A webhook. Times are seconds since 1970, UTC."""

    id: int
    channel: str
    """'http', 'command' or 'apprise'."""
    url: str
    secret: str
    filters: Filters
    created_by: str
    created_at: float
    delivered_at: float | None
    failing_since: float | None
    disabled_at: float | None
    disabled_reason: str | None

    @property
    def state(self) -> str:
        """'ok', 'failing' or 'disabled'."""
        return "disabled" if self.disabled_at else "failing" if self.failing_since else "ok"


@dataclass(frozen=True)
class Delivery:
    """A delivery, with its event and job."""

    webhook_id: int
    state: str
    attempts: int
    created_at: float
    next_at: float | None
    tried_at: float | None
    status: int | None
    error: str | None
    event: Event
    job: Job
    labels: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """Return what users see, as JSON."""
        about = {"event": self.event.id, "type": self.event.type, "at": self.event.at, "job": self.job.id}
        names = ("state", "attempts", "next_at", "tried_at", "status", "error")
        return {"webhook": self.webhook_id, **about, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Sent:
    """What came of one attempt to deliver."""

    event_id: int
    attempts: int
    """Including this one."""
    delivered: bool
    status: int | None = None
    error: str | None = None
    retry_in_s: float | None = None
    """None: this was the last attempt."""
    gone: bool = False
    """The receiver wants no more (410)."""


class Webhooks:
    """The tables of webhooks and deliveries."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, channel: str, url: str, filters: Filters, user: str) -> Webhook:
        """Add a webhook, with a new secret. Events from now on are delivered."""
        secret = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
        values = {"channel": channel, "url": url, "secret": secret, "created_by": user}
        values |= {name: _lines(getattr(filters, name)) for name in FILTERS}

        def work(conn: Connection) -> Webhook:
            known = _find(conn, webhook.c.secret == secret)
            if not known:  # else an earlier try has committed, and the answer was lost
                conn.execute(insert(webhook).values(**values, created_at=utcnow()))
                known = _find(conn, webhook.c.secret == secret)
            return known[0]

        return self.database.write(work)

    def all(self) -> list[Webhook]:
        """Return all webhooks, oldest first."""
        return self.database.read(lambda conn: _find(conn))

    def get(self, webhook_id: int) -> Webhook:
        """
        Return a webhook.

        Raises:
            NotFoundError: there is none with this number.
        """
        found = self.database.read(lambda conn: _find(conn, webhook.c.id == webhook_id))
        if not found:
            raise NotFoundError(f"there is no webhook {webhook_id}", hint="ganq webhook list shows them")
        return found[0]

    def remove(self, webhook_id: int) -> Webhook:
        """
        Delete a webhook and its deliveries; those that are being sent may still arrive.

        Raises:
            NotFoundError: there is none with this number.
        """
        found = self.get(webhook_id)

        def work(conn: Connection) -> None:
            conn.execute(delete(webhook).where(webhook.c.id == webhook_id))
            conn.execute(delete(delivery).where(delivery.c.webhook_id == webhook_id))

        self.database.write(work)
        return found

    def enable(self, webhook_id: int) -> Webhook:
        """
        End the disabling of a webhook, and send at once what is pending and what was given up.

        Raises:
            NotFoundError: there is none with this number.
        """

        def work(conn: Connection) -> None:
            renewed = {"disabled_at": None, "disabled_reason": None, "failing_since": None}
            conn.execute(update(webhook).where(webhook.c.id == webhook_id).values(renewed))
            again = {"state": PENDING, "next_at": None, "attempts": 0}
            undelivered = (delivery.c.webhook_id == webhook_id, delivery.c.state != DELIVERED)
            conn.execute(update(delivery).where(*undelivered).values(again))

        self.get(webhook_id)
        self.database.write(work)
        return self.get(webhook_id)

    def counts(self) -> dict[int, dict[str, int]]:
        """Return the number of deliveries by webhook and state; 'waiting': due for a minute."""
        late = and_(delivery.c.state == PENDING, _ready_for(60.0))
        query = select(
            delivery.c.webhook_id, delivery.c.state, func.count(), func.sum(case((late, 1), else_=0))
        ).group_by(delivery.c.webhook_id, delivery.c.state)
        found: dict[int, dict[str, int]] = {}
        for number, state, count, waiting in self.database.read(lambda conn: conn.execute(query).all()):
            found.setdefault(number, {})[state] = count
            if state == PENDING:
                found[number]["waiting"] = int(waiting)
        return found

    def deliveries(
        self, webhook_id: int | None = None, *, state: str | None = None, limit: int = 50
    ) -> list[Delivery]:
        """Return deliveries, newest event first."""
        query = _DELIVERIES.order_by(delivery.c.event_id.desc(), delivery.c.webhook_id).limit(limit)
        if webhook_id is not None:
            query = query.where(delivery.c.webhook_id == webhook_id)
        if state is not None:
            query = query.where(delivery.c.state == state)
        return self.database.read(lambda conn: _deliveries(conn, query))

    # --- delivering -------------------------------------------------------------------------------

    def due(self, owner: str, channels: Collection[str], *, for_s: float = 0.0) -> list[int]:
        """
        Return the webhooks with deliveries that can be sent now, and that no other process delivers.

        Args:
            owner: this process.
            for_s: only if one could have been sent for so many seconds.
        """
        pending = exists().where(delivery.c.webhook_id == webhook.c.id, _ready_for(for_s), _is_head())
        query = select(webhook.c.id).where(_can_be_leased(owner, channels), pending).order_by(webhook.c.id)
        return list(self.database.read(lambda conn: conn.execute(query).scalars().all()))

    def lease(self, webhook_id: int, owner: str, channels: Collection[str]) -> Webhook | None:
        """Take or renew the lease of a webhook for LEASE_S seconds; return None if another process has it."""
        take = update(webhook).where(webhook.c.id == webhook_id, _can_be_leased(owner, channels))

        def work(conn: Connection) -> Webhook | None:
            taken = conn.execute(take.values(lease_owner=owner, lease_until=utcnow() + LEASE_S))
            return _find(conn, webhook.c.id == webhook_id)[0] if taken.rowcount else None

        return self.database.write(work)

    def release(self, webhook_id: int, owner: str) -> None:
        """Give the lease back."""
        mine = update(webhook).where(webhook.c.id == webhook_id, webhook.c.lease_owner == owner)
        self.database.write(lambda conn: conn.execute(mine.values(lease_owner=None, lease_until=None)))

    def batch(self, found: Webhook, limit: int) -> list[Delivery]:
        """
        Return deliveries that can be sent now: of each job at most its earliest.

        Deliveries of jobs without the labels of the filter are deleted.
        """
        heads = (delivery.c.webhook_id == found.id, _ready_for(0.0), _is_head())
        query = _DELIVERIES.where(*heads).order_by(delivery.c.event_id).limit(limit)
        while ready := self.database.read(lambda conn: _deliveries(conn, query)):
            passing = [one for one in ready if found.filters.passes_labels(one.labels)]
            dropped = [one.event.id for one in ready if one not in passing]
            unwanted = delete(delivery).where(
                delivery.c.webhook_id == found.id, delivery.c.event_id.in_(dropped)
            )
            if dropped:
                self.database.write(lambda conn, drop=unwanted: conn.execute(drop))  # type: ignore[misc]
            if passing:
                return passing
        return []

    def record(self, webhook_id: int, owner: str, outcomes: Sequence[Sent]) -> bool:
        """
        Record what came of a batch, and renew the lease.

        Returns:
            False if the lease was lost, or the webhook removed or disabled.
        """
        errors = [one.error for one in outcomes if not one.delivered]
        mine = webhook.c.id == webhook_id
        health: dict[str, Any] = {"failing_since": func.coalesce(webhook.c.failing_since, utcnow())}
        if len(errors) < len(outcomes):
            health = {"failing_since": None, "delivered_at": utcnow()}

        def work(conn: Connection) -> bool:
            for one in outcomes:
                conn.execute(_attempted(webhook_id, one))
            conn.execute(update(webhook).where(mine).values(health))
            disable = update(webhook).where(mine, webhook.c.disabled_at.is_(None))
            if any(one.gone for one in outcomes):
                conn.execute(
                    disable.values(disabled_at=utcnow(), disabled_reason="its receiver answered 410 Gone")
                )
            else:
                days = DISABLED_AFTER_S / 86400
                reason = (
                    f"no delivery has succeeded for {days:.0f} days; the last error: {(errors or [''])[-1]}"
                )
                too_long = webhook.c.failing_since < utcnow() - DISABLED_AFTER_S
                conn.execute(disable.where(too_long).values(disabled_at=utcnow(), disabled_reason=reason))
            renew = disable.where(webhook.c.lease_owner == owner)
            return bool(conn.execute(renew.values(lease_until=utcnow() + LEASE_S)).rowcount)

        return self.database.write(work)

    def prune(self) -> None:
        """Delete old outcomes, and deliveries of webhooks that were removed while an event was recorded."""
        old = and_(delivery.c.state != PENDING, delivery.c.tried_at < utcnow() - KEPT_S)
        orphaned = delivery.c.webhook_id.not_in(select(webhook.c.id))
        self.database.write(lambda conn: conn.execute(delete(delivery).where(or_(old, orphaned))))


def _attempted(webhook_id: int, one: Sent) -> Any:
    """Return the statement that records an attempt; a repetition changes nothing."""
    state = DELIVERED if one.delivered else FAILED if one.retry_in_s is None else PENDING
    values: dict[str, Any] = {
        "state": state,
        "attempts": one.attempts,
        "status": one.status,
        "error": one.error,
    }
    values |= {"tried_at": utcnow(), "next_at": None if one.retry_in_s is None else utcnow() + one.retry_in_s}
    here = (delivery.c.webhook_id == webhook_id, delivery.c.event_id == one.event_id)
    return update(delivery).where(*here, delivery.c.state == PENDING).values(values)


def _ready_for(seconds: float) -> Any:
    """Return whether a delivery could have been sent for so long."""
    pending = delivery.c.state == literal(PENDING, literal_execute=True)  # as in the partial index
    # A new one is ready whatever the clock says, which may have been set back.
    since = func.coalesce(delivery.c.next_at, delivery.c.created_at if seconds else 0.0)
    return and_(pending, since <= utcnow() - seconds)


def _is_head() -> Any:
    """Return whether no earlier event of the same job is pending."""
    earlier = delivery.alias("earlier")
    return ~exists().where(
        earlier.c.webhook_id == delivery.c.webhook_id,
        earlier.c.job_id == delivery.c.job_id,
        earlier.c.state == literal(PENDING, literal_execute=True),
        earlier.c.event_id < delivery.c.event_id,
    )


def _can_be_leased(owner: str, channels: Collection[str]) -> Any:
    # A lease that ends later than LEASE_S from now is of a time before the clock was set back.
    valid = webhook.c.lease_until.between(utcnow(), utcnow() + LEASE_S)
    free = or_(webhook.c.lease_until.is_(None), ~valid)
    enabled = and_(webhook.c.disabled_at.is_(None), webhook.c.channel.in_(tuple(channels)))
    return and_(enabled, or_(free, webhook.c.lease_owner == owner))


def _lines(values: Iterable[Any]) -> str:
    text = "\n".join(map(str, values))
    return f"\n{text}\n" if text else ""


def _find(conn: Connection, *where: Any) -> list[Webhook]:
    rows = conn.execute(select(webhook).where(*where).order_by(webhook.c.id))
    return [_webhook(row._mapping) for row in rows]


def _webhook(values: Any) -> Webhook:
    columns = {name: values[name] for name in Webhook.__dataclass_fields__ if name != "filters"}
    texts = {name: tuple(values[name].split("\n")[1:-1]) for name in FILTERS}
    filters = Filters(**{**texts, "jobs": tuple(int(one) for one in texts["jobs"])})
    return Webhook(**columns, filters=filters)


_OWN = ("webhook_id", "state", "attempts", "created_at", "next_at", "tried_at", "status", "error")
_DELIVERIES = select(*(delivery.c[name] for name in ("event_id", "job_id", *_OWN)))


def _deliveries(conn: Connection, query: Any) -> list[Delivery]:
    rows = conn.execute(query).all()
    jobs = {row.job_id for row in rows}
    of_jobs = {row.id: Job.from_row(row) for row in conn.execute(select(job).where(job.c.id.in_(jobs)))}
    texts = select(event).where(event.c.id.in_({row.event_id for row in rows}))
    events = {row.id: Event.from_row(row) for row in conn.execute(texts)}
    labels: dict[int, dict[str, str]] = {}
    for row in conn.execute(select(label).where(label.c.job_id.in_(jobs))):
        labels.setdefault(row.job_id, {})[row.key] = row.value
    return [
        Delivery(
            **{name: row._mapping[name] for name in _OWN},
            event=events[row.event_id],
            job=of_jobs[row.job_id],
            labels=labels.get(row.job_id, {}),
        )
        for row in rows
        if row.event_id in events and row.job_id in of_jobs  # deleted by ganq gc between the queries
    ]
