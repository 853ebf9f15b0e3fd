"""The queue: counts by state, workers, fifty jobs. The address contains all filters."""

import re
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import SpecError
from jobs.kinds import KINDS
from jobs.labels import read_filters
from jobs.states import JobState
from storage.db.queries import Filter
from web import html, rows
from web.site import Site

PAGE = 50
RECENT_S = 3600.0
"""A worker that stopped longer ago has no card here; /workers lists all."""
NAMES = ("state", "kind", "user", "name", "label", "sweep", "held", "before")


def page(request: Request) -> Response:
    site: Site = request.app.state.site
    given = {name: value for name in NAMES if (value := request.query_params.get(name, "").strip())}
    wanted = _filter(site, given)
    return html.answer(request, "queue.html", lambda: _facts(site, wanted, given))


def _filter(site: Site, given: dict[str, str]) -> Filter:
    """
    Return the filter that the query string describes.

    Raises:
        SpecError: a value that no link of ours has.
    """
    states = given.get("state", "").split(",") if "state" in given else None
    if states and (unknown := [one for one in states if one not in list(JobState)]):
        raise SpecError(f"there is no state {html.cut(unknown[0], 40)!r}", hint=", ".join(JobState))
    before = given.get("before")
    if before is not None and not re.fullmatch(r"[0-9]{1,18}", before):
        raise SpecError("before must be the id of a job", hint="the first page has none")
    if given.get("kind") is not None and given["kind"] not in KINDS:
        raise SpecError(f"there is no kind {html.cut(given['kind'], 40)!r}", hint=", ".join(KINDS))
    return Filter(
        states=tuple(JobState(one) for one in states) if states else None,
        kind=given.get("kind"),
        user=given.get("user"),
        name=given.get("name"),
        labels=read_filters([given["label"]]) if "label" in given else (),
        sweep=site.queries.find_sweep(given["sweep"]) if "sweep" in given else None,
        # Held jobs have a list of their own.
        held=True if "held" in given else False if states == [JobState.QUEUED] else None,
        before_id=int(before) if before is not None else None,
    )


def _facts(site: Site, wanted: Filter, given: dict[str, str]) -> html.Facts:
    found = site.queries.page(wanted, limit=PAGE + 1)
    listed, around = rows.rows(site, found[:PAGE])
    older = {**given, "before": str(found[PAGE - 1].id)} if len(found) > PAGE else None
    kept = [
        worker
        for worker in around.workers.values()
        if worker.state != "stopped" or worker.silent_s < RECENT_S
    ]
    counts, held = site.counts(), site.held()
    free = max(0, counts[JobState.QUEUED] - held.get(JobState.QUEUED, 0))
    return {
        "jobs": listed,
        "counts": counts,
        "shown_counts": {**counts, JobState.QUEUED: free},
        "held": sum(held.values()),
        "workers": rows.worker_cards(site, kept),
        "filter": given,
        "kinds": list(KINDS),
        "older": f"/?{urlencode(older)}" if older else None,
        "newest": f"/?{urlencode({k: v for k, v in given.items() if k != 'before'})}"
        if "before" in given
        else None,
        "links": {
            state: "/?" + urlencode({**{k: v for k, v in given.items() if k != "before"}, "state": state})
            for state in JobState
        },
    }
