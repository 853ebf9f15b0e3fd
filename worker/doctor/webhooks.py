"""Checks of `ganq doctor`: webhooks that are disabled, that fail, or that nobody delivers."""

from collections.abc import Iterator

from storage.db.engine import Database
from storage.db.webhooks import Webhook, Webhooks
from storage.status.units import count, timestamp
from worker.doctor.check import Finding, ok, warn
from worker.webhooks.targets import shown

CHECK = "webhooks"


def check_webhooks(database: Database) -> Iterator[Finding]:
    """Check all webhooks; where there is none, nothing is reported."""
    table = Webhooks(database)
    webhooks, counts = table.all(), table.counts()
    found = [one for hook in webhooks if (one := _finding(hook, counts.get(hook.id, {}))) is not None]
    yield from found
    if webhooks and not found:
        yield ok(CHECK, f"{count(len(webhooks), 'webhook')}, no failures")


def _finding(hook: Webhook, counts: dict[str, int]) -> Finding | None:
    name = f"webhook {hook.id} ({shown(hook.url)})"
    pending = count(counts.get("pending", 0), "delivery waits", "deliveries wait")
    if hook.disabled_at is not None:
        message = f"{name} is disabled since {timestamp(hook.disabled_at)}: {hook.disabled_reason}"
        return warn(CHECK, message, f"repair its receiver, then: ganq webhook enable {hook.id}")
    if hook.failing_since is not None:
        message = f"{name} has failed since {timestamp(hook.failing_since)}; {pending}"
        return warn(CHECK, message, f"ganq webhook deliveries {hook.id} shows the answers")
    if not counts.get("waiting"):
        return None
    needs = {"command": " where GANQ_WEBHOOK_COMMAND is set", "apprise": " where ganq[notify] is installed"}
    hint = "run ganq web, a worker or ganq webhook deliver" + needs.get(hook.channel, "")
    return warn(CHECK, f"{name}: {pending}, and nobody delivers them", hint)
