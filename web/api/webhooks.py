"""Handlers of the REST API: webhooks. All are for admins, who may cause requests from the server."""

from typing import Any

from starlette.responses import Response

from jobs.errors import SpecError
from jobs.kinds import kind_named
from jobs.labels import read_filters
from storage.db.webhooks import ENDS, Filters, Webhook, Webhooks, read_events
from web.api.answers import json_answer
from web.api.call import Call, require_fields
from worker.webhooks.targets import COMMAND, read_target, webhook_facts

FIELDS = ("url", "events", "users", "kinds", "jobs", "labels")


def create(call: Call) -> Response:
    """Add a webhook; the answer has its secret, which is not shown again."""
    require_fields(call.body, FIELDS)
    url = call.body.get("url")
    if not isinstance(url, str) or url == COMMAND:
        raise SpecError("url must be the URL of a webhook", hint="a command is set on the server alone")
    channel, target = read_target(url, call.site.settings)
    labels = _texts(call.body, "labels")
    read_filters(labels)
    kinds = tuple(kind_named(one).name for one in _texts(call.body, "kinds"))
    filters = Filters(
        events=read_events(_texts(call.body, "events") or ENDS),
        users=_texts(call.body, "users"),
        kinds=kinds,
        jobs=tuple(call.site.queries.find(one).id for one in _texts(call.body, "jobs")),
        labels=labels,
    )
    made = _table(call).create(channel, target, filters, call.principal.user)
    return json_answer({**webhook_facts(made, {}), "secret": made.secret if channel == "http" else None}, 201)


def read_list(call: Call) -> Response:
    """List the webhooks."""
    counts = _table(call).counts()
    found = [webhook_facts(one, counts.get(one.id, {})) for one in _table(call).all()]
    return json_answer({"webhooks": found})


def remove(call: Call) -> Response:
    """Remove a webhook with what waits for it."""
    return json_answer(webhook_facts(_table(call).remove(_named(call).id), {}))


def enable(call: Call) -> Response:
    """Enable a webhook again, and send what is left."""
    found = _table(call).enable(_named(call).id)
    return json_answer(webhook_facts(found, _table(call).counts().get(found.id, {})))


def deliveries(call: Call) -> Response:
    """List the deliveries to a webhook, newest event first."""
    found = _table(call).deliveries(
        _named(call).id, state=call.query.get("state"), limit=call.query.get("limit", 50)
    )
    return json_answer({"deliveries": [one.facts() for one in found]})


def _table(call: Call) -> Webhooks:
    return Webhooks(call.site.database)


def _named(call: Call) -> Webhook:
    text = call.request.path_params["webhook"]
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise SpecError("the address of a webhook ends with its number")
    return _table(call).get(int(text))


def _texts(body: dict[str, Any], name: str) -> tuple[str, ...]:
    """
    Return a list of texts of a body; a number counts as text.

    Raises:
        SpecError: it is something else.
    """
    values = body.get(name) or []
    lines = isinstance(values, list) and all(
        (isinstance(one, str) and one.isprintable() and 0 < len(one) <= 400) or type(one) is int
        for one in values
    )
    if not lines:
        raise SpecError(f"{name} must be a list of texts")
    return tuple(str(one) for one in values)
