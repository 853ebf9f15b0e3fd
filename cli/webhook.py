"""`ganq webhook`: have programs and people notified of the events of jobs."""

from typing import TYPE_CHECKING

import click

from cli.session import JOB, LABEL_FILTER, NoJobsYetError, open_session
from cli.ui import output
from cli.ui.lazy import Entry, LazyGroup, examples
from cli.ui.params import BoundedInt, User
from jobs.kinds import KINDS

if TYPE_CHECKING:
    from storage.db.webhooks import Delivery, Filters, Webhook, Webhooks

STATES = ("pending", "delivered", "failed")
ID = BoundedInt(1)
NONE_YET = "no webhooks: ganq webhook add https://HOST/PATH"


@click.group(
    cls=LazyGroup,
    entries=(
        Entry("add", "cli.webhook:add", "Send events to a URL, a service or a command."),
        Entry("list", "cli.webhook:list_", "List the webhooks and their state."),
        Entry("test", "cli.webhook:test", "Send a test message from this machine."),
        Entry("deliveries", "cli.webhook:deliveries", "List sent and pending deliveries."),
        Entry("enable", "cli.webhook:enable", "Enable webhooks again, and send pending deliveries."),
        Entry("remove", "cli.webhook:remove", "Remove webhooks."),
        Entry("deliver", "cli.webhook:deliver", "Deliver from this machine, in the foreground."),
    ),
    suggestions={"create": "add", "rm": "remove", "delete": "remove", "ls": "list"},
    epilog=examples(
        "ganq webhook add https://ci.example.org/hooks/ganq",
        "ganq webhook add https://lab.example/hook --user ada --label project=faces --events failed",
        "ganq webhook add apprise+ntfys://ntfy.sh/my-topic",
        "ganq webhook deliveries",
    ),
)
def webhook() -> None:
    """Send events of jobs to programs (webhooks), services (Slack, ntfy, mail) or a command."""


@click.command(
    epilog=examples(
        "ganq webhook add https://ci.example.org/hooks/ganq > secret",
        "ganq webhook add https://lab.example/hook --events failed,diverged --user ada --kind train",
        "ganq webhook add apprise+slack://TOKEN_A/TOKEN_B/TOKEN_C --label project",
        "ganq webhook add command --events all",
    )
)
@click.argument("url")
@click.option(
    "--events",
    default="succeeded,failed,cancelled",
    show_default=True,
    metavar="EVENT,…",
    help="Types of events (see docs/states.md), or all.",
)
@click.option("--user", "users", multiple=True, type=User(), help="Only jobs of this user; repeatable.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice([*KINDS]), help="Only jobs of this kind; repeatable."
)
@click.option("--job", "jobs", multiple=True, type=JOB, help="Only this job; repeatable.")
@click.option(
    "--label", "labels", multiple=True, type=LABEL_FILTER, help="Only jobs with this label; repeatable: all."
)
@output.json_option
def add(
    url: str,
    events: str,
    users: tuple[str, ...],
    kinds: tuple[str, ...],
    jobs: tuple[str, ...],
    labels: tuple[str, ...],
    as_json: bool,
) -> int:
    """
    Send events to URL from now on.

    \b
    URL is one of
      https://…            a webhook: signed by Standard Webhooks, with the secret that is printed once
      apprise+SERVICE://…  Slack, ntfy, mail and others: https://appriseit.com/services/
      command              the command that GANQ_WEBHOOK_COMMAND names where it is delivered

    `ganq web`, `ganq up` and workers deliver: at least once, in the order of each job's events.
    """
    from storage.db.webhooks import Filters, Webhooks, read_events
    from worker.webhooks.targets import read_target, webhook_facts

    wanted = read_events(events.split(","))
    session = open_session(create=True)
    channel, target = read_target(url, session.settings)
    ids = tuple(session.queries.find(one).id for one in jobs)
    filters = Filters(wanted, users, kinds, tuple(dict.fromkeys(ids)), labels)
    made = Webhooks(session.database).create(channel, target, filters, session.settings.user)
    if as_json:
        output.print_json({**webhook_facts(made, {}), "secret": made.secret if channel == "http" else None})
        return 0
    output.notice(f"webhook {made.id}: {_described(filters)} → {_shown(made)}")
    if url.startswith("http://"):
        output.notice("http:// is signed, but not encrypted")
    output.notice(f"ganq webhook test {made.id} sends a test message")
    if channel == "http":
        output.notice("the secret with which the receiver verifies signatures; it is not shown again:")
        click.echo(made.secret)
    return 0


@click.command(epilog=examples("ganq webhook list", "ganq webhook list --json"))
@output.json_option
def list_(as_json: bool) -> int:
    """List the webhooks, their filters, their state and their pending deliveries."""
    from worker.webhooks.targets import webhook_facts

    table = _open()
    found = table.all() if table is not None else []
    counts = table.counts() if table is not None else {}
    if as_json:
        output.print_json([webhook_facts(one, counts.get(one.id, {})) for one in found])
        return 0
    if not found:
        click.echo(NONE_YET)
        return 0
    rows = [
        [
            str(one.id),
            one.state,
            _shown(one),
            _described(one.filters),
            *(str(counts.get(one.id, {}).get(state, 0)) for state in ("pending", "failed")),
            output.timestamp(one.delivered_at) or "never",
        ]
        for one in found
    ]
    headers = ("ID", "STATE", "URL", "EVENTS", "PENDING", "FAILED", "LAST DELIVERY")
    output.print_table(headers, rows, right=("ID", "PENDING", "FAILED"))
    for one in found:
        if one.disabled_at is not None:
            since = output.timestamp(one.disabled_at)
            output.notice(f"webhook {one.id} is disabled since {since}: {output.clean(one.disabled_reason)}")
            output.notice(f"  → ganq webhook enable {one.id}")
    return 0


@click.command(epilog=examples("ganq webhook remove 2"))
@click.argument("webhooks", nargs=-1, required=True, type=ID)
def remove(webhooks: tuple[int, ...]) -> int:
    """Remove WEBHOOKS, by the number that `ganq webhook list` shows, with their pending deliveries."""
    from storage.db.webhooks import Webhooks

    table = Webhooks(open_session().database)
    for number in dict.fromkeys(webhooks):
        click.echo(f"webhook {number} ({_shown(table.remove(number))}) is removed")
    return 0


@click.command(epilog=examples("ganq webhook enable 2"))
@click.argument("webhooks", nargs=-1, required=True, type=ID)
def enable(webhooks: tuple[int, ...]) -> int:
    """Enable WEBHOOKS that were disabled, and send pending and failed deliveries at once."""
    from storage.db.webhooks import Webhooks

    table = Webhooks(open_session().database)
    for number in dict.fromkeys(webhooks):
        found = table.enable(number)
        pending = table.counts().get(number, {}).get("pending", 0)
        what = output.count(pending, "delivery", "deliveries")
        click.echo(f"webhook {number} ({_shown(found)}) is enabled; {what} will be sent")
    return 0


@click.command(epilog=examples("ganq webhook test 1"))
@click.argument("webhook", type=ID)
def test(webhook: int) -> int:
    """
    Send a test message to WEBHOOK from this machine, also if it is disabled.

    Exit code 1: it was not accepted.
    """
    import asyncio
    import secrets
    import time

    from storage.db.webhooks import Webhooks
    from worker.webhooks.message import test_message
    from worker.webhooks.send import send

    session = open_session()
    found = Webhooks(session.database).get(webhook)
    message = test_message(session.database.installation, secrets.token_hex(4), time.time())
    began = time.monotonic()
    reply = asyncio.run(send(found, message, session.settings))
    took_ms = 1000 * (time.monotonic() - began)
    if not reply.delivered:
        output.notice(f"webhook {webhook} ({_shown(found)}) did not take it: {output.clean(reply.error)}")
        return 1
    answer = f"HTTP {reply.status}, " if reply.status else ""
    click.echo(f"webhook {webhook} ({_shown(found)}) took it: {answer}{took_ms:.0f} ms")
    return 0


@click.command(epilog=examples("ganq webhook deliveries", "ganq webhook deliveries 2 --state failed"))
@click.argument("webhook", required=False, type=ID)
@click.option("--state", type=click.Choice(STATES), help="Only deliveries in this state.")
@click.option("--limit", type=BoundedInt(1, 10_000), default=20, show_default=True, help="How many.")
@output.json_option
def deliveries(webhook: int | None, state: str | None, limit: int, as_json: bool) -> int:
    """List deliveries to WEBHOOK, or to all, newest event first; outcomes are kept for a week."""
    table = _open()
    found: list[Delivery] = []
    if table is not None:
        if webhook is not None:
            table.get(webhook)
        found = table.deliveries(webhook, state=state, limit=limit)
    if as_json:
        output.print_json([one.facts() for one in found])
    elif found:
        headers = ("WEBHOOK", "JOB", "EVENT", "AT", "STATE", "ATTEMPTS", "NEXT", "ANSWER")
        output.print_table(
            headers, [_delivery_row(one) for one in found], right=("WEBHOOK", "JOB", "ATTEMPTS")
        )
    else:
        click.echo("no deliveries")
    return 0


@click.command(epilog=examples("ganq webhook deliver"))
@click.option("--exit-when-idle", is_flag=True, help="Exit when nothing was to be delivered for 10 s.")
@click.option("--owner", hidden=True, help="Name of the leases that another process took for this one.")
def deliver(exit_when_idle: bool, owner: str | None) -> int:
    """
    Deliver events from this machine until SIGTERM or Ctrl-C.

    `ganq web`, `ganq up` and workers do so anyway. Run it where only some machines may
    connect to the receivers, and set GANQ_WEBHOOK_DELIVERY=off on the others.
    """
    import asyncio
    import signal

    from worker.host import logs
    from worker.webhooks.deliver import Deliverer

    session = open_session(create=True)
    logs.configure(session.settings)
    deliverer = Deliverer(session.database, session.settings, owner)
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: deliverer.stop())
    if not exit_when_idle:
        output.notice("delivering webhooks; Ctrl-C stops")
    asyncio.run(deliverer.run(10.0 if exit_when_idle else None))
    return 0


def _open() -> "Webhooks | None":
    """Return the webhooks, or None where there is no job table yet."""
    from storage.db.webhooks import Webhooks

    try:
        return Webhooks(open_session().database)
    except NoJobsYetError:
        return None


def _shown(one: "Webhook") -> str:
    from worker.webhooks.targets import shown

    return output.clean(shown(one.url))


def _described(filters: "Filters") -> str:
    parts = [",".join(filters.events) or "all events"]
    parts += [f"user {one}" for one in filters.users] + [f"kind {one}" for one in filters.kinds]
    parts += [f"job {one}" for one in filters.jobs] + [f"label {one}" for one in filters.labels]
    return output.clean(" · ".join(parts))


def _delivery_row(one: "Delivery") -> list[str]:
    answer = one.error or (f"HTTP {one.status}" if one.status else "")
    return [
        str(one.webhook_id),
        str(one.job.id),
        one.event.type,
        output.timestamp(one.event.at),
        one.state,
        str(one.attempts),
        output.timestamp(one.next_at),
        output.clean(answer),
    ]
