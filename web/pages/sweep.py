"""A sweep: its runs as a table coloured by the metric, and the last grid of each."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from storage.db.queries import Filter
from storage.db.rows import Job
from web import html, rows
from web.site import Site

MAX_RUNS = 200
SHADES = 5


def page(request: Request) -> Response:
    site: Site = request.app.state.site
    sweep = site.queries.find_sweep(request.path_params["sweep"])
    return html.answer(request, "sweep.html", lambda: _facts(site, sweep))


def _facts(site: Site, sweep: str) -> html.Facts:
    jobs = site.queries.page(Filter(sweep=sweep), limit=MAX_RUNS, oldest_first=True)
    listed, _ = rows.rows(site, jobs)
    changed = varying(jobs)
    best = site.queries.best_metrics([job.id for job in jobs])
    ranked = sorted(set(best.values()))
    for row, job in zip(listed, jobs, strict=True):
        row["values"] = {name: html.cut(job.spec.get(name), 80) for name in changed}
        row["metric"] = best.get(job.id)
        row["shade"] = None
        if job.id in best:
            row["shade"] = ranked.index(best[job.id]) * SHADES // len(ranked)
    return {
        "sweep": sweep,
        "name": html.cut((jobs[0].name or "").rpartition("-")[0] or sweep, 64),
        "runs": listed,
        "changed": changed,
        "counts": (counts := site.queries.counts(sweep=sweep)),
        "left_out": sum(counts.values()) - len(jobs),
        "best": min(best, key=lambda one: best[one]) if best else None,
    }


def varying(jobs: list[Job]) -> list[str]:
    """Return the fields of the spec that differ between the runs."""
    names: dict[str, Any] = {}
    for job in jobs:
        for name in job.spec:
            names.setdefault(name, None)
    return [name for name in names if len({repr(job.spec.get(name)) for job in jobs}) > 1]
